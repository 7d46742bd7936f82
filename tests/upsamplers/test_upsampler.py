from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import nn

from unclip.core.sampling import cat_contexts
from upsamplers.upsampler import Upsampler, UpsamplerContext

PAPER = Path(__file__).parents[2] / "recipes" / "paper"
TINY = {"sample_size": 64, "model_channels": 16, "channel_multipliers": (1, 2), "num_res_blocks": 1}


def randomised(**changes) -> Upsampler:
    torch.manual_seed(0)
    upsampler = Upsampler(**(TINY | changes))
    for parameter in upsampler.parameters():
        nn.init.normal_(parameter, std=0.1)
    return upsampler.eval()


def inputs(b=2, h=16, w=16, factor=4):
    generator = torch.Generator().manual_seed(1)
    low = torch.rand(b, 3, h // factor, w // factor, generator=generator) * 2 - 1
    return torch.randn(b, 3, h, w, generator=generator), torch.arange(b) * 300 + 5, low


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "changes", [{}, {"patch_size": 4}, {"time_conditioning": "additive", "learned_variance": True}]
)
def test_both_ways_to_call_agree_in_value_and_gradient(changes):
    x_t, t, low = inputs()
    outputs, gradients = [], []
    for halves in (False, True):
        upsampler, given = randomised(**changes), low.clone().requires_grad_()
        output = upsampler(x_t, t, upsampler.encode_context(given)) if halves else upsampler(x_t, t, low=given)
        output.square().sum().backward()
        outputs.append(output)
        gradients.append([given.grad, *(p.grad for p in upsampler.parameters())])
    assert outputs[0].shape == (2, 6 if changes.get("learned_variance") else 3, 16, 16)
    assert torch.equal(*outputs)
    assert all(g.any() and torch.equal(g, h) for g, h in zip(*gradients, strict=True))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("factor", [2, 4])
def test_context_is_the_picture_upsampled(interpolation, factor):
    upsampler = randomised(interpolation=interpolation, factor=factor)
    low = inputs(h=8, w=16, factor=factor)[2]
    large = upsampler.encode_context(low).low
    assert large.shape == (2, 3, 8, 16)
    close(large, F.interpolate(low, (8, 16), mode=interpolation, align_corners=False))
    close(upsampler.encode_context(torch.full_like(low, 0.3)).low, torch.full_like(large, 0.3))


@pytest.mark.parametrize("h, w", [(64, 64), (64, 32), (16, 48)])
@pytest.mark.parametrize("patch_size", [1, 2, 4])
def test_runs_at_four_times_its_crop_and_at_any_aspect(h, w, patch_size):
    x_t, t, low = inputs(h=h, w=w)
    out = randomised(patch_size=patch_size)(x_t, t, low=low)
    assert out.shape == x_t.shape and out.isfinite().all()


@pytest.mark.parametrize("patch_size", [1, 4])
def test_what_it_draws_moves_with_the_picture(patch_size):
    """A patch on an even ground, in two places of a canvas four times its side: the same drawing, moved."""
    upsampler = randomised(patch_size=patch_size, num_res_blocks=1, channel_multipliers=(1, 1))
    side, step = 64 * patch_size, 8 * patch_size  # a move is a multiple of the coarsest position and of the factor
    x_t, t, low = inputs(b=1, h=side // 4, w=side // 4)
    drawings = []
    for move in (0, step):
        top = 3 * side // 8 - step // 2 + move
        canvas = torch.zeros(1, 3, side, side)
        canvas[..., top : top + side // 4, top : top + side // 4] = x_t
        ground = torch.zeros(1, 3, side // 4, side // 4)
        ground[..., top // 4 : top // 4 + side // 16, top // 4 : top // 4 + side // 16] = low
        out = upsampler(canvas, t, low=ground)
        drawings.append(out[..., top - step : top + side // 4 + step, top - step : top + side // 4 + step])
    close(*drawings)
    assert drawings[0].std() > 0.1


def test_a_row_of_a_batch_is_the_row_alone():
    upsampler = randomised()
    x_t, t, low = inputs(b=3)
    whole = upsampler(x_t, t, low=low)
    for i in range(3):
        close(whole[i : i + 1], upsampler(x_t[i : i + 1], t[i : i + 1], low=low[i : i + 1]))


def test_contexts_join():
    upsampler = randomised()
    x_t, t, low = inputs()
    context = cat_contexts(upsampler.encode_context(low[:1]), upsampler.encode_context(low[1:]))
    assert isinstance(context, UpsamplerContext)
    assert torch.equal(upsampler(x_t, t, context), upsampler(x_t, t, low=low))


def test_low_resolution_in_bf16_keeps_its_colour():
    low = torch.full((1, 3, 8, 8), 0.7, dtype=torch.bfloat16)
    large = randomised().encode_context(low).low
    assert large.dtype == torch.bfloat16 and (large == low[0, 0, 0, 0]).all()


def test_save_and_load_round_trip(tmp_path):
    upsampler = randomised(patch_size=2, num_res_blocks=(1, 2))
    upsampler.save_pretrained(tmp_path)
    x_t, t, low = inputs()
    assert torch.equal(Upsampler.from_pretrained(tmp_path)(x_t, t, low=low), upsampler(x_t, t, low=low))


def test_overfits_one_batch():
    torch.manual_seed(0)
    upsampler = Upsampler(**TINY).train()
    x_t, t, low = inputs()
    target = upsampler.encode_context(low).low
    optimizer = torch.optim.Adam(upsampler.parameters(), 3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        loss = (upsampler(x_t, t, low=low) - target).square().mean()
        loss.backward()
        optimizer.step()
    assert loss < 0.05 * target.square().mean()


def test_refuses_what_does_not_fit():
    upsampler = randomised()
    x_t, t, low = inputs()
    with pytest.raises(ValueError, match="either a context or"):
        upsampler(x_t, t)
    with pytest.raises(ValueError, match="4 times the size"):
        upsampler(x_t, t, low=low[..., :2])
    with pytest.raises(ValueError, match="low has shape"):
        upsampler(x_t, t, low=low[:, :1])
    with pytest.raises(ValueError, match="divisible by 8"):
        randomised(patch_size=4)(x_t[..., :12], t, low=low[..., :3])
    with pytest.raises(ValueError, match="interpolation"):
        randomised(interpolation="nearest")
    with pytest.raises(ValueError, match="factor"):
        randomised(factor=0)


@pytest.mark.parametrize("name, count", [("upsampler_256", 700e6), ("upsampler_1024", 300e6)])
def test_paper_sizes_are_the_papers(name, count):
    with torch.device("meta"):
        upsampler = Upsampler(**yaml.safe_load((PAPER / f"{name}.yaml").read_text())["model"])
    assert sum(p.numel() for p in upsampler.parameters()) == pytest.approx(count, rel=0.05)


def test_antialias_is_torchs_other_cubic():
    low = torch.rand(1, 3, 8, 8) * 2 - 1
    plain, other = (Upsampler(**TINY, antialias=flag).encode_context(low).low for flag in (False, True))
    torch.testing.assert_close(other, F.interpolate(low, size=[32, 32], mode="bicubic", antialias=True))
    assert not torch.allclose(plain, other, atol=1e-3)
