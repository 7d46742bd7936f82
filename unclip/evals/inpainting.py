"""Does an inpainted picture keep what is known, show no seam, and become what the prompt says?

A part of a held-out drawing is drawn anew from its own caption: with known pixels put back at each noise level, in
several walks and in one; with these shown to the networks as well, where the model has networks tuned to see them; and,
as a control, from the caption alone, with the known part pasted over it. The judge of concepts, which takes no part in
training (`features.py`), sees the part that was drawn alone: what was known is white to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count as count_up
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from unclip.core.data import Draws, pil_from_pixels, to_pixels
from unclip.core.files import write_json
from unclip.core.masks import random_masks
from unclip.evals.concepts import Gallery, dtype_of, rates
from unclip.evals.corpus import SIDE, Drawing, load_corpus, to_bytes
from unclip.evals.features import Featurize
from unclip.evals.manipulations import judged_drawings
from unclip.inpainting import RESAMPLES

if TYPE_CHECKING:
    from unclip.arguments import Callback, DTypeName
    from unclip.pipeline import UnCLIP

LEAST, MOST = 0.25, 0.75  # of a drawing's pixels that are known
HIDDEN = 0.3  # of what is drawn in it, at least, that is not
PAPER = 250  # what is lighter is no part of a drawing


def seam_steps(x: Tensor, keep: Tensor) -> Tensor:
    """Absolute differences of neighbouring pixels of which one is known: x (n, 3, h, w), keep (n, 1, h, w) → (k,)."""
    beside, above = keep[..., 1:] != keep[..., :-1], keep[..., 1:, :] != keep[..., :-1, :]
    return torch.cat(
        [
            (x[..., 1:] - x[..., :-1]).abs().mean(1, keepdim=True)[beside],
            (x[..., 1:, :] - x[..., :-1, :]).abs().mean(1, keepdim=True)[above],
        ]
    )


def choose_mask(picture: Tensor, row: int, seed: int = 0) -> Tensor:
    """keep (1, 1, h, w) of a drawing, uint8 (3, h, w): the first of its random masks that keeps enough of all pixels,
    and leaves enough of them and of those that are not white. row: its number, by which it has its masks.
    """
    drawn = (picture < PAPER).any(0)  # h w
    for step in count_up():
        keep = random_masks(Draws(seed, step, [row]), *picture.shape[-2:])
        hidden = float((drawn & ~keep[0, 0]).sum())
        if LEAST <= float(keep.float().mean()) <= MOST and hidden >= HIDDEN * float(drawn.sum()):
            return keep
    raise AssertionError


class Look(NamedTuple):
    """What is measured of one picture. filled: its unknown part on white, uint8 (1, 3, 64, 64); known: whether each
    known pixel is the given one, (k,)."""

    seam: Tensor
    filled: Tensor
    known: Tensor


def look(x: Tensor, given: Tensor, keep: Tensor) -> Look:
    """x, given (1, 3, h, w) in [−1, 1]: what came, and the picture it came of; keep (1, 1, h, w)."""
    same = (to_bytes(x, x.shape[-1]) == to_bytes(given, x.shape[-1])).all(1, keepdim=True)[keep]
    return Look(seam_steps(x, keep), to_bytes(torch.where(keep, torch.ones_like(x), x)), same)


def figures_of(looks: Sequence[Look], index: Sequence[int], gallery: Gallery, featurize: Featurize) -> dict[str, Any]:
    """`seam`, the mean step across it; `known`, the share of known pixels that came back; `filled`, how often what was
    drawn, without what was known, is nearest to the drawing's concept: "top1", "top5" and their 95 % intervals."""
    ranks = gallery.ranks(featurize(torch.cat([one.filled for one in looks])), torch.tensor(list(index)))
    return {
        "seam": round(float(torch.cat([one.seam for one in looks]).mean()), 4),
        "known": float(torch.cat([one.known for one in looks]).double().mean()),
        "filled": rates(ranks, len(set(index))),
    }


def measure(
    pipe: UnCLIP,
    pictures: Tensor,
    captions: Sequence[str],
    index: Sequence[int],
    gallery: Gallery,
    featurize: Featurize,
    seed: int = 0,
    **options: Any,
) -> dict[str, Any]:
    """`figures_of` each way, of the drawings themselves (a ceiling) and of white in the unknown part's place (a floor).

    pictures: uint8 (n, 3, size, size), of a size that the pipeline draws; index: each one's row in the gallery, which
    is left out of its concept's mean.
    """
    size = pictures.shape[-1]
    common = {"size": size, "output_type": "pt", **options}
    ways: dict[str, dict[str, Any]] = {
        "one walk": {"method": "replace", "resamples": 1},
        f"{RESAMPLES} walks": {"method": "replace", "resamples": RESAMPLES},
        **({"tuned": {"method": "tuned"}} if pipe.decoder.inpaint else {}),
    }
    looks: dict[str, list[Look]] = {name: [] for name in ("drawings", "white", "pasted", *ways)}
    for i, (row, caption) in enumerate(zip(index, captions, strict=True)):
        given = to_pixels(pictures[i : i + 1])
        keep = F.interpolate(choose_mask(to_bytes(given)[0], row, seed).float(), (size, size)) == 1
        picture, mask = pil_from_pixels(given)[0], pil_from_pixels(1 - 2 * keep.float().expand(-1, 3, -1, -1))[0]
        whole = cast(Tensor, pipe(caption, seed=seed + i, **common).images)
        found = {"drawings": given, "white": torch.where(keep, given, torch.ones_like(given))}
        found["pasted"] = torch.where(keep, given, whole)
        for name, way in ways.items():
            found[name] = cast(Tensor, pipe.inpaint(picture, mask, caption, 1, seed=seed + i, **way, **common).images)
        for name, x in found.items():
            looks[name].append(look(x, given, keep))
    figures = {name: figures_of(some, index, gallery, featurize) for name, some in looks.items()}
    return {"count": len(pictures), "size": size, **figures}


def same_drawings(folder: str | Path, drawings: Sequence[Drawing], size: int) -> Tensor:
    """Drawings as another corpus has them, by their keys, scaled to uint8 (n, 3, size, size). Raises ValueError."""
    corpus = load_corpus(folder, sorted({drawing.split for drawing in drawings}), size)
    rows = {drawing.key: drawing.index for drawing in corpus.drawings}
    if missing := [drawing.key for drawing in drawings if drawing.key not in rows]:
        raise ValueError(f"{folder} has no drawing {missing[0]!r}; give a corpus of the same drawings.")
    return corpus.pictures([rows[drawing.key] for drawing in drawings])


def evaluate(
    model: str | None,
    corpus: str | Path = "corpora/emoji-64",
    split: str = "test-pair",
    count: int = 50,
    size: int = SIDE,
    given: str | Path | None = None,
    preset: str = "default",
    seed: int = 0,
    json_path: Path | None = None,
    device: str | None = None,
    dtype: DTypeName | None = None,
    callback: Callback | None = None,
) -> dict[str, Any]:
    """`unclip evals inpainting`: the figures of a model (None: the embedded one) on held-out drawings.

    given: folder of a corpus that has the same drawings at `size`; None scales those of `corpus`. Raises ValueError,
    FileNotFoundError.
    """
    from unclip.folder import find_model
    from unclip.pipeline import UnCLIP

    folder, name = find_model(model)
    real, rows, gallery, judge = judged_drawings(folder, corpus, split, count, seed, device)
    drawings = [real.drawings[row] for row in rows]
    pipe = UnCLIP.from_pretrained(model, dtype, device)
    pictures = same_drawings(given or corpus, drawings, pipe.check_size(size))
    captions = [drawing.caption for drawing in drawings]
    found = measure(pipe, pictures, captions, rows, gallery, judge, seed, preset=preset, callback=callback)
    figures = {"model": name, "dtype": dtype_of(pipe), "split": split, "preset": preset, "seed": seed}
    figures |= {"given": Path(given or corpus).name, **found}
    if json_path is not None:
        write_json(figures, json_path)
    return figures
