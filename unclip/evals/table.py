"""Where quality is lost: each stage of a model given the truth, or what the stage before it makes, in one table.

The decoder draws from the real drawing's z_i, the prior's, z_t in its place, and the caption alone; each upsampler
enlarges the real picture, and the one drawn the whole way. The largest drop from one row to the next is what to work
on. Above the rows stands what they rest on: CLIP's retrieval, and how near the prior's embeddings are to the true ones.
Each row is compared with real drawings of its own size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from unclip.clip.evaluate import evaluate as evaluate_clip
from unclip.core.data import DataConfig, ShardDataset, to_pixels
from unclip.core.files import write_json
from unclip.evals.concepts import (
    Draw,
    Generate,
    choose,
    corpus_features,
    dtype_of,
    generator_of,
    measure,
    trained_concepts,
)
from unclip.evals.corpus import SIDE, Corpus, by_digest, corpus_at, load_corpus, to_bytes
from unclip.evals.features import INCEPTION, JUDGE, Featurize, Inception, Judge, cached_features
from unclip.evals.fidelity import NEIGHBOURS, fidelity
from unclip.evals.priors import measure as measure_prior

if TYPE_CHECKING:
    from unclip.arguments import Callback, DTypeName
    from unclip.pipeline import UnCLIP
    from unclip.presets import StageSettings

REFERENCE = 2000  # real drawings at most that rows are compared with
DECODED = {"true z_i": "true_z_i", "prior": "prior", "z_t in z_i's place": "text", "caption alone": "caption"}
UPSAMPLED = ("real", "prior")
COLUMNS = ("top-1", "top-5", "of ceiling, top-5", "floor, top-5", "Fréchet", "precision", "recall", "kernel")


class Judges(NamedTuple):
    """What looks at pictures: EfficientNet at what is drawn, Inception at how it is drawn."""

    concept: Featurize
    inception: Featurize


def stored_name(judge: str, side: int) -> str:
    """The name that features of pictures of this side have in a corpus's folder."""
    return judge if side == SIDE else f"{judge}-{side}"


def reference_of(
    corpus: Corpus, asked: Collection[str], trained: Collection[str] | None = None, seed: int = 0
) -> list[int]:
    """Rows of the drawings that pictures are compared with: of trained concepts, not among those asked for (keys)."""
    fit = [d for d in corpus.drawings if d.key not in asked and (trained is None or d.concept in trained)]
    fit = by_digest(fit, seed)
    return [drawing.index for drawing in fit[:REFERENCE]]


def measure_level(
    generators: dict[str, Generate],
    corpus: Corpus,
    judges: Judges,
    split: str,
    count: int,
    trained: Collection[str] | None = None,
    seed: int = 0,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The figures of each generator of pictures of one size, and the pictures, uint8 (count, 3, side, side)."""
    draws = choose(corpus.drawings, split, count, trained, seed)
    rows = reference_of(corpus, {draw.drawing.key for draw in draws}, trained, seed)
    judge = stored_name(JUDGE, corpus.side)
    digest = hashlib.sha256("\n".join(corpus.drawings[i].key for i in rows).encode()).hexdigest()[:12]
    name = f"{stored_name(INCEPTION, corpus.side)}-{digest}"
    real = cached_features(corpus.folder, lambda: corpus.batches(rows=rows), name, judges.inception)
    real_concepts = corpus_features(corpus, judge, judges.concept)[rows]
    table, drawn = {}, {}
    for row, generate in generators.items():
        figures, _, pictures, features = measure(
            generate, corpus, split, count, trained, seed, judges.concept, judge, batch_size=16
        )
        table[row] = {part: figures[part] for part in ("generated", "ceiling", "floor", "over_ceiling")}
        table[row] |= fidelity((judges.inception(pictures), real), (features, real_concepts))
        drawn[row] = pictures
    return table, drawn


def decoded(
    pipe: UnCLIP, corpus: Corpus, preset: str, guidance_scale: float | None, callback: Callback | None
) -> dict[str, Generate]:
    """What draws the rows of the decoder's size."""
    conditions = {**DECODED, **({"autoregressive prior": "ar"} if pipe.prior_ar is not None else {})}
    return {
        row: generator_of(pipe, corpus, condition, preset, guidance_scale, callback)
        for row, condition in conditions.items()
    }


def upsampled(
    pipe: UnCLIP,
    side: int,
    lower: dict[str, Tensor],
    seed: int,
    settings: StageSettings,
    callback: Callback | None,
) -> dict[str, Generate]:
    """What draws the rows of an upsampler's size. lower: pictures of the size below by row, in the order of draws."""

    def generate(row: str, captions: list[str], draws: list[Draw]) -> Tensor:
        """The pictures of a row at the draws, upsampled: uint8 (n, 3, side, side)."""
        seeds = [draw.seed for draw in draws]
        pictures = lower[row][[number - seed for number in seeds]]  # draws have successive seeds
        return to_bytes(pipe.upsample(to_pixels(pictures), side, seeds, settings, callback), side)

    return {f"{row}, upsampled": partial(generate, row) for row in lower}


def real_pictures(corpus: Corpus) -> Generate:
    return lambda captions, draws: corpus.pictures([draw.drawing.index for draw in draws])


def evaluate(
    model: str | None,
    split: str = "train",
    count: int = 500,
    size: int | None = None,
    json_path: Path | None = None,
    corpus: str | Path = "corpora/emoji-64",
    seed: int = 0,
    preset: str = "default",
    guidance_scale: float | None = None,
    device: str | None = None,
    dtype: DTypeName | None = None,
    callback: Callback | None = None,
    judges: Judges | None = None,
) -> dict[str, Any]:
    """`unclip evals table`: the figures of a model (None: the embedded one), also written to `json_path`.

    size: up to which the upsamplers are measured, None for the largest of the model; beside `corpus` there must be
    folders of each size (`corpus_at`). judges: others than the two networks. Raises ValueError, FileNotFoundError.
    """
    from unclip.arguments import choose_device
    from unclip.folder import find_model
    from unclip.pipeline import UnCLIP

    if count < NEIGHBOURS + 2:
        raise ValueError(
            f"count={count} came; sets of pictures are compared from {NEIGHBOURS + 2} on, so ask for more."
        )
    folder, name = find_model(model)
    trained = trained_concepts(folder)
    choose(load_corpus(corpus).drawings, split, count, trained, seed)  # bad arguments are named before networks load
    pipe = UnCLIP.from_pretrained(model, dtype, device)
    sides = [side for side in pipe.sizes if side <= pipe.check_size(size)]
    settings = pipe.settings(preset, guidance_scale)
    corpora = [load_corpus(corpus_at(corpus, sides[0], side), side=side) for side in sides]
    judges = judges or Judges(Judge(choose_device(device)), Inception(choose_device(device)))
    concepts = folder / "concepts.txt"
    dataset = ShardDataset(DataConfig(str(corpus), split, concepts=str(concepts) if trained is not None else None))
    report: dict[str, Any] = {"model": name, "split": split, "count": count, "seed": seed, "preset": preset}
    report |= {
        "dtype": dtype_of(pipe),
        "guidance_scale": guidance_scale,
        "clip": evaluate_clip(pipe.clip, dataset, sorted({drawing.concept for drawing in corpora[0].drawings})),
        "prior": measure_prior(pipe, dataset, settings["prior"], callback),
        "rows": {},
    }
    lower: dict[str, Tensor] = {}
    for real in corpora:
        generators = {"real": real_pictures(real)}
        if lower:
            generators |= upsampled(pipe, real.side, lower, seed, settings[pipe.networks[real.side]], callback)
        else:
            generators |= decoded(pipe, real, preset, guidance_scale, callback)
        rows, drawn = measure_level(generators, real, judges, split, count, trained, seed)
        lower = {row: drawn[f"{row}, upsampled" if lower else row] for row in UPSAMPLED}
        report["rows"][str(real.side)] = rows
        if json_path is not None:  # what is measured is kept, should a larger size not come to its end
            write_json(report, json_path)
    return report


def markdown(report: dict[str, Any]) -> str:
    """A report as lines and a table in Markdown."""
    clip, prior = report["clip"], report["prior"]
    lines = [
        f"{report['model']}, {report['split']}: {report['count']} captions from seed {report['seed']}, "
        f"{report['preset']} preset",
        f"CLIP on {clip['count']} pictures: zero-shot top-1 {clip['top1']:.4f}, top-5 {clip['top5']:.4f} of "
        f"{clip['labels']} concepts; retrieval of captions {clip['image_to_text']:.4f}, of pictures "
        f"{clip['text_to_image']:.4f}",
        f"prior: cosine to the true z_i {prior['cosine']:.4f}, to another's {prior['cosine_shuffled']:.4f}, of z_t "
        f"{prior['cosine_text']:.4f}",
        "",
        f"| px | pictures | {' | '.join(COLUMNS)} |",
        f"|{'---|' * (2 + len(COLUMNS))}",
    ]
    for side, rows in report["rows"].items():
        for row, found in rows.items():
            figures = [found["generated"]["top1"], found["generated"]["top5"], found["over_ceiling"]["top5"]]
            figures += [found["floor"]["top5"], *(found[k] for k in ("frechet", "precision", "recall", "kernel"))]
            lines.append(f"| {side} | {row} | {' | '.join(map(str, figures))} |")
    return "\n".join(lines)
