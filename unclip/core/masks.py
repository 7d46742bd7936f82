"""Masks, and what a network tuned to inpaint sees by them: `keep` is (b, 1, h, w) bool, true on known pixels."""

from __future__ import annotations

import torch
from torch import Tensor

from unclip.core.data import Draws

STROKES = 4
KNOWN_CHANNELS = 4  # three of colour, one of the mask


def random_masks(draws: Draws, height: int, width: int) -> Tensor:
    """keep (b, 1, height, width), of four kinds alike: nothing is known; all but a box, or the box alone; all but
    strokes; one side of a line along an axis."""
    kind, u = draws.integers(4)[:, None, None], draws.uniform(20)[:, :, None, None]  # b 1 1 and b 20 1 1
    y = ((torch.arange(height, device=u.device) + 0.5) / height)[None, :, None]
    x = ((torch.arange(width, device=u.device) + 0.5) / width)[None, None, :]
    inside = ((x - u[:, 0]).abs() < 0.1 + 0.35 * u[:, 1]) & ((y - u[:, 2]).abs() < 0.1 + 0.35 * u[:, 3])  # b h w
    box = inside ^ (u[:, 4] < 0.5)
    half = (torch.where(u[:, 5] < 0.5, x, y) < 0.15 + 0.7 * u[:, 6]) ^ (u[:, 7] < 0.5)
    strokes = torch.zeros_like(inside)
    for i in range(8, 8 + 2 * STROKES, 2):
        strokes |= _near_segment(x, y, u[:, i : i + 4], 0.03 + 0.07 * u[:, 18])
    drawn = torch.where(kind == 1, box, torch.where(kind == 2, strokes, torch.where(kind == 3, half, True)))
    return ~drawn[:, None]


def _near_segment(x: Tensor, y: Tensor, ends: Tensor, width: Tensor) -> Tensor:
    """Pixels within `width` of the segment between two points, ends (b, 4, 1, 1) as x, y, x, y: (b, h, w)."""
    ax, ay, bx, by = ends.unbind(1)
    dx, dy = bx - ax, by - ay
    along = (((x - ax) * dx + (y - ay) * dy) / (dx**2 + dy**2).clamp(min=1e-12)).clamp(0, 1)
    return (x - ax - along * dx) ** 2 + (y - ay - along * dy) ** 2 < width**2


def known_channels(x0: Tensor, keep: Tensor) -> Tensor:
    """What a network is shown of x0 (b, 3, h, w) to inpaint it (GLIDE, arXiv 2112.10741, §4.3): (b, 4, h, w).

    The colours where keep (b, 1, h, w) is true and zeros elsewhere; then keep itself, 1 on known pixels.
    """
    return torch.cat([torch.where(keep, x0, torch.zeros_like(x0)), keep.to(x0.dtype)], dim=1)


def join_known(x: Tensor, known: Tensor | None) -> Tensor:
    """x (b, c, h, w) with the channels of `known_channels` after its own: (b, c + 4, h, w).

    known (b, 4, h, w); None: nothing is known, which is zeros. They come last, so that the input weights of a trained
    network go before theirs, after folding by `patch_size` too. Raises ValueError for another shape.
    """
    expected = (len(x), KNOWN_CHANNELS, *x.shape[2:])
    if known is None:
        known = x.new_zeros(expected)
    if tuple(known.shape) != expected:
        raise ValueError(
            f"known has shape {tuple(known.shape)}; expected {expected}, as core.masks.known_channels gives"
        )
    return torch.cat([x, known.to(x.dtype)], dim=1)


def check_known(known: Tensor | None, inpaint: bool) -> None:
    """Raises ValueError where known pixels come to a network without channels for them."""
    if known is not None and not inpaint:
        raise ValueError("known came to a network built without inpaint=True; leave it out, or tune one that has it")
