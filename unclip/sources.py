"""What an operation on latents starts from: a picture in any form, a caption, or a latent; and the options of all."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict

import torch
from PIL import Image
from torch import Tensor

from unclip.arguments import Callback, OutputType, Picture, Pictures, check_prompts, check_seeds
from unclip.core.data import fit, load_image, pixels_from_pil
from unclip.core.diffusion import Diffusion
from unclip.core.sampling import Seed, picture_generators, resolve_timesteps, starting_noise
from unclip.latents import Latent
from unclip.presets import PriorName, StageSettings
from unclip.prompts import check_negative, parse

if TYPE_CHECKING:
    from unclip.pipeline import UnCLIP

Frame = Literal["crop", "pad"]
Source = Picture | Latent  # a string is the path of a picture where it looks like one, else a caption
Read = Image.Image | str | Latent  # a source that `read_source` has read: a string is a caption
STEPS = 100
# Of all steps. Below, what a network calls noise in a clean picture is its own error over a σ close to 0: docs/log.md.
LOWEST = 0.08
SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"),
    *(".heic", ".heif", ".jp2", ".ppm", ".tga", ".ico", ".svg"),
)


class Options(TypedDict, total=False):
    """What every operation takes by keyword.

    seed: of the first result (0); size: side of the pictures (the largest the model has); preset: of prior and
    upsamplers, and of the decoder where a prompt is drawn: in `study`, `img2img` and `inpaint` ("default"); steps: of
    the decoder, a count, or a list, falling (the preset's there, 100 elsewhere); guidance_scale: of the decoder (the
    preset's there, 1 elsewhere); prior, prior_guidance_scale (the preset's); negative_prompt: what guidance leads away
    from, of the prior and, where a prompt is drawn, of the decoder; frame: how a picture becomes square, "crop" to its
    centre or "pad" with white ("crop"); output_type: "pil", "np" or "pt" ("pil"); callback: called with a `Progress`
    after each step.
    """

    seed: int
    size: int | None
    preset: str
    steps: int | Sequence[int] | None
    guidance_scale: float | None
    prior: PriorName | None
    prior_guidance_scale: float | None
    negative_prompt: str | None
    frame: Frame
    output_type: OutputType
    callback: Callback | None


@dataclass(frozen=True)
class Plan:
    """Options checked and filled in. seeds: one for each result; settings: of each stage, as for drawing prompts;
    ddim: the decoder's where no prompt is drawn; negative: a prompt, or None."""

    seeds: list[Seed]
    size: int
    settings: dict[str, StageSettings]
    ddim: StageSettings
    negative: str | None
    frame: Frame
    output_type: OutputType
    callback: Callback | None


def make_plan(pipe: UnCLIP, options: Options, n: int = 1, hears: Collection[str] = ("prior", "decoder")) -> Plan:
    """Raises TypeError for an option that is none, ValueError for a value out of range, before any work.

    hears: the stages that a prompt reaches (`heard_by`); where the decoder is none of them it walks `Plan.ddim`.
    """
    if unknown := options.keys() - Options.__annotations__.keys():
        raise TypeError(f"there is no option {sorted(unknown)[0]!r}; there are {', '.join(Options.__annotations__)}.")
    frame = options.get("frame", "crop")
    if frame not in ("crop", "pad"):
        raise ValueError(f"frame is {frame!r}; give 'crop' or 'pad'.")
    scale, steps = options.get("guidance_scale"), options.get("steps")
    prior_scale, preset = options.get("prior_guidance_scale"), options.get("preset", "default")
    settings = pipe.settings(preset, scale, prior_scale, [None, steps], options.get("prior"))
    return Plan(
        seeds=check_seeds(options.get("seed", 0), n),
        size=pipe.check_size(options.get("size")),
        settings=settings,
        ddim=ddim_settings(
            pipe, STEPS if steps is None or "decoder" in hears else steps, 1.0 if scale is None else scale
        ),
        negative=check_negative(options.get("negative_prompt"), pipe, settings, hears),
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
    wanted: Any = steps  # any list becomes a tuple, and what is none is refused
    settings = StageSettings("ddim", wanted, guidance_scale, eta=eta, options={"clip_sample": False})
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


def draw_noise(pipe: UnCLIP, seeds: Sequence[Seed]) -> Tensor:
    """The decoder's noise (b, 3, s, s) of these seeds."""
    side = pipe.sizes[0]
    return starting_noise((3, side, side), picture_generators(seeds, "decoder"))


def draw_x_T(
    pipe: UnCLIP, z_i: Tensor, seeds: Sequence[Seed], settings: StageSettings, callback: Callback | None = None
) -> Tensor:
    """x_T (b, 3, s, s) of z_i (b, d) and seeds, for `ddim_settings`: as noisy as what an inversion over them gives.

    Noise is of the schedule's last step, where nothing of a picture is left; an inversion ends below, and there noise
    alone would be a picture too dark. One step of DDIM leads down to it, clamped as where a prompt is drawn.
    """
    assert isinstance(settings.steps, tuple)  # ddim_settings
    noise, diffusion = draw_noise(pipe, seeds), Diffusion.from_scheduler(pipe.decoder_scheduler)
    last, first = diffusion.num_train_timesteps - 1, settings.steps[0]
    if first == last:
        return noise
    x0 = pipe.decode(z_i, None, seeds, StageSettings("ddim", (last,), settings.guidance_scale), callback, noise).cpu()
    t = torch.full((len(x0),), last)
    eps = diffusion.to_eps(noise, diffusion.from_x0(noise, x0, t), t)
    return diffusion.add_noise(x0, eps, torch.full_like(t, first))


def check_output_type(output_type: Any) -> OutputType:
    """Raises ValueError for another than "pil", "np" and "pt"."""
    if output_type not in ("pil", "np", "pt"):
        raise ValueError(f"output_type {output_type!r} is unknown; give 'pil', 'np' or 'pt'.")
    return output_type


def heard_by(*sources: Read | Tensor) -> tuple[str, ...]:
    """Which stages a prompt reaches where these are decoded without their caption: the prior, for a caption's z_i."""
    return ("prior",) if any(isinstance(source, str) for source in sources) else ()


def read_source(pipe: UnCLIP, source: Source) -> Read:
    """A picture loaded, upright, RGB or RGBA; a caption; or a latent of one row, of this model's z_i and x_T.

    A `Path` is a picture. A string is one where there is a file of that name, it names a folder and is no mere word, or
    it ends like a picture's; every other string is a caption. Raises FileNotFoundError, TypeError, ValueError.
    """
    if isinstance(source, Latent):
        if len(source.z_i) != 1 or len(source.x_T) != 1:
            raise ValueError(f"a latent of {len(source.z_i)} rows came; give one row, as latent.row(i).")
        side, width = pipe.sizes[0], int(pipe.decoder.config["z_i_width"])
        if source.z_i.shape[1:] != (width,) or source.x_T.shape[1:] != (3, side, side):
            raise ValueError(
                f"a latent of z_i {tuple(source.z_i.shape)} and x_T {tuple(source.x_T.shape)} came; this model's are "
                f"(1, {width}) and (1, 3, {side}, {side})."
            )
        return source
    if isinstance(source, str) and not is_path(source):
        (caption,) = check_prompts(source)
        parse(caption)
        return caption
    return load_image(source)


def is_path(text: str) -> bool:
    """Whether a string names a picture rather than describes one."""
    try:
        path = Path(text)
        names_a_folder = bool(set(text) & set("./\\")) and path.is_dir()  # "fox" is a fox, whatever lies about
        return path.is_file() or names_a_folder or text.lower().endswith(SUFFIXES)
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
