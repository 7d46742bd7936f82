"""Nearest-concept accuracy: does a generated picture look like drawings of what its caption names?

A judge network (`features.py`) turns pictures into features. A picture is right at k where its caption's concept is
among the k concepts whose mean feature over real drawings is nearest, out of all concepts of the corpus. The drawing
whose caption was asked for is left out of its concept's mean. Nearness is the cosine after taking the corpus's mean off
both sides. Two figures give the scale: the ceiling, the same for the real drawing, and the floor, the same
for the picture that was generated for another caption.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from unclip.evals.corpus import Corpus, Drawing
from unclip.evals.features import JUDGE, Featurize, Judge, cached_features, check_pictures

SPLITS = ("train", "test-pair")


@dataclass(frozen=True)
class Draw:
    """One picture to generate: the real drawing whose caption is asked for, and the seed of its noise."""

    drawing: Drawing
    seed: int


Generate = Callable[[list[str], list[Draw]], Tensor]  # captions, draws → uint8 (n, 3, h, w)


class Gallery:
    """Mean features of concepts, from which any drawing can be left out."""

    def __init__(self, features: Tensor, concepts: Sequence[str]) -> None:
        """features: float32 (m, d), one row a real drawing; concepts: m names. Raises ValueError where m differs."""
        if len(features) != len(concepts) or not len(concepts):
            raise ValueError(f"{len(features)} features came with {len(concepts)} concepts; give one each.")
        if not torch.isfinite(features).all():
            raise ValueError(
                "The features hold NaN or infinity; the judge or its pictures are broken, so measure again."
            )
        self.names = sorted(set(concepts))
        ids = {name: i for i, name in enumerate(self.names)}
        self.features = features
        self.concept = torch.tensor([ids[name] for name in concepts])
        self.count = torch.bincount(self.concept, minlength=len(self.names))
        self.sum = torch.zeros(len(self.names), features.shape[1], dtype=torch.float64)
        self.sum.index_add_(0, self.concept, features.double())
        self.centre = features.mean(dim=0)

    def mean_without(self, index: Tensor) -> Tensor:
        """Mean feature of each drawing's concept over its other drawings. index (n,); returns (n, d)."""
        concept = self.concept[index]
        others = self.count[concept] - 1
        if (others < 1).any():
            name = self.names[int(concept[others < 1][0])]
            raise ValueError(
                f"{name!r} has one real drawing only, so none is left to judge by; ask for other concepts."
            )
        return ((self.sum[concept] - self.features[index].double()) / others[:, None]).float()

    def ranks(self, queries: Tensor, index: Tensor) -> Tensor:
        """How many other concepts are as near to each query as its own, or nearer.

        queries (n, d): features of pictures; index (n,): the real drawing each stands for, which is left out of its
        concept's mean. Returns int64 (n,); 0 is right at first guess, below k is right at k.
        """
        if not torch.isfinite(queries).all():
            raise ValueError(
                "The features of the pictures hold NaN or infinity; look at the pictures, then measure again."
            )
        q = self.direction(queries)
        own = self.concept[index]
        scores = q @ self.direction((self.sum / self.count[:, None]).float()).T  # n concepts
        mine = (q * self.direction(self.mean_without(index))).sum(dim=1, keepdim=True)  # n 1
        nearer = scores >= mine
        nearer[torch.arange(len(own)), own] = False
        return nearer.sum(dim=1)

    def direction(self, features: Tensor) -> Tensor:
        return F.normalize(features - self.centre, dim=-1)


def choose(
    drawings: Sequence[Drawing], split: str, count: int, trained: Collection[str] | None = None, seed: int = 0
) -> list[Draw]:
    """The drawings whose captions are asked for: in the order of a hash of (seed, key), so that the choice is fixed.

    Only concepts of `trained` (None: any) that have at least two drawings in all splits together. Where the split
    has fewer than `count` such drawings they are taken again from the first, with other noise. Raises ValueError where
    the split is unknown or nothing is left.
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r} came; it is one of {', '.join(SPLITS)}.")
    if count < 1:
        raise ValueError(f"count={count} came; ask for at least one picture.")
    drawn: dict[str, int] = {}
    for drawing in drawings:
        drawn[drawing.concept] = drawn.get(drawing.concept, 0) + 1
    fit = [
        drawing
        for drawing in drawings
        if drawing.split == split and drawn[drawing.concept] > 1 and (trained is None or drawing.concept in trained)
    ]
    if not fit:
        raise ValueError(
            f"No drawing of split {split!r} is of a concept the model was trained on; check corpus and concepts.txt."
        )
    fit.sort(key=lambda drawing: hashlib.sha256(f"{seed}/{drawing.key}".encode()).digest())
    return [Draw(fit[i % len(fit)], seed + i) for i in range(count)]


def shuffled(draws: Sequence[Draw]) -> list[int]:
    """For each draw the place of the next one (cyclic) of another concept: whose picture is judged for the floor."""
    n = len(draws)
    others = []
    for i, draw in enumerate(draws):
        steps = (s for s in range(1, n) if draws[(i + s) % n].drawing.concept != draw.drawing.concept)
        others.append((i + next(steps, 0)) % n)
    return others


def rates(ranks: Tensor, distinct: int) -> dict[str, Any]:
    """{"top1", "top5"} and their 95 % intervals (Wilson's, at the number of distinct drawings)."""
    result: dict[str, Any] = {}
    for k in (1, 5):
        rate = (ranks < k).float().mean().item()
        result[f"top{k}"] = round(rate, 4)
        result[f"top{k}_interval"] = wilson(rate, distinct)
    return result


def wilson(rate: float, n: int, z: float = 1.96) -> list[float]:
    """Wilson's score interval of a rate over n trials, rounded: it stays honest at 0 and 1."""
    middle = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return [round(max(0.0, middle - half), 4), round(min(1.0, middle + half), 4)]


def over_ceiling(generated: Tensor, ceiling: Tensor, drawings: Sequence[int], k: int) -> dict[str, Any]:
    """Generated over ceiling at k, with a 95 % interval from 2,000 bootstraps over distinct drawings."""
    hits = torch.stack([(generated < k).double(), (ceiling < k).double()])  # 2 n
    _, cluster = torch.unique(torch.tensor(list(drawings)), return_inverse=True)
    per_drawing = torch.zeros(2, int(cluster.max()) + 1, dtype=torch.float64).index_add_(1, cluster, hits)
    m = per_drawing.shape[1]
    picks = torch.randint(m, (2000, m), generator=torch.Generator().manual_seed(0))
    totals = per_drawing[:, picks].sum(dim=-1)  # 2 2000
    ratios = (totals[0] / totals[1].clamp(min=1)).sort().values
    value = hits[0].sum() / hits[1].sum().clamp(min=1)
    return {f"top{k}": round(value.item(), 4), f"top{k}_interval": [round(ratios[j].item(), 4) for j in (50, 1949)]}


def measure(
    generate: Generate,
    corpus: Corpus,
    split: str = "train",
    count: int = 300,
    trained: Collection[str] | None = None,
    seed: int = 0,
    featurize: Featurize | None = None,
    judge: str = JUDGE,
    batch_size: int = 50,
) -> tuple[dict[str, Any], list[Draw], Tensor, Tensor]:
    """Nearest-concept accuracy of any generator, on captions of one split.

    generate: (captions, draws) → uint8 (n, 3, h, w), called `batch_size` captions at a time; trained: the concepts that
    captions are drawn from (None: all of the split). Returns the figures, the draws, their pictures uint8
    (n, 3, h, w) and their features (n, d).
    """
    draws = choose(corpus.drawings, split, count, trained, seed)
    featurize = featurize or Judge()
    gallery = Gallery(corpus_features(corpus, judge, featurize), [drawing.concept for drawing in corpus.drawings])
    pictures = torch.cat([run(generate, draws[i : i + batch_size]) for i in range(0, count, batch_size)])
    features = featurize(pictures)
    index = torch.tensor([draw.drawing.index for draw in draws])
    distinct = len(set(index.tolist()))
    generated, ceiling = gallery.ranks(features, index), gallery.ranks(gallery.features[index], index)
    floor = gallery.ranks(features[shuffled(draws)], index)
    figures = {
        "split": split,
        "count": count,
        "drawings": distinct,
        "seed": seed,
        "concepts": len(gallery.names),
        "concepts_asked": len({draw.drawing.concept for draw in draws}),
        "judge": judge,
        "generated": rates(generated, distinct),
        "ceiling": rates(ceiling, distinct),
        "floor": rates(floor, distinct),
        "over_ceiling": {
            k: v for top in (1, 5) for k, v in over_ceiling(generated, ceiling, index.tolist(), top).items()
        },
    }
    return figures, draws, pictures, features


def run(generate: Generate, draws: list[Draw]) -> Tensor:
    pictures = generate([draw.drawing.caption for draw in draws], draws)
    check_pictures(pictures)
    if len(pictures) != len(draws):
        raise ValueError(
            f"{len(draws)} captions gave {len(pictures)} pictures; generate must give one picture a caption."
        )
    return pictures.cpu()


def corpus_features(corpus: Corpus, judge: str = JUDGE, featurize: Featurize | None = None) -> Tensor:
    """The judge's features of every drawing of a corpus at 64×64 on white, (m, d), cached in its folder."""
    return cached_features(corpus.folder, corpus.batches, judge, featurize or Judge())


def write_json(data: dict[str, Any], path: Path) -> Path:
    """Write JSON aside and rename it; makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    return aside.replace(path)
