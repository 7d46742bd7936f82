"""Do variations keep the concept, do interpolations go evenly, do text diffs change what they name?

None of it is judged by the CLIP that steers: variations and interpolations are by the features of a network that takes
no part in training (`features.py`), text diffs by the program that reads pictures of the shapes world (`shapes.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from unclip.arguments import choose_device
from unclip.core.files import write_json
from unclip.corpora.shapes import COLOURS, SHAPES, Scene, captions_of, draw, scenes
from unclip.evals.concepts import Gallery, corpus_features, dtype_of, trained_concepts, wilson
from unclip.evals.corpus import SIDE, Corpus, load_corpus, to_bytes
from unclip.evals.features import Featurize, Judge
from unclip.evals.inversion import choose
from unclip.evals.shapes import Reading, read
from unclip.evals.sheets import to_images

if TYPE_CHECKING:
    from unclip.arguments import Callback, DTypeName
    from unclip.pipeline import UnCLIP
    from unclip.sources import Source

STRENGTHS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
FRAMES = 9
EVEN = 0.9


# ------------------------------------------------------------------------------------------------ variations, ways


def rank_correlation(values: Sequence[float]) -> float:
    """Spearman's correlation of values with their places: 1 where they rise all the way. Equal values share a rank."""
    if len(set(values)) < 2:
        return 0.0
    ordered = sorted(values)
    ranks = [ordered.index(v) + (ordered.count(v) - 1) / 2 for v in values]
    return float(np.corrcoef(ranks, np.arange(len(values)))[0, 1])


def reconstructions(pipe: UnCLIP, sources: Sequence[Source], **options: Any) -> Tensor:
    """What η = 0 draws of n pictures or latents, all at the one seed, (n, 3, size, size) in [−1, 1]."""
    return torch.cat([cast(Tensor, pipe.vary(s, 1, 0.0, output_type="pt", **options).images) for s in sources])


def draw_variations(
    pipe: UnCLIP, sources: Sequence[Source], seeds: int, eta: float, seed: int = 0, **options: Any
) -> Tensor:
    """`seeds` variations of each of n pictures or latents, of successive seeds, (n · seeds, 3, size, size)."""
    firsts = range(seed, seed + len(sources) * seeds, seeds)
    varied = (
        pipe.vary(s, seeds, eta, seed=i, output_type="pt", **options) for s, i in zip(sources, firsts, strict=True)
    )
    return torch.cat([cast(Tensor, output.images) for output in varied])


def measure_variations(
    pipe: UnCLIP,
    sources: Sequence[Source],
    again: Tensor,
    index: Sequence[int],
    gallery: Gallery,
    featurize: Featurize,
    eta: float = 1.0,
    seeds: int = 2,
    **options: Any,
) -> dict[str, Any]:
    """How often a reconstruction and a variation are nearest to the picture's concept, and the second given the first.

    sources: n pictures or latents; again (n, 3, h, w): their reconstructions; index: each one's row in the gallery,
    which is left out of its concept's mean; seeds: how many variations of each. `kept`: the share of right ones among
    the `of` variations of those `drawings` whose reconstruction is right, None where there are none, and its 95 %
    interval (Wilson's, at the number of drawings).
    """
    rows = torch.tensor(list(index))
    drawn = draw_variations(pipe, sources, seeds, eta, **options)
    before = gallery.ranks(featurize(to_bytes(again)), rows)
    after = gallery.ranks(featurize(to_bytes(drawn)), rows.repeat_interleave(seeds)).view(-1, seeds)
    figures: dict[str, Any] = {"count": len(sources), "seeds": seeds, "eta": eta}
    return figures | {f"top{k}": keep_rate(before < k, after < k) for k in (1, 5)}


def keep_rate(right: Tensor, still: Tensor) -> dict[str, Any]:
    """The table of variations: right (n,) bool says which reconstructions are, still (n, seeds) which variations."""
    drawings = int(right.sum())
    rate = float(still[right].float().mean()) if drawings else None
    return {
        "reconstructions": round(float(right.float().mean()), 4),
        "variations": round(float(still.float().mean()), 4),
        "kept": None if rate is None else round(rate, 4),
        "kept_interval": None if rate is None else wilson(rate, drawings),
        "of": drawings * still.shape[1],
        "drawings": drawings,
    }


def measure_interpolations(
    pipe: UnCLIP,
    sources: Sequence[Source],
    again: Tensor,
    real: Tensor,
    featurize: Featurize,
    centre: Tensor,
    frames: int = FRAMES,
    **options: Any,
) -> dict[str, Any]:
    """How evenly pictures go from each source to the next, and from the last to the first.

    `difference`, the rank correlation of feature similarity with the position: Spearman's, of a frame's place with the
    cosine of its features to those of the real picture at the end, less the cosine to those of the one at the start.
    `end`: the same of the first cosine alone; `start`: of the second, negated. `ends_error`: how far frames at the ends
    are from the sources' reconstructions at most, of values in [−1, 1].

    sources: n pictures or latents; again (n, 3, h, w): their reconstructions at the same seed; real (n, d): features
    of the real pictures; centre (d,): what is taken off all features, the corpus's mean.
    """
    toward, error = F.normalize(real - centre, dim=-1), 0.0
    found: dict[str, list[float]] = {"difference": [], "end": [], "start": []}
    for i in range(len(sources)):
        j = (i + 1) % len(sources)
        x = cast(Tensor, pipe.interpolate(sources[i], sources[j], frames, output_type="pt", **options).images)
        error = max(error, float((x[[0, -1]] - again[[i, j]]).abs().max()))
        f = F.normalize(featurize(to_bytes(x)) - centre, dim=-1)
        to_end, to_start = f @ toward[j], f @ toward[i]
        for name, values in (("difference", to_end - to_start), ("end", to_end), ("start", -to_start)):
            found[name].append(rank_correlation(values.tolist()))
    figures = {name: correlations(values) for name, values in found.items()}
    return {"pairs": len(sources), "frames": frames, **figures, "ends_error": float(f"{error:.3g}")}


def correlations(values: Sequence[float]) -> dict[str, float]:
    """Mean and least of correlations, and the share of those that are even enough."""
    return {
        "mean": round(float(np.mean(values)), 4),
        "least": round(min(values), 4),
        f"at_least_{EVEN}": round(float(np.mean([value >= EVEN for value in values])), 4),
    }


def judged_drawings(
    folder: Path, corpus: str | Path, split: str, count: int, seed: int, device: str | None = None
) -> tuple[Corpus, list[int], Gallery, Judge]:
    """The corpus, rows of `count` drawings of a split, of the concepts that the model in `folder` was trained on, the
    mean features of all concepts, and the network that made them. Raises ValueError, FileNotFoundError.
    """
    real = load_corpus(corpus)
    of_split = [drawing for drawing in real.drawings if drawing.split == split]
    rows = choose(of_split, count, trained_concepts(folder), seed)
    judge = Judge(choose_device(device))
    gallery = Gallery(corpus_features(real, featurize=judge), [drawing.concept for drawing in real.drawings])
    return real, rows, gallery, judge


def evaluate(
    model: str | None,
    corpus: str | Path = "corpora/emoji-64",
    split: str = "test-pair",
    count: int = 50,
    seeds: int = 2,
    steps: int = 100,
    guidance_scale: float = 1.0,
    seed: int = 0,
    json_path: Path | None = None,
    device: str | None = None,
    dtype: DTypeName | None = None,
    callback: Callback | None = None,
) -> dict[str, Any]:
    """`unclip evals variations`: both measures of a model (None: the embedded one) on held-out drawings.

    count: drawings that are varied, and pairs of successive ones; seeds: variations of each drawing. Raises ValueError,
    FileNotFoundError.
    """
    from unclip.folder import find_model
    from unclip.pipeline import UnCLIP

    if seeds < 1:
        raise ValueError(f"seeds={seeds} came; ask for at least one variation of each drawing.")
    folder, name = find_model(model)
    real, rows, gallery, judge = judged_drawings(folder, corpus, split, count, seed, device)
    pipe = UnCLIP.from_pretrained(model, dtype, device)
    latents = pipe.invert(to_images(real.pictures(rows)), steps, guidance_scale, callback=callback)
    sources = [latents.row(i) for i in range(count)]
    options = {"seed": seed, "steps": steps, "guidance_scale": guidance_scale, "size": SIDE, "callback": callback}
    again = reconstructions(pipe, sources, **options)
    varied = measure_variations(pipe, sources, again, rows, gallery, judge, seeds=seeds, **options)
    ways = measure_interpolations(pipe, sources, again, gallery.features[rows], judge, gallery.centre, **options)
    figures = {"model": name, "dtype": dtype_of(pipe), "split": split, "steps": steps, "guidance_scale": guidance_scale}
    figures |= {"seed": seed, "variations": varied, "interpolations": ways}
    if json_path is not None:
        write_json(figures, json_path)
    return figures


# ------------------------------------------------------------------------------------------------ text diffs


class Edit(NamedTuple):
    """A scene, and which part of it is to become what."""

    scene: Scene
    part: str  # "colour" or "shape"
    target: str

    @property
    def captions(self) -> tuple[str, str]:
        """The barest caption of the scene as it is, and as it is to be."""
        return captions_of(self.scene)[0], captions_of(self.scene._replace(**{self.part: self.target}))[0]


def choose_edits(count: int, seed: int = 0) -> list[Edit]:
    """Scenes of all kinds, of which every other one is to change its colour, the rest their shape."""
    rng = np.random.default_rng(seed)
    edits = []
    for i, scene in enumerate(scenes(count, seed)):
        part = ("colour", "shape")[i % 2]
        others = [value for value in (COLOURS, SHAPES)[i % 2] if value != getattr(scene, part)]
        edits.append(Edit(scene, part, others[rng.integers(len(others))]))
    return edits


def score(edits: Sequence[Edit], readings: Sequence[Reading | None]) -> dict[str, float]:
    """How often the named part has become what it was to be, the other is what it was, both, and nothing is read."""
    changed, kept = [], []
    for edit, reading in zip(edits, readings, strict=True):
        other = "shape" if edit.part == "colour" else "colour"
        changed.append(reading is not None and getattr(reading, edit.part) == edit.target)
        kept.append(reading is not None and getattr(reading, other) == getattr(edit.scene, other))
    both = [a and b for a, b in zip(changed, kept, strict=True)]
    refused = [reading is None for reading in readings]
    rates = {"changed": changed, "kept": kept, "both": both, "refused": refused}
    return {name: round(float(np.mean(values)), 4) for name, values in rates.items()}


def measure_edits(
    pipe: UnCLIP,
    edits: Sequence[Edit],
    sources: Sequence[Source],
    strengths: Sequence[float] = STRENGTHS,
    **options: Any,
) -> dict[str, Any]:
    """`score` at each strength, for all edits and for those of each part; `best`: where changed and kept both are high.

    sources: pictures of the edits' scenes, or their latents.
    The best single strength is the one at which the lower of the two rates is highest.
    """
    readings: list[list[Reading | None]] = []
    for edit, source in zip(edits, sources, strict=True):
        before, after = edit.captions
        drawn = pipe.edit(source, after, before, strengths, output_type="pt", **options)
        readings.append([read(x) for x in cast(Tensor, drawn.images)])
    table = {}
    for i, strength in enumerate(strengths):
        row: dict[str, Any] = score(edits, [found[i] for found in readings])
        for part in ("colour", "shape"):
            some = [(edit, found[i]) for edit, found in zip(edits, readings, strict=True) if edit.part == part]
            row[part] = score([edit for edit, _ in some], [reading for _, reading in some])
        table[f"{strength:g}"] = row
    best = max(table, key=lambda strength: min(table[strength]["changed"], table[strength]["kept"]))
    return {"count": len(edits), "best": best, "strengths": table}


def measure_scenes(
    pipe: UnCLIP, scenes: Sequence[Scene], sources: Sequence[Source], seeds: int = 2, **options: Any
) -> dict[str, Any]:
    """`keep_rate` of scenes: is what η = 0 draws of each, and its variations at η = 1, read as its shape and colour?

    sources: pictures of the scenes, or their latents; seeds: how many variations of each.
    """

    def shown(x: Tensor, times: int) -> Tensor:
        readings = zip([read(picture) for picture in x], [s for s in scenes for _ in range(times)], strict=True)
        return torch.tensor([r is not None and (r.shape, r.colour) == (s.shape, s.colour) for r, s in readings])

    right = shown(reconstructions(pipe, sources, **options), 1)
    still = shown(draw_variations(pipe, sources, seeds, 1.0, **options), seeds).view(-1, seeds)
    return {"count": len(scenes), "seeds": seeds, "eta": 1.0} | keep_rate(right, still)


def evaluate_edits(
    model: str | None,
    count: int = 100,
    strengths: Sequence[float] = STRENGTHS,
    seeds: int = 2,
    steps: int = 100,
    guidance_scale: float = 1.0,
    seed: int = 0,
    json_path: Path | None = None,
    device: str | None = None,
    dtype: DTypeName | None = None,
    callback: Callback | None = None,
) -> dict[str, Any]:
    """`unclip evals edits`: text diffs of a model of the shapes world, and variations of the same scenes.

    seeds: variations of each scene, 0 for none. Raises ValueError, FileNotFoundError.
    """
    from unclip.pipeline import UnCLIP

    if count < 2:
        raise ValueError(f"count={count} came; give at least 2, half to change their colour and half their shape.")
    if seeds < 0:
        raise ValueError(f"seeds={seeds} came; give how many variations of each scene are drawn, 0 for none.")
    pipe = UnCLIP.from_pretrained(model, dtype, device)
    options = {"seed": seed, "steps": steps, "guidance_scale": guidance_scale, "size": SIDE, "callback": callback}
    figures = {"model": pipe.model_name, "dtype": dtype_of(pipe), "steps": steps, "guidance_scale": guidance_scale}
    edits = choose_edits(count, seed)
    scenes = [edit.scene for edit in edits]
    latents = pipe.invert([draw(scene, SIDE) for scene in scenes], steps, guidance_scale, callback=callback)
    sources = [latents.row(i) for i in range(count)]
    figures |= {"seed": seed} | measure_edits(pipe, edits, sources, strengths, **options)
    if seeds:
        figures["variations"] = measure_scenes(pipe, scenes, sources, seeds, **options)
    if json_path is not None:
        write_json(figures, json_path)
    return figures
