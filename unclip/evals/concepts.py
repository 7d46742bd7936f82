"""Nearest-concept accuracy: does a generated picture look like drawings of what its caption names?

A judge network (`features.py`) turns pictures into features. A picture is right at k where its caption's concept is
among the k concepts whose mean feature over real drawings is nearest, out of all concepts of the corpus. The drawing
whose caption was asked for is left out of its concept's mean. Nearness is the cosine after taking the corpus's mean off
both sides. Two figures give the scale: the ceiling, the same for the real drawing, and the floor, the same
for the picture that was generated for another caption.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from unclip.arguments import dtype_name
from unclip.core.data import to_pixels
from unclip.core.files import read_lines, write_json
from unclip.evals.corpus import Corpus, Drawing, by_digest, load_corpus, to_bytes
from unclip.evals.features import JUDGE, Featurize, Judge, cached_features, check_pictures
from unclip.evals.sheets import check_suffix, contact_sheet, nearest, save_sheet, to_images
from unclip.prompts import best_rows, check_best_of

if TYPE_CHECKING:
    from unclip.arguments import Callback, DTypeName
    from unclip.pipeline import UnCLIP
    from unclip.presets import StageSettings

SPLITS = ("train", "test-pair")
CONDITIONS = ("prior", "ar", "true_z_i", "text", "caption")


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

    @property
    def means(self) -> Tensor:
        """Mean feature of each concept, in the order of `names`, (c, d)."""
        return (self.sum / self.count[:, None]).float()

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
        scores = q @ self.direction(self.means).T  # n concepts
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
    fit = by_digest(fit, seed)
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
    """A generator's pictures of these draws' captions, uint8 (n, 3, h, w). Raises ValueError for others, or not n."""
    pictures = generate([draw.drawing.caption for draw in draws], draws)
    check_pictures(pictures)
    if len(pictures) != len(draws):
        raise ValueError(
            f"{len(draws)} captions gave {len(pictures)} pictures; generate must give one picture a caption."
        )
    return pictures.cpu()


def corpus_features(corpus: Corpus, judge: str = JUDGE, featurize: Featurize | None = None) -> Tensor:
    """The judge's features of every drawing of a corpus on white, (m, d), cached in its folder under that name."""
    return cached_features(corpus.folder, corpus.batches, judge, featurize or Judge())


# ------------------------------------------------------------------------------------------------ a model


def trained_concepts(folder: str | Path) -> set[str] | None:
    """The concepts a model folder says it was trained on (concepts.txt, one a line); None where it says nothing."""
    path = Path(folder) / "concepts.txt"
    if not path.is_file():
        return None
    return set(read_lines(path))


def dtype_of(pipe: UnCLIP) -> str:
    """The dtype that a pipeline computes in: "fp32", "bf16" or "fp16"."""
    return dtype_name(pipe.decoder.dtype)


def generator_of(
    pipe: UnCLIP,
    corpus: Corpus,
    condition: str = "prior",
    preset: str = "default",
    guidance_scale: float | None = None,
    callback: Callback | None = None,
    prior: StageSettings | None = None,
    best_of: int = 1,
    decoder: StageSettings | None = None,
) -> Generate:
    """A pipeline's decoded pictures as a `Generate`, at the corpus's size, by what the decoder is given.

    condition: "prior", the whole way; "ar", the same by the autoregressive prior; "true_z_i", the embedding of the
    real drawing, which shows the decoder alone; "text", z_t in z_i's place (§5.1); "caption", the text without any
    z_i. prior, decoder: their settings, in place of the preset's. best_of: of so many pictures of a caption the one
    that CLIP finds nearest to it. Raises ValueError for another condition, an unknown preset, or what is no `best_of`.
    """
    if condition not in CONDITIONS:
        raise ValueError(f"condition={condition!r} came; it is one of {', '.join(CONDITIONS)}.")
    check_best_of(best_of, (), pipe.clip)
    settings = pipe.settings(preset, guidance_scale, prior="ar" if condition == "ar" else None)

    def generate(captions: list[str], draws: list[Draw]) -> Tensor:
        """A picture of each caption, uint8 (n, 3, side, side), with the corpus's side."""
        captions = [caption for caption in captions for _ in range(best_of)]
        draws = [draw for draw in draws for _ in range(best_of)]
        text = pipe.encode_text(captions)
        seeds = [draw.seed * best_of + i % best_of for i, draw in enumerate(draws)]
        if condition in ("prior", "ar"):
            z_i = pipe.sample_z_i(text, seeds, prior or settings["prior"], callback)
        elif condition == "true_z_i":
            z_i = pipe.encode_image(to_pixels(corpus.pictures([draw.drawing.index for draw in draws])))
        else:
            z_i = text.z_t if condition == "text" else None
        x = pipe.decode(z_i, text, seeds, decoder or settings["decoder"], callback)
        if best_of > 1:
            x = x[best_rows(pipe.encode_image(x), text.z_t, best_of)]
        return to_bytes(x, corpus.side)

    return generate


def nearest_sheet(
    corpus: Corpus,
    draws: Sequence[Draw],
    pictures: Tensor,
    features: Tensor,
    trained: Collection[str] | None,
    featurize: Featurize,
) -> Image.Image:
    """Each picture beside the training drawing nearest to it by the judge's features, over caption and that name."""
    rows = [d.index for d in corpus.drawings if d.split == "train" and (trained is None or d.concept in trained)]
    near = [rows[i] for i in nearest(features, corpus_features(corpus, featurize=featurize)[rows]).tolist()]
    cells = list(zip(to_images(pictures), to_images(corpus.pictures(near)), strict=True))
    labels = [
        f"{draw.drawing.caption}: nearest {corpus.drawings[i].concept} ({corpus.drawings[i].style})"
        for draw, i in zip(draws, near, strict=True)
    ]
    title = "left: generated, right: nearest training drawing (judge's features); caption: nearest that drawing"
    return contact_sheet(cells, labels, columns=10, side=64, title=title)


def evaluate(
    model: str | None,
    split: str,
    count: int,
    json_path: str | Path | None,
    corpus: str | Path = "corpora/emoji-64",
    seed: int = 0,
    preset: str = "default",
    sheet: str | Path | None = None,
    condition: str = "prior",
    guidance_scale: float | None = None,
    device: str | None = None,
    dtype: DTypeName | None = None,
    callback: Callback | None = None,
    best_of: int = 1,
) -> dict[str, Any]:
    """`unclip evals concepts`: the figures of a model (None: the embedded one), also written to `json_path`.

    sheet: a PNG of every picture beside its nearest training drawing. Raises ValueError, FileNotFoundError.
    """
    from unclip.folder import find_model
    from unclip.pipeline import UnCLIP

    folder, name = find_model(model)
    if sheet is not None:
        check_suffix(Path(sheet))
    real, trained = load_corpus(corpus), trained_concepts(folder)
    choose(real.drawings, split, count, trained, seed)  # bad arguments are named before the networks load
    pipe = UnCLIP.from_pretrained(model, dtype, device)
    generate = generator_of(pipe, real, condition, preset, guidance_scale, callback, best_of=best_of)
    judge = Judge(pipe.device)
    figures, draws, pictures, features = measure(generate, real, split, count, trained, seed, judge)
    settings = {"preset": preset, "condition": condition, "guidance_scale": guidance_scale, "best_of": best_of}
    figures = {"model": name, "dtype": dtype_of(pipe), **settings, **figures}
    if json_path is not None:
        write_json(figures, Path(json_path))
    if sheet is not None:
        save_sheet(nearest_sheet(real, draws, pictures, features, trained, judge), Path(sheet))
    return figures
