"""Building blocks of the U-Net (ADM, arXiv 2105.05233; GLIDE, arXiv 2112.10741; paper §2.1).

Everything here keeps `channels_last` memory: a picture's tokens are a view of it, never a copy. Where no gradient is
wanted, what a block has made itself is overwritten: on a CPU, fresh memory of a large picture costs as much as a norm.
"""

import math
from typing import Literal, TypeVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from unclip.core.products import Linear

TimeConditioning = Literal["scale_shift", "additive"]
Module = TypeVar("Module", bound=nn.Module)
KeysValues = tuple[Tensor, Tensor]  # each (b, heads, n, head_channels)
QUERIES = 256  # of a head at once, and
SCORES = 2**20  # of all heads at once: what the second-level caches of two cores hold in bf16


class GroupNorm(nn.GroupNorm):
    """torch's, by the faster of its two kernels.

    On a CPU the one for channels_last takes up to ten times as long in bf16 where a grid is small and a group is less
    than a vector.
    """

    def forward(self, x: Tensor) -> Tensor:
        small = x.ndim == 4 and x.shape[2] * x.shape[3] < 1024 and x.shape[1] // self.num_groups < 16
        if small and x.device.type == "cpu" and x.dtype != torch.float32:
            return super().forward(x.contiguous()).contiguous(memory_format=torch.channels_last)
        return super().forward(x)


def group_norm(channels: int, groups: int | None = None) -> GroupNorm:
    """GroupNorm of at most 32 groups. `groups` None: as many as have 16 channels each or a multiple of them.

    A number (ADM's is 32) is taken as it is, or as the most groups below it that divide the channels. Groups of 16 fill
    a vector register: on a CPU in bf16 they run up to ten times as fast as groups of four.
    """
    most = channels // math.gcd(channels, 16) if groups is None else channels
    limit = 32 if groups is None else groups
    return GroupNorm(next(n for n in range(min(limit, most), 0, -1) if most % n == 0), channels)


def zero_init(module: Module) -> Module:
    """Sets every parameter of `module` to zero and returns it: a residual branch then starts as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def fold(x: Tensor, patch_size: int) -> Tensor:
    """Folds each patch of pixels into channels: (b, c, h, w) → (b, c·p², h/p, w/p)."""
    return F.pixel_unshuffle(x, patch_size) if patch_size > 1 else x


def unfold(x: Tensor, patch_size: int) -> Tensor:
    """Undoes `fold`: (b, c·p², h, w) → (b, c, h·p, w·p)."""
    return F.pixel_shuffle(x, patch_size) if patch_size > 1 else x


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q·kᵀ/√c)·v. q: (b, heads, n, c); k, v: (b, heads, m, c).

    mask: (b, l) bool, false where one of the first l keys does not count; all later ones do.
    """
    if q.device.type != "cpu" or q.dtype == torch.float32:
        if mask is not None:
            mask = F.pad(mask, (0, k.shape[2] - mask.shape[1]), value=True)[:, None, None, :]
        return F.scaled_dot_product_attention(q, k, v, mask)
    # In bf16 a CPU's fused kernel takes longer than plain products over as many scores as its caches hold.
    rows, m = min(q.shape[2], QUERIES), k.shape[2]
    at_once = max(1, round(SCORES / (rows * m)))  # heads
    queries = (q * q.shape[-1] ** -0.5).flatten(0, 1).split(at_once)  # (b heads) n c
    keys, values = k.mT.flatten(0, 1).split(at_once), v.flatten(0, 1).split(at_once)  # (b heads) c m, (b heads) m c
    hidden = [None] * len(queries)
    if mask is not None:
        hidden = (~mask.repeat_interleave(q.shape[1], 0)[:, None]).split(at_once)  # (b heads) 1 l
    room = None if torch.is_grad_enabled() else q.new_empty(len(queries[0]), rows, m)
    parts = []
    for some, to, of, blind in zip(queries, keys, values, hidden, strict=True):
        parts.append(torch.cat([_attend(x, to, of, blind, room) for x in some.split(rows, 1)], 1))
    return torch.cat(parts).unflatten(0, q.shape[:2])


def _attend(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, room: Tensor | None) -> Tensor:
    """softmax(q·k)·v of q (h, n, c), k (h, c, m) and v (h, m, c).

    hidden: (h, 1, l), true at keys that do not count; room: where the scores may go, at least (h, n, m).
    """
    room = None if room is None else room[: len(q), : q.shape[1]]
    scores = torch.bmm(q, k, out=room)  # h n m
    if hidden is not None:
        scores[..., : hidden.shape[-1]].masked_fill_(hidden, -math.inf)
    return torch.softmax(scores, dim=-1, out=room) @ v


def silu(x: Tensor) -> Tensor:
    """SiLU of a tensor that is not needed again."""
    return F.silu(x, inplace=not torch.is_grad_enabled())


def add(x: Tensor, other: Tensor) -> Tensor:
    """x + other, of which x is not needed again."""
    return x + other if torch.is_grad_enabled() or x.dtype != other.dtype else x.add_(other)


def scale_and_shift(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """x·(1 + scale) + shift, of which x is not needed again."""
    return torch.addcmul(shift, x, 1 + scale, out=None if torch.is_grad_enabled() else x)


class Resize(nn.Module):
    """Halves by averaging, doubles by repeating, or leaves a picture's grid as it is."""

    def __init__(self, direction: Literal["down", "up", "same"]):
        super().__init__()
        self.direction = direction

    def forward(self, x: Tensor) -> Tensor:
        if self.direction == "down":
            return F.avg_pool2d(x, 2)
        if self.direction == "up":
            return F.interpolate(x, scale_factor=2, mode="nearest")
        return x


class ResBlock(nn.Module):
    """Residual block of ADM. Its time projection is part of the U-Net's one matrix and comes in as `time`.

    `time` is (b, time_channels): (scale | shift) of the second norm, or an addend before it (`additive`).
    `direction` resizes inside the block, before the first convolution.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        dropout: float = 0.0,
        time_conditioning: TimeConditioning = "scale_shift",
        direction: Literal["down", "up", "same"] = "same",
        norm_groups: int | None = None,
    ):
        super().__init__()
        self.scale_shift = time_conditioning == "scale_shift"
        self.time_channels = 2 * out_channels if self.scale_shift else out_channels
        self.norm1 = group_norm(in_channels, norm_groups)
        self.resize = Resize(direction)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = group_norm(out_channels, norm_groups)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zero_init(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.skip = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        time = time[:, :, None, None]  # b 2c 1 1, or b c 1 1
        h = self.conv1(self.resize(silu(self.norm1(x))))  # b c h w
        h = scale_and_shift(self.norm2(h), *time.chunk(2, dim=1)) if self.scale_shift else self.norm2(add(h, time))
        h = self.conv2(self.dropout(silu(h)))
        return add(h, self.skip(self.resize(x)))


class Attention(nn.Module):
    """Attention of pixels to pixels and, as extra keys and values, to context tokens (GLIDE; paper §2.1).

    `context_width` None: pixels only. `head_channels` must divide `channels`.
    """

    def __init__(
        self, channels: int, head_channels: int, context_width: int | None = None, norm_groups: int | None = None
    ):
        super().__init__()
        if channels % head_channels:
            raise ValueError(f"attention over {channels} channels: head_channels must divide them, got {head_channels}")
        self.heads = channels // head_channels
        self.norm = group_norm(channels, norm_groups)
        self.qkv = Linear(channels, 3 * channels)
        self.context_kv = Linear(context_width, 2 * channels) if context_width else None
        self.out = zero_init(Linear(channels, channels))

    def project_context(self, tokens: Tensor) -> KeysValues:
        """Keys and values of context tokens (b, n, context_width): two tensors (b, heads, n, head_channels)."""
        if self.context_kv is None:
            raise ValueError("this attention layer was built without context_width and takes no context tokens")
        k, v = rearrange(self.context_kv(tokens), "b n (two heads c) -> two b heads n c", two=2, heads=self.heads)
        return k, v

    def forward(self, x: Tensor, context: KeysValues | None = None, mask: Tensor | None = None) -> Tensor:
        """x: (b, c, h, w); context: what `project_context` gave; mask: (b, n) bool, true where a token counts."""
        height = x.shape[2]
        tokens = rearrange(self.norm(x), "b c h w -> b (h w) c")
        qkv = rearrange(self.qkv(tokens), "b n (three heads c) -> three b heads n c", three=3, heads=self.heads)
        q, k, v = qkv.unbind(0)  # b heads n c
        if context is not None:
            k = torch.cat([context[0].to(k.dtype), k], dim=2)
            v = torch.cat([context[1].to(v.dtype), v], dim=2)
        h = self.out(rearrange(attend(q, k, v, mask), "b heads n c -> b n (heads c)"))
        return add(rearrange(h, "b (h w) c -> b c h w", h=height), x)
