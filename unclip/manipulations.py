"""What one can do with a picture's (z_i, x_T) (§3, §4): take it apart, vary, interpolate, edit, compare.

Functions over a pipeline, which has them as methods: `pipe.vary(picture, n=4)`. What an operation may start from, and
the options that all of them take, are in `unclip.sources`. What was inverted is decoded by DDIM over the same steps,
without the caption, at guidance 1 unless asked.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Unpack

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from unclip.arguments import Callback, check_fractions, check_prompts
from unclip.clip.model import TextFeatures
from unclip.core.data import load_image
from unclip.core.diffusion import Diffusion
from unclip.core.sampling import Seed, resolve_timesteps
from unclip.latents import Latent, slerp, text_difference, weighted_mean
from unclip.presets import StageSettings
from unclip.prompts import decode_prompts, embed_prompts, plain
from unclip.sources import (
    STEPS,
    Frame,
    Options,
    Picture,
    Plan,
    Read,
    Source,
    as_pixels,
    ddim_settings,
    draw_noise,
    draw_x_T,
    heard_by,
    make_plan,
    on_white,
    read_source,
    square,
    with_alpha,
)
from unclip.stages import UnCLIPOutput, finish

if TYPE_CHECKING:
    from unclip.pipeline import UnCLIP

COMPONENTS = (20, 30, 40, 80, 120, 160, 200, 320)
STRENGTHS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)


class Probe(NamedTuple):
    """Variations of a picture, and the probability of each label for it (row 0) and for them: (1 + n, labels)."""

    output: UnCLIPOutput
    probabilities: Tensor


# ------------------------------------------------------------------------------------------------ taking apart


@torch.no_grad()
def invert(
    pipe: UnCLIP,
    images: Picture | Sequence[Picture],
    steps: int | Sequence[int] = STEPS,
    guidance_scale: float = 1.0,
    frame: Frame = "crop",
    callback: Callback | None = None,
) -> Latent:
    """(z_i, x_T) of pictures of any size and mode: z_i (b, d) by CLIP, x_T (b, 3, s, s) by inverting DDIM (§3).

    steps: how many, or the list, falling, of decoding it. Decoded over the same steps at η = 0 and the
    same guidance it gives the picture back, the closer the more steps. Transparency becomes white. Raises ValueError,
    TypeError, or FileNotFoundError for what is no picture.
    """
    settings = ddim_settings(pipe, steps, guidance_scale)
    rows = [images] if isinstance(images, Picture) else list(images)
    if not rows:
        raise ValueError("no pictures came; give at least one.")
    pictures = [square(image, _side_seen(pipe), frame) for image in rows]
    x0 = torch.cat([on_white(picture, _side_drawn(pipe)) for picture in pictures])
    z_i = pipe.encode_image(pictures)
    assert isinstance(settings.steps, tuple)  # ddim_settings
    settings = replace(settings, solver="ddim_inverse", steps=settings.steps[::-1])
    x_T = pipe.decode(z_i, None, [0] * len(x0), settings, callback, x0)  # no noise is drawn: seeds are for form
    return Latent(z_i.float().cpu(), x_T.cpu())


def embed(pipe: UnCLIP, source: Read, plan: Plan) -> Tensor:
    """z_i (1, d) of a picture, of a caption (the prior's, at the plan's first seed), of a latent."""
    if isinstance(source, Latent):
        return source.z_i
    if isinstance(source, Image.Image):
        return pipe.encode_image(square(source, _side_seen(pipe), plan.frame)).float().cpu()
    settings = plan.settings["prior"]
    return embed_prompts(pipe, [source], plan.seeds[:1], settings, plan.callback, plan.negative).z_i.cpu()


def locate(pipe: UnCLIP, source: Read, plan: Plan) -> Latent:
    """The latent of a picture, by inversion; of a caption, the prior's z_i and x_T of the plan's first seed."""
    if isinstance(source, Latent):
        return source
    if isinstance(source, Image.Image):
        return invert(pipe, source, plan.ddim.steps, plan.ddim.guidance_scale, plan.frame, plan.callback)
    z_i = embed(pipe, source, plan)
    return Latent(z_i, draw_x_T(pipe, z_i, plan.seeds[:1], plan.ddim, plan.callback))


@torch.no_grad()
def mix(
    pipe: UnCLIP, sources: Sequence[Source], weights: Sequence[float] | None = None, **options: Unpack[Options]
) -> Tensor:
    """One z_i (1, d) of several pictures and captions: their weighted mean on the sphere, of two their slerp.

    weights: one for each, all 1 if left out. `pipe.vary` draws it. Raises ValueError for what does not fit.
    """
    if isinstance(sources, Source) or not sources:
        raise ValueError(f"{sources!r} came to be mixed; give a list of pictures and captions.")
    weights = [1.0] * len(sources) if weights is None else weights
    if len(weights) != len(sources):
        raise ValueError(f"{len(sources)} sources came with {len(weights)} weights; give one weight for each.")
    read = [read_source(pipe, source) for source in sources]
    plan = make_plan(pipe, options, hears=heard_by(*read))
    return weighted_mean(torch.stack([embed(pipe, source, plan) for source in read]), weights)


# ------------------------------------------------------------------------------------------------ operations


@torch.no_grad()
def vary(
    pipe: UnCLIP,
    source: Source | Tensor,
    n: int = 4,
    eta: float = 1.0,
    keep_alpha: bool = False,
    **options: Unpack[Options],
) -> UnCLIPOutput:
    """n pictures with the source's z_i and x_T: what CLIP saw stays, the rest is drawn anew as far as η goes (§3.1).

    source: a picture, a caption, a latent, or a z_i (1, d), such as `mix` gives, whose x_T is drawn; eta: from 0,
    which reconstructs the picture n times, to 1; keep_alpha: results get the picture's transparency. Result i has the
    seed seed + i.
    """
    width = pipe.decoder.config["z_i_width"]
    if isinstance(source, Tensor) and tuple(source.shape) != (1, width):
        raise ValueError(f"z_i is {tuple(source.shape)}; give (1, {width}), and n for several pictures of it.")
    given = source if isinstance(source, Tensor) else read_source(pipe, source)
    plan = make_plan(pipe, options, n, heard_by(given))
    settings = ddim_settings(pipe, plan.ddim.steps, plan.ddim.guidance_scale, eta)
    alpha = _alpha_of(given, plan) if keep_alpha else None
    if isinstance(given, Tensor):
        z_i = given.expand(n, -1)
        latent = Latent(z_i, draw_x_T(pipe, z_i, plan.seeds, plan.ddim, plan.callback))
    else:
        latent = locate(pipe, given, plan).repeat(n)
    x = pipe.decode(latent.z_i, None, plan.seeds, settings, plan.callback, latent.x_T)
    return _finish(pipe, x, latent.z_i, plan.seeds, plan, alpha)


@torch.no_grad()
def interpolate(
    pipe: UnCLIP,
    a: Source,
    b: Source,
    n: int = 8,
    x_T: Literal["slerp", "fixed"] = "slerp",
    **options: Unpack[Options],
) -> UnCLIPOutput:
    """n pictures from a to b, each a picture, a caption or a latent, by slerp of z_i (§3.2).

    x_T: "slerp" goes from a's to b's, so that the ends are the reconstructions of both; "fixed" is one drawn from the
    seed, so that only what CLIP sees changes. All pictures have the one seed.
    """
    if isinstance(n, bool) or not isinstance(n, int) or n < 2:
        raise ValueError(f"n is {n!r}; an interpolation has at least its 2 ends.")
    if x_T not in ("slerp", "fixed"):
        raise ValueError(f"x_T is {x_T!r}; give 'slerp' or 'fixed'.")
    ends = [read_source(pipe, source) for source in (a, b)]
    plan, t = make_plan(pipe, options, hears=heard_by(*ends)), torch.linspace(0, 1, n, dtype=torch.float64)
    if x_T == "fixed":
        z_a, z_b = (embed(pipe, source, plan).expand(n, -1) for source in ends)
        z_i = slerp(z_a, z_b, t)
        latent = Latent(z_i, draw_x_T(pipe, z_i, plan.seeds * n, plan.ddim, plan.callback))
    else:
        start, end = (locate(pipe, source, plan).repeat(n) for source in ends)
        latent = Latent(slerp(start.z_i, end.z_i, t), slerp(start.x_T, end.x_T, t))
    x = pipe.decode(latent.z_i, None, plan.seeds * n, plan.ddim, plan.callback, latent.x_T)
    return _finish(pipe, x, latent.z_i, plan.seeds * n, plan)


@torch.no_grad()
def edit(
    pipe: UnCLIP,
    source: Source,
    caption: str,
    from_caption: str | None = None,
    strengths: Sequence[float] = STRENGTHS,
    keep_alpha: bool = False,
    **options: Unpack[Options],
) -> UnCLIPOutput:
    """Text diffs (§3.3): z_i turned towards z_d = norm(z_t − z_t0) by slerp(z_i, z_d, θ), x_T as it was.

    caption: what the picture shall show, z_t; from_caption: what it shows, z_t0, the empty caption if left out;
    strengths: θ of each result, 0 … 1; 0 reconstructs, the paper goes up to 0.25 … 0.5. Raises ValueError where both
    captions are one, or one has parts or a weight.
    """
    said = [plain(caption), plain(from_caption) if from_caption else ""]
    strengths, read = check_fractions("a strength", strengths), read_source(pipe, source)
    plan = make_plan(pipe, options, hears=heard_by(read))
    alpha = _alpha_of(read, plan) if keep_alpha else None
    z_t, z_t0 = (F.normalize(pipe.encode_text(caption).z_t.float(), dim=-1).cpu() for caption in said)
    direction = text_difference(z_t, z_t0)
    n = len(strengths)
    latent = locate(pipe, read, plan).repeat(n)
    # as long as z_i is: not every CLIP's embeddings have unit norm
    direction = direction * latent.z_i.norm(dim=-1, keepdim=True)
    z_i = slerp(latent.z_i, direction, torch.tensor(strengths, dtype=torch.float64))
    x = pipe.decode(z_i, None, plan.seeds * n, plan.ddim, plan.callback, latent.x_T)
    return _finish(pipe, x, z_i, plan.seeds * n, plan, alpha)


@torch.no_grad()
def reconstruct(
    pipe: UnCLIP,
    source: Source,
    components: Sequence[int] | None = None,
    keep_alpha: bool = False,
    **options: Unpack[Options],
) -> UnCLIPOutput:
    """Pictures of z_i's first principal components alone (§4, Fig. 7), all from the noise of one seed.

    components: how many, for each result; the paper's counts as far as the model's basis goes, and all, if left out. A
    projected z_i is brought back to its norm. Raises ValueError where the model has no basis, or not so many.
    """
    read, counts = read_source(pipe, source), component_counts(pipe, components)
    plan = make_plan(pipe, options, hears=heard_by(read))
    alpha = _alpha_of(read, plan) if keep_alpha else None
    z_i = embed(pipe, read, plan)
    basis: Any = pipe.pca
    parts = torch.cat([basis.project(z_i.to(basis.mean.device), k).cpu() for k in counts])
    parts = F.normalize(parts, dim=-1) * z_i.norm(dim=-1, keepdim=True)
    seeds = plan.seeds * len(counts)
    x_T = draw_x_T(pipe, parts, seeds, plan.ddim, plan.callback)
    x = pipe.decode(parts, None, seeds, plan.ddim, plan.callback, x_T)
    return _finish(pipe, x, parts, seeds, plan, alpha)


@torch.no_grad()
def study(pipe: UnCLIP, caption: str, n: int = 4, **options: Unpack[Options]) -> dict[str, UnCLIPOutput]:
    """What the prior is for (§5.1, Fig. 8): n pictures, from the same noise, by three conditions of the same decoder.

    "caption": the caption alone, z_i dropped; "text embedding": the caption, and its z_t in z_i's place; "prior": the
    caption and the prior's z_i, which is what `pipe(caption)` draws; `image_embeds` of the first are zeros. Raises
    ValueError for parts or weights.
    """
    plan, caption = make_plan(pipe, options, n), plain(caption)
    text = TextFeatures(*(x.repeat_interleave(n, 0) for x in pipe.encode_text(caption)))
    z_i = pipe.sample_z_i(text, plan.seeds, plan.settings["prior"], plan.callback, plan.negative)
    results = {}
    for name, given in {"caption": None, "text embedding": text.z_t.float(), "prior": z_i}.items():
        x = pipe.decode(given, text, plan.seeds, plan.settings["decoder"], plan.callback, negative=plan.negative)
        results[name] = _finish(pipe, x, torch.zeros_like(z_i) if given is None else given, plan.seeds, plan)
    return results


@torch.no_grad()
def probe(
    pipe: UnCLIP,
    image: Picture,
    labels: Sequence[str],
    n: int = 4,
    eta: float = 1.0,
    keep_alpha: bool = False,
    **options: Unpack[Options],
) -> Probe:
    """Typographic attacks (§4, Fig. 6): variations of a picture, and CLIP's probability of each label for all of them.

    A variation is judged as the decoder drew it, before the upsamplers. Raises ValueError for less than two labels.
    """
    labels = check_labels(labels)
    picture = square(image, _side_seen(pipe), make_plan(pipe, options, n, ()).frame)
    output = vary(pipe, image, n, eta, keep_alpha, **options)
    seen = (on_white(picture), as_pixels(output.stages[_side_drawn(pipe)]))
    probabilities = [pipe.clip.zero_shot(x.to(pipe.clip.device), labels).float().cpu() for x in seen]
    return Probe(output, torch.cat(probabilities))


@torch.no_grad()
def img2img(
    pipe: UnCLIP,
    image: Picture,
    prompt: str,
    strength: float = 0.5,
    n: int = 1,
    keep_alpha: bool = False,
    **options: Unpack[Options],
) -> UnCLIPOutput:
    """n pictures of the prompt that start from the picture, noised, in noise's place (SDEdit, arXiv 2108.01073).

    strength: the noise level at which the decoder takes over: 0 leaves the picture, 1 draws as `pipe(prompt)` does.
    """
    (strength,) = check_fractions("strength", [strength])
    plan, picture = make_plan(pipe, options, n), load_image(image)
    alpha = _alpha_of(picture, plan) if keep_alpha else None
    x = on_white(square(picture, _side_drawn(pipe), plan.frame)).expand(n, -1, -1, -1)
    given = (plan.seeds, plan.settings["prior"], plan.callback, plan.negative)
    conditions = embed_prompts(pipe, check_prompts(prompt), *given)
    settings = plan.settings["decoder"]
    if steps := _steps_below(pipe, settings, strength):
        diffusion = Diffusion.from_scheduler(pipe.decoder_scheduler)
        x_t = diffusion.add_noise(x, draw_noise(pipe, plan.seeds), torch.full((n,), steps[0]))
        settings = replace(settings, steps=steps)
        x = decode_prompts(pipe, conditions, plan.seeds, settings, plan.callback, plan.negative, x_t)
    return _finish(pipe, x, conditions.z_i, plan.seeds, plan, alpha)


def component_counts(pipe: UnCLIP, components: Sequence[int] | None = None) -> list[int]:
    """What `reconstruct` draws. Raises ValueError where the model has no basis, or not so many components."""
    basis: Any = getattr(pipe, "pca", None)
    if basis is None:
        raise ValueError("this model has no principal components; fit them by `unclip pca fit`.")
    most = len(basis.components)
    counts = [*(k for k in COMPONENTS if k < most), most] if components is None else components
    if (
        not isinstance(counts, Sequence)
        or not counts
        or any(isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= most for k in counts)
    ):
        raise ValueError(
            f"components are {counts}; this model has {most}, give a list of whole numbers from 1 to that."
        )
    return list(counts)


def check_labels(labels: Sequence[str]) -> list[str]:
    """Raises TypeError or ValueError unless there are two labels or more, each with words and none twice."""
    empty = any(not str(label).strip() for label in labels)
    if isinstance(labels, str) or len(set(labels)) < max(2, len(labels)) or empty:
        raise ValueError(f"labels are {labels!r}; give a list of two or more, each another and none empty.")
    return check_prompts(labels)


# ------------------------------------------------------------------------------------------------ inside


def _side_drawn(pipe: UnCLIP) -> int:
    return pipe.sizes[0]


def _side_seen(pipe: UnCLIP) -> int:
    """Of the square that a picture is brought to: what CLIP sees, or what the decoder draws where that is more."""
    return max(pipe.clip.image_size, _side_drawn(pipe))


def _steps_below(pipe: UnCLIP, settings: StageSettings, strength: float) -> tuple[int, ...]:
    """The highest step below a part of the noise levels, then those of the decoder after all that are above it."""
    sampler = pipe.sampler("decoder", settings)
    steps = resolve_timesteps(sampler, settings.steps)
    level = round(strength * int(sampler.config["num_train_timesteps"]), 6)  # 0.55 · 1000 is a hair above 550
    first = math.ceil(level) - 1
    above = [i for i, t in enumerate(steps) if t >= first]
    return (first, *steps[above[-1] + 1 if above else 0 :]) if first >= 0 else ()


def _alpha_of(source: Read | Tensor, plan: Plan) -> Image.Image:
    """The picture whose transparency results get. Raises ValueError where there is none."""
    if not isinstance(source, Image.Image) or plan.output_type != "pil":
        raise ValueError(
            "keep_alpha came without a picture to keep it of, or for other than PIL pictures; leave it out."
        )
    return source


def _finish(
    pipe: UnCLIP, x: Tensor, z_i: Tensor, seeds: list[Seed], plan: Plan, alpha_of: Image.Image | None = None
) -> UnCLIPOutput:
    """The decoder's pictures at the size asked for, with the transparency of a picture if one is given."""
    output = finish(pipe, x, z_i, seeds, plan.size, plan.settings, plan.output_type, plan.callback)
    if alpha_of is not None:
        for pictures in output.stages.values():
            assert isinstance(pictures, list)  # _alpha_of
            pictures[:] = with_alpha(pictures, alpha_of, plan.frame)
    return output
