"""From a picture to x_T and back, on gaussian data, of which the exact way is known; and against diffusers' own run."""

from itertools import pairwise

import pytest
import torch
from diffusers import DDIMInverseScheduler
from torch import Tensor

from unclip.core.diffusion import PREDICTION_TYPES, Diffusion, make_scheduler
from unclip.core.sampling import make_sampler, picture_generators, resolve_timesteps, sample

LOW_END = {"timestep_spacing": "leading"}


def gaussian_denoiser(diffusion: Diffusion, mean: float, std: float):
    """The exact denoiser of data N(mean, std²)."""

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        a_bar = diffusion.alphas_cumprod.double()[int(t[0])]
        gain = a_bar.sqrt() * std**2 / (a_bar * std**2 + 1 - a_bar)
        x0 = mean + gain * (x_t.double() - a_bar.sqrt() * mean)
        return diffusion.from_x0(x_t.double(), x0, t).float()

    return denoise


def setup(prediction: str = "epsilon", kind: str = "cosine", clip: bool = False):
    scheduler = make_scheduler(kind, prediction, clip_sample=clip)  # pyright: ignore[reportArgumentType]
    x = torch.linspace(-1.5, 1.5, 61).view(1, 1, -1)
    return scheduler, Diffusion.from_scheduler(scheduler), x, picture_generators([0], "decoder")


def there(denoise, scheduler, x, steps, generators) -> Tensor:
    return sample(denoise, make_sampler(scheduler, "ddim_inverse", **LOW_END), x, steps, generators)


def back(denoise, scheduler, x, steps, generators) -> Tensor:
    return sample(denoise, make_sampler(scheduler, "ddim", clip_sample=False, **LOW_END), x, steps, generators)


@pytest.mark.parametrize("kind", ["cosine", "linear"])
@pytest.mark.parametrize("prediction", PREDICTION_TYPES)
def test_the_noise_of_gaussian_data_is_known_and_nears_it_with_steps(prediction: str, kind: str) -> None:
    mean, std = 0.3, 0.5
    scheduler, diffusion, x, generators = setup(prediction, kind)
    errors = []
    for steps in (25, 50, 100, 200):
        top = resolve_timesteps(make_sampler(scheduler, "ddim_inverse", **LOW_END), steps)[-1]
        a_bar = diffusion.alphas_cumprod.double()[top]
        exact = a_bar.sqrt() * mean + (a_bar * std**2 + 1 - a_bar).sqrt() * (x - mean) / std
        found = there(gaussian_denoiser(diffusion, mean, std), scheduler, x, steps, generators)
        errors.append(float((found - exact).abs().max()))
    assert errors[-1] < 0.05
    for coarse, fine in pairwise(errors):
        assert fine < 0.65 * coarse  # of first order: half as large at twice the steps


@pytest.mark.parametrize("prediction", PREDICTION_TYPES)
def test_the_way_back_leads_to_the_picture(prediction: str) -> None:
    scheduler, diffusion, x, generators = setup(prediction)
    denoise = gaussian_denoiser(diffusion, 0.3, 0.5)
    errors = []
    for steps in (25, 50, 100, 200):
        x_T = there(denoise, scheduler, x, steps, generators)
        errors.append(float((back(denoise, scheduler, x_T, steps, generators) - x).abs().max()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.04


def test_it_is_diffusers_own_run_with_eps_where_x_is() -> None:
    scheduler, diffusion, x, generators = setup()
    denoise = gaussian_denoiser(diffusion, 0.3, 0.5)
    own = DDIMInverseScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=False)
    own.set_timesteps(40)
    state, at = x, own.timesteps[:1]
    for t in own.timesteps:
        state = own.step(denoise(state, at), int(t), state, return_dict=False)[0]
        at = t[None]
    torch.testing.assert_close(there(denoise, scheduler, x, 40, generators), state, rtol=1e-4, atol=1e-4)


def test_it_walks_the_grid_of_the_way_back() -> None:
    scheduler, _, x, generators = setup()
    inverse, forward = (make_sampler(scheduler, s, **LOW_END) for s in ("ddim_inverse", "ddim"))
    for count in (1, 2, 7, 25, 100, 999, 1000):
        assert resolve_timesteps(inverse, count) == resolve_timesteps(forward, count)[::-1]
    assert resolve_timesteps(inverse, 100)[-1] == 990
    calls: list[int] = []

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        calls.append(int(t[0]))
        return torch.zeros_like(x_t)

    sample(denoise, inverse, x, [3, 40, 500], generators)
    assert calls == [3, 3, 40]
    with pytest.raises(ValueError, match="go down"):
        sample(denoise, inverse, x, [3, 500, 40, 900], generators)
    with pytest.raises(ValueError, match="eta"):
        sample(denoise, inverse, x, 5, generators, eta=0.5)


def test_nothing_is_clamped_and_variance_channels_are_cut() -> None:
    """The scheduler says to clamp; the picture reaches to ±1.5 and comes back."""
    scheduler, diffusion, x, generators = setup("v_prediction", clip=True)
    denoise = gaussian_denoiser(diffusion, 0.0, 1.0)
    with_variance = lambda x_t, t: torch.cat([denoise(x_t, t), torch.full_like(x_t, 9.0)], 1)  # noqa: E731
    x_T = there(with_variance, scheduler, x, 100, generators)
    assert torch.equal(x_T, there(denoise, scheduler, x, 100, generators))
    assert float((back(denoise, scheduler, x_T, 100, generators) - x).abs().max()) < 0.06
