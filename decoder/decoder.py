"""Decoder P(x | z_i, y): how the image embedding and the caption enter the U-Net (paper §2.1)."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from unclip.core.layers import KeysValues, TimeConditioning
from unclip.core.masks import KNOWN_CHANNELS, check_known, join_known
from unclip.core.transformer import Block
from unclip.core.unet import Times, UNet, check_picture


class DecoderContext(NamedTuple):
    """All of a decoder's computation that depends neither on x_t nor on t; n context tokens, text before CLIP's."""

    keys_values: tuple[KeysValues, ...]  # per attention layer, each (b, heads, n, head_channels)
    time: Tensor  # (b, time_dim), added to the embedding of t
    mask: Tensor | None  # (b, n) bool, true on tokens that count; None where there is no text
    sketch: Tensor | None = None  # (b, in_channels, side, side), the picture that the conditions alone foretell
    times: Times | None = None  # the time projections of all steps of a run
    known: Tensor | None = None  # (b, 4, h, w), known pixels and their mask; None: nothing is known


class Sketch(nn.Module):
    """MLP from the addend of the time embedding to a small picture: what conditions say before any noise is seen."""

    def __init__(self, time_dim: int, width: int, channels: int, side: int):
        super().__init__()
        self.shape = (channels, side, side)
        self.layers = nn.Sequential(
            nn.SiLU(),
            nn.Linear(time_dim, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, channels * side**2),
        )

    def forward(self, time: Tensor) -> Tensor:
        """time: (b, time_dim). Returns (b, channels, side, side), about in [−1, 1]."""
        return self.layers(time).unflatten(1, self.shape)


class Decoder(ModelMixin, ConfigMixin):
    """U-Net that draws pictures of `sample_size` from a CLIP image embedding and, optionally, the caption's tokens.

    Args:
        z_i_width: width of `z_i`. `z_i_scale` multiplies it on entry: √d gives a unit vector entries of unit variance.
        z_i_tokens: context tokens made of `z_i` (the paper's four).
        null_z_i: what stands in for a dropped `z_i`: a learned embedding or zeros (§2.1: either).
        text_width: width of the text encoder's token states, None for a decoder of `z_i` alone.
        context_width: width of context tokens, from which each attention layer takes keys and values.
        z_t_width: width of `z_t`, where that enters the time embedding in place of the last text token's state (Karlo).
            Such a decoder always has a caption: the encoded empty prompt stands for none.
        norm_context: which context tokens the layer norm covers: all, or the text's alone.
        sketch_side, sketch_width: where a side is given, an MLP of that hidden width makes a picture of that side from
            what enters the time embedding, trained to be the mean of the pictures that fit the conditions, and the
            U-Net sees it beside x_t. It is no part of the paper: a short training learns outlines by it.
        inpaint: whether the U-Net also sees known pixels and their mask, in four channels after all others (GLIDE
            §4.3). Trained from a decoder without them (`start`), it begins as exactly that one.
        text_layers, text_heads: a transformer of the decoder's own over the token states, not causal (GLIDE's).
        sample_size, attention_resolutions: side of a training picture in pixels, and sides of the grids (in positions,
            after folding by `patch_size`) at which attention runs. Pictures of other sizes keep those levels.

    The other arguments are those of `core.unet.UNet`.
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        sample_size: int = 64,
        in_channels: int = 3,
        out_channels: int = 3,
        patch_size: int = 1,
        model_channels: int = 192,
        channel_multipliers: tuple[float, ...] = (1, 2, 3, 4),
        num_res_blocks: int | tuple[int, ...] = 3,
        attention_resolutions: tuple[int, ...] = (32, 16, 8),
        head_channels: int = 64,
        dropout: float = 0.0,
        time_conditioning: TimeConditioning = "scale_shift",
        resblock_updown: bool = True,
        learned_variance: bool = True,
        z_i_width: int = 512,
        z_i_scale: float = 1.0,
        z_i_tokens: int = 4,
        null_z_i: Literal["learned", "zeros"] = "learned",
        text_width: int | None = None,
        context_width: int = 512,
        text_layers: int = 0,
        text_heads: int = 8,
        norm_groups: int | None = None,
        z_t_width: int | None = None,
        norm_context: Literal["all", "text"] = "all",
        sketch_side: int | None = None,
        sketch_width: int = 512,
        inpaint: bool = False,
        mix_input: bool = False,
    ):
        super().__init__()
        check_choices(norm_context, null_z_i, text_width, z_t_width)
        self.unet = UNet(
            in_channels=in_channels * (1 if sketch_side is None else 2) + (KNOWN_CHANNELS if inpaint else 0),
            out_channels=out_channels,
            model_channels=model_channels,
            channel_multipliers=channel_multipliers,
            num_res_blocks=num_res_blocks,
            attention_levels=attention_levels(attention_resolutions, sample_size // patch_size, channel_multipliers),
            head_channels=head_channels,
            context_width=context_width,
            dropout=dropout,
            time_conditioning=time_conditioning,
            resblock_updown=resblock_updown,
            patch_size=patch_size,
            learned_variance=learned_variance,
            norm_groups=norm_groups,
            mix_input=mix_input,
        )
        time_dim = self.unet.time_dim
        self.z_i_width, self.z_i_scale, self.z_i_tokens, self.text_width = z_i_width, z_i_scale, z_i_tokens, text_width
        self.z_t_width, self.channels, self.inpaint = z_t_width, in_channels, inpaint
        self.null_embedding = nn.Parameter(torch.zeros(z_i_width)) if null_z_i == "learned" else None
        self.time_z_i = nn.Linear(z_i_width, time_dim)
        self.context_z_i = nn.Linear(z_i_width, z_i_tokens * context_width)
        self.context_norm = nn.LayerNorm(context_width)
        if text_width is not None:
            self.add_text(text_width, z_t_width, context_width, time_dim, text_layers, text_heads, dropout)
        self.sketch = None if sketch_side is None else Sketch(time_dim, sketch_width, in_channels, sketch_side)

    def add_text(
        self,
        text_width: int,
        z_t_width: int | None,
        context_width: int,
        time_dim: int,
        layers: int,
        heads: int,
        dropout: float,
    ) -> None:
        """Makes the layers by which the caption enters."""
        self.context_text = nn.Linear(text_width, context_width)
        if z_t_width is None:
            self.time_text = nn.Linear(context_width, time_dim)
        else:
            self.time_z_t = nn.Linear(z_t_width, time_dim)
        self.text_blocks = nn.ModuleList(Block(context_width, heads, dropout) for _ in range(layers))

    def encode_context(
        self,
        z_i: Tensor,
        text: Tensor | None = None,
        text_mask: Tensor | None = None,
        drop_z_i: Tensor | None = None,
        drop_text: Tensor | None = None,
        z_t: Tensor | None = None,
        known: Tensor | None = None,
    ) -> DecoderContext:
        """Everything the conditions decide (§2.1): z_i enters the time embedding and four context tokens.

        z_i: (b, z_i_width); text: (b, n, text_width), the text encoder's token states, or None; text_mask: (b, n) bool,
        true on real tokens (None: all are); drop_z_i, drop_text: (b,) bool, true where a sample goes without (None:
        nowhere). The last real token's state also enters the time embedding (GLIDE), or z_t (b, z_t_width) in its place
        where the decoder was built for that. A sample whose text is dropped is exactly the sample computed without
        text. known: (b, 4, h, w) of pictures to inpaint, as `core.masks.known_channels` gives it, where the decoder was
        built for that. Raises ValueError on shapes that do not fit.
        """
        check_known(known, self.inpaint)
        time, tokens, mask = self.read(z_i, text, text_mask, drop_z_i, drop_text, z_t)
        return DecoderContext(self.unet.project_context(tokens), time, mask, self.draw_sketch(time), known=known)

    def read(
        self,
        z_i: Tensor,
        text: Tensor | None = None,
        text_mask: Tensor | None = None,
        drop_z_i: Tensor | None = None,
        drop_text: Tensor | None = None,
        z_t: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The conditions of `encode_context` as the addend of the time embedding (b, time_dim), the context tokens
        (b, n, context_width), and the mask (b, n) of those that count, None for all. Raises ValueError as it does."""
        self.check_conditions(z_i, text, text_mask, drop_z_i, drop_text, z_t)
        z_i = z_i * self.z_i_scale
        if drop_z_i is not None:
            null = torch.zeros_like(z_i) if self.null_embedding is None else self.null_embedding.to(z_i.dtype)
            z_i = torch.where(drop_z_i[:, None], null, z_i)
        time = self.time_z_i(z_i)  # b time_dim
        tokens = rearrange(self.context_z_i(z_i), "b (n w) -> b n w", n=self.z_i_tokens)
        only_text = self.config["norm_context"] == "text"
        if text is None:
            return time, tokens if only_text else self.context_norm(tokens), None
        mask = text.new_ones(text.shape[:2], dtype=torch.bool) if text_mask is None else text_mask  # b n
        if drop_text is not None:
            mask = mask & ~drop_text[:, None]
        words = self.encode_text(text, mask)  # b n w
        if only_text:
            tokens = torch.cat([self.context_norm(words), tokens], dim=1)
        else:
            tokens = self.context_norm(torch.cat([words, tokens], dim=1))
        if z_t is not None:
            time = time + self.time_z_t(z_t)
        else:
            last = (mask * torch.arange(1, text.shape[1] + 1, device=text.device)).argmax(dim=1)  # b
            pooled = self.time_text(tokens[torch.arange(len(text), device=text.device), last])  # b time_dim
            time = time + torch.where(mask.any(dim=1, keepdim=True), pooled, torch.zeros_like(pooled))
        return time, tokens, torch.cat([mask, mask.new_ones(len(text), self.z_i_tokens)], dim=1)

    def draw_sketch(self, time: Tensor) -> Tensor | None:
        return None if self.sketch is None else self.sketch(time)

    def at_steps(self, context: DecoderContext, steps: Sequence[int]) -> DecoderContext:
        """The context with all that the steps of a run decide, too; it is then good for these steps alone."""
        return context._replace(times=self.unet.at_steps(steps, context.time, len(context.time)))

    def encode_text(self, text: Tensor, mask: Tensor) -> Tensor:
        """Context tokens (b, n, context_width) of token states (b, n, text_width); mask: (b, n), true on real ones."""
        # `where`, not a product: whatever stands in a dropped or padded row, NaN included, must not get through.
        h = self.context_text(torch.where(mask[..., None], text, torch.zeros_like(text)))
        itself = torch.eye(mask.shape[1], dtype=torch.bool, device=mask.device)  # lest a padded token's row be empty
        for block in self.text_blocks:
            h = block(h, mask=(mask[:, None, :] | itself)[:, None])
        return h

    def forward(
        self,
        x_t: Tensor | None,
        t: Tensor | None,
        context: DecoderContext | None = None,
        return_sketch: bool = False,
        **conditions,
    ) -> Tensor | tuple[Tensor | None, Tensor | None]:
        """One evaluation. Give `context`, or the keyword arguments of `encode_context`.

        x_t: (b, in_channels, h, w) in about [−1, 1] plus noise; t: (b,) steps 0 … 999.
        Returns the prediction (b, out_channels, h, w); with learned variance (prediction | variance) along channels.
        With `return_sketch`, a pair: the prediction, and the context's sketch, which training compares with x0; x_t and
        t may then be None, and no prediction is made, at a thousandth of the cost.
        """
        if (context is None) == (not conditions):
            raise ValueError("the decoder takes either a context or conditions (z_i=…, text=…): give one of the two")
        if x_t is None or t is None:
            if not return_sketch:
                raise ValueError("the decoder has no x_t or t, and no sketch is asked for: give both, or return_sketch")
            # the keys and values of a context cost more than the sketch
            return None, self.draw_sketch(self.read(**conditions)[0]) if context is None else context.sketch
        if context is None:
            context = self.encode_context(**conditions)
        check_picture("x_t", x_t, self.channels, self.unet.multiple)
        if context.sketch is not None:
            x_t = torch.cat([x_t, F.interpolate(context.sketch, x_t.shape[2:], mode="bilinear").to(x_t.dtype)], dim=1)
        if self.inpaint:
            x_t = join_known(x_t, context.known)
        output = self.unet(x_t, t, context.time, context.keys_values, context.mask, context.times)
        return (output, context.sketch) if return_sketch else output

    def check_conditions(
        self,
        z_i: Tensor,
        text: Tensor | None,
        text_mask: Tensor | None,
        drop_z_i: Tensor | None,
        drop_text: Tensor | None,
        z_t: Tensor | None,
    ) -> None:
        """Raises ValueError unless conditions have the shapes and types that `encode_context` states."""
        if z_i.ndim != 2 or z_i.shape[1] != self.z_i_width:
            raise ValueError(f"z_i has shape {tuple(z_i.shape)}; this decoder expects (b, {self.z_i_width})")
        batch = len(z_i)
        expected_z_t = None if self.z_t_width is None else (batch, self.z_t_width)
        if (None if z_t is None else tuple(z_t.shape)) != expected_z_t:
            given = None if z_t is None else tuple(z_t.shape)
            raise ValueError(f"z_t is {given}; this decoder expects {expected_z_t}")
        if z_t is not None and (text is None or drop_text is not None):
            raise ValueError("this decoder always has a caption: give the encoded empty prompt for none, not drop_text")
        if text is not None:
            if self.text_width is None:
                raise ValueError("this decoder was built without text_width and takes no text; leave text out")
            if text.ndim != 3 or text.shape[0] != batch or text.shape[2] != self.text_width or text.shape[1] == 0:
                raise ValueError(f"text has shape {tuple(text.shape)}; expected ({batch}, n, {self.text_width}), n ≥ 1")
        expected = {
            "text_mask": (text_mask, None if text is None else tuple(text.shape[:2])),
            "drop_text": (drop_text, (batch,)),
            "drop_z_i": (drop_z_i, (batch,)),
        }
        for name, (value, shape) in expected.items():
            if value is not None and (value.dtype != torch.bool or tuple(value.shape) != shape):
                raise ValueError(f"{name} is {value.dtype} {tuple(value.shape)}; expected bool of shape {shape}")


def attention_levels(sides: Sequence[int], finest: int, multipliers: Sequence[float]) -> list[int]:
    """The levels of a U-Net whose grids have these sides; finest: the first grid's; multipliers: one for each level.

    Raises ValueError for a side that no grid has.
    """
    grids = [finest // 2**level for level in range(len(multipliers))]
    if unknown := [side for side in sides if side not in grids]:
        raise ValueError(f"attention_resolutions name {unknown}; the grids of this decoder are {grids}")
    return [grids.index(side) for side in sides]


def check_choices(norm_context: str, null_z_i: str, text_width: int | None, z_t_width: int | None) -> None:
    """Raises ValueError where `Decoder`'s arguments are not among those offered, or do not fit each other."""
    if norm_context not in ("all", "text") or (z_t_width is not None and text_width is None):
        raise ValueError(
            f"norm_context is {norm_context!r}, z_t_width {z_t_width} and text_width {text_width}; expected 'all' "
            "or 'text', and z_t_width only with text_width"
        )
    if null_z_i not in ("learned", "zeros"):
        raise ValueError(f"null_z_i is {null_z_i!r}; expected 'learned' or 'zeros'")
