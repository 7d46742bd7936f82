"""Pre-norm transformer blocks whose computation splits into a prefix, done once, and what attends to it.

A sequence [prefix | rest] under a causal mask: nothing in the prefix sees the rest, so the prefix's keys and values of
every layer are computed once (`Block.prefix`) and the rest runs over them (`Block.forward`). Without a prefix a block
is a plain causal block.
"""

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from unclip.core.products import Linear


class KeysValues(NamedTuple):
    """Keys and values (b, n, width) of one layer, not yet split into heads, so that joining them copies whole rows."""

    k: Tensor
    v: Tensor


def causal_mask(mask: Tensor, prefix_mask: Tensor | None = None) -> Tensor:
    """What each position of [prefix | rest] that belongs to the rest may attend to: (b, 1, n, m + n) bool.

    mask: (b, n), prefix_mask: (b, m) bool, true on tokens that count. A masked token attends to itself, lest its row
    be empty; as no other token attends to it, whatever it computes changes nothing.
    """
    n = mask.shape[1]
    causal = torch.ones(n, n, dtype=torch.bool, device=mask.device).tril()
    eye = torch.eye(n, dtype=torch.bool, device=mask.device)
    rest = causal & mask[:, None, :] | eye  # b n n
    if prefix_mask is not None:
        rest = torch.cat([prefix_mask[:, None, :].expand(-1, n, -1), rest], dim=2)
    return rest[:, None]


class Attention(nn.Module):
    """Multi-head self-attention, over a prefix if there is one."""

    def __init__(self, width: int, heads: int, dropout: float = 0.0):
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} does not divide into {heads} heads; choose heads that divide it.")
        self.heads = heads
        self.to_q = Linear(width, width)
        self.to_k = Linear(width, width)
        self.to_v = Linear(width, width)
        self.to_out = Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def keys_values(self, h: Tensor) -> KeysValues:
        """h: (b, n, width)."""
        return KeysValues(self.to_k(h), self.to_v(h))

    def forward(self, h: Tensor, kv: KeysValues, mask: Tensor | None) -> Tensor:
        """Queries of h (b, n, width) over kv (b, m, width); mask (b, 1, n, m) bool, true where attended."""
        q, k, v = (self._split(x) for x in (self.to_q(h), kv.k, kv.v))
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # b heads n c
        return self.dropout(self.to_out(rearrange(h, "b heads n c -> b n (heads c)")))

    def _split(self, h: Tensor) -> Tensor:
        return rearrange(h, "b n (heads c) -> b heads n c", heads=self.heads)


class Block(nn.Module):
    """h + attention(norm(h)), then h + MLP(norm(h)), with a GELU MLP four times as wide."""

    def __init__(self, width: int, heads: int, dropout: float = 0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads, dropout)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(Linear(width, 4 * width), nn.GELU(), Linear(4 * width, width), nn.Dropout(dropout))

    def keys_values(self, h: Tensor) -> KeysValues:
        """All that the last layer keeps of a prefix h (b, n, width)."""
        return self.attention.keys_values(self.norm1(h))

    def prefix(self, h: Tensor, mask: Tensor, before: KeysValues | None = None) -> tuple[Tensor, KeysValues]:
        """The prefix h (b, m, width) through this block, and its keys and values; mask from `causal_mask`.

        Where the prefix goes on from an earlier one, `before` has that one's, and they are returned as one.
        """
        normed = self.norm1(h)
        kv = self._after(before, self.attention.keys_values(normed))
        return self._rest(h, normed, kv, mask), kv

    def forward(
        self, h: Tensor, prefix: KeysValues | None = None, mask: Tensor | None = None, rows: int | None = None
    ) -> Tensor:
        """h (b, n, width) over [prefix | h]; mask (b, 1, n, m + n). With `rows`, the last so many rows alone."""
        normed = self.norm1(h)
        kv = self._after(prefix, self.attention.keys_values(normed))
        if rows is not None:
            h, normed = h[:, -rows:], normed[:, -rows:]
            mask = None if mask is None else mask[:, :, -rows:]
        return self._rest(h, normed, kv, mask)

    @staticmethod
    def _after(before: KeysValues | None, kv: KeysValues) -> KeysValues:
        if before is None:
            return kv
        return KeysValues(torch.cat([before.k, kv.k], dim=1), torch.cat([before.v, kv.v], dim=1))

    def _rest(self, h: Tensor, normed: Tensor, kv: KeysValues, mask: Tensor | None) -> Tensor:
        h = h + self.attention(normed, kv, mask)
        return h + self.mlp(self.norm2(h))


def prefix_of(blocks: Sequence[Block] | nn.ModuleList, h: Tensor, mask: Tensor) -> tuple[KeysValues, ...]:
    """Keys and values of a prefix h (b, n, width) in every block of a transformer; mask from `causal_mask`."""
    *body, last = cast(list[Block], list(blocks))
    kept = []
    for block in body:
        h, kv = block.prefix(h, mask)
        kept.append(kv)
    return *kept, last.keys_values(h)
