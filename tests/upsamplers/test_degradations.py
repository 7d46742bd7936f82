import io
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from unclip.core.data import Draws
from upsamplers.degradations import (
    STEPS,
    STRENGTHS,
    Parameters,
    add_noise,
    add_sensor_noise,
    blur,
    blur_covariances,
    bsr,
    downsample,
    gaussian_blur,
    jpeg,
    noise_mixing,
)


def smooth(b=1, h=64, w=64, seed=0):
    """Pictures in [−1, 1] with structure at several scales."""
    generator = torch.Generator().manual_seed(seed)
    layers = [torch.rand(b, 3, h // s, w // s, generator=generator) * 2 - 1 for s in (4, 8, 16)]
    return sum(F.interpolate(layer, (h, w), mode="bilinear") for layer in layers) / 3


def parameters(b=200, strength="full", h=32, w=32):
    return Parameters(Draws(0, 0, range(b)), torch.Size((b, 3, h, w)), STRENGTHS[strength], 4)


@pytest.mark.parametrize("strength", ["full", "light"])
@pytest.mark.parametrize("h, w", [(64, 64), (64, 32), (20, 52), (4, 8)])
def test_bsr_gives_a_quarter_in_range(strength, h, w):
    x0 = torch.rand(3, 3, h, w) * 2 - 1
    low = bsr(x0, Draws(0, 1, range(3)), strength)
    assert low.shape == (3, 3, h // 4, w // 4) and low.dtype == x0.dtype
    assert low.isfinite().all() and low.abs().max() <= 1


@pytest.mark.parametrize("strength", ["full", "light"])
def test_a_row_of_a_batch_is_the_row_alone(strength):
    x0 = smooth(b=12, h=48, w=64)
    whole = bsr(x0, Draws(5, 3, range(12)), strength)
    for i in range(12):
        alone = bsr(x0[i : i + 1], Draws(5, 3, [i]), strength)
        torch.testing.assert_close(whole[i : i + 1], alone, atol=1e-4, rtol=0)


def test_draws_decide_and_nothing_else():
    x0 = smooth(b=4)
    state = torch.get_rng_state()
    first = bsr(x0, Draws(0, 0, range(4)))
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(first, bsr(x0, Draws(0, 0, range(4))))
    assert not torch.allclose(first, bsr(x0, Draws(0, 1, range(4))), atol=1e-2)
    same = x0[:1].expand(4, -1, -1, -1)
    assert not torch.allclose(*bsr(same, Draws(0, 0, range(4)))[:2], atol=1e-2)


def test_full_destroys_more_than_light_and_light_more_than_blur():
    x0 = smooth(b=16)
    low = downsample(x0, 4)
    full, light = (bsr(x0, Draws(0, 0, range(16)), strength) for strength in ("full", "light"))
    errors = [(y - low).square().mean().item() for y in (gaussian_blur(low), light, full)]
    assert 0 < errors[0] < errors[1] < errors[2]


def test_every_order_resizes_before_it_fixes_the_size():
    p = parameters()
    resize, to_final = STEPS.index("resize"), STEPS.index("to_final")
    for order in p.orders:
        assert sorted(order) == list(range(len(STEPS)))
        assert order.index(resize) < order.index(to_final)
    assert len({tuple(order) for order in p.orders}) > 150
    for step in range(len(STEPS)):
        if step != to_final:
            assert {order.index(step) for order in p.orders} >= set(range(6))


@pytest.mark.parametrize(
    "strength, widest, noise, quality", [("full", 2.8, (2, 25), (30, 95)), ("light", 0.7, (2, 8), (80, 95))]
)
def test_parameters_fill_their_ranges(strength, widest, noise, quality):
    p = parameters(1000, strength)
    variances = torch.linalg.eigvalsh(p.covariances)  # b 2 2
    isotropic = torch.isclose(variances[..., 0], variances[..., 1], rtol=1e-3)
    assert 0.4 < isotropic.float().mean() < 0.6
    sigma = variances[isotropic].sqrt().quantile(0.98)  # a few of the others are round by chance
    assert widest * 0.9 < sigma <= widest * 1.001
    assert variances[~isotropic].max() <= 8 * STRENGTHS[strength].blur + 1e-4
    level = p.noise_level * 255
    assert noise[0] <= level.min() < noise[0] + 0.5 and noise[1] - 0.5 < level.max() <= noise[1]
    for q in (p.quality, p.last_quality):
        assert quality[0] <= q.min() and q.max() <= quality[1] and q.max() - q.min() > 0.95 * (quality[1] - quality[0])
    assert 0.86 < np.mean(p.has_jpeg) < 0.94 and 0.2 < np.mean(p.has_sensor) < 0.3
    sides = [side for size in p.sizes for side in size]
    assert min(sides) >= 4 and max(sides) == 32
    assert {mode for modes in p.modes for mode in modes} == {"bilinear", "bicubic", "area"}


def test_gaussian_blur_is_the_kernel_of_three_and_keeps_even_ground():
    low = torch.zeros(1, 3, 9, 9)
    low[..., 4, 4] = 1
    taps = [math.exp(-(x**2) / (2 * 0.6**2)) for x in (-1, 0, 1)]
    kernel = torch.tensor(taps) / sum(taps)
    expected = torch.zeros(9, 9)
    expected[3:6, 3:6] = kernel[:, None] * kernel
    torch.testing.assert_close(gaussian_blur(low)[0, 1], expected)
    ground = torch.full((1, 3, 6, 10), 0.4)
    torch.testing.assert_close(gaussian_blur(ground), ground)


def test_blur_has_the_covariance_it_is_told():
    covariance = torch.tensor([[[4.0, 1.5], [1.5, 2.0]]])
    x = torch.zeros(1, 3, 41, 41)
    x[..., 20, 20] = 1
    spread = blur(x, covariance, 15)[0, 0]
    side = torch.arange(-20, 21.0)
    assert spread.sum() == pytest.approx(1, abs=1e-5)
    measured = torch.stack(
        [
            torch.stack([(spread * side[:, None] ** 2).sum(), (spread * side[:, None] * side).sum()]),
            torch.stack([(spread * side[:, None] * side).sum(), (spread * side**2).sum()]),
        ]
    )
    torch.testing.assert_close(measured, covariance[0], atol=0.02, rtol=0)


def test_half_the_covariances_are_isotropic():
    u = torch.rand(2, 2, 5)
    u[0, :, 0], u[1, :, 0] = 0.2, 0.8
    isotropic, other = blur_covariances(u, 1.0, 4)
    torch.testing.assert_close(isotropic, torch.diag_embed(isotropic.diagonal(dim1=-2, dim2=-1)), atol=1e-5, rtol=0)
    assert (other[:, 0, 1].abs() > 1e-3).all()


def test_downsample_keeps_the_mean_and_inverts_enlarging():
    low = smooth(h=32, w=64)
    large = F.interpolate(low, scale_factor=4, mode="nearest")
    small = downsample(large, 4)
    assert small.shape == low.shape
    assert (small - low).square().mean() < 0.01 * low.square().mean()
    assert small.mean() == pytest.approx(low.mean().item(), abs=1e-3)


def test_noise_comes_in_three_kinds():
    basis, variances = torch.rand(3, 3, 3), torch.rand(3, 3) + 0.1
    mixing = noise_mixing(torch.tensor([0.9, 0.1, 0.5]), variances, basis)
    noise = torch.randn(3, 3, 64, 64)
    out = add_noise(torch.full((3, 3, 64, 64), 0.5), noise, torch.full((3,), 0.02), mixing) - 0.5
    colour, grey, correlated = (torch.cov(o.flatten(1)) / 0.02**2 for o in out)
    torch.testing.assert_close(colour, torch.eye(3), atol=0.1, rtol=0)
    torch.testing.assert_close(grey, torch.ones(3, 3), atol=0.1, rtol=0)
    torch.testing.assert_close(correlated, mixing[2] @ mixing[2].T, atol=0.1, rtol=0)
    torch.testing.assert_close(torch.linalg.eigvalsh(mixing[2] @ mixing[2].T), variances[2].sort()[0])


def test_sensor_noise_grows_with_its_parameter():
    x = torch.full((2, 3, 64, 64), 0.5)
    out = add_sensor_noise(x, torch.randn(2, 3, 64, 64), torch.tensor([1e-4, 0.012]))
    weak, strong = (o.std().item() for o in out)
    assert 0 < weak < 0.05 and strong > 4 * weak
    torch.testing.assert_close(add_sensor_noise(x, torch.zeros_like(x), torch.tensor([1e-4, 0.012])), x)


@pytest.mark.parametrize("quality", [30, 80, 95])
def test_jpeg_is_near_a_real_encoder(quality):
    x = (smooth(h=48, w=64) + 1) / 2
    array = (x[0].permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
    file = io.BytesIO()
    Image.fromarray(array).save(file, "JPEG", quality=quality, subsampling="4:2:0")
    real = torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1) / 255
    ours = jpeg(x, torch.tensor([float(quality)]))[0]
    loss = (real - x[0]).square().mean()
    assert (ours - real).square().mean() < loss
    assert 0.5 < (ours - x[0]).square().mean() / loss < 2


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: bsr(torch.zeros(1, 3, 10, 8), Draws(0, 0, [0])), "divisible by 4"),
        (lambda: bsr(torch.zeros(3, 8, 8), Draws(0, 0, [0])), "shape"),
        (lambda: bsr(torch.zeros(1, 3, 8, 8), Draws(0, 0, [0]), "strong"), "strength is 'strong'"),
        (lambda: downsample(torch.zeros(1, 1, 8, 8), 4), "shape"),
        (lambda: gaussian_blur(torch.zeros(1, 4, 8, 8)), "shape"),
    ],
)
def test_refuses_what_does_not_fit(call, message):
    with pytest.raises(ValueError, match=message):
        call()
