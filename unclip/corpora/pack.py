"""Anybody's folder of captioned pictures as shards."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from unclip.core.data import fit, load_image
from unclip.core.files import read_text, write_json
from unclip.corpora.shards import ShardWriter, encode_webp, new_folder

log = logging.getLogger(__name__)

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"}
FIELDS = ("concept", "style", "group", "license", "keywords")


def pack(
    path: str | Path,
    out: str | Path,
    size: int | None = None,
    split: str = "train",
    overwrite: bool = False,
    progress: Callable[[Iterable[Any], int, str], Iterable[Any]] | None = None,
) -> dict[str, Any]:
    """Pack a folder of pictures into shards in the folder `out` and return its dataset.json.

    Captions come from `metadata.jsonl` (a line a picture: `file_name`, and `text`, `caption` or `captions`; `concept`,
    `style`, `group`, `split`, `license`, `keywords` are kept), else from a `.txt` beside each picture, one a line.
    size: pictures are fitted into size × size and padded; None keeps each as it is.
    A picture that cannot be read or has no caption is left out with a warning, and counted under `skipped`.
    Raises FileNotFoundError, FileExistsError, ValueError when nothing can be packed.
    """
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"There is no folder of pictures {path}.")
    if size is not None and not 1 <= size <= 8192:
        raise ValueError(f"size is {size}, but 1 to 8192 pixels are expected.")
    if not split or not all(c.isalnum() or c in "-_" for c in split):
        raise ValueError(f"The split {split!r} is not a plain word.")
    rows = _rows(path)
    if not rows:
        raise ValueError(f"{path} holds no pictures: expected {', '.join(sorted(SUFFIXES))}.")
    skipped: list[str] = []
    concepts: dict[str, None] = {}
    with new_folder(out, overwrite) as folder:
        with ShardWriter(folder) as writer:
            for i, (file, meta) in enumerate(progress(rows, len(rows), "pack") if progress else rows):
                try:
                    captions = _captions(file, meta)
                    picture = load_image(file)
                    picture = picture if size is None else fit(picture, size)
                    encoded = encode_webp(picture)
                except (ValueError, OSError) as error:
                    log.warning("left out: %s", error)
                    skipped.append(os.path.relpath(file, path))
                    continue
                kept = {name: meta[name] for name in FIELDS if name in meta}
                writer.add(f"{i:08d}", encoded, {"captions": captions, "split": _split(file, meta, split), **kept})
                concepts[str(meta.get("concept", ""))] = None
        if not writer.counts:
            raise ValueError(
                f"None of the {len(rows)} pictures in {path} can be used: each is unreadable or uncaptioned."
            )
        summary = {
            "name": path.resolve().name,
            "size": size,
            "count": sum(writer.counts.values()),
            "splits": dict(writer.counts),
            "concepts": [c for c in concepts if c],
            "skipped": skipped,
        }
        write_json(summary, folder / "dataset.json")
    if skipped:
        log.warning("%d of %d pictures were left out.", len(skipped), len(rows))
    return summary


def _split(file: Path, meta: dict[str, Any], default: str) -> str:
    """The split that a picture names, or the default. Raises ValueError where a name is none: it may be held out."""
    split = str(meta.get("split") or default)
    if not all(c.isalnum() or c in "-_" for c in split):
        raise ValueError(f"{file} names the split {split!r}: use letters, digits, - and _ alone.")
    return split


def _rows(path: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Pictures in the order of metadata.jsonl or of their names, with what is said of them."""
    table = path / "metadata.jsonl"
    if not table.is_file():
        return [(p, {}) for p in sorted(path.rglob("*")) if p.suffix.lower() in SUFFIXES and p.is_file()]
    rows = []
    for number, line in enumerate(read_text(table).split("\n"), 1):
        if not line.strip():
            continue
        try:
            meta = json.loads(line)
            file = path / meta["file_name"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"Line {number} of {table} is no JSON object with a `file_name`.") from None
        if not file.resolve().is_relative_to(path.resolve()):
            raise ValueError(f"Line {number} of {table} names {meta['file_name']}, which lies outside {path}.")
        rows.append((file, meta))
    return rows


def _captions(file: Path, meta: dict[str, Any]) -> list[str]:
    """Captions of one picture, stripped; ValueError if there is none, or what is no text."""
    raw: Any = meta.get("captions") or meta.get("caption") or meta.get("text")
    if raw is None and not meta and file.with_suffix(".txt").is_file():
        raw = read_text(file.with_suffix(".txt")).splitlines()
    given = [raw] if isinstance(raw, str) else raw or []
    if not isinstance(given, list) or not all(isinstance(c, str) for c in given):
        raise ValueError(f"{file} has the captions {raw!r}: expected a text, or a list of texts.")
    captions = list(dict.fromkeys(c.strip() for c in given if c.strip()))
    if not captions:
        raise ValueError(f"{file} has no caption.")
    return captions
