"""Autoregressive prior P(z_i | y): z_i's principal components, quantised, one after another (paper §2.2)."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, cast

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from prior.caption import check_caption, drop_caption, without_padding
from prior.pca import PCA
from prior.quantiser import Buckets, Quantiles
from unclip.core.sampling import cat_contexts
from unclip.core.transformer import Block, KeysValues, causal_mask, prefix_of


class AutoregressiveContext(NamedTuple):
    """The prefix [text tokens | z_t | dot product], and after it as much of [start, y_1, y_2, …] as was seen so far.

    `encode_context` gives one that has seen nothing yet.
    """

    seen: tuple[KeysValues, ...]  # per layer, each (b, n + 2 + tokens seen, width)
    mask: Tensor  # (b, n + 2) bool, true on tokens of the prefix that count


class AutoregressivePrior(ModelMixin, ConfigMixin):
    """Causal transformer over [text tokens | z_t | dot product | start, y_1 … y_{k−1}]; the last k say y_1 … y_k.

    y_j is the bucket of z_i's coordinate along its j-th principal component, sorted by eigenvalue. The dot product
    z_i·z_t is a condition: a high one asks for a picture that fits its caption better. As in the diffusion prior, text
    token i has position i, and the others their own however long the text is; padded tokens are attended to by nobody.

    The basis, the buckets and the distribution of the dot product are buffers, stored with the weights:
    `set_statistics` fills them.

    Args:
        embedding_dim: d of z_t and z_i.
        text_width: width of the token states; context_length: the most text tokens.
        width, depth, heads: of the transformer; dropout: after attention and MLP, in training.
        components: k; buckets: of each component; dot_buckets: of the dot product (the paper does not say how many).
        caption_depth, caption_width, caption_heads: of a causal transformer of its own that the text runs through
            first (Table 3 has one, the paper says no more); depth 0 for none.
    """

    _no_split_modules = ["Block"]  # noqa: RUF012
    _keep_in_fp32_modules = ["pca", "quantiser", "dots"]  # noqa: RUF012

    @register_to_config
    def __init__(
        self,
        embedding_dim: int = 768,
        text_width: int = 768,
        context_length: int = 77,
        width: int = 1664,
        depth: int = 24,
        heads: int = 26,
        dropout: float = 0.0,
        components: int = 319,
        buckets: int = 1024,
        dot_buckets: int = 100,
        caption_depth: int = 0,
        caption_width: int = 2048,
        caption_heads: int = 32,
    ):
        super().__init__()
        self.embedding_dim, self.text_width, self.context_length = embedding_dim, text_width, context_length
        self.components = components
        self.pca = PCA(embedding_dim, components)
        self.quantiser = Buckets(components, buckets)
        self.dots = Quantiles(dot_buckets)
        if caption_depth:
            self.caption = CaptionTransformer(
                text_width, context_length, caption_width, caption_depth, caption_heads, dropout
            )
        else:
            self.caption = None
        self.embed_text = nn.Linear(caption_width if caption_depth else text_width, width)
        self.embed_z_t = nn.Linear(embedding_dim, width)
        self.embed_dot = nn.Embedding(dot_buckets, width)
        self.embed_y = nn.Embedding(buckets, width)
        for embedding in (self.embed_dot, self.embed_y):
            nn.init.normal_(embedding.weight, std=0.02)  # as positions are, beside which they stand
        self.start = nn.Parameter(torch.randn(width) * 0.02)
        self.null_text = nn.Parameter(torch.randn(width) * 0.02)
        self.null_z_t = nn.Parameter(torch.randn(width) * 0.02)
        self.null_dot = nn.Parameter(torch.randn(width) * 0.02)
        self.positions = nn.Parameter(torch.randn(context_length + 2 + components, width) * 0.02)
        self.blocks = nn.ModuleList([Block(width, heads, dropout) for _ in range(depth)])
        self.norm_out = nn.LayerNorm(width)
        self.head = nn.Linear(width, buckets)

    def set_statistics(self, basis: PCA, z_i: Tensor, dot: Tensor) -> None:
        """What tokens mean, by embeddings of the training set: a basis of them, z_i (n, d), and z_i·z_t (m,)."""
        self.pca.load_state_dict(basis.kept(self.components).state_dict())
        self.quantiser.fit(self.pca.encode(z_i))
        self.dots.fit(dot)

    def quantise(self, z_i: Tensor) -> Tensor:
        """CLIP's image embeddings (b, d) to tokens y, int64 (b, k)."""
        return self.quantiser.encode(self.pca.encode(z_i))

    def dequantise(self, y: Tensor) -> Tensor:
        """The first j ≤ k tokens (b, j), or means of tokens, to embeddings (b, d), float32. The norm is not made 1."""
        return self.pca.decode(self.quantiser.decode(y))

    def encode_context(
        self, z_t: Tensor, text: Tensor, text_mask: Tensor, dot: Tensor, drop_text: Tensor | None = None
    ) -> AutoregressiveContext:
        """Keys and values of the prefix, per layer.

        z_t, text, text_mask, drop_text: as the diffusion prior's; dot: z_i·z_t, (b,). Where drop_text is true, learned
        tokens stand for text, z_t and dot alike: what is left is P(z_i). Raises ValueError on shapes that do not fit.
        """
        check_caption(self, z_t, text, text_mask, drop_text)
        if dot.shape != z_t.shape[:1]:
            raise ValueError(f"dot is {tuple(dot.shape)}, expected one product z_i·z_t for each z_t, ({len(z_t)},).")
        n = text.shape[1]
        text = without_padding(text, text_mask)
        h = self.embed_text(text if self.caption is None else self.caption(text, text_mask))  # b n w
        z = self.embed_z_t(z_t)[:, None]  # b 1 w
        product = self.embed_dot(self.dots.encode(dot))[:, None]  # b 1 w
        if drop_text is not None:
            h, z, text_mask = drop_caption(h, z, text_mask, drop_text, self.null_text, self.null_z_t)
            product = torch.where(drop_text[:, None, None], self.null_dot.to(product.dtype), product)
        own = self.positions[self.context_length :]
        h = torch.cat([h + self.positions[:n], z + own[0], product + own[1]], dim=1)  # b n+2 w
        mask = torch.cat([text_mask, text_mask.new_ones(len(text), 2)], dim=1)
        return AutoregressiveContext(prefix_of(self.blocks, h, causal_mask(mask)), mask)

    def forward(self, y: Tensor, context: AutoregressiveContext | None = None, **conditions) -> Tensor:
        """Logits of every token, given those before it. Give `context`, or the arguments of `encode_context`.

        y: int64 (b, k). Returns (b, k, buckets); those of y_j depend on y_1 … y_{j−1} and the conditions alone.
        """
        if (context is None) == (not conditions):
            raise ValueError("The prior takes either a context or conditions (z_t=…, text=…): give one of the two.")
        if y.ndim != 2 or y.shape[1] != self.components or y.dtype != torch.long:
            raise ValueError(f"y is {y.dtype} {tuple(y.shape)}, expected int64 (b, {self.components}).")
        context = self.encode_context(**conditions) if context is None else context
        return self.extend(y[:, :-1], context)[0]

    def extend(self, y: Tensor, context: AutoregressiveContext) -> tuple[Tensor, AutoregressiveContext]:
        """Goes on from a context by tokens y, int64 (b, m); where it has seen none yet, by the start token before them.

        Returns the logits after each of them, (b, m or m + 1, buckets), and the context that has seen them.
        """
        done = context.seen[0].k.shape[1] - context.mask.shape[1]
        h = self.embed_y(y)  # b m w
        if done == 0:
            h = torch.cat([self.start.to(h.dtype).expand(len(h), 1, -1), h], dim=1)
        m = h.shape[1]
        h = h + self.positions[self.context_length + 2 + done :][:m]
        ones = context.mask.new_ones(len(h), done + m)
        mask = causal_mask(ones[:, done:], torch.cat([context.mask, ones[:, :done]], dim=1))
        seen = []
        for block, before in zip(cast(list[Block], list(self.blocks)), context.seen, strict=True):
            h, kv = block.prefix(h, mask, before)
            seen.append(kv)
        return self.head(self.norm_out(h)), AutoregressiveContext(tuple(seen), context.mask)

    @torch.no_grad()
    def sample(
        self,
        z_t: Tensor,
        text: Tensor,
        text_mask: Tensor,
        generators: Sequence[torch.Generator],
        guidance_scale: float = 1.0,
        temperature: float = 1.0,
        top_p: float = 1.0,
        callback: Callable[[int, int, Tensor], None] | None = None,
        negative: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Draws z_i (b, d), float32, for a dot product from the top half of its distribution (§2.2).

        z_t, text, text_mask: as `encode_context`'s; generators: one for each row, on the CPU, from which all that is
        random about the row comes. guidance_scale: 1 is the conditional model, 0 the unconditional. temperature, top_p:
        `draw_tokens` says. callback(j, k − 1 − j, z_i of the tokens so far): after token j. negative: z_t, text and
        text_mask, b rows of as many tokens, that guidance leads away from in the unconditional's place. The norm is not
        made 1.
        """
        if len(generators) != len(z_t):
            raise ValueError(f"got {len(generators)} generators for {len(z_t)} embeddings: give one for each.")
        numbers = torch.stack([torch.rand(self.components + 1, generator=g, dtype=torch.float64) for g in generators])
        dot = self.dots.quantile(0.5 + numbers[:, 0].float().to(z_t.device) / 2)
        guides = guidance_scale not in (0, 1)
        context = self.encode_context(z_t, text, text_mask, dot)
        if guidance_scale != 1:
            drop = torch.ones_like(text_mask[:, 0]) if negative is None else None
            away = negative or {"z_t": z_t, "text": text, "text_mask": text_mask}
            null = self.encode_context(**away, dot=dot, drop_text=drop)
            context = cat_contexts(null, context) if guides else null
        y = torch.empty(len(z_t), 0, dtype=torch.long, device=z_t.device)
        for j in range(self.components):
            last = y[:, -1:]
            logits, context = self.extend(torch.cat([last, last]) if guides else last, context)
            logits = logits[:, -1].float()  # b buckets, or 2b
            if guides:
                null_logits, conditional = logits.chunk(2)
                logits = torch.lerp(null_logits, conditional, guidance_scale)
            y = torch.cat([y, draw_tokens(logits, numbers[:, j + 1], temperature, top_p)[:, None]], dim=1)
            if callback is not None:
                callback(j, self.components - 1 - j, self.dequantise(y))
        return self.dequantise(y)


class CaptionTransformer(nn.Module):
    """A causal transformer over the caption's tokens alone: (b, n, text_width) to (b, n, width)."""

    def __init__(self, text_width: int, context_length: int, width: int, depth: int, heads: int, dropout: float):
        super().__init__()
        self.embed = nn.Linear(text_width, width)
        self.positions = nn.Parameter(torch.randn(context_length, width) * 0.02)
        self.blocks = nn.ModuleList([Block(width, heads, dropout) for _ in range(depth)])
        self.norm_out = nn.LayerNorm(width)

    def forward(self, text: Tensor, text_mask: Tensor) -> Tensor:
        """text (b, n, text_width), text_mask (b, n) bool."""
        h = self.embed(text) + self.positions[: text.shape[1]]
        mask = causal_mask(text_mask)
        for block in self.blocks:
            h = block(h, mask=mask)
        return self.norm_out(h)


def draw_tokens(logits: Tensor, number: Tensor, temperature: float = 1.0, top_p: float = 1.0) -> Tensor:
    """One token for each row of logits (b, buckets) by a number (b,) in [0, 1): int64 (b,), on the logits' device.

    temperature: divides the logits. top_p: of the most probable tokens as many as together have at least this
    probability are drawn from, one at least: 1 is all, 0 the most probable alone. Drawn by the inverse of the
    distribution function, in float64 on the CPU: as buckets are in order, rounding at an edge gives a neighbour.
    """
    if not temperature > 0 or not 0 <= top_p <= 1:
        raise ValueError(f"temperature {temperature} and top_p {top_p}: give one above 0, and one from 0 to 1.")
    p = (logits.cpu().double() / temperature).softmax(-1)
    if top_p < 1:
        falling, order = p.sort(dim=-1, descending=True, stable=True)
        kept = falling.cumsum(-1) - falling < top_p
        kept[:, 0] = True
        p = p * torch.zeros_like(kept).scatter(-1, order, kept)
    below = p.cumsum(-1)
    token = (below <= number.cpu()[:, None] * below[:, -1:]).sum(-1)
    return token.clamp(max=p.shape[-1] - 1).to(logits.device)
