"""What an operation on latents starts from: a picture in any form, a caption, or a latent; and the options of all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict

import torch
from PIL import Image
from torch import Tensor

from unclip.arguments import Callback, OutputType, Pictures, check_prompts, check_seeds
from unclip.core.data import fit, load_image, pixels_from_pil
from unclip.core.sampling import Seed, resolve_timesteps
from unclip.latents import Latent
from unclip.presets import PriorName, StageSettings

if TYPE_CHECKING:
    from unclip.pipeline import UnCLIP

Frame = Literal["crop", "pad"]
Picture = str | Path | Image.Image
Source = Picture | Latent  # a string is the path of a picture where it looks like one, else a caption
STEPS = 100
# Of all steps. Below, what a network calls noise in a clean picture is its own error over a σ close to 0: docs/log.md.
LOWEST = 0.08
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")


class Options(TypedDict, total=False):
    """What every operation takes by keyword.

    seed: of the first result (0); size: side of the pictures (the largest the model has); preset: of prior and
    upsamplers, and of the decoder where nothing is inverted ("default"); steps: of the decoder, a count, or a list,
    falling (100 where it inverts, else the preset's); guidance_scale: of the decoder (1 where it inverts, else the
    preset's); prior, prior_guidance_scale (the preset's); frame: how a picture becomes square, "crop" to its centre or
    "pad" with white ("crop"); output_type: "pil", "np" or "pt" ("pil"); callback: called with a `Progress` after each
    step.
    """

    seed: int
    size: int | None
    preset: str
    steps: int | Sequence[int] | None
    guidance_scale: float | None
    prior: PriorName | None
    prior_guidance_scale: float | None
    frame: Frame
    output_type: OutputType
    callback: Callback | None


@dataclass(frozen=True)
class Plan:
    """Options checked and filled in. seeds: one for each result; settings: of each stage, as for drawing prompts;
    ddim: the decoder's where a picture is inverted and what comes of it decoded."""

    seeds: list[Seed]
    size: int
    settings: dict[str, StageSettings]
    ddim: StageSettings
    frame: Frame
    output_type: OutputType
    callback: Callback | None


def make_plan(pipe: UnCLIP, options: Options, n: int = 1) -> Plan:
    """Raises TypeError for an option that is none, ValueError for a value out of range, before any work."""
    if unknown := options.keys() - Options.__annotations__.keys():
        raise TypeError(f"there is no option {sorted(unknown)[0]!r}; there are {', '.join(Options.__annotations__)}.")
    frame = options.get("frame", "crop")
    if frame not in ("crop", "pad"):
        raise ValueError(f"frame is {frame!r}; give 'crop' or 'pad'.")
    scale, steps = options.get("guidance_scale"), options.get("steps")
    prior_scale = options.get("prior_guidance_scale")
    return Plan(
        seeds=check_seeds(options.get("seed", 0), n),
        size=pipe.check_size(options.get("size")),
        settings=pipe.settings(
            options.get("preset", "default"), scale, prior_scale, [None, steps], options.get("prior")
        ),
        ddim=ddim_settings(pipe, STEPS if steps is None else steps, 1.0 if scale is None else scale),
        frame=frame,
        output_type=check_output_type(options.get("output_type", "pil")),
        callback=options.get("callback"),
    )


def ddim_settings(
    pipe: UnCLIP, steps: int | Sequence[int] = STEPS, guidance_scale: float = 1.0, eta: float = 0.0
) -> StageSettings:
    """The decoder's settings on the grid that an inversion walks both ways; a clamped x0 has no inverse, so none is.

    steps: how many, or which. Raises ValueError for what DDIM cannot do.
    """
    if isinstance(eta, bool) or not isinstance(eta, int | float) or not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta!r}; give a number from 0 to 1.")
    steps = steps if isinstance(steps, int) else tuple(steps)
    settings = StageSettings("ddim", steps, guidance_scale, eta=eta, options={"clip_sample": False})
    sampler = pipe.sampler("decoder", settings)
    if isinstance(settings.steps, int):
        settings = replace(settings, steps=low_grid(settings.steps, int(sampler.config["num_train_timesteps"])))
    resolve_timesteps(sampler, settings.steps)
    return settings


def low_grid(count: int, total: int = 1000) -> tuple[int, ...]:
    """`count` steps, falling, evenly spaced from `LOWEST` of all up to where as much is left above the last.

    With a cosine schedule a step 989 → 999 multiplies an error in ε by about 300, 980 → 990 by about 1.1. Raises
    ValueError.
    """
    lowest = round(LOWEST * total)
    if not 1 <= count <= total - lowest:
        raise ValueError(f"{count} steps asked for; give 1 to {total - lowest}, or a list.")
    return tuple(lowest + k * (total - lowest) // count for k in reversed(range(count)))


def check_output_type(output_type: Any) -> OutputType:
    """Raises ValueError for another than "pil", "np" and "pt"."""
    if output_type not in ("pil", "np", "pt"):
        raise ValueError(f"output_type {output_type!r} is unknown; give 'pil', 'np' or 'pt'.")
    return output_type


def read_source(source: Source) -> Image.Image | str | Latent:
    """A picture loaded, upright, RGB or RGBA; a caption; or a latent of one row.

    A `Path` is a picture. A string is one where there is a file of that name or it ends like a picture's; every other
    string is a caption. Raises FileNotFoundError, TypeError, ValueError.
    """
    if isinstance(source, Latent):
        if len(source.z_i) != 1 or len(source.x_T) != 1:
            raise ValueError(f"a latent of {len(source.z_i)} rows came; give one row, as latent.row(i).")
        return source
    if isinstance(source, str) and not is_path(source):
        return check_prompts(source)[0]
    return load_image(source)


def is_path(text: str) -> bool:
    """Whether a string names a picture rather than describes one."""
    try:
        return Path(text).is_file() or text.lower().endswith(SUFFIXES)
    except (OSError, ValueError):  # too long for a name, or with a null in it
        return False


def square(picture: Picture, side: int, frame: Frame = "crop") -> Image.Image:
    """A picture of any size and mode as side × side, RGB or RGBA: its centre, or all of it between white margins.

    Margins of a picture with transparency are transparent. Raises FileNotFoundError, ValueError, TypeError.
    """
    image = load_image(picture)
    if frame == "crop":
        short = min(image.size)
        left, top = ((length - short) // 2 for length in image.size)
        image = image.crop((left, top, left + short, top + short))
    return fit(image, side)


def on_white(picture: Image.Image, side: int | None = None) -> Tensor:
    """One RGB or RGBA picture, if asked scaled to `side`, as (1, 3, h, w) in [−1, 1]; transparency becomes white."""
    return pixels_from_pil(picture, side)


def as_pixels(pictures: Pictures) -> Tensor:
    """Pictures of any output type as (b, 3, h, w) in [−1, 1]."""
    if isinstance(pictures, list):
        return pixels_from_pil(pictures)
    return pictures if isinstance(pictures, Tensor) else torch.from_numpy(pictures).permute(0, 3, 1, 2) * 2 - 1


def with_alpha(images: Sequence[Image.Image], picture: Picture, frame: Frame = "crop") -> list[Image.Image]:
    """Drawn pictures with the transparency of the picture they were made of; as they are where it has none."""
    if load_image(picture).mode != "RGBA":
        return list(images)
    results = []
    for image in images:
        image = image.copy()
        image.putalpha(square(picture, image.width, frame).getchannel("A"))
        results.append(image)
    return results
