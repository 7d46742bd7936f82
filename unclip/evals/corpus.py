"""A corpus as the metrics see it: every real drawing of all splits, on white, at 64×64."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor


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
    """`pictures(indices)` gives uint8 (n, 3, 64, 64) on white; `drawings[i].index == i`."""

    folder: Path
    drawings: Sequence[Drawing]
    pictures: Callable[[Sequence[int]], Tensor]

    def batches(self, size: int = 256) -> Iterator[Tensor]:
        """All pictures in order, uint8 (b, 3, 64, 64)."""
        for i in range(0, len(self.drawings), size):
            yield self.pictures(list(range(i, min(i + size, len(self.drawings)))))
