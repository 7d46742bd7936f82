"""Upsampling in tiles: the whole where a network looks at one pixel, near it otherwise, and no larger than a tile."""

import pytest
import torch
from torch import nn

from unclip.core.sampling import guided
from upsamplers.tiles import Tiled
from upsamplers.upsampler import Upsampler, UpsamplerContext


def upsampler(seed: int = 0) -> Upsampler:
    torch.manual_seed(seed)
    net = Upsampler(model_channels=16, channel_multipliers=(1, 2), num_res_blocks=1)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.1)
    return net.eval().requires_grad_(False)


class Pointwise(Upsampler):
    """What it predicts of a pixel depends on this pixel and on t alone."""

    def forward(self, x_t, t, context, **conditions):
        return torch.cat([x_t * 2 + t[:, None, None, None], context.low - x_t], dim=1)


@pytest.mark.parametrize(("h", "w"), [(64, 64), (40, 72), (16, 48)])
def test_of_a_pointwise_network_tiles_are_the_whole(h: int, w: int):
    net = Pointwise(model_channels=16, channel_multipliers=(1, 2), num_res_blocks=1)
    x, t, context = torch.randn(2, 3, h, w), torch.tensor([3, 7]), UpsamplerContext(torch.randn(2, 3, h, w))
    torch.testing.assert_close(Tiled(net, 16)(x, t, context), net(x, t, context))


def test_tiles_cover_every_pixel_and_none_is_larger(monkeypatch: pytest.MonkeyPatch):
    net, seen = upsampler(), []
    net.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].shape[-2:]))
    x, context = torch.randn(1, 3, 64, 40), net.encode_context(low=torch.randn(1, 3, 16, 10))
    out = Tiled(net, 32)(x, torch.tensor([10]), context)
    assert out.isfinite().all() and out.shape == (1, 3, 64, 40)
    assert set(seen) == {(32, 32)} and len(seen) == 6


def test_a_picture_no_larger_than_a_tile_is_untouched():
    net = upsampler()
    x, t, context = torch.randn(2, 3, 32, 24), torch.tensor([3, 7]), net.encode_context(low=torch.randn(2, 3, 8, 6))
    assert torch.equal(Tiled(net, 32)(x, t, context), net(x, t, context))
    assert torch.equal(guided(Tiled(net, 32), context)(x, t), guided(net, context)(x, t))


@pytest.mark.parametrize("side", [0, -8, 4, 30, 2.5, True, "64"])
def test_a_side_that_does_not_fit_is_refused(side):
    with pytest.raises(ValueError, match="multiple of 8"):
        Tiled(upsampler(), side)
