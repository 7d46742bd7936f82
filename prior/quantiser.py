"""Numbers as tokens: what the autoregressive prior reads and writes (paper §2.2)."""

import torch
from torch import Tensor, nn


class Buckets(nn.Module):
    """Each of k coordinates cut into equal buckets between its least and its greatest value in training.

    §2.2 cuts into 1,024 and does not say where; equal ones bound the error of a round trip by half a bucket. Buffers:
    `low`, `high` (k,); 0 and 1 until `fit`.
    """

    low: Tensor
    high: Tensor

    def __init__(self, coordinates: int, buckets: int = 1024):
        super().__init__()
        if coordinates < 1 or buckets < 1:
            raise ValueError(f"{coordinates} coordinates and {buckets} buckets: give at least 1 of each.")
        self.buckets = buckets
        self.register_buffer("low", torch.zeros(coordinates))
        self.register_buffer("high", torch.ones(coordinates))

    def fit(self, x: Tensor) -> None:
        """Takes the ranges from samples x (n, k)."""
        if x.ndim != 2 or x.shape[1] != len(self.low) or not len(x) or not bool(x.isfinite().all()):
            raise ValueError(f"samples are {tuple(x.shape)}, expected finite numbers (n, {len(self.low)}).")
        self.low.copy_(x.amin(0))
        self.high.copy_(x.amax(0))

    def encode(self, x: Tensor) -> Tensor:
        """x (…, k) to its buckets 0 … buckets − 1, int64 (…, k); what lies outside a range is in its outer bucket."""
        width = (self.high - self.low) / self.buckets
        # A coordinate that was constant in training has no width: it is in bucket 0, and comes back as that constant.
        position = torch.where(width > 0, (x.to(self.low.dtype) - self.low) / width, torch.zeros_like(width))
        return position.floor().clamp(0, self.buckets - 1).long()

    def decode(self, bucket: Tensor) -> Tensor:
        """Buckets of the first j ≤ k coordinates (…, j), whole or means of several, to the middles of them, (…, j)."""
        low, high = self.low[: bucket.shape[-1]], self.high[: bucket.shape[-1]]
        return low + (high - low) / self.buckets * (bucket.to(low.dtype) + 0.5)


class Quantiles(nn.Module):
    """One number cut into buckets that hold equally many of the training's: of z_i·z_t, so that its distribution's top
    half (§2.2) is the upper half of them. Buffer: `edges` (buckets + 1,), −1 … 1 evenly until `fit`.
    """

    edges: Tensor

    def __init__(self, buckets: int = 100):
        super().__init__()
        if buckets < 1:
            raise ValueError(f"{buckets} buckets: give at least 1.")
        self.register_buffer("edges", torch.linspace(-1, 1, buckets + 1))

    def fit(self, x: Tensor) -> None:
        """Takes the edges from samples x (n,)."""
        if x.ndim != 1 or not len(x) or not bool(x.isfinite().all()):
            raise ValueError(f"samples are {tuple(x.shape)}, expected finite numbers (n,), at least one.")
        levels = torch.linspace(0, 1, len(self.edges), dtype=torch.float64, device=x.device)
        self.edges.copy_(_interpolate(x.double().sort().values, levels))

    def encode(self, x: Tensor) -> Tensor:
        """x (b,) to its buckets, int64 (b,); what lies outside the training's range is in the outer bucket."""
        return torch.bucketize(x.to(self.edges.dtype).contiguous(), self.edges[1:-1], right=True)

    def quantile(self, level: Tensor) -> Tensor:
        """The number below which a part `level` (b,), 0 … 1, of the distribution lies, (b,)."""
        return _interpolate(self.edges, level)


def _interpolate(rising: Tensor, level: Tensor) -> Tensor:
    """Between n values, the first at level 0 and the last at level 1. (torch.quantile takes 16 million at most.)"""
    position = level.to(rising.dtype) * (len(rising) - 1)
    below = position.floor().long().clamp(0, max(0, len(rising) - 2))
    above = (below + 1).clamp(max=len(rising) - 1)
    return torch.lerp(rising[below], rising[above], position - below)
