"""Pictures as files: drawing into a folder, names made of prompts, PNG text chunks, grids. Loads no torch."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from unclip import __version__
from unclip.core.files import whole_file
from unclip.presets import PriorName, write_preset

if TYPE_CHECKING:
    from unclip.arguments import Callback
    from unclip.pipeline import UnCLIP

AT_ONCE = 8  # pictures drawn before they are written: what an interruption costs, and what is held in memory


def check_folder(folder: Path, option: str) -> None:
    """Raises ValueError where `folder`, which `option` named, is a file, or could not be made or written to."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{option} {folder} is a file; give a folder.")
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise ValueError(f"{option} {folder} cannot be written: {nearest} does not allow it; give another folder.")


def check_file(file: Path | None, option: str) -> None:
    """Raises ValueError where `file`, which `option` named, is a folder, or could not be written; None is no file."""
    if file is not None and file.is_dir():
        raise ValueError(f"{option} {file} is a folder; give the name of a file.")
    if file is not None:
        check_folder(file.parent, f"{option} {file}: its folder")


def draw(
    pipe: UnCLIP,
    prompts: Sequence[str],
    num_images: int,
    seed: int,
    folder: Path,
    with_grid: bool = False,
    callback: Callback | None = None,
    *,
    size: int | None = None,
    preset: str = "default",
    guidance_scale: float | None = None,
    prior_guidance_scale: float | None = None,
    prior: PriorName | None = None,
    negative_prompt: str | None = None,
    best_of: int = 1,
) -> Iterator[Path]:
    """Draws `num_images` pictures of each prompt into a folder, `AT_ONCE` at a time; yields each path once written.

    The arguments are those of the pipeline's call. A prompt that comes twice is drawn once. with_grid: at last the path
    of a sheet of them all.
    """
    chosen = pipe.settings(preset, guidance_scale, prior_guidance_scale, prior=prior)
    settings = {"size": size or pipe.sizes[-1], "preset": preset, **computed_with(pipe), **write_preset(chosen)}
    settings |= {"negative_prompt": negative_prompt} if negative_prompt else {}
    settings |= {"tile": pipe.tile} if pipe.tile else {}
    common = {"settings": json.dumps(settings), **made_by(pipe)}
    taken: set[Path] = set()
    sheet: list[Image.Image] = []
    prompts = list(dict.fromkeys(prompts))
    asked = {"prior": prior, "negative_prompt": negative_prompt, "best_of": best_of, "callback": callback}
    for batch, first, count in groups(prompts, num_images, max(1, AT_ONCE // max(1, best_of))):
        scales = (guidance_scale, prior_guidance_scale)
        result = pipe(batch, count, seed + first * best_of, size, preset, *scales, **asked)
        for i, (image, own_seed) in enumerate(zip(cast("list[Image.Image]", result.images), result.seeds, strict=True)):
            chunks = {"prompt": batch[i // count], "seed": str(own_seed), **common}
            path = picture_path(folder, slug(batch[i // count]), own_seed, chunks, taken)
            taken.add(path)
            write_png(image, path, chunks)
            sheet += [image] if with_grid else []
            yield path
    if with_grid:
        counts = {"num_images": str(num_images), "best_of": str(best_of)}
        chunks = {"prompt": "\n".join(prompts), "seed": str(seed), **counts, **common}
        path = picture_path(folder, f"{slug(prompts[0])}-grid", seed, chunks, taken)
        row_a_prompt = len(prompts) > 1 and num_images > 1
        write_png(grid(sheet, num_images if row_a_prompt else columns_of(len(sheet))), path, chunks)
        yield path


def made_by(pipe: UnCLIP) -> dict[str, str]:
    """Text chunks that name the model, tell it from others of its name, and name the software."""
    from unclip.folder import model_digest

    return {"model": pipe.model_name, "model_digest": model_digest(pipe), "software": f"unclip {__version__}"}


def computed_with(pipe: UnCLIP) -> dict[str, str]:
    """The dtype and the kind of device that a pipeline really computes with, whatever was asked for."""
    return {"dtype": str(pipe.dtype).removeprefix("torch."), "device": pipe.device.type}


def groups(prompts: Sequence[str], num_images: int, most: int = AT_ONCE) -> Iterator[tuple[Sequence[str], int, int]]:
    """What is drawn in one go, `most` pictures at most: prompts, the first of each one's pictures, how many."""
    together = max(1, most // num_images)
    for start in range(0, len(prompts), together):
        for first in range(0, num_images, most):
            yield prompts[start : start + together], first, min(most, num_images - first)


def slug(prompt: str, length: int = 60) -> str:
    """The prompt as part of a file name: lower case, words of any script joined by hyphens, cut at a word's end."""
    words = re.findall(r"[^\W_]+", unicodedata.normalize("NFC", prompt).lower())
    name = "-".join(words)
    while len(name.encode()) > length:
        name = name.rpartition("-")[0] if "-" in name else name[:-1]
    return name or "picture"


def picture_path(folder: Path, name: str, seed: int, chunks: Mapping[str, str], taken: set[Path]) -> Path:
    """`folder/name-seed.png`; where that is another picture's, with a hash of `chunks` in it: none is overwritten.

    Another picture's: one in `taken`, or on disk with other text chunks. The same chunks are the same picture.
    """
    path = folder / f"{name}-{seed}.png"
    if path not in taken and (not path.exists() or read_chunks(path) == dict(chunks)):
        return path
    digest = hashlib.sha256(repr(sorted(chunks.items())).encode()).hexdigest()[:8]
    return folder / f"{name}-{digest}-{seed}.png"


def read_chunks(path: Path) -> dict[str, str] | None:
    """The text chunks of a PNG; None where it is none."""
    try:
        with Image.open(path) as image:
            return dict(getattr(image, "text", {}))
    except (OSError, ValueError, SyntaxError):
        return None


def write_png(image: Image.Image, path: Path, chunks: Mapping[str, str]) -> None:
    """Writes a PNG with text chunks, whole or not at all. Same input, same bytes."""
    info = PngInfo()
    for key, value in chunks.items():
        info.add_text(key, value)
    with whole_file(path) as aside:
        image.save(aside, format="PNG", pnginfo=info)


def flattened(image: Image.Image) -> Image.Image:
    """A picture of any mode as RGB, on white where it is transparent."""
    paper = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(paper, image.convert("RGBA")).convert("RGB")


def write_gif(images: Sequence[Image.Image], path: Path, milliseconds: int) -> None:
    """Writes an endless animation, there and back, each picture shown so long; whole or not at all."""
    frames = [flattened(image) for image in (*images, *images[-2:0:-1])]
    with whole_file(path) as aside:
        frames[0].save(aside, format="GIF", save_all=True, append_images=frames[1:], duration=milliseconds, loop=0)


def grid(images: Sequence[Image.Image], columns: int, gap: int = 8) -> Image.Image:
    """Pictures of one size in rows of `columns`, on white."""
    width, height = images[0].size
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for i, image in enumerate(images):
        sheet.paste(image, ((i % columns) * (width + gap), (i // columns) * (height + gap)))
    return sheet


def columns_of(count: int) -> int:
    """Columns of a sheet of `count` pictures: between square and half as high as wide, the fewest places empty."""
    return min(range(math.isqrt(count - 1) + 1, int(2 * count**0.5) + 1), key=lambda columns: -count % columns)
