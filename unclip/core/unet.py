"""The one U-Net, of decoder and upsamplers (ADM, arXiv 2105.05233, as GLIDE and paper §2.1 use it)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from unclip.core.layers import (
    Attention,
    KeysValues,
    ResBlock,
    Resize,
    TimeConditioning,
    fold,
    group_norm,
    silu,
    unfold,
    zero_init,
)
from unclip.core.products import Linear

MOST_TIMES = 2**24  # numbers that `UNet.at_steps` keeps at most


class Times(NamedTuple):
    """The time projections of all residual blocks at every step of a run."""

    steps: Tensor  # (b, s)
    projections: Tensor  # (b, s, time_channels of all blocks)

    def at(self, t: Tensor) -> Tensor:
        """Those at the steps t (b,): (b, time_channels of all blocks); NaN at a step that is not among them."""
        found = self.steps == t[:, None]  # b s
        chosen = self.projections[torch.arange(len(t), device=t.device), found.int().argmax(1)]
        return torch.where(found.any(1, keepdim=True), chosen, torch.nan)


class Resample(nn.Module):
    """Resize by a plain convolution: what stands between two levels where `resblock_updown` is off."""

    def __init__(self, channels: int, direction: Literal["down", "up"]):
        super().__init__()
        down = direction == "down"
        self.resize = nn.Identity() if down else Resize("up")
        self.conv = nn.Conv2d(channels, channels, 3, stride=2 if down else 1, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.resize(x))


class Stage(nn.Module):
    """What stands between two skip connections: a residual block, an attention layer, a resize, each optional."""

    def __init__(
        self, block: ResBlock | None = None, attention: Attention | None = None, resize: nn.Module | None = None
    ):
        super().__init__()
        self.block, self.attention, self.resize = block, attention, resize

    def forward(
        self, x: Tensor, times: Sequence[Tensor], context: KeysValues | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """times: the time projections of the stage's residual blocks, in order."""
        remaining = iter(times)
        if self.block is not None:
            x = self.block(x, next(remaining))
        if self.attention is not None:
            x = self.attention(x, context, mask)
        if self.resize is not None:
            x = self.resize(x, next(remaining)) if isinstance(self.resize, ResBlock) else self.resize(x)
        return x

    def res_blocks(self) -> list[ResBlock]:
        return [module for module in (self.block, self.resize) if isinstance(module, ResBlock)]


@dataclass(frozen=True)
class Plan:
    """The stages of one U-Net, in the order in which they run; the fields are `UNet`'s arguments, worked out.

    widths: channels of each level; counts: its residual blocks on the way down, one more on the way up.
    """

    widths: Sequence[int]
    counts: Sequence[int]
    attention_levels: Sequence[int]
    head_channels: int
    context_width: int | None
    dropout: float
    time_conditioning: TimeConditioning
    resblock_updown: bool
    norm_groups: int | None

    def down(self) -> list[Stage]:
        stages, width = [], self.widths[0]
        for level, count in enumerate(self.counts):
            for _ in range(count):
                stages.append(Stage(self.block(width, self.widths[level]), self.attention(level)))
                width = self.widths[level]
            if level < len(self.counts) - 1:
                stages.append(Stage(resize=self.resize(width, "down")))
        return stages

    def middle(self) -> list[Stage]:
        width = self.widths[-1]
        attention = self.attention_over(width) if self.attention_levels else None
        return [Stage(self.block(width, width), attention), Stage(self.block(width, width))]

    def up(self) -> list[Stage]:
        stages, skips, width = [], self.skips(), self.widths[-1]
        for level in reversed(range(len(self.counts))):
            for i in range(self.counts[level] + 1):
                last = level > 0 and i == self.counts[level]
                resize = self.resize(self.widths[level], "up") if last else None
                block = self.block(width + skips.pop(), self.widths[level])
                stages.append(Stage(block, self.attention(level), resize))
                width = self.widths[level]
        return stages

    def skips(self) -> list[int]:
        """Channels of what the way down leaves for the way up: of the input and of every stage."""
        skips = [self.widths[0]]
        for level, count in enumerate(self.counts):
            skips += [self.widths[level]] * (count + (level < len(self.counts) - 1))
        return skips

    def block(self, n_in: int, n_out: int, direction: Literal["down", "up", "same"] = "same") -> ResBlock:
        return ResBlock(n_in, n_out, self.dropout, self.time_conditioning, direction, self.norm_groups)

    def attention_over(self, width: int) -> Attention:
        return Attention(width, self.head_channels, self.context_width, self.norm_groups)

    def attention(self, level: int) -> Attention | None:
        return self.attention_over(self.widths[level]) if level in self.attention_levels else None

    def resize(self, width: int, direction: Literal["down", "up"]) -> nn.Module:
        return self.block(width, width, direction) if self.resblock_updown else Resample(width, direction)


class UNet(nn.Module):
    """U-Net over pictures (b, in_channels, h, w), conditioned on t, an addend to its embedding and context tokens.

    `model_channels` times each of `channel_multipliers` is the width of a level, the finest first; each next level
    halves the grid. `num_res_blocks` is one count for all levels or one per level. `attention_levels` are indices of
    levels; where there is any, the middle has one too. `head_channels` is an attention head's width. `patch_size` folds
    pixels into channels first and unfolds them last: h and w must be divisible by
    `patch_size · 2^(levels − 1)`. `learned_variance` doubles the output: (prediction | variance) along channels.
    `context_width` None means attention of pixels to pixels only. `time_dim` is the width of the time embedding,
    4 times `model_channels` unless given; `norm_groups` is explained at `layers.group_norm`. `mix_input` adds the input
    to the prediction, each channel times a number that the time embedding gives and that starts at zero: the last norm
    hides how large values are, so that a network which predicts x0 copies badly what it was shown without it.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        model_channels: int,
        channel_multipliers: Sequence[float],
        num_res_blocks: int | Sequence[int],
        attention_levels: Sequence[int] = (),
        head_channels: int = 64,
        context_width: int | None = None,
        dropout: float = 0.0,
        time_conditioning: TimeConditioning = "scale_shift",
        resblock_updown: bool = True,
        patch_size: int = 1,
        learned_variance: bool = False,
        time_dim: int | None = None,
        norm_groups: int | None = None,
        mix_input: bool = False,
    ):
        super().__init__()
        levels = len(channel_multipliers)
        counts = [num_res_blocks] * levels if isinstance(num_res_blocks, int) else list(num_res_blocks)
        check_arguments(channel_multipliers, counts, attention_levels, time_conditioning, patch_size)
        self.in_channels, self.out_channels = in_channels, out_channels
        self.patch_size = patch_size
        self.multiple = patch_size * 2 ** (levels - 1)
        self.time_dim = time_dim or 4 * model_channels
        self.gradient_checkpointing = False

        widths = [round(model_channels * multiplier) for multiplier in channel_multipliers]
        area, doubled = patch_size**2, 2 if learned_variance else 1
        plan = Plan(
            widths,
            counts,
            attention_levels,
            head_channels,
            context_width,
            dropout,
            time_conditioning,
            resblock_updown,
            norm_groups,
        )
        # Weights start from one stream of random numbers: what is made in another order starts from other weights.
        self.time_steps = Timesteps(model_channels, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(model_channels, self.time_dim)
        self.input = nn.Conv2d(in_channels * area, widths[0], 3, padding=1)
        down, middle, up = plan.down(), plan.middle(), plan.up()
        self.down, self.up, self.middle = nn.ModuleList(down), nn.ModuleList(up), nn.ModuleList(middle)
        self.norm = group_norm(widths[0], norm_groups)
        self.output = zero_init(nn.Conv2d(widths[0], out_channels * area * doubled, 3, padding=1))
        # One matrix for the time projections of all residual blocks: one product a step in place of dozens.
        self.time_widths = [[b.time_channels for b in stage.res_blocks()] for stage in self.stages()]
        self.time_projection = Linear(self.time_dim, sum(map(sum, self.time_widths)))
        self.input_mix = zero_init(Linear(self.time_dim, in_channels * out_channels)) if mix_input else None

    def stages(self) -> list[Stage]:
        """All stages in the order in which they run."""
        return [*self.down, *self.middle, *self.up]  # type: ignore[list-item]

    def attention_layers(self) -> list[Attention]:
        """The attention layers in the order in which they run: that of the keys and values `forward` takes."""
        return [stage.attention for stage in self.stages() if stage.attention is not None]

    def project_context(self, tokens: Tensor) -> tuple[KeysValues, ...]:
        """Keys and values of context tokens (b, n, context_width), for each attention layer."""
        return tuple(layer.project_context(tokens) for layer in self.attention_layers())

    def project_time(self, t: Tensor, addend: Tensor | None) -> Tensor:
        """Time projections of all residual blocks, (…, time_channels of all), of t (n,) and addend (…, time_dim); the
        mix of input channels, (…, in_channels · out_channels), comes after them where there is one."""
        sines = self.time_steps(t).to(self.time_projection.weight.dtype)
        embedding = self.time_embedding(sines)  # n time_dim
        if addend is not None:
            embedding = embedding + addend
        embedding = F.silu(embedding)
        projections = self.time_projection(embedding)
        if self.input_mix is None:
            return projections
        return torch.cat([projections, self.input_mix(embedding)], dim=-1)

    def at_steps(self, steps: Sequence[int], addend: Tensor | None, batch: int) -> Times | None:
        """What `forward` takes as `times`, for the steps of a run; None where that is too much to keep."""
        if batch * len(steps) * self.time_projection.out_features > MOST_TIMES:
            return None
        t = torch.tensor(steps, device=self.time_projection.weight.device)
        projections = self.project_time(t, None if addend is None else addend[:, None])
        return Times(t.expand(batch, -1), projections.expand(batch, -1, -1))

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        addend: Tensor | None = None,
        keys_values: Sequence[KeysValues] | None = None,
        mask: Tensor | None = None,
        times: Times | None = None,
    ) -> Tensor:
        """One evaluation.

        x: (b, in_channels, h, w); t: (b,) steps 0 … 999; addend: (b, time_dim), added to the embedding of t;
        keys_values: what `project_context` gave; mask: (b, n) bool, true on context tokens that count; times: what
        `at_steps` gave for this addend, t among its steps.
        Returns (b, out_channels, h, w), or (b, 2·out_channels, h, w) with learned variance.
        """
        check_picture("x_t", x, self.in_channels, self.multiple)
        if t.shape != x.shape[:1]:
            raise ValueError(f"t has shape {tuple(t.shape)}; expected one step per picture: ({x.shape[0]},)")
        projections = self.project_time(t, addend) if times is None else times.at(t)
        blocks, mix = projections.tensor_split([self.time_projection.out_features], dim=1)
        parts = iter(blocks.split([width for widths in self.time_widths for width in widths], dim=1))
        remaining = iter([[next(parts) for _ in widths] for widths in self.time_widths])
        contexts = iter(keys_values or ())
        h = self.input(fold(x, self.patch_size).contiguous(memory_format=torch.channels_last))  # b c h w
        skips = [h]
        for stage in self.down:
            h = self.run(stage, h, remaining, contexts, mask)
            skips.append(h)
        for stage in self.middle:
            h = self.run(stage, h, remaining, contexts, mask)
        for stage in self.up:
            h = self.run(stage, torch.cat([h, skips.pop()], dim=1), remaining, contexts, mask)
        output = unfold(self.output(silu(self.norm(h))), self.patch_size)
        return output if self.input_mix is None else self.add_input(output, x, mix)

    def add_input(self, output: Tensor, x: Tensor, mix: Tensor) -> Tensor:
        """The output (b, c, h, w) with the input x (b, i, h, w) in its prediction, by mix (b, i · out_channels)."""
        mix = mix.unflatten(1, (self.in_channels, self.out_channels))
        mixed = torch.einsum("b i h w, b i o -> b o h w", x.to(mix.dtype), mix)
        if output.shape[1] == self.out_channels:
            return output + mixed
        return torch.cat([output[:, : self.out_channels] + mixed, output[:, self.out_channels :]], dim=1)

    def run(self, stage, h: Tensor, times, contexts, mask: Tensor | None) -> Tensor:
        """Runs one stage on the next of the time projections and contexts; recomputes it backward if asked to."""
        arguments = (h, next(times), next(contexts, None) if stage.attention is not None else None, mask)
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(stage, *arguments, use_reentrant=False)
        return stage(*arguments)


def check_arguments(
    multipliers: Sequence[float], counts: Sequence[int], attention_levels: Sequence[int], conditioning: str, patch: int
) -> None:
    """Raises ValueError where `UNet`'s arguments are out of range or do not fit each other."""
    levels = len(multipliers)
    if not levels or len(counts) != levels or min(counts) < 1 or min(multipliers) < 1:
        raise ValueError(
            f"channel_multipliers {list(multipliers)} and num_res_blocks {list(counts)} must be positive, "
            "with one count for all levels or one per level"
        )
    if patch not in (1, 2, 4, 8):
        raise ValueError(f"patch_size is {patch}; expected 1, 2, 4 or 8")
    if conditioning not in ("scale_shift", "additive"):
        raise ValueError(f"time_conditioning is {conditioning!r}; expected 'scale_shift' or 'additive'")
    if any(not 0 <= level < levels for level in attention_levels):
        raise ValueError(f"attention_levels {list(attention_levels)} name a level outside 0 … {levels - 1}")


def check_picture(name: str, x: Tensor, channels: int, multiple: int) -> None:
    """Raises ValueError unless x is (b, channels, h, w) with h and w divisible by `multiple`."""
    if x.ndim != 4 or x.shape[1] != channels or x.shape[2] % multiple or x.shape[3] % multiple or 0 in x.shape:
        raise ValueError(
            f"{name} has shape {tuple(x.shape)}; expected (b, {channels}, h, w) with h and w divisible by {multiple}"
        )
