"""Checks and conversions of what comes into the pipeline and goes out of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from unclip.core.data import pil_from_pixels
from unclip.core.products import computes_bf16
from unclip.core.sampling import Seed

Picture = str | Path | Image.Image

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DTypeName = Literal["fp32", "bf16", "fp16", "auto"]
OutputType = Literal["pil", "np", "pt"]
Pictures = list[Image.Image] | np.ndarray | Tensor
MAX_SEED = 2**63 - 1
MAX_PICTURES = 10_000


class Progress(NamedTuple):
    """One call of a network: its stage, how many calls are done out of how many, and the state x_t it led to."""

    stage: str
    step: int
    total: int
    x_t: Tensor


Callback = Callable[[Progress], None]


def choose_device(device: torch.device | str | None) -> torch.device:
    """A device by name; "auto" is CUDA or MPS where there is one; None is the CPU. Raises ValueError."""
    has_mps = torch.backends.mps.is_available()
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu")
    try:
        place = torch.device(device or "cpu")
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device {device!r} is unknown; give auto, cpu, cuda or mps.") from error
    if (place.type == "cuda" and not torch.cuda.is_available()) or (place.type == "mps" and not has_mps):
        raise ValueError(f"device {str(device)!r} is not to be had on this machine; give auto or cpu.")
    return place


def choose_dtype(dtype: torch.dtype | DTypeName | None, device: torch.device) -> torch.dtype:
    """A dtype by name; None is fp32; "auto" is bf16 where the device has it natively, else fp32. Raises ValueError."""
    if dtype == "auto":
        return torch.bfloat16 if computes_bf16(device) else torch.float32
    found = DTYPES.get(dtype or "fp32") if isinstance(dtype, str | None) else dtype
    if found is None or found not in DTYPES.values():
        raise ValueError(f"dtype {dtype!r} is unknown; give fp32, bf16, fp16 or auto.")
    return found


def check_fractions(name: str, values: Sequence[float]) -> list[float]:
    """The values as floats. Raises ValueError unless there are some, all of them numbers in [0, 1]."""
    rows = values.tolist() if isinstance(values, Tensor | np.ndarray) else values
    if not isinstance(rows, Sequence) or not rows:
        raise ValueError(f"{name} came as {values!r}; give a list of numbers from 0 to 1.")
    for value in rows:
        if isinstance(value, bool) or not isinstance(value, int | float | np.number) or not 0 <= value <= 1:
            raise ValueError(f"{name} is {value!r}; give a number from 0 to 1.")
    return [float(value) for value in rows]


def check_prompts(prompt: str | Sequence[str]) -> list[str]:
    """Prompts as a list. Raises TypeError for what is no text, ValueError for an empty one or none."""
    several = isinstance(prompt, Sequence) and not isinstance(prompt, str)
    prompts: list[str] = list(prompt) if several else [prompt]  # pyright: ignore[reportAssignmentType]
    if wrong := [p for p in prompts if not isinstance(p, str)]:
        raise TypeError(f"a prompt is of type {type(wrong[0]).__name__}; give a string or a list of strings.")
    if not prompts or any(not p.strip() for p in prompts):
        raise ValueError("a prompt is empty; say what to draw.")
    return prompts


def check_request(
    prompt: str | Sequence[str] | None, image: Any, z_i: Tensor | None, num_images: int
) -> tuple[list[str] | None, list[Picture] | Tensor | None, int]:
    """Prompts, pictures to vary, and of how many of them `num_images` are asked. Raises TypeError or ValueError."""
    one = isinstance(image, Picture)
    images = [image] if one else image if isinstance(image, Tensor | None) else list(image)
    if images is not None and (z_i is not None or not len(images)):
        raise ValueError("image came empty or together with z_i; give one picture or more, or z_i.")
    if prompt is None and images is not None:
        return None, images, len(images)
    if prompt is None and z_i is not None:
        return None, None, max(1, len(z_i) // max(1, num_images if isinstance(num_images, int) else 1))
    prompts = check_prompts(prompt)  # pyright: ignore[reportArgumentType]  # None is refused there
    if images is not None and len(images) != len(prompts):
        raise ValueError(f"{len(images)} pictures came with {len(prompts)} prompts; give one prompt for each, or none.")
    return prompts, images, len(prompts)


def check_seeds(
    seed: int,
    num_images: int,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    prompts: int = 1,
) -> list[Seed]:
    """The seeds of all pictures of so many prompts, or their generators. Raises TypeError or ValueError."""
    for name, value in (("num_images", num_images), ("seed", seed)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} is {value!r}; give a whole number.")
    if not 1 <= num_images <= MAX_PICTURES:
        raise ValueError(f"num_images is {num_images}; ask for 1 to {MAX_PICTURES} pictures.")
    if isinstance(generator, Sequence):
        if len(generator) != num_images * prompts or any(g.device.type != "cpu" for g in generator):
            raise ValueError(
                f"{len(generator)} generators came for {num_images * prompts} pictures; give a list with one for each, "
                "on the CPU."
            )
        return list(generator)
    if generator is not None:
        seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    if not 0 <= seed <= MAX_SEED - num_images:
        raise ValueError(f"seed is {seed}; give one from 0 to {MAX_SEED} with room for {num_images} pictures.")
    return [seed + i for i in range(num_images)] * prompts


def check_fit(clip: Any, prior: Any, decoder: Any, *upsamplers: Any, prior_ar: Any = None, pca: Any = None) -> None:
    """Raises ValueError where widths or sizes of two components disagree, naming both numbers. Priors may be None."""
    pairs = [("the decoder's embedding width", decoder.config["z_i_width"], "CLIP's", clip.dim)]
    for net, name in ((prior, "the prior"), (prior_ar, "the autoregressive prior")):
        if net is not None:
            pairs.append((f"{name}'s embedding width", net.config["embedding_dim"], "CLIP's", clip.dim))
            pairs.append((f"{name}'s text width", net.config["text_width"], "CLIP's", clip.text_width))
    if pca is not None:
        pairs.append(("the principal components' width", pca.config["embedding_dim"], "CLIP's", clip.dim))
    if decoder.config["text_width"] is not None:
        pairs.append(("the decoder's text width", decoder.config["text_width"], "CLIP's", clip.text_width))
    if decoder.config["z_t_width"] is not None:
        pairs.append(("the decoder's text embedding width", decoder.config["z_t_width"], "CLIP's", clip.dim))
    for net in (prior, prior_ar):
        if net is not None and clip.context_length > net.config["context_length"]:
            raise ValueError(
                f"CLIP reads {clip.context_length} tokens but the prior {net.config['context_length']}; "
                "join stages trained together."
            )
    side = decoder.config["sample_size"]
    if upsamplers and upsamplers[0] is None and any(net is not None for net in upsamplers):
        raise ValueError("the second upsampler came without the first; give both or neither.")
    for net, name in zip(upsamplers, ("upsampler_256", "upsampler_1024"), strict=False):
        if net is not None:
            side *= net.config["factor"]
            pairs.append((f"the sample size of {name}", net.config["sample_size"], "what the stages before give", side))
    for one, a, other, b in pairs:
        if a != b:
            raise ValueError(
                f"{one} is {a} but {other} {'is ' if 'give' not in other else ''}{b}; join stages trained together."
            )


def dtype_name(dtype: torch.dtype) -> str:
    """What options call a dtype: "fp32", "bf16", "fp16"; of another, torch's name."""
    return {value: name for name, value in DTYPES.items()}.get(dtype, str(dtype))


def finite(x: Tensor, name: str, dtype: torch.dtype) -> Tensor:
    """x itself. Raises ValueError where it holds NaN or infinity."""
    if not bool(x.isfinite().all()):
        advice = "" if dtype == torch.float32 else "run it in fp32 (on the command line --dtype fp32), or "
        raise ValueError(f"{name} gave NaN or infinity in {dtype_name(dtype)}; {advice}check its weights.")
    return x


def quantised(x: Tensor) -> Tensor:
    """Pictures in [−1, 1] at the 256 levels of a file."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1


def as_type(x: Tensor, output_type: OutputType) -> Pictures:
    """Pictures (b, 3, h, w) in [−1, 1] as PIL images, as float arrays (b, h, w, 3) in [0, 1], or as they are."""
    if output_type == "pil":
        return pil_from_pixels(x)
    return ((x + 1) / 2).permute(0, 2, 3, 1).float().numpy() if output_type == "np" else x


def cast(x: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """On the device, and in the dtype unless it is a mask."""
    return x.to(device, dtype) if x.is_floating_point() else x.to(device)


def reporter(
    callback: Callback | None, stage: str, steps: int, part: int, parts: int
) -> Callable[[int, int, Tensor], None] | None:
    """The sampling loop's callback, for run `part` out of `parts` runs of a stage."""
    if callback is None:
        return None
    return lambda i, _, x_t: callback(Progress(stage, part * steps + i + 1, parts * steps, x_t))
