"""Does an inpainted picture keep what is known, show no seam, and become what the prompt says?

A part of a held-out drawing is drawn anew from its own caption: with known pixels put back at each noise level, in
several walks and in one; with these shown to the networks as well, where the model has networks tuned to see them; and,
as a control, from the caption alone, with the known part pasted over it. The judge of concepts takes no part in
training (`features.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count as count_up
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from PIL import Image
from torch import Tensor

from unclip.core.data import Draws, pil_from_pixels
from unclip.core.files import write_json
from unclip.core.masks import random_masks
from unclip.evals.concepts import Gallery
from unclip.evals.corpus import SIDE, to_bytes
from unclip.evals.features import Featurize
from unclip.evals.manipulations import judged_drawings
from unclip.evals.sheets import to_images
from unclip.inpainting import RESAMPLES, read_known

if TYPE_CHECKING:
    from unclip.arguments import Callback, DTypeName
    from unclip.pipeline import UnCLIP

LEAST, MOST = 0.25, 0.75  # of a drawing that is known


def seam(x: Tensor, keep: Tensor) -> float:
    """Mean absolute difference of neighbouring pixels of which one is known: x (n, 3, h, w), keep (n, 1, h, w)."""
    beside, above = keep[..., 1:] != keep[..., :-1], keep[..., 1:, :] != keep[..., :-1, :]
    steps = torch.cat(
        [
            (x[..., 1:] - x[..., :-1]).abs().mean(1, keepdim=True)[beside],
            (x[..., 1:, :] - x[..., :-1, :]).abs().mean(1, keepdim=True)[above],
        ]
    )
    return float(steps.mean())


def choose_mask(row: int, seed: int = 0, side: int = SIDE) -> Tensor:
    """keep (1, 1, side, side) of a drawing: the first of its random masks that keeps enough and leaves enough."""
    for step in count_up():
        keep = random_masks(Draws(seed, step, [row]), side, side)
        if LEAST <= float(keep.float().mean()) <= MOST:
            return keep
    raise AssertionError


def measure(
    pipe: UnCLIP,
    pictures: Sequence[Image.Image],
    captions: Sequence[str],
    index: Sequence[int],
    gallery: Gallery,
    featurize: Featurize,
    size: int = SIDE,
    seed: int = 0,
    **options: Any,
) -> dict[str, Any]:
    """Of each way `seam`, top1 and top5, the concept's accuracy, and known, the share of known pixels that came back.

    index: each picture's row in the gallery, which is left out of its concept's mean.
    """
    masks = [pil_from_pixels((~choose_mask(row, seed)).float().expand(-1, 3, -1, -1) * 2 - 1)[0] for row in index]
    known = [read_known(picture, mask, size) for picture, mask in zip(pictures, masks, strict=True)]
    x0, keep = torch.cat([k.x0 for k in known]), torch.cat([k.keep for k in known])
    common = {"size": size, "output_type": "pt", **options}
    ways: dict[str, dict[str, Any]] = {
        "one walk": {"method": "replace", "resamples": 1},
        f"{RESAMPLES} walks": {"method": "replace", "resamples": RESAMPLES},
        **({"tuned": {"method": "tuned"}} if pipe.decoder.inpaint else {}),
    }
    drawn: dict[str, list[Tensor]] = {name: [] for name in ("pasted", *ways)}
    for i, (picture, mask, caption) in enumerate(zip(pictures, masks, captions, strict=True)):
        whole = cast(Tensor, pipe(caption, seed=seed + i, **common).images)
        drawn["pasted"].append(torch.where(keep[i], x0[i], whole))
        for name, way in ways.items():
            result = pipe.inpaint(picture, mask, caption, 1, seed=seed + i, **way, **common)
            drawn[name].append(cast(Tensor, result.images))
    figures: dict[str, Any] = {"count": len(pictures), "size": size, "drawings": {"seam": round(seam(x0, keep), 4)}}
    for name, rows in drawn.items():
        x = torch.cat(rows)
        ranks = gallery.ranks(featurize(to_bytes(x)), torch.tensor(list(index)))
        same = (to_bytes(x, size) == to_bytes(x0, size)).all(1, keepdim=True)[keep]
        figures[name] = {
            "seam": round(seam(x, keep), 4),
            "top1": round(float((ranks < 1).float().mean()), 4),
            "top5": round(float((ranks < 5).float().mean()), 4),
            "known": float(same.float().mean()),
        }
    return figures


def evaluate(
    model: str | None,
    corpus: str | Path = "corpora/emoji-64",
    split: str = "test-pair",
    count: int = 50,
    size: int = SIDE,
    preset: str = "default",
    seed: int = 0,
    json_path: Path | None = None,
    device: str | None = None,
    dtype: DTypeName | None = None,
    callback: Callback | None = None,
) -> dict[str, Any]:
    """`unclip evals inpainting`: the figures of a model (None: the embedded one) on held-out drawings.

    Raises ValueError, FileNotFoundError.
    """
    from unclip.folder import find_model
    from unclip.pipeline import UnCLIP

    folder, name = find_model(model)
    real, rows, gallery, judge = judged_drawings(folder, corpus, split, count, seed)
    pipe = UnCLIP.from_pretrained(model, dtype, device)
    pictures, captions = to_images(real.pictures(rows)), [real.drawings[row].caption for row in rows]
    found = measure(
        pipe, pictures, captions, rows, gallery, judge, pipe.check_size(size), seed, preset=preset, callback=callback
    )
    figures = {"model": name, "split": split, "preset": preset, "seed": seed, **found}
    if json_path is not None:
        write_json(figures, json_path)
    return figures
