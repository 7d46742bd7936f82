"""A corpus as the metrics see it: every real drawing of all splits, on white, at 64×64 or another size."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from unclip.core.data import DataConfig, ShardDataset, collate, to_pixels

SPLITS = ("train", "test-pair", "test-concept")
SIDE = 64


@dataclass(frozen=True)
class Drawing:
    """One real drawing and the plain caption "{name}, {style}" that asks for it."""

    index: int  # its row in the corpus
    key: str
    caption: str
    concept: str
    style: str
    group: str
    split: str


@dataclass(frozen=True)
class Corpus:
    """`pictures(indices)` gives uint8 (n, 3, side, side) on white; `drawings[i].index == i`; all captions of each."""

    folder: Path
    drawings: Sequence[Drawing]
    pictures: Callable[[Sequence[int]], Tensor]
    captions: Sequence[Sequence[str]] = ()
    side: int = SIDE

    def batches(self, size: int | None = None, rows: Sequence[int] | None = None) -> Iterator[Tensor]:
        """All pictures in order, or those of `rows`, uint8 (b, 3, side, side), b ≤ `size`."""
        size = size or max(1, 256 * SIDE**2 // self.side**2)
        rows = range(len(self.drawings)) if rows is None else rows
        for i in range(0, len(rows), size):
            yield self.pictures(list(rows[i : i + size]))


def digest(drawing: Drawing, seed: int) -> bytes:
    """What a drawing's place in a choice depends on: its key and the seed, not the other drawings."""
    return hashlib.sha256(f"{seed}/{drawing.key}".encode()).digest()


def by_digest(drawings: Iterable[Drawing], seed: int) -> list[Drawing]:
    """In a random order that is the same everywhere."""
    return sorted(drawings, key=lambda drawing: digest(drawing, seed))


def load_corpus(folder: str | Path, splits: Sequence[str] = SPLITS, side: int = SIDE) -> Corpus:
    """All drawings of a corpus's splits (those of `splits` that it has), in the order of its shards.

    A drawing's first caption is the plain one. Pictures of another size are resized to side×side (bicubic,
    antialiased). Raises FileNotFoundError where there is no corpus, ValueError where a shard is damaged.
    """
    folder = Path(folder)
    have = [split for split in splits if any(folder.glob(f"{split}-[0-9]*.tar"))]
    dataset = ShardDataset(DataConfig(str(folder), "+".join(have or splits[:1])), cache=False)
    drawings = [
        Drawing(
            i, row[1], meta["captions"][0], *(meta.get(name, "") for name in ("concept", "style", "group", "split"))
        )
        for i, (row, meta) in enumerate(zip(dataset.rows, dataset.meta, strict=True))
    ]

    def pictures(indices: Sequence[int]) -> Tensor:
        return to_bytes(to_pixels(collate([dataset[i] for i in indices])["image"]), side)

    return Corpus(folder, drawings, pictures, [meta["captions"] for meta in dataset.meta], side)


def corpus_at(folder: str | Path, base: int, side: int) -> Path:
    """Of a corpus of pictures of base×base, the folder beside it that has the same ones at side×side.

    By their names: corpora/emoji-256 is beside corpora/emoji-64. Raises FileNotFoundError where it is not there.
    """
    folder = Path(folder)
    other = folder if side == base else folder.with_name(f"{folder.name.removesuffix(f'-{base}')}-{side}")
    if not other.is_dir():
        raise FileNotFoundError(
            f"There is no corpus folder {other} with real pictures of {side} px; build it by `unclip corpus emoji "
            f"--size {side} --out {other}`, or ask for a smaller size."
        )
    return other


def to_bytes(x: Tensor, side: int = SIDE) -> Tensor:
    """Pictures (b, 3, h, w) in [−1, 1] as uint8 (b, 3, side, side)."""
    if x.shape[-2:] != (side, side):
        x = F.interpolate(x.float(), (side, side), mode="bicubic", antialias=True)
    return ((x.float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
