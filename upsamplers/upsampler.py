"""Upsampler: how the low-resolution picture enters the U-Net (paper §2.1). No attention, no text, no guidance."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

from unclip.core.layers import TimeConditioning
from unclip.core.masks import KNOWN_CHANNELS, check_known, join_known
from unclip.core.unet import Times, UNet, check_picture


class UpsamplerContext(NamedTuple):
    """What an upsampler computes once for a picture."""

    low: Tensor  # (b, 3, h·factor, w·factor), the low-resolution picture at the target size
    times: Times | None = None  # the time projections of all steps of a run
    known: Tensor | None = None  # (b, 4, h·factor, w·factor), known pixels and their mask; None: nothing is known


class Upsampler(ModelMixin, ConfigMixin):
    """Convolutional U-Net that draws a picture `factor` times as large as the one it is given, of any size and aspect.

    Args:
        sample_size: side in pixels of the pictures it is meant to draw (for pipelines; nothing depends on it).
        factor: target size over low-resolution size.
        interpolation, antialias: how the low-resolution picture is brought to the target size. (Enlarged by torch,
            `antialias` means another cubic: a = −0.5 in place of −0.75.)
        inpaint: whether the U-Net sees known pixels of the target and their mask, too, in four channels after all
            others (GLIDE §4.3). Trained from an upsampler without them (`start`), it begins as exactly that one.

    The other arguments are those of `core.unet.UNet`. The target's sides must be divisible by
    `patch_size · 2^(levels − 1)`.
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        sample_size: int = 256,
        factor: int = 4,
        in_channels: int = 3,
        out_channels: int = 3,
        patch_size: int = 1,
        model_channels: int = 320,
        channel_multipliers: tuple[float, ...] = (1, 2, 3, 4),
        num_res_blocks: int | tuple[int, ...] = 3,
        dropout: float = 0.0,
        time_conditioning: TimeConditioning = "scale_shift",
        resblock_updown: bool = True,
        learned_variance: bool = False,
        time_dim: int | None = None,
        norm_groups: int | None = None,
        interpolation: Literal["bilinear", "bicubic"] = "bicubic",
        antialias: bool = False,
        inpaint: bool = False,
        mix_input: bool = False,
    ):
        super().__init__()
        if factor < 1:
            raise ValueError(f"factor is {factor}; expected a whole number of at least 1")
        if interpolation not in ("bilinear", "bicubic"):
            raise ValueError(f"interpolation is {interpolation!r}; expected 'bilinear' or 'bicubic'")
        self.inpaint = inpaint
        self.unet = UNet(
            in_channels=in_channels + 3 + (KNOWN_CHANNELS if inpaint else 0),
            out_channels=out_channels,
            model_channels=model_channels,
            channel_multipliers=channel_multipliers,
            num_res_blocks=num_res_blocks,
            dropout=dropout,
            time_conditioning=time_conditioning,
            resblock_updown=resblock_updown,
            patch_size=patch_size,
            learned_variance=learned_variance,
            time_dim=time_dim,
            norm_groups=norm_groups,
            mix_input=mix_input,
        )

    def encode_context(self, low: Tensor, known: Tensor | None = None) -> UpsamplerContext:
        """Brings the low-resolution picture (b, 3, h, w) in [−1, 1] to the target size (b, 3, h·factor, w·factor).

        known: (b, 4, h·factor, w·factor) of pictures to inpaint, as `core.masks.known_channels` gives it.
        """
        check_known(known, self.inpaint)
        check_picture("low", low, 3, 1)
        factor, mode, antialias = (self.config[name] for name in ("factor", "interpolation", "antialias"))
        # Bicubic weights in bf16 would shift the whole picture's colours by up to 1/64.
        large = F.interpolate(low.float(), scale_factor=factor, mode=mode, align_corners=False, antialias=antialias)
        return UpsamplerContext(large.to(low.dtype).contiguous(memory_format=torch.channels_last), known=known)

    def at_steps(self, context: UpsamplerContext, steps: Sequence[int]) -> UpsamplerContext:
        """The context with all that the steps of a run decide, too; it is then good for these steps alone."""
        return context._replace(times=self.unet.at_steps(steps, None, len(context.low)))

    def forward(self, x_t: Tensor, t: Tensor, context: UpsamplerContext | None = None, **conditions) -> Tensor:
        """One evaluation. Give `context`, or the keyword arguments of `encode_context`.

        x_t: (b, in_channels, h, w) at the target size; t: (b,) steps 0 … 999.
        Returns the prediction (b, out_channels, h, w); with learned variance (prediction | variance) along channels.
        """
        if (context is None) == (not conditions):
            raise ValueError("the upsampler takes either a context or the condition low=…: give one of the two")
        if context is None:
            context = self.encode_context(**conditions)
        low = context.low
        if low.shape[0] != x_t.shape[0] or low.shape[-2:] != x_t.shape[-2:]:
            raise ValueError(
                f"x_t has shape {tuple(x_t.shape)}, but the low-resolution picture upsampled has {tuple(low.shape)}: "
                f"x_t must be {self.config['factor']} times the size of low"
            )
        x = torch.cat([x_t, low.to(x_t.dtype)], dim=1)
        return self.unet(join_known(x, context.known) if self.inpaint else x, t, times=context.times)
