"""What an upsampler is worth: its pictures beside bicubic's and Lanczos's, on held-out drawings whose large ones exist.

It starts from two kinds of picture. "real": the drawing at the lower size. "redrawn": that drawing, noised and drawn
again by the decoder (SDEdit, arXiv 2108.01073), then enlarged by the upsamplers before this one: it has a decoder's
faults, and still the real drawing to be compared with, which a picture of a caption alone has not. PSNR and structural
similarity (Wang et al. 2004) are measured; LPIPS and DISTS rest on networks that no package carries.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from kornia.metrics import ssim
from PIL import Image
from torch import Tensor

from unclip.core.data import pil_from_pixels, pixels_from_pil, to_pixels
from unclip.core.files import write_json
from unclip.evals.concepts import dtype_of, trained_concepts
from unclip.evals.corpus import Corpus, corpus_at, load_corpus
from unclip.evals.inversion import choose, psnr, summary
from unclip.evals.sheets import to_images
from upsamplers.degradations import downsample

if TYPE_CHECKING:
    from unclip.arguments import Callback, DTypeName
    from unclip.pipeline import UnCLIP
    from unclip.presets import StageSettings

METHODS = {"bicubic": Image.Resampling.BICUBIC, "lanczos": Image.Resampling.LANCZOS}
STRENGTH = 0.3
AT_ONCE = 4


def enlarged(low: Tensor, side: int, method: str) -> Tensor:
    """Pictures (b, 3, h, w) in [−1, 1] resized to side×side by Pillow, by way of 8 bits."""
    return pixels_from_pil([picture.resize((side, side), METHODS[method]) for picture in pil_from_pixels(low)])


def figures_of(x: Tensor, real: Tensor, low: Tensor) -> dict[str, Tensor]:
    """Of enlarged pictures x, each (b,): PSNR and SSIM to the real ones, and PSNR of x made small again to its input.

    x, real: (b, 3, s, s) in [−1, 1]; low (b, 3, h, w). SSIM is by windows of 11 pixels, over the three channels.
    """
    similarity = ssim((x + 1) / 2, (real + 1) / 2, 11).flatten(1).mean(1)
    return {
        "psnr": psnr(x, real),
        "ssim": similarity,
        "psnr_back": psnr(downsample(x, x.shape[-1] // low.shape[-1]), low),
    }


@torch.no_grad()
def measure(
    pipe: UnCLIP,
    low: Tensor,
    real: Corpus,
    rows: Sequence[int],
    seeds: Sequence[int],
    settings: StageSettings,
    callback: Callback | None = None,
) -> tuple[dict[str, Any], Tensor]:
    """The figures of each method at one size, and the upsampler's pictures (n, 3, side, side) in [−1, 1].

    low (n, 3, h, w): what is enlarged; rows: the n real drawings in the corpus of the larger size. `over_lanczos`: the
    upsampler's PSNR less that of Lanczos, picture by picture.
    """
    found: dict[str, dict[str, list[Tensor]]] = defaultdict(lambda: defaultdict(list))
    drawn = []
    for i in range(0, len(rows), AT_ONCE):
        part = slice(i, i + AT_ONCE)
        target = to_pixels(real.pictures(list(rows[part])))
        drawn.append(pipe.upsample(low[part], real.side, seeds[part], settings, callback).float().cpu())
        pictures = {"upsampler": drawn[-1], **{name: enlarged(low[part], real.side, name) for name in METHODS}}
        for method, x in pictures.items():
            for name, values in figures_of(x, target, low[part]).items():
                found[method][name].append(values)
    values = {method: {name: torch.cat(parts) for name, parts in by.items()} for method, by in found.items()}
    table: dict[str, Any] = {
        method: {name: rounded(figures, 4 if name == "ssim" else 2) for name, figures in by.items()}
        for method, by in values.items()
    }
    return table | {"over_lanczos": summary(values["upsampler"]["psnr"] - values["lanczos"]["psnr"])}, torch.cat(drawn)


def rounded(values: Tensor, digits: int) -> float:
    return round(float(values.mean()), digits)


def redrawn(
    pipe: UnCLIP,
    corpus: Corpus,
    rows: Sequence[int],
    strength: float,
    seed: int,
    preset: str,
    callback: Callback | None,
) -> Tensor:
    """The drawings, noised to `strength` and drawn again by the decoder for their captions: (n, 3, s, s) in [−1, 1]."""
    drawn = [
        pipe.img2img(
            picture,
            corpus.drawings[row].caption,
            strength,
            seed=seed + i,
            size=corpus.side,
            preset=preset,
            output_type="pt",
            callback=callback,
        ).images
        for i, (row, picture) in enumerate(zip(rows, to_images(corpus.pictures(list(rows))), strict=True))
    ]
    return torch.cat([cast(Tensor, x) for x in drawn])


def evaluate(
    model: str | None,
    corpus: str | Path = "corpora/emoji-64",
    split: str = "test-pair",
    count: int = 100,
    size: int | None = None,
    strength: float = STRENGTH,
    preset: str = "default",
    seed: int = 0,
    json_path: Path | None = None,
    device: str | None = None,
    dtype: DTypeName | None = None,
    callback: Callback | None = None,
) -> dict[str, Any]:
    """`unclip evals upsamplers`: the table of a model (None: the embedded one), also written to `json_path`.

    size: up to which upsamplers are measured, None for the largest; beside `corpus` there must be folders of each size
    (`corpus_at`). strength: how much of the decoder's noise drawings are redrawn from. Raises ValueError,
    FileNotFoundError.
    """
    from unclip.arguments import check_fractions
    from unclip.folder import find_model
    from unclip.pipeline import UnCLIP

    folder, name = find_model(model)
    check_fractions("strength", [strength])
    choose(load_corpus(corpus, (split,)).drawings, count, seed=seed)  # bad arguments are named before networks load
    pipe = UnCLIP.from_pretrained(model, dtype, device)
    sides = [side for side in pipe.sizes if side <= pipe.check_size(size)]
    if len(sides) < 2:
        raise ValueError(f"size {size!r} is the decoder's; give one of {', '.join(map(str, pipe.sizes[1:]))}.")
    settings = pipe.settings(preset)
    corpora = [load_corpus(corpus_at(corpus, sides[0], side), (split,), side) for side in sides]
    rows = [choose(real.drawings, count, seed=seed) for real in corpora]  # the same drawings at each size
    concepts = trained_concepts(folder)
    trained = None if concepts is None else sum(corpora[0].drawings[row].concept in concepts for row in rows[0])
    seeds = list(range(seed, seed + count))
    base = to_pixels(corpora[0].pictures(rows[0]))
    again = redrawn(pipe, corpora[0], rows[0], strength, seed, preset, callback)
    report: dict[str, Any] = {"model": name, "dtype": dtype_of(pipe), "split": split, "count": count}
    report |= {"drawings_of_trained_concepts": trained, "seed": seed, "preset": preset}
    report |= {"strength": strength, "redrawn": {"psnr": rounded(psnr(again, base), 2)}, "sizes": {}}
    for i, side in enumerate(sides[1:], 1):
        inputs = {"real": to_pixels(corpora[i - 1].pictures(rows[i - 1])), "redrawn": again}
        stage = settings[pipe.networks[side]]
        table, drawn = {}, {}
        for kind, low in inputs.items():
            table[kind], drawn[kind] = measure(pipe, low, corpora[i], rows[i], seeds, stage, callback)
        report["sizes"][str(side)], again = table, drawn["redrawn"]
        if json_path is not None:  # what is measured is kept, should a larger size not come to its end
            write_json(report, json_path)
    return report
