"""Inpainting and outpainting: what a mask keeps comes back as it was, the rest is drawn to go with it.

A mask is white where the picture is to be drawn anew and black where it stays. In the code it is the other way round:
`keep` is true (1) where a pixel is known. At every step the known pixels' x0 is given (`stages.keeping`). What is drawn
comes to agree with them because the network sees them, where it was tuned to (GLIDE, arXiv 2112.10741, §4.3), or else
because a stretch of noise levels is walked several times (RePaint, arXiv 2201.09865).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal, Unpack, get_args

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageChops
from torch import Tensor

from unclip.arguments import check_prompts
from unclip.core.data import MAX_PIXELS, load_image, pil_from_pixels, pixels_from_pil, tensor_from_pil
from unclip.core.sampling import resolve_timesteps
from unclip.pictures import flattened
from unclip.prompts import decode_prompts, embed_prompts
from unclip.sources import Frame, Options, Picture, make_plan
from unclip.stages import Known, UnCLIPOutput, finish

if TYPE_CHECKING:
    from unclip.pipeline import UnCLIP

Method = Literal["auto", "tuned", "replace"]
RESAMPLES = 4
STRETCH = 5  # steps that are walked again together
MAX_MARGIN = 1.0
LARGER = 8  # times the side that is drawn: a photograph is worked on at no more


@torch.no_grad()
def inpaint(
    pipe: UnCLIP,
    image: Picture,
    mask: Picture | None,
    prompt: str,
    n: int = 1,
    margin: float = 0.0,
    resamples: int | None = None,
    method: Method = "auto",
    **options: Unpack[Options],
) -> UnCLIPOutput:
    """n pictures of the prompt that keep what the mask keeps: those pixels are the given picture's at every size.

    mask: white is drawn anew, black stays; of the picture's size and any mode. None: what is transparent is drawn, and
    so are margins. margin: as a part of the sides, empty space put around the picture first (outpainting); the frame
    "pad" makes margins of a picture that is not square.

    method: "auto" shows the known pixels to each network that was tuned to see them; "tuned" asks that the decoder was;
    "replace" shows them to none. resamples: how often each stretch of noise levels is walked; more fits the parts
    together better and takes as many times as long. None: once where the decoder sees them, else 4 times. Raises
    ValueError, TypeError, FileNotFoundError for what does not fit, or where nothing is to be drawn.
    """
    resamples = check_way(pipe, method, resamples)
    plan = make_plan(pipe, options, n)
    known = read_known(image, mask, plan.size, plan.frame, margin)._replace(shown=method != "replace")
    meant = embed_prompts(pipe, check_prompts(prompt), plan.seeds, plan.settings["prior"], plan.callback, plan.negative)
    settings = plan.settings["decoder"]
    steps = resolve_timesteps(pipe.sampler("decoder", settings), settings.steps)
    settings = replace(settings, steps=resampled(steps, resamples))
    small = known.at(pipe.sizes[0])
    x = decode_prompts(pipe, meant, plan.seeds, settings, plan.callback, plan.negative, known=small)
    return finish(
        pipe, x, meant.z_i, plan.seeds, plan.size, plan.settings, plan.output_type, plan.callback, known=known
    )


def check_way(pipe: UnCLIP, method: Method, resamples: int | None) -> int:
    """How often each stretch of noise levels is walked. Raises ValueError for what is not offered."""
    if method not in get_args(Method):
        raise ValueError(f"method is {method!r}; give one of {', '.join(get_args(Method))}.")
    if method == "tuned" and not pipe.decoder.inpaint:
        raise ValueError("method is 'tuned', but this model's decoder was not tuned to inpaint; give 'auto'.")
    if resamples is None:
        return 1 if pipe.decoder.inpaint and method != "replace" else RESAMPLES
    if isinstance(resamples, bool) or not isinstance(resamples, int) or not 1 <= resamples <= 100:
        raise ValueError(f"resamples is {resamples!r}; give a whole number from 1 to 100.")
    return resamples


def resampled(steps: Sequence[int], times: int, stretch: int = STRETCH) -> tuple[int, ...]:
    """Falling steps as a list that goes back up: each `stretch` of them is walked `times` times before the next."""
    walked: list[int] = []
    for first in range(0, len(steps) - 1, stretch):
        part = steps[first : first + stretch + 1]
        walked += [*part] * (times - 1) + [*part[:-1]]
    return (*walked, steps[-1])


def read_known(image: Picture, mask: Picture | None, side: int, frame: Frame = "crop", margin: float = 0.0) -> Known:
    """A picture at side × side, and which pixels are known: no part of theirs is to be drawn. Raises ValueError."""
    if isinstance(margin, bool) or not isinstance(margin, int | float) or not 0 <= margin <= MAX_MARGIN:
        raise ValueError(
            f"margin is {margin!r}; give a number from 0 to {MAX_MARGIN:g}, a part of the picture's sides."
        )
    picture = masked(load_image(image), mask)
    whole = framed(picture, margin, frame)
    if whole.width > (most := LARGER * side):  # premultiplied: what is to be drawn colours nothing
        whole = whole.convert("RGBa").resize((most, most), Image.Resampling.BOX).convert("RGBA")
    alpha = whole.getchannel("A").resize((side, side), Image.Resampling.BILINEAR)
    keep = torch.from_numpy(np.array(alpha))[None, None] == 255  # (1, 1, side, side)
    if bool(keep.all()):
        if np.asarray(picture.getchannel("A")).min() < 255:
            raise ValueError("what is to be drawn lies outside the centre square; give frame='pad'.")
        raise ValueError("nothing is to be drawn; paint some of the mask white, or give a margin.")
    return Known(pixels_from_pil(filled(whole), side), keep)


def masked(image: Image.Image, mask: Picture | None) -> Image.Image:
    """The picture as RGBA, clear where the mask is white (from mid-grey on), opaque elsewhere; None: as it is."""
    if mask is None:
        return image.convert("RGBA")
    painted = load_image(mask)
    if painted.size != image.size:
        raise ValueError(
            f"the mask is {painted.width}×{painted.height} and the picture {image.width}×{image.height}; "
            "give a mask of the picture's size."
        )
    light = painted.convert("L")
    if painted.mode == "RGBA":  # what is clear is not painted
        light = ImageChops.multiply(light, painted.getchannel("A"))
    opaque = flattened(image)
    opaque.putalpha(light.point([255] * 128 + [0] * 128))
    return opaque


def framed(image: Image.Image, margin: float, frame: Frame) -> Image.Image:
    """An RGBA picture as a square, with clear space of `margin` times its sides around it: its centre, or all of it."""
    side = (max if frame == "pad" else min)(round(length * (1 + 2 * margin)) for length in image.size)
    if side * side > MAX_PIXELS:
        raise ValueError(f"the picture with its margins is {side}×{side}; scale it down, or give a smaller margin.")
    canvas = Image.new("RGBA", (side, side))
    canvas.paste(image, (-((image.width - side) // 2), -((image.height - side) // 2)))
    return canvas


def filled(image: Image.Image) -> Image.Image:
    """An RGBA picture as RGB, clear pixels in the colours of those around them: scaling then mixes in no others."""
    pixels = tensor_from_pil(image)[None].float()  # 1 4 h w
    return pil_from_pixels(_spread(pixels[:, :3] / 127.5 - 1, pixels[:, 3:] / 255))[0]


def _spread(x: Tensor, alpha: Tensor) -> Tensor:
    """x (1, 3, h, w) where alpha (1, 1, h, w) is 1; what is clear shows the same at half the sides, spread likewise."""
    if bool((alpha > 0).all()) or max(x.shape[2:]) == 1:
        return x
    weight = F.avg_pool2d(alpha, 2, ceil_mode=True)
    half = F.avg_pool2d(x * alpha, 2, ceil_mode=True) / weight.clamp(min=1e-9)
    behind = F.interpolate(_spread(half, (weight > 0).float()), x.shape[2:], mode="bilinear")
    return torch.lerp(behind, x, alpha)
