"""A corpus as the metrics see it: every real drawing of all splits, on white, at 64×64."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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
    """`pictures(indices)` gives uint8 (n, 3, 64, 64) on white; `drawings[i].index == i`; all captions of each."""

    folder: Path
    drawings: Sequence[Drawing]
    pictures: Callable[[Sequence[int]], Tensor]
    captions: Sequence[Sequence[str]] = ()

    def batches(self, size: int = 256) -> Iterator[Tensor]:
        """All pictures in order, uint8 (b, 3, 64, 64)."""
        for i in range(0, len(self.drawings), size):
            yield self.pictures(list(range(i, min(i + size, len(self.drawings)))))


def load_corpus(folder: str | Path, splits: Sequence[str] = SPLITS) -> Corpus:
    """All drawings of a corpus's splits (those of `splits` that it has), in the order of its shards.

    A drawing's first caption is the plain one. Pictures of another size are resized to 64×64 (bicubic, antialiased).
    Raises FileNotFoundError where there is no corpus, ValueError where a shard is damaged.
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
        return to_bytes(to_pixels(collate([dataset[i] for i in indices])["image"]))

    return Corpus(folder, drawings, pictures, [meta["captions"] for meta in dataset.meta])


def to_bytes(x: Tensor, side: int = SIDE) -> Tensor:
    """Pictures (b, 3, h, w) in [−1, 1] as uint8 (b, 3, side, side)."""
    if x.shape[-2:] != (side, side):
        x = F.interpolate(x.float(), (side, side), mode="bicubic", antialias=True)
    return ((x.float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
