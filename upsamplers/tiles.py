"""Upsampling in overlapping tiles: memory is bounded by a tile's, however large the picture (no part of the paper)."""

import torch
from torch import Tensor

from upsamplers.upsampler import Upsampler, UpsamplerContext


class Tiled:
    """An upsampler whose every step looks at one tile at a time, and blends their predictions where they overlap.

    A tile's weight falls linearly to its edges, over a quarter of its side. The result is not the whole picture's: the
    norms' statistics are each tile's own, and at its edges a tile does not see its neighbours (docs/performance.md has
    the difference). Pictures no larger than a tile are as ever.

    size: side of a tile in pixels. Raises ValueError unless it divides by 4 times what the network's grids need.
    """

    def __init__(self, net: Upsampler, size: int):
        multiple = 4 * net.unet.multiple
        if isinstance(size, bool) or not isinstance(size, int) or size < 1 or size % multiple:
            raise ValueError(f"a tile of {size!r} pixels does not fit this upsampler; give a multiple of {multiple}.")
        self.net, self.size, self.overlap = net, size, size // 4

    @property
    def dtype(self) -> torch.dtype:
        """Type of the network's weights."""
        return self.net.dtype

    def __call__(self, x_t: Tensor, t: Tensor, context: UpsamplerContext) -> Tensor:
        """One evaluation, of and as the upsampler's own."""
        output = weight = torch.zeros(())
        for top in self.starts(x_t.shape[2]):
            for left in self.starts(x_t.shape[3]):
                tile = (..., slice(top, top + self.size), slice(left, left + self.size))
                known = None if context.known is None else context.known[tile]
                part = self.net(x_t[tile], t, context._replace(low=context.low[tile], known=known)).float()
                if part.shape[2:] == x_t.shape[2:]:
                    return part
                if not output.ndim:
                    output = part.new_zeros(*part.shape[:2], *x_t.shape[2:])
                    weight = part.new_zeros(x_t.shape[2:])
                ramp = self.ramp(part.shape[2], part)[:, None] * self.ramp(part.shape[3], part)
                output[tile] += part * ramp
                weight[tile] += ramp
        return output / weight

    def starts(self, side: int) -> list[int]:
        """Where tiles start along a side of a picture."""
        last = max(0, side - self.size)
        return [*range(0, last, self.size - self.overlap), last]

    def ramp(self, side: int, like: Tensor) -> Tensor:
        """Weights along a tile's side, (side,)."""
        i = torch.arange(side, device=like.device, dtype=like.dtype)
        return torch.minimum(i + 1, side - i).clamp(max=self.overlap)
