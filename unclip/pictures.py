"""Pictures as files: names made of prompts, PNG text chunks, grids. Loads no torch."""

from __future__ import annotations

import hashlib
import os
import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from unclip.core.files import whole_file


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


def grid(images: Sequence[Image.Image], columns: int, gap: int = 8) -> Image.Image:
    """Pictures of one size in rows of `columns`, on white."""
    width, height = images[0].size
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for i, image in enumerate(images):
        sheet.paste(image, ((i % columns) * (width + gap), (i // columns) * (height + gap)))
    return sheet
