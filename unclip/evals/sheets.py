"""Contact sheets: pictures in a grid, each over its label; and which real picture is nearest to a generated one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from unclip.core.data import pil_from_pixels
from unclip.core.files import read_lines, whole_file
from unclip.pictures import flattened

if TYPE_CHECKING:
    from unclip.arguments import Callback, DTypeName

CAPTIONS = Path(__file__).with_name("captions.txt")
FORMATS = {".png": "PNG", ".webp": "WEBP", ".jpg": "JPEG"}
PAPER, INK = (255, 255, 255), (40, 40, 40)


def to_images(pictures: Tensor) -> list[Image.Image]:
    """uint8 (n, 3, h, w) → n RGB images."""
    return [Image.fromarray(picture.permute(1, 2, 0).contiguous().cpu().numpy()) for picture in pictures]


def contact_sheet(
    cells: Sequence[Sequence[Image.Image]], labels: Sequence[str], columns: int = 8, side: int = 128, title: str = ""
) -> Image.Image:
    """A grid, read by rows. Each cell is one or more pictures next to each other, `side` pixels each, over its label.

    Raises ValueError where cells and labels differ in number, or a cell is empty.
    """
    if len(cells) != len(labels) or not cells:
        raise ValueError(
            f"{len(cells)} cells came with {len(labels)} labels; a sheet needs one label a cell, at least one."
        )
    if min(len(cell) for cell in cells) == 0:
        raise ValueError("A cell came without pictures; give each cell at least one.")
    if columns < 1 or side < 8:
        raise ValueError(f"columns={columns}, side={side} came; a sheet needs at least 1 column and 8 pixels a side.")
    points = max(10, side // 11)
    font = ImageFont.load_default(size=points)
    gap, line = max(4, side // 16), int(points * 1.25)
    width = max(len(cell) for cell in cells) * (side + 2) - 2
    wrapped = [wrap(label, font, width) for label in labels]
    height = side + max(len(lines) for lines in wrapped) * line + gap // 2
    columns = min(columns, len(cells))
    rows = -(-len(cells) // columns)
    whole = columns * (width + gap) - gap
    heading = wrap(title, font, whole) if title else []
    top = gap + (len(heading) * line + gap if heading else 0)
    sheet = Image.new("RGB", (whole + 2 * gap, top + rows * (height + gap)), PAPER)
    draw = ImageDraw.Draw(sheet)
    for i, text in enumerate(heading):
        draw.text((gap, gap + i * line), text, INK, font)
    for i, (cell, lines) in enumerate(zip(cells, wrapped, strict=True)):
        x, y = gap + i % columns * (width + gap), top + i // columns * (height + gap)
        for j, picture in enumerate(cell):
            sheet.paste(fit(picture, side), (x + j * (side + 2), y))
        for j, text in enumerate(lines):
            draw.text((x, y + side + gap // 2 + j * line), text, INK, font)
    return sheet


def fit(picture: Image.Image, side: int) -> Image.Image:
    """A picture of any size, RGB or RGBA, as side × side RGB on white."""
    # Whole-number enlargements stay crisp, so that the sheet shows the pixels the model made.
    whole = side % picture.width == 0 and side % picture.height == 0
    return flattened(picture).resize((side, side), Image.Resampling.NEAREST if whole else Image.Resampling.LANCZOS)


def wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int, most: int = 3) -> list[str]:
    """Lines of `text` no wider than `width` pixels, at most `most` of them; what is cut ends in an ellipsis."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    cut = len(lines) > most
    lines = [shorten(line, font, width, cut and i == most - 1) for i, line in enumerate(lines[:most])]
    return lines or [""]


def shorten(line: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int, cut: bool) -> str:
    """A line, so much of it as is no wider than `width` pixels, with an ellipsis where `cut` or more is left out."""
    ellipsis = "…" if cut else ""
    while line and font.getlength(line + ellipsis) > width:
        line, ellipsis = line[:-1], "…"
    return line + ellipsis


def check_suffix(path: Path) -> str:
    """The format that a sheet's name ends in. Raises ValueError for another than .png, .webp and .jpg."""
    if path.suffix not in FORMATS:
        raise ValueError(f"The sheet's name came as {path.name}; let it end in one of {', '.join(FORMATS)}.")
    return FORMATS[path.suffix]


def save_sheet(sheet: Image.Image, path: Path) -> Path:
    """Write the sheet, whole or not at all, in the format of its suffix; makes the folder."""
    kind = check_suffix(path)
    with whole_file(path) as aside:
        sheet.save(aside, format=kind, quality=90)
    return path


def nearest(queries: Tensor, gallery: Tensor) -> Tensor:
    """Index of each query's nearest row of `gallery`. queries (n, d), gallery (m, d); returns int64 (n,).

    By cosine, after taking the gallery's mean off both. Raises ValueError for an empty gallery.
    """
    if len(gallery) == 0:
        raise ValueError("The gallery came empty; nothing can be nearest, so give at least one real picture.")
    centre = gallery.mean(dim=0)
    unit = torch.nn.functional.normalize
    return (unit(queries - centre) @ unit(gallery - centre).T).argmax(dim=1)


def read_captions(path: str | Path) -> list[str]:
    """Captions of a text file, one a line; empty lines left out. Raises FileNotFoundError, ValueError (none left)."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no list of captions {path}; give a text file with a caption a line.")
    captions = read_lines(path)
    if not captions:
        raise ValueError(f"{path} holds no caption; give a text file with a caption a line.")
    return captions


def caption_sheet(
    model: str | None,
    out: str | Path,
    captions: str | Path | None = None,
    seed: int = 0,
    size: int = 256,
    preset: str = "default",
    columns: int = 8,
    device: str | None = None,
    dtype: DTypeName | None = None,
    callback: Callback | None = None,
) -> Path:
    """`unclip evals sheet`: one picture of each caption at one seed, unpicked, labelled; returns the sheet's path.

    captions: a text file, a caption a line; None takes the 48 that come with the package. Each picture is what
    `unclip sample CAPTION --seed SEED --size SIZE` draws. Raises ValueError, FileNotFoundError.
    """
    from unclip.pipeline import UnCLIP

    prompts, out = read_captions(captions or CAPTIONS), Path(out)
    check_suffix(out)
    pipe = UnCLIP.from_pretrained(model, dtype, device)
    result = pipe(prompts, seed=seed, size=size, preset=preset, output_type="pt", callback=callback)
    pictures = pil_from_pixels(cast(Tensor, result.images))
    title = f"{pipe.model_name}: {len(prompts)} captions, one draw each at seed {seed}, {preset} preset, {size} px"
    return save_sheet(contact_sheet([[picture] for picture in pictures], prompts, columns, size, title), out)
