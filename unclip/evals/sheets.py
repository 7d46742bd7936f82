"""Contact sheets: pictures in a grid, each over its label; and which real picture is nearest to a generated one."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

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
    top = gap + (line + gap if title else 0)
    sheet = Image.new("RGB", (gap + columns * (width + gap), top + rows * (height + gap)), PAPER)
    draw = ImageDraw.Draw(sheet)
    if title:
        draw.text((gap, gap), title, INK, font)
    for i, (cell, lines) in enumerate(zip(cells, wrapped, strict=True)):
        x, y = gap + i % columns * (width + gap), top + i // columns * (height + gap)
        for j, picture in enumerate(cell):
            sheet.paste(fit(picture, side), (x + j * (side + 2), y))
        for j, text in enumerate(lines):
            draw.text((x, y + side + gap // 2 + j * line), text, INK, font)
    return sheet


def fit(picture: Image.Image, side: int) -> Image.Image:
    # Whole-number enlargements stay crisp, so that the sheet shows the pixels the model made.
    whole = side % picture.width == 0 and side % picture.height == 0
    return picture.convert("RGB").resize((side, side), Image.Resampling.NEAREST if whole else Image.Resampling.LANCZOS)


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
    ellipsis = "…" if cut else ""
    while line and font.getlength(line + ellipsis) > width:
        line, ellipsis = line[:-1], "…"
    return line + ellipsis


def save_sheet(sheet: Image.Image, path: Path) -> Path:
    """Write a PNG aside and rename it; makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    sheet.save(aside, format="PNG")
    return aside.replace(path)


def nearest(queries: Tensor, gallery: Tensor, metric: str = "cosine") -> Tensor:
    """Index of each query's nearest row of `gallery`. queries (n, d), gallery (m, d); returns int64 (n,).

    "cosine" compares directions after taking the gallery's mean off both; "euclidean" compares distances, as for
    pixels. Raises ValueError for another metric or an empty gallery.
    """
    if len(gallery) == 0:
        raise ValueError("The gallery came empty; nothing can be nearest, so give at least one real picture.")
    if metric == "euclidean":
        return torch.cdist(queries.float(), gallery.float()).argmin(dim=1)
    if metric != "cosine":
        raise ValueError(f"metric={metric!r} came; it is 'cosine' or 'euclidean'.")
    centre = gallery.mean(dim=0)
    unit = torch.nn.functional.normalize
    return (unit(queries - centre) @ unit(gallery - centre).T).argmax(dim=1)
