"""How a caption enters both priors: as tokens and z_t, or, where it is dropped, as learned tokens (paper §2.2)."""

from typing import Protocol

import torch
from torch import Tensor


class Sizes(Protocol):
    """What a prior knows of CLIP."""

    embedding_dim: int
    text_width: int
    context_length: int


def check_caption(prior: Sizes, z_t: Tensor, text: Tensor, text_mask: Tensor, drop_text: Tensor | None) -> None:
    """Raises ValueError where a caption's tensors do not fit the prior or each other."""
    b = len(z_t)
    if z_t.shape != (b, prior.embedding_dim):
        raise ValueError(f"z_t is {tuple(z_t.shape)}, expected (b, {prior.embedding_dim}).")
    if text.ndim != 3 or text.shape != (b, text.shape[1], prior.text_width) or text.shape[1] < 1:
        raise ValueError(f"text is {tuple(text.shape)}, expected ({b}, n, {prior.text_width}), n at least 1.")
    if text.shape[1] > prior.context_length:
        raise ValueError(f"text has {text.shape[1]} tokens, the prior takes {prior.context_length}; cut it.")
    if text_mask.shape != text.shape[:2] or text_mask.dtype != torch.bool:
        raise ValueError(
            f"text_mask is {text_mask.dtype} {tuple(text_mask.shape)}, expected bool {tuple(text.shape[:2])}."
        )
    if drop_text is not None and (drop_text.shape != (b,) or drop_text.dtype != torch.bool):
        raise ValueError(f"drop_text is {drop_text.dtype} {tuple(drop_text.shape)}, expected bool ({b},).")


def without_padding(text: Tensor, text_mask: Tensor) -> Tensor:
    """Token states (b, n, w) with 0 in padded rows. (`where`, not a product: NaN there must not get through.)"""
    return torch.where(text_mask[..., None], text, torch.zeros_like(text))


def drop_caption(
    h: Tensor, z: Tensor, text_mask: Tensor, drop_text: Tensor, null_text: Tensor, null_z_t: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Embedded text h (b, n, w), z_t (b, 1, w) and the text's mask (b, n), where `drop_text` (b,) is true the null's.

    One learned token stands for all the text, another for z_t: nothing is left of either, nor of the text's length.
    """
    drop = drop_text[:, None, None]
    first = torch.zeros_like(text_mask)
    first[:, 0] = True
    h = torch.where(drop, null_text.to(h.dtype), h)
    z = torch.where(drop, null_z_t.to(z.dtype), z)
    return h, z, torch.where(drop_text[:, None], first, text_mask)
