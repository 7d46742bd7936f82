"""Diffusion prior P(z_i | y): a causal transformer that predicts the unnoised image embedding (paper §2.2)."""

from typing import NamedTuple

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from prior.caption import check_caption, drop_caption, without_padding
from unclip.core.transformer import Block, KeysValues, causal_mask, prefix_of


class PriorContext(NamedTuple):
    """The causal prefix [text tokens | z_t]: nothing in it depends on x_t or t."""

    prefix: tuple[KeysValues, ...]  # per layer, each (b, n + 1, width)
    mask: Tensor  # (b, n + 1) bool, true on tokens that count


class DiffusionPrior(ModelMixin, ConfigMixin):
    """Causal transformer over [text tokens | z_t | time | noised z_i | learned query]; the query's output is x0.

    Of its `context_length + 4` learned positions, text token i has position i, and z_t, time, z_i and query have the
    last four however long the text is. Padded tokens are attended to by nobody. So dropping them is exact.

    x0 and x_t are standardised embeddings: (z_i − clip_mean) / clip_std, per dimension (`standardize`). The
    statistics are buffers, stored with the weights; they are 0 and 1 until `set_statistics`.

    Args:
        embedding_dim: d of z_t and z_i.
        text_width: width of the token states; context_length: the most text tokens.
        width, depth, heads: of the transformer.
        dropout: after attention and MLP, in training.
        learned_null: whether learned tokens stand in for a dropped caption. Where none do, the null condition is the
            encoded empty prompt, given like any other.
    """

    _no_split_modules = ["Block"]  # noqa: RUF012

    clip_mean: Tensor
    clip_std: Tensor

    @register_to_config
    def __init__(
        self,
        embedding_dim: int = 768,
        text_width: int = 768,
        context_length: int = 77,
        width: int = 2048,
        depth: int = 20,
        heads: int = 32,
        dropout: float = 0.0,
        learned_null: bool = True,
    ):
        super().__init__()
        self.embedding_dim, self.text_width, self.context_length = embedding_dim, text_width, context_length
        self.sinusoid = Timesteps(width, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.embed_time = TimestepEmbedding(width, width)
        self.embed_text = nn.Linear(text_width, width)
        self.embed_z_t = nn.Linear(embedding_dim, width)
        self.embed_x = nn.Linear(embedding_dim, width)
        self.query = nn.Parameter(torch.randn(width) * 0.02)
        self.null_text = nn.Parameter(torch.randn(width) * 0.02) if learned_null else None
        self.null_z_t = nn.Parameter(torch.randn(width) * 0.02) if learned_null else None
        self.positions = nn.Parameter(torch.randn(context_length + 4, width) * 0.02)
        self.blocks = nn.ModuleList([Block(width, heads, dropout) for _ in range(depth)])
        self.norm_out = nn.LayerNorm(width)
        self.head = nn.Linear(width, embedding_dim)
        self.register_buffer("clip_mean", torch.zeros(embedding_dim))
        self.register_buffer("clip_std", torch.ones(embedding_dim))

    def set_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Mean and standard deviation of z_i over the training set, each (d,)."""
        if mean.shape != self.clip_mean.shape or std.shape != self.clip_std.shape or not bool((std > 0).all()):
            raise ValueError(
                f"Statistics are {tuple(mean.shape)} and {tuple(std.shape)}, expected ({self.embedding_dim},) twice, "
                "deviations positive."
            )
        self.clip_mean.copy_(mean)
        self.clip_std.copy_(std)

    def standardize(self, z_i: Tensor) -> Tensor:
        """CLIP's image embedding (b, d) to x0, what is noised and predicted: zero mean, unit variance."""
        return (z_i - self.clip_mean) / self.clip_std

    def unstandardize(self, x: Tensor) -> Tensor:
        """x0 (b, d) back to CLIP's image embedding. Its norm is not made 1."""
        return x * self.clip_std + self.clip_mean

    def encode_context(
        self, z_t: Tensor, text: Tensor, text_mask: Tensor, drop_text: Tensor | None = None
    ) -> PriorContext:
        """Keys and values of the prefix, per layer.

        z_t: (b, d); text: (b, n, w) token states, n ≤ context_length; text_mask: (b, n) bool, true on real tokens;
        drop_text: (b,) bool or None. Where it is true the sample is unconditional: a learned token stands for all its
        text, another for z_t, and nothing of z_t, text and mask is used. Raises ValueError on shapes that do not fit,
        and on drop_text without learned tokens.
        """
        check_caption(self, z_t, text, text_mask, drop_text)
        n = text.shape[1]
        h = self.embed_text(without_padding(text, text_mask))  # b n w
        z = self.embed_z_t(z_t)[:, None]  # b 1 w
        if drop_text is not None:
            if self.null_text is None or self.null_z_t is None:
                raise ValueError("This prior has no learned null tokens: give the encoded empty prompt, not drop_text.")
            h, z, text_mask = drop_caption(h, z, text_mask, drop_text, self.null_text, self.null_z_t)
        h = torch.cat([h + self.positions[:n], z + self.positions[self.context_length]], dim=1)
        mask = torch.cat([text_mask, text_mask.new_ones(len(text), 1)], dim=1)  # b n+1
        return PriorContext(prefix_of(self.blocks, h, causal_mask(mask)), mask)

    def forward(self, x_t: Tensor, t: Tensor, context: PriorContext | None = None, **conditions) -> Tensor:
        """One denoising step: three tokens over the prefix. Give `context`, or the arguments of `encode_context`.

        x_t: noised x0, (b, d); t: (b,) steps 0 … 999. Returns the predicted x0, standardised, (b, d).
        """
        if (context is None) == (not conditions):
            raise ValueError("The prior takes either a context or conditions (z_t=…, text=…): give one of the two.")
        if x_t.ndim != 2 or x_t.shape[1] != self.embedding_dim or t.shape != x_t.shape[:1]:
            raise ValueError(
                f"x_t is {tuple(x_t.shape)} and t {tuple(t.shape)}, expected (b, {self.embedding_dim}) and (b,)."
            )
        if context is None:
            context = self.encode_context(**conditions)
        time = self.embed_time(self.sinusoid(t).to(x_t.dtype))  # b w
        h = torch.stack([time, self.embed_x(x_t), self.query.to(time.dtype).expand_as(time)], dim=1)  # b 3 w
        h = h + self.positions[-3:]
        mask = causal_mask(context.mask.new_ones(len(h), 3), context.mask)
        *body, last = self.blocks
        for block, kv in zip(body, context.prefix[:-1], strict=True):
            h = block(h, kv, mask)
        h = last(h, context.prefix[-1], mask, rows=1)  # b 1 w
        return self.head(self.norm_out(h[:, 0]))


def best_of(z_i: Tensor, z_t: Tensor) -> Tensor:
    """Of n draws (n, b, d) of each z_i the one with the largest z_i·z_t (§2.2: two draws): (b, d).

    z_t: (b, d). Only the direction of z_t matters; that of z_i and its norm both do.
    """
    if z_i.ndim != 3 or z_i.shape[1:] != z_t.shape:
        raise ValueError(f"z_i is {tuple(z_i.shape)}, expected (n, b, d) with z_t's (b, d) = {tuple(z_t.shape)}.")
    best = torch.einsum("n b d, b d -> n b", z_i.float(), z_t.float()).argmax(0)  # b
    return z_i[best, torch.arange(len(z_t), device=z_i.device)]
