"""Sampling: one loop over diffusers' schedulers, guidance, and one generator per picture.

Every list of timesteps is right for every scheduler: the loop runs a copy of the scheduler whose chain consists of the
kept steps alone, with the kept ᾱ, so that a step of the copy always goes to its neighbour (Improved DDPM §4).
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal, TypeVar

import torch
from diffusers import (
    DDIMInverseScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    UnCLIPScheduler,
    UniPCMultistepScheduler,
)
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from unclip.core.analytic import AnalyticDDPMScheduler
from unclip.core.diffusion import Diffusion

Denoise = Callable[[Tensor, Tensor], Tensor]
Callback = Callable[[int, int, Tensor], None]
Context = TypeVar("Context")
Seed = int | torch.Generator
Solver = Literal["ddpm", "analytic", "ddim", "ddim_inverse", "dpm++", "dpm++sde", "unipc", "unclip"]

SOLVERS: dict[str, tuple[type, dict[str, Any]]] = {
    "ddpm": (DDPMScheduler, {}),
    "analytic": (AnalyticDDPMScheduler, {"variance_type": "fixed_small"}),
    "ddim": (DDIMScheduler, {"set_alpha_to_one": True}),
    "dpm++": (DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++"}),
    "dpm++sde": (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
    "unipc": (UniPCMultistepScheduler, {"solver_type": "bh2"}),
    "unclip": (UnCLIPScheduler, {}),
}
# From a picture to noise. A clamped x0 has no way back: neither an inversion nor decoding what it gave may clamp.
INVERSE = {"ddim_inverse": (DDIMInverseScheduler, {"set_alpha_to_one": True, "clip_sample": False})}
ANCESTRAL = (DDPMScheduler, UnCLIPScheduler)
# Both end at σ = 0 by a step of first order, the only one that is finite there.
MULTISTEP = (DPMSolverMultistepScheduler, UniPCMultistepScheduler)
SPACED_BY_SIGMA = (
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "use_lu_lambdas",
    "use_flow_sigmas",
)


# Schedulers


def make_sampler(scheduler_or_config: Any, solver: Solver = "ddpm", **options: Any) -> Any:
    """The diffusers scheduler that samples what a stored scheduler was trained for.

    Schedule, prediction type, spacing and clamping come from the stored one; `options` are fields of the new one's
    config that replace them (`timestep_spacing="linspace"`, `solver_order=3`, `clip_sample=False`). `clip_sample` and
    `clip_sample_range` are kept in the config of every solver, and `sample` obeys them.
    Raises ValueError for an unknown solver or option, or what a solver cannot do (UnCLIPScheduler: v, linear schedule).
    """
    if solver not in SOLVERS | INVERSE:
        raise ValueError(f"solver {solver!r} is unknown, expected one of {', '.join(SOLVERS)}")
    config = getattr(scheduler_or_config, "config", scheduler_or_config)
    if not isinstance(config, Mapping):
        raise TypeError(f"got {type(config).__name__}, expected a diffusers scheduler or its config")
    cls, fixed = (SOLVERS | INVERSE)[solver]
    known = inspect.signature(cls.__init__).parameters.keys() - {"self"}
    unknown = options.keys() - known - {"clip_sample", "clip_sample_range"}
    if unknown:
        raise ValueError(f"solver {solver!r} has no option {', '.join(sorted(unknown))}")
    wanted = {"timestep_spacing": "trailing", **config, **fixed, **options}
    if cls in MULTISTEP:
        wanted |= {"final_sigmas_type": "zero", "lower_order_final": True}
        # Given "learned_range", DPMSolverMultistepScheduler cuts to three channels; `sample` cuts to the right number.
        wanted.pop("variance_type", None)
    if cls is UnCLIPScheduler:
        if wanted.get("prediction_type") == "v_prediction":
            raise ValueError("UnCLIPScheduler cannot sample v_prediction: take solver 'ddpm', whose steps are the same")
        learned = wanted.get("variance_type") == "learned_range"
        wanted["variance_type"] = "learned_range" if learned else "fixed_small_log"
    sampler = cls(**{name: value for name, value in wanted.items() if name in known})
    clip = {name: wanted[name] for name in ("clip_sample", "clip_sample_range") if name in wanted}
    sampler.register_to_config(**clip)
    return sampler


def resolve_timesteps(scheduler: Any, timesteps: int | Sequence[int]) -> list[int]:
    """The steps a run visits: a count by the scheduler's own spacing, or the list itself, checked.

    A list runs over 0 … num_train_timesteps − 1; it may go back up, but ends lower than it came. An inversion's rises
    all the way: it is DDIM's own grid walked the other way. Raises ValueError.
    """
    if isinstance(scheduler, DDIMInverseScheduler):
        grid = timesteps if isinstance(timesteps, int) else list(reversed(timesteps))
        steps = resolve_timesteps(DDIMScheduler.from_config(scheduler.config), grid)[::-1]
        if any(b < a for a, b in pairwise(steps)):
            raise ValueError(f"timesteps {steps} of an inversion go down: each must be higher than the one before")
        return steps
    total = int(scheduler.config["num_train_timesteps"])
    spaced = [name for name in SPACED_BY_SIGMA if scheduler.config.get(name)]
    if spaced:
        raise ValueError(f"{spaced[0]} leaves the training steps: turn it off and give a list of timesteps instead")
    if isinstance(timesteps, int):
        if not 1 <= timesteps <= total:
            raise ValueError(f"{timesteps} sampling steps asked for, expected 1 to {total}")
        if timesteps in (1, total):
            # Where the spacings divide by zero, or start at 0.
            return list(range(total - 1, -1, -1))[:timesteps]
        own = type(scheduler).from_config(scheduler.config)
        own.set_timesteps(timesteps)
        # "trailing" may name −1 where its float steps add up to a little less than the whole.
        return [int(t) for t in own.timesteps if t >= 0]
    steps = [int(t) for t in timesteps]
    if not steps or min(steps) < 0 or max(steps) >= total:
        raise ValueError(f"timesteps {steps} must be a list of at least one step within 0 to {total - 1}")
    if any(a == b for a, b in pairwise(steps)):
        raise ValueError(f"timesteps {steps} repeat a step: each must be lower than the one before, or go back up")
    if len(steps) > 1 and steps[-1] > steps[-2]:
        raise ValueError(f"timesteps {steps} end by going up: they must end going down")
    return steps


def respaced(scheduler: Any, steps: Sequence[int]) -> Any:
    """A fresh copy of the scheduler whose chain is `steps`, falling: its step k is steps[−1−k], its ᾱ_k the kept ᾱ."""
    count = len(steps)
    kept = scheduler.alphas_cumprod.cpu()[list(reversed(steps))]
    if isinstance(scheduler, UnCLIPScheduler):
        return _respaced_unclip(scheduler, list(reversed(steps)), kept)
    kept = kept.double()
    options = {"num_train_timesteps": count, "trained_betas": None, "timestep_spacing": "trailing", "steps_offset": 0}
    if isinstance(scheduler, MULTISTEP):
        options |= {"final_sigmas_type": "zero", "lower_order_final": True, "lambda_min_clipped": -float("inf")}
        options["variance_type"] = None
    if isinstance(scheduler, DDIMInverseScheduler):
        options["prediction_type"] = "epsilon"  # `sample` hands it ε: at ᾱ = 1, where it starts, x0 gives none
    if isinstance(scheduler, AnalyticDDPMScheduler):
        options["x0_variance"] = [scheduler.config["x0_variance"][step] for step in reversed(steps)]
    copy: Any = type(scheduler).from_config(scheduler.config, **options)
    alphas = kept / torch.cat([kept.new_ones(1), kept[:-1]])
    # ᾱ is set, not computed anew from β: where β is close to 1, 1 − β has no digits left in float32.
    copy.alphas_cumprod, copy.alphas, copy.betas = kept.float(), alphas.float(), (1 - alphas).float()
    if isinstance(scheduler, DDIMScheduler):  # in double: at η = 1 its 1 − ᾱ − σ² is next to 0, and its root was NaN
        copy.alphas_cumprod, copy.final_alpha_cumprod = kept, scheduler.final_alpha_cumprod
    copy.set_timesteps(count)
    return copy


def _respaced_unclip(scheduler: UnCLIPScheduler, rising: list[int], kept: Tensor) -> UnCLIPScheduler:
    """β and α as this scheduler computes them where it is told of a skip, in float32: its pictures to the last bit."""
    copy: Any = UnCLIPScheduler.from_config(scheduler.config, num_train_timesteps=len(rising))
    skips = 1 - kept / torch.cat([kept.new_ones(1), kept[:-1]])
    adjacent = torch.tensor([step == previous + 1 for previous, step in pairwise([-1, *rising])])
    copy.alphas_cumprod = kept
    copy.betas = torch.where(adjacent, scheduler.betas.cpu()[rising], skips)
    copy.alphas = torch.where(adjacent, scheduler.alphas.cpu()[rising], 1 - skips)
    return copy


def _falling_runs(steps: Sequence[int]) -> list[list[int]]:
    runs = [[steps[0]]]
    for previous, step in pairwise(steps):
        if step > previous:
            runs.append([step])
        else:
            runs[-1].append(step)
    return runs


# The loop


@torch.no_grad()
def sample(
    denoise: Denoise,
    scheduler: Any,
    x_T: Tensor,
    timesteps: int | Sequence[int],
    generators: Sequence[torch.Generator],
    callback: Callback | None = None,
    *,
    eta: float = 0.0,
) -> Tensor:
    """From noise to x0, (b, c, …), in x_T's dtype.

    denoise(x_t, t) is called with x_t in float32, (b, c, …), and t (b,), and returns the network's prediction,
    (b, c, …), or with variance channels, (b, 2c, …), which go to schedulers that use them and are cut for the others.
    timesteps: how many (the scheduler's own spacing), or which. From each step the run goes to the next in the list,
    from the last to x0. Where the list goes back up, x_t is noised forward to the higher level by the ratio of the two
    ᾱ (resampling), without a call of the network. With "ddim_inverse" x_T is a picture, the list rises, and what comes
    back is the x_T from which "ddim" over the same list, falling, leads to the picture (§3 of the paper).
    generators: one per picture; all noise of picture i comes from generator i.
    callback(i, t, x_t): after call number i of the network, from 0: the step it was called at, and the state reached.
    eta: DDIM's η in [0, 1]; 0 is deterministic.
    The config's `clip_sample` holds for every scheduler, by `clamped` for those that do not clamp. The scheduler is
    not changed. Raises TypeError or ValueError for what does not fit, before the first call.
    """
    _check_run(scheduler, x_T, generators, eta)
    steps = resolve_timesteps(scheduler, timesteps)
    diffusion = Diffusion.from_scheduler(scheduler).to(x_T.device)
    if diffusion.clip is not None and isinstance(scheduler, MULTISTEP):
        denoise = clamped(denoise, diffusion, diffusion.clip)
    inverts = isinstance(scheduler, DDIMInverseScheduler)
    x, runs, calls = x_T.float(), [steps] if inverts else _falling_runs(steps), 0
    for i, run in enumerate(runs):
        if i > 0:
            x = _renoise(scheduler, x, runs[i - 1][-1], run[0], list(generators))
        chain, last = respaced(scheduler, run[::-1] if inverts else run), i == len(runs) - 1
        step_options = _step_options(chain, list(generators), eta)
        for k, t in enumerate(run if last else run[:-1]):
            # An inverse step arrives at t; ε is asked for where x_t is, a step below, and at first at the lowest step.
            t = run[max(k - 1, 0)] if inverts else t
            batch_t = torch.full((len(x),), t, device=x.device, dtype=torch.long)
            output = _fit_channels(denoise(x, batch_t).float(), x, chain)
            output = diffusion.to_eps(x, output, batch_t) if inverts else output
            x = chain.step(output, k if inverts else len(run) - 1 - k, x, return_dict=False, **step_options)[0]
            if callback is not None:
                callback(calls, t, x)
            calls += 1
    return x.to(x_T.dtype)


def _check_run(scheduler: Any, x_T: Tensor, generators: Sequence[torch.Generator], eta: float) -> None:
    supported = tuple({cls for cls, _ in (SOLVERS | INVERSE).values()})
    if not isinstance(scheduler, supported):
        names = ", ".join(sorted(cls.__name__ for cls in supported))
        raise TypeError(f"cannot sample with {type(scheduler).__name__}, expected one of {names}: take make_sampler")
    if x_T.ndim < 2 or not x_T.is_floating_point():
        raise ValueError(f"x_T is {x_T.dtype} {tuple(x_T.shape)}, expected floating point of shape (b, c, …)")
    if isinstance(generators, torch.Generator) or len(generators) != len(x_T):
        count = 1 if isinstance(generators, torch.Generator) else len(generators)
        raise ValueError(f"got {count} generators for {len(x_T)} pictures: give a list with one for each")
    if not 0 <= eta <= 1 or (eta > 0 and not isinstance(scheduler, DDIMScheduler)):
        raise ValueError(f"eta {eta} with {type(scheduler).__name__}: it must be within 0 to 1, and 0 except with DDIM")


def _step_options(chain: Any, generators: list[torch.Generator], eta: float) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if "generator" in inspect.signature(chain.step).parameters:
        options["generator"] = generators
    if isinstance(chain, DDIMScheduler):
        # ε is made anew from the clamped x0, as in GLIDE; without clamping that changes nothing.
        clips = bool(chain.config["clip_sample"] or chain.config["thresholding"])
        options |= {"eta": eta, "use_clipped_model_output": clips}
    return options


def _fit_channels(output: Tensor, x: Tensor, chain: Any) -> Tensor:
    channels = x.shape[1]
    uses_variance = isinstance(chain, ANCESTRAL) and chain.config["variance_type"] == "learned_range"
    allowed = (2 * channels,) if uses_variance else (channels, 2 * channels)
    if output.shape[1] not in allowed or output.shape[2:] != x.shape[2:] or len(output) != len(x):
        raise ValueError(
            f"denoise returned {tuple(output.shape)} for x_t {tuple(x.shape)}, expected that shape with "
            f"{' or '.join(map(str, allowed))} channels (variance_type is {chain.config.get('variance_type')!r})"
        )
    return output if uses_variance else output[:, :channels]


def _renoise(scheduler: Any, x: Tensor, low: int, high: int, generators: list[torch.Generator]) -> Tensor:
    ratio = float(scheduler.alphas_cumprod[high]) / float(scheduler.alphas_cumprod[low])
    noise = randn_tensor(x.shape, generator=generators, device=x.device, dtype=x.dtype)
    return ratio**0.5 * x + (1 - ratio) ** 0.5 * noise


# What a denoiser is made of


def guided(
    net: Callable[..., Tensor],
    context: Context,
    null_context: Context | None = None,
    guidance_scale: float = 1.0,
    interval: tuple[int, int] | None = None,
) -> Denoise:
    """Classifier-free guidance: denoise(x_t, t) → ε_∅ + s·(ε_c − ε_∅) by one call of 2b, [null, conditional].

    One call of b where the scale is 1 or there is no null context (conditional), where it is 0 (null alone), and, given
    an interval (lowest t, highest t), outside it (conditional). Variance channels are the conditional half's.

    The formula is applied to whatever the network predicts. That is the same as guiding ε: at given x_t and t, ε, x0
    and v are affine functions of each other, f(y) = p·y + q, and the weights 1 − s and s of the halves sum to 1, so
    f((1−s)·y_∅ + s·y_c) = (1−s)·f(y_∅) + s·f(y_c). (Clamping x0 is not affine: it comes after, once.)

    net: net(x_t, t, context) → (b, c, …) or (b, 2c, …); x_t is cast to `net.dtype` if any, the result to float32.
    """
    if interval is not None and interval[0] > interval[1]:
        raise ValueError(f"interval {interval} must be (lowest t, highest t)")
    both = None
    if null_context is not None and guidance_scale not in (0, 1):
        both = cat_contexts(null_context, context)

    def call(x_t: Tensor, t: Tensor, of: Any) -> Tensor:
        return net(x_t.to(getattr(net, "dtype", x_t.dtype)), t, of).float()

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        inside = interval is None or interval[0] <= int(t[0]) <= interval[1]
        if null_context is None or guidance_scale == 1 or not inside:
            return call(x_t, t, context)
        if guidance_scale == 0:
            return call(x_t, t, null_context)
        null, conditional = call(torch.cat([x_t, x_t]), torch.cat([t, t]), both).chunk(2)
        channels = x_t.shape[1]
        prediction = torch.lerp(null[:, :channels], conditional[:, :channels], guidance_scale)
        return torch.cat([prediction, conditional[:, channels:]], dim=1)

    return denoise


def clamped(denoise: Denoise, diffusion: Diffusion, limit: float = 1.0) -> Denoise:
    """A denoise whose x0 lies within ±limit, in the parametrisation it had; variance channels pass through."""
    if limit <= 0:
        raise ValueError(f"limit {limit} must be positive")

    def clamp(x_t: Tensor, t: Tensor) -> Tensor:
        output = denoise(x_t, t)
        prediction, variance = output[:, : x_t.shape[1]], output[:, x_t.shape[1] :]
        x0 = diffusion.to_x0(x_t, prediction, t).clamp(-limit, limit)
        return torch.cat([diffusion.from_x0(x_t, x0, t), variance], dim=1)

    return clamp


# Contexts: NamedTuples of tensors, nested tuples and None


def map_context(fn: Callable[[Tensor], Tensor], context: Context) -> Context:
    """The context with fn applied to each of its tensors."""
    return _map(lambda tensors: fn(tensors[0]), context)


def cat_contexts(a: Context, b: Context) -> Context:
    """Two contexts of one shape joined along the batch. Raises ValueError where they differ elsewhere."""

    def cat(tensors: tuple[Tensor, ...]) -> Tensor:
        first, second = tensors
        if first.shape[1:] != second.shape[1:]:
            raise ValueError(f"contexts of {tuple(first.shape)} and {tuple(second.shape)} do not join along the batch")
        return torch.cat([first, second])

    return _map(cat, a, b)


def repeat_context(context: Context, n: int) -> Context:
    """Each sample of the context n times in a row, (b, …) → (b·n, …)."""
    return map_context(lambda x: x.repeat_interleave(n, dim=0), context)


def _map(fn: Callable[[tuple[Tensor, ...]], Tensor], *contexts: Any) -> Any:
    first = contexts[0]
    if any(type(other) is not type(first) for other in contexts):
        raise ValueError(f"contexts differ: {' and '.join(type(context).__name__ for context in contexts)}")
    if first is None:
        return None
    if isinstance(first, Tensor):
        return fn(contexts)
    if not isinstance(first, tuple):
        raise TypeError(f"a context is made of tensors, tuples and None, got {type(first).__name__}")
    parts = [_map(fn, *items) for items in zip(*contexts, strict=True)]
    return type(first)(*parts) if hasattr(first, "_fields") else tuple(parts)


# Randomness


def picture_generators(seeds: Sequence[Seed], stage: str, draw: int = 0) -> list[torch.Generator]:
    """One CPU generator per picture, a function of (seed, stage name, draw): no stage's steps change another's noise.

    A generator in place of a seed is taken as it is: its stream then runs on from stage to stage.
    """
    if any(not isinstance(seed, int | torch.Generator) for seed in seeds):
        raise TypeError(f"seeds {list(seeds)} must be integers, or generators")
    name = stage if draw == 0 else f"{stage}-{draw + 1}"
    return [seed if isinstance(seed, torch.Generator) else _generator(f"{seed}:{name}") for seed in seeds]


def _generator(name: str) -> torch.Generator:
    digest = hashlib.sha256(name.encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def starting_noise(
    shape_of_one: Sequence[int],
    generators: Sequence[torch.Generator],
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """x_T, (b, *shape_of_one): row i is drawn from generator i on the CPU in float32, then moved and cast."""
    if not generators or min(shape_of_one, default=0) < 1:
        raise ValueError(f"shape {tuple(shape_of_one)} and {len(generators)} generators: both must be positive")
    noise = torch.stack([torch.randn(*shape_of_one, generator=generator) for generator in generators])
    return noise.to(device=device, dtype=dtype)
