"""One network's sampling, once its conditions are there; and what comes out of the last."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from prior.diffusion_prior import DiffusionPrior
from unclip.arguments import Callback, OutputType, Pictures, as_type, cast, finite, reporter
from unclip.clip.model import TextFeatures
from unclip.core.diffusion import Diffusion
from unclip.core.masks import known_channels
from unclip.core.sampling import (
    INVERSE,
    Denoise,
    Seed,
    guided,
    map_context,
    picture_generators,
    repeat_context,
    resolve_timesteps,
    sample,
    starting_noise,
)
from unclip.folder import fingerprint
from unclip.presets import StageSettings
from upsamplers.tiles import Tiled
from upsamplers.upsampler import Upsampler

if TYPE_CHECKING:
    from unclip.pipeline import UnCLIP


@dataclass
class UnCLIPOutput:
    """What a call returns; every list runs over prompts, then over each prompt's pictures.

    images: pictures at the size asked for; stages: the same at every size up to it, by side; image_embeds: z_i (b, d);
    seeds: of each picture. Pictures are PIL images ("pil"), float arrays (b, h, w, 3) in [0, 1] ("np"), or float
    tensors (b, 3, h, w) in [−1, 1] ("pt"). In place of a generator's picture's seed stands the generator's.
    """

    images: Pictures
    image_embeds: Tensor
    stages: dict[int, Pictures]
    seeds: list[int]


class Known(NamedTuple):
    """What stays of a picture: x0 (1, 3, s, s) in [−1, 1], and keep (1, 1, s, s) bool, true where x0 is known.

    shown: whether networks that have channels for it see it, beside its being put in place.
    """

    x0: Tensor
    keep: Tensor
    shown: bool = True

    def at(self, side: int) -> Known:
        """The same at a side that this one's is a multiple of; a pixel is known where all it is made of is."""
        factor = self.x0.shape[-1] // side
        keep = F.max_pool2d((~self.keep).float(), factor) == 0
        return self._replace(x0=F.avg_pool2d(self.x0, factor), keep=keep)


def run_stage(
    pipe: UnCLIP,
    name: str,
    conditions: Mapping[str, Tensor],
    shape: tuple[int, ...],
    seeds: Sequence[Seed],
    settings: StageSettings,
    callback: Callback | None,
    x_T: Tensor | None = None,
    negative: str | None = None,
    known: Known | None = None,
    draws: int = 1,
) -> Tensor:
    """One network's sampling, `batch_size` pictures at a time, in float32 on the network's device.

    Where the pipeline has a network `<name>_last`, that one makes the last step. negative: a prompt in the place of
    none, for the unconditional half of guidance; known: pixels that all pictures share; draws: how often all rows are
    drawn, from one context and noise of each draw's own. Returns (draws · b, *shape), draw after draw.
    """
    net, last, at_once = getattr(pipe, name), getattr(pipe, f"{name}_last", None), pipe.batch_size[name]
    scheduler = pipe.sampler(name, settings)
    steps = resolve_timesteps(scheduler, settings.steps)
    rises = 0 if settings.solver in INVERSE else sum(b > a for a, b in pairwise(steps))
    device, against = place(net), None
    if negative and negative.strip() and "text" in conditions and settings.guidance_scale != 1:
        conditions, against = padded_alike(conditions, caption(pipe, [negative], conditions["text"].shape[1]))
    step = net if pipe.tile is None or not isinstance(net, Upsampler) else Tiled(net, pipe.tile)
    end = last if pipe.tile is None or last is None else Tiled(last, pipe.tile)
    scale, interval = settings.guidance_scale, settings.guidance_interval
    results: list[list[Tensor]] = [[] for _ in range(draws)]
    batches = -(-len(seeds) // at_once)
    for batch in range(batches):
        rows = slice(batch * at_once, (batch + 1) * at_once)
        context = encode_rows(net, {k: cast(v[rows], device, net.dtype) for k, v in conditions.items()})
        null = null_context(pipe, name, conditions, len(seeds[rows]), against) if scale != 1 else None
        if known is not None and known.shown and net.inpaint:
            seen = known_channels(known.x0, known.keep).to(device, net.dtype).expand(len(seeds[rows]), -1, -1, -1)
            context, null = (c if c is None else c._replace(known=seen) for c in (context, null))
        denoise = guided(step, at_steps(net, context, steps), at_steps(net, null, steps), scale, interval)
        if end is not None:
            denoise = ending(denoise, guided(end, context, null, scale, interval), steps[-1])
        if known is not None:
            denoise = keeping(denoise, Diffusion.from_scheduler(scheduler).to(device), known)
        for draw in range(draws):
            generators = picture_generators(seeds[rows], name, draw)
            drawn = starting_noise(shape, generators)  # also where x_T is given: the rest of the stream stays put
            noise = (drawn if x_T is None else x_T[rows].float()).to(device)
            report = reporter(callback, name, len(steps) - rises, batch * draws + draw, batches * draws)
            results[draw].append(sample(denoise, scheduler, noise, steps, generators, report, eta=settings.eta))
    x = finite(torch.cat([part for parts in results for part in parts]), name, net.dtype)
    return x if known is None else torch.where(known.keep.to(device), known.x0.to(device), x)


def run_autoregressive(
    pipe: UnCLIP,
    conditions: Mapping[str, Tensor],
    seeds: Sequence[Seed],
    settings: StageSettings,
    callback: Callback | None,
    negative: str | None = None,
    draws: int = 1,
) -> Tensor:
    """The autoregressive prior's z_i (draws · b, d) in float32, whose norm is not made 1; otherwise as `run_stage`."""
    net: Any = pipe.prior_ar
    at_once, device, away = pipe.batch_size["prior"], place(net), None
    if unknown := settings.options.keys() - {"temperature", "top_p"}:
        raise ValueError(f"the autoregressive prior has no option {min(unknown)!r}, but temperature and top_p.")
    if negative and negative.strip() and settings.guidance_scale != 1:
        conditions, against = padded_alike(conditions, caption(pipe, [negative], conditions["text"].shape[1]))
        away = {k: cast(v, device, net.dtype) for k, v in against.items()}
    results, batches = [], -(-len(seeds) // at_once)
    for part in range(draws * batches):
        draw, batch = divmod(part, batches)
        rows = slice(batch * at_once, (batch + 1) * at_once)
        z_i = net.sample(
            **{k: cast(v[rows], device, net.dtype) for k, v in conditions.items()},
            generators=picture_generators(seeds[rows], "prior", draw),
            guidance_scale=settings.guidance_scale,
            callback=reporter(callback, "prior", net.components, part, draws * batches),
            negative=away and {k: v.expand(len(seeds[rows]), *v.shape[1:]) for k, v in away.items()},
            **settings.options,
        )
        results.append(z_i)
    return finite(torch.cat(results), "prior_ar", net.dtype)


def decoder_conditions(
    pipe: UnCLIP, z_i: Tensor | None, text: TextFeatures | None, rows: int, negative: str | None = None
) -> dict[str, Tensor]:
    """What the decoder's context is made of: z_i (b, d), text (b rows), or None for none; rows: b.

    To a decoder of z_t no caption is the empty one. To one of text alone it is a dropped one, and is left out but where
    a negative prompt needs its place.
    """
    width, z_i_width, z_t_width = (pipe.decoder.config[f"{name}_width"] for name in ("text", "z_i", "z_t"))
    conditions = {"z_i": torch.zeros(rows, z_i_width) if z_i is None else z_i}
    if z_i is None:
        conditions["drop_z_i"] = torch.ones(rows, dtype=torch.bool)
    if width is None or (text is None and not negative and z_t_width is None):
        return conditions
    if text is None:
        text = TextFeatures(*(part.expand(rows, *part.shape[1:]) for part in pipe.encode_text([""])))
        if z_t_width is None:
            conditions["drop_text"] = torch.ones(rows, dtype=torch.bool)
    conditions |= {"text": text.states, "text_mask": text.mask}
    return conditions if z_t_width is None else {**conditions, "z_t": text.z_t}


def check_prior(pipe: UnCLIP, settings: StageSettings) -> None:
    """Raises ValueError where the model lacks the prior that the settings name."""
    if settings.solver == "ar" and pipe.prior_ar is None:
        raise ValueError("this model has no autoregressive prior; give prior='diffusion'.")
    if settings.solver != "ar" and pipe.prior is None and pipe.prior_ar is not None:
        raise ValueError("this model has no diffusion prior; give prior='ar'.")
    if settings.solver != "ar" and pipe.prior is None:
        raise ValueError("this model has no prior: give image or z_i.")


def finish(
    pipe: UnCLIP,
    x: Tensor,
    z_i: Tensor,
    seeds: Sequence[Seed],
    size: int,
    settings: Mapping[str, StageSettings],
    output_type: OutputType = "pil",
    callback: Callback | None = None,
    known: Known | None = None,
) -> UnCLIPOutput:
    """The decoder's pictures x (b, 3, s, s) upsampled to `size`, and what they were drawn from; known: at `size`."""
    stages = {pipe.sizes[0]: x.cpu()}
    for side in pipe.sizes[1:]:
        if side <= size:
            kept = None if known is None else known.at(side)
            x = pipe.upsample(x, side, seeds, settings[pipe.networks[side]], callback, kept)
            stages[side] = x.cpu()
    pipe.maybe_free_model_hooks()
    pictures = {side: as_type(x, output_type) for side, x in stages.items()}
    numbers = [s.initial_seed() if isinstance(s, torch.Generator) else s for s in seeds]
    return UnCLIPOutput(pictures[size], z_i.float().cpu(), pictures, numbers)


def use_tiles(pipe: UnCLIP, side: int | None) -> None:
    """From here on upsamples in overlapping tiles of so many pixels, for less memory; None: whole pictures.

    The pictures differ a little from those upsampled whole (`upsamplers.tiles`). Raises ValueError for a side that does
    not fit the upsamplers.
    """
    for net in (pipe.upsampler_256, pipe.upsampler_1024):
        if net is not None and side is not None:
            Tiled(net, side)
    pipe.tile = side


def compile_networks(pipe: UnCLIP) -> None:
    """Compiles every diffusion network's step by torch.compile: the first call takes minutes, those after it less."""
    for name in ("prior", *pipe.networks.values(), "upsampler_256_last"):
        if getattr(pipe, name) is not None:
            getattr(pipe, name).compile()


def encode_rows(net: Any, conditions: Mapping[str, Tensor]) -> Any:
    """A network's context, in which what the pictures of one prompt share is computed once."""
    repeats = torch.stack([(v[1:] == v[:-1])[:, None].flatten(1).all(1) for v in conditions.values()]).all(0)  # b−1
    first = F.pad(~repeats, (1, 0), value=True)  # b
    context = net.encode_context(**{k: v[first] for k, v in conditions.items()})
    return context if bool(first.all()) else map_context(lambda x: x[first.cumsum(0) - 1], context)


def at_steps(net: Any, context: Any, steps: Sequence[int]) -> Any:
    """A context with what the steps of a run decide, of networks that keep any of that."""
    return context if context is None or isinstance(net, DiffusionPrior) else net.at_steps(context, steps)


def ending(denoise: Denoise, last: Denoise, step: int) -> Denoise:
    """A denoise that is `last` at `step`, and `denoise` at all others."""
    return lambda x_t, t: (last if int(t[0]) == step else denoise)(x_t, t)


def keeping(denoise: Denoise, diffusion: Diffusion, known: Known) -> Denoise:
    """A denoise that says x0 where it is known, in the parametrisation it had, and elsewhere what it said.

    Each step then leads to the known pixels at its own noise level, whatever the scheduler.
    """

    def keep(x_t: Tensor, t: Tensor) -> Tensor:
        output = denoise(x_t, t)
        channels = x_t.shape[1]
        given = diffusion.from_x0(x_t, known.x0.to(x_t), t)
        prediction = torch.where(known.keep.to(x_t.device), given, output[:, :channels])
        return torch.cat([prediction, output[:, channels:]], dim=1)

    return keep


def padded_alike(
    conditions: Mapping[str, Tensor], against: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Conditions with as many tokens as those they are guided away from, and of those what the network takes."""
    missing = against["text"].shape[1] - conditions["text"].shape[1]
    text, mask = F.pad(conditions["text"], (0, 0, 0, missing)), F.pad(conditions["text_mask"], (0, missing))
    return {**conditions, "text": text, "text_mask": mask}, {k: v for k, v in against.items() if k in conditions}


def null_context(
    pipe: UnCLIP,
    name: str,
    conditions: Mapping[str, Tensor],
    rows: int,
    against: Mapping[str, Tensor] | None = None,
) -> Any:
    """Context of no conditions, `rows` times; kept until the network's weights, dtype or device, or the number
    of tokens change.

    against: a negative prompt's conditions in the caption's place, one row; its context is not kept.
    """
    if name not in ("prior", "decoder"):
        return None
    net, kept = getattr(pipe, name), pipe._null_contexts
    empty_prompt = not net.config["learned_null"] if name == "prior" else net.config["z_t_width"] is not None
    length = conditions["text"].shape[1] if "text" in conditions else 0
    mark = (length, *fingerprint(net), *(fingerprint(pipe.clip) if empty_prompt else ()))
    of, context = kept.get(name, (None, None))
    if against is not None or of != mark:
        device = place(net)
        null = {k: torch.zeros_like(v[:1]) for k, v in conditions.items()}
        drops = [] if name == "prior" else ["drop_z_i"]
        if against is not None or empty_prompt:
            null |= against or caption(pipe, [""], length)
        elif name == "prior" or "text" in conditions:
            drops.append("drop_text")
        null |= {drop: torch.ones(1, dtype=torch.bool) for drop in drops}
        context = net.encode_context(**{k: cast(v, device, net.dtype) for k, v in null.items()})
        if against is None:
            kept[name] = (mark, context)
    return repeat_context(context, rows)


def caption(pipe: UnCLIP, prompts: Sequence[str], length: int = 0) -> dict[str, Tensor]:
    """z_t, text and text_mask of prompts, padded to `length` tokens where they are fewer."""
    text = pipe.encode_text(prompts)
    missing = max(0, length - text.mask.shape[1])
    states, mask = F.pad(text.states, (0, 0, 0, missing)), F.pad(text.mask, (0, missing))
    return {"z_t": text.z_t, "text": states, "text_mask": mask}


def place(net: Any) -> torch.device:
    """Where a network runs. Under offload its forward's hook brings it there now, for `encode_context` too."""
    hook = getattr(net, "_hf_hook", None)
    if hook is not None:
        hook.pre_forward(net)
    return getattr(hook, "execution_device", None) or net.device
