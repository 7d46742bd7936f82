"""Does a picture come back? PSNR of reconstructions by the number of steps, with controls that give it meaning (§3).

A picture is inverted to (z_i, x_T) and decoded at η = 0. Two controls say what each half carries: x_T with another
picture's z_i, and z_i with a random x_T. A third says how near x_T is to noise: its mean, variance and the correlation
of neighbouring pixels, beside a normal's. The last is another picture in the picture's place. Drawings are held out;
those of concepts that the model was trained on are told from the others.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from unclip.core.data import pil_from_pixels
from unclip.core.files import write_json
from unclip.evals.concepts import dtype_of, trained_concepts
from unclip.evals.corpus import Drawing, by_digest, load_corpus
from unclip.evals.sheets import check_suffix, contact_sheet, save_sheet, to_images
from unclip.sources import ddim_settings, draw_noise, draw_x_T

if TYPE_CHECKING:
    from unclip.arguments import Callback, DTypeName
    from unclip.pipeline import UnCLIP

STEPS = (25, 50, 100)
ON_A_SHEET = 24


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of pictures (b, …) in [−1, 1], (b,): 10·log10(2² / mean squared error)."""
    return 10 * torch.log10(4 / ((x - y) ** 2).flatten(1).mean(1))


def noise_statistics(x_T: Tensor) -> dict[str, float]:
    """Of noise (b, c, h, w): root mean square of the pictures' means, mean of their variances, and the correlation of
    pixels beside and above each other, a mean over pictures and channels."""
    centred = x_T.double() - x_T.double().mean(dim=(2, 3), keepdim=True)
    beside = (centred[..., 1:] * centred[..., :-1]).mean(dim=(2, 3))
    above = (centred[..., 1:, :] * centred[..., :-1, :]).mean(dim=(2, 3))
    correlation = (beside + above) / 2 / centred.square().mean(dim=(2, 3))
    return {
        "mean": round(float(x_T.double().flatten(1).mean(1).square().mean().sqrt()), 4),
        "variance": round(float(x_T.double().flatten(1).var(1).mean()), 4),
        "neighbours": round(float(correlation.mean()), 4),
    }


def choose(drawings: Sequence[Drawing], count: int, trained: Collection[str] | None = None, seed: int = 0) -> list[int]:
    """Rows of `count` drawings, of trained concepts, in the order of a hash of (seed, key). Raises ValueError."""
    fit = [drawing for drawing in drawings if trained is None or drawing.concept in trained]
    if not 2 <= count <= len(fit):
        raise ValueError(f"{count} drawings asked for; the split has {len(fit)} that fit, give 2 to that.")
    fit = by_digest(fit, seed)
    return [drawing.index for drawing in fit[:count]]


def measure(
    pipe: UnCLIP,
    pictures: Sequence[Image.Image],
    steps: Sequence[int] = STEPS,
    guidance_scale: float = 1.0,
    seed: int = 0,
    callback: Callback | None = None,
    trained: Sequence[bool] | None = None,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The table of n ≥ 2 square pictures, and the pictures it was measured on, (n, 3, s, s) by name.

    trained: whether each is of a concept that the model knows; reconstructions of either group have a row then.
    """
    from unclip.sources import on_white

    side = pipe.sizes[0]
    x0 = torch.cat([on_white(picture, side) for picture in pictures])
    seeds = list(range(seed, seed + len(x0)))
    groups: dict[str, Tensor] = {}
    if trained is not None:
        known = torch.tensor(list(trained))
        groups = {"of_trained_concepts": known, "of_other_concepts": ~known}
    table: dict[str, Any] = {
        "another_picture": summary(psnr(x0.roll(1, 0), x0)),
        "normal": noise_statistics(draw_noise(pipe, seeds)),
    }
    drawn, controls = {"picture": x0}, {}
    for count in steps:
        settings = ddim_settings(pipe, count, guidance_scale)
        latent = pipe.invert(pictures, count, guidance_scale, callback=callback)
        runs = {
            "reconstruction": latent,
            "another_z_i": (latent.z_i.roll(1, 0), latent.x_T),
            "random_x_T": (latent.z_i, draw_x_T(pipe, latent.z_i, seeds, settings, callback)),
        }
        results = {
            name: pipe.decode(z_i, None, seeds, settings, callback, x_T).cpu() for name, (z_i, x_T) in runs.items()
        }
        table[str(count)] = {name: summary(psnr(x, x0)) for name, x in results.items()}
        found = psnr(results["reconstruction"], x0)
        table[str(count)] |= {name: summary(found[rows]) for name, rows in groups.items() if rows.any()}
        table[str(count)]["x_T"] = noise_statistics(latent.x_T)
        drawn[f"{count} steps"] = results.pop("reconstruction")
        controls = results
    return table, drawn | controls  # the controls at the last number of steps


def summary(values: Tensor) -> dict[str, float]:
    """Mean, standard deviation (0 of a single one) and least of values (n,), n ≥ 1."""
    return {
        "mean": round(float(values.mean()), 2),
        "std": round(float(values.std()), 2) if len(values) > 1 else 0.0,
        "least": round(float(values.min()), 2),
    }


def evaluate(
    model: str | None,
    corpus: str | Path = "corpora/emoji-64",
    split: str = "test-pair",
    count: int = 100,
    steps: Sequence[int] = STEPS,
    guidance_scale: float = 1.0,
    seed: int = 0,
    json_path: Path | None = None,
    sheet: Path | None = None,
    device: str | None = None,
    dtype: DTypeName | None = None,
    callback: Callback | None = None,
) -> dict[str, Any]:
    """`unclip evals inversion`: the table of a model (None: the embedded one) on held-out drawings.

    A model inverts drawings of any concept, so all of the split may be chosen. sheet: the first drawings, each beside
    its reconstructions and the two controls. Raises ValueError, FileNotFoundError.
    """
    from unclip.folder import find_model
    from unclip.pipeline import UnCLIP

    folder, name = find_model(model)
    if sheet is not None:
        check_suffix(sheet)
    real = load_corpus(corpus, (split,))
    rows, concepts = choose(real.drawings, count, seed=seed), trained_concepts(folder)
    trained = None if concepts is None else [real.drawings[row].concept in concepts for row in rows]
    pipe = UnCLIP.from_pretrained(model, dtype, device)
    table, drawn = measure(pipe, to_images(real.pictures(rows)), steps, guidance_scale, seed, callback, trained)
    figures: dict[str, Any] = {"model": name, "dtype": dtype_of(pipe), "split": split, "count": count}
    figures |= {"drawings_of_trained_concepts": None if trained is None else sum(trained)}
    figures |= {"seed": seed, "guidance_scale": guidance_scale, **table}
    if json_path is not None:
        write_json(figures, json_path)
    if sheet is not None:
        save_sheet(inversion_sheet(drawn, [real.drawings[row].caption for row in rows]), sheet)
    return figures


def inversion_sheet(drawn: dict[str, Tensor], captions: Sequence[str]) -> Image.Image:
    """A row for each of the first pictures: what `measure` drew of it, in its order."""
    some = slice(0, ON_A_SHEET)
    columns = [pil_from_pixels(x[some]) for x in drawn.values()]
    title = "picture, " + ", ".join(name.replace("_", " ") for name in list(drawn)[1:])
    return contact_sheet(list(zip(*columns, strict=True)), captions[some], columns=3, side=64, title=title)
