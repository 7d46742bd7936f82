"""Analytic variance on data whose optimal variance is known in closed form: x0 ~ N(0, s²)."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from unclip.core.analytic import AnalyticDDPMScheduler, x0_variance
from unclip.core.diffusion import Diffusion, make_scheduler
from unclip.core.sampling import make_sampler, picture_generators, resolve_timesteps, respaced, sample, starting_noise

S = 0.7
KINDS = ("cosine", "linear")
PREDICTIONS = ("sample", "epsilon", "v_prediction")


def exact(scheduler):
    """The optimal network for x0 ~ N(0, s²): E[x0 | x_t] = a·s² / (a²·s² + σ²) · x_t, in its parametrisation."""
    diffusion = Diffusion.from_scheduler(scheduler)

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        kept = scheduler.alphas_cumprod.double()[t][:, None]
        x0 = kept.sqrt() * S**2 / (kept * S**2 + 1 - kept) * x_t
        return diffusion.from_x0(x_t, x0.float(), t)

    return denoise


def variance_of_x0(scheduler) -> Tensor:
    """Var(x0 | x_t) = s²·σ² / (a²·s² + σ²)."""
    kept = scheduler.alphas_cumprod.double()
    return S**2 * (1 - kept) / (kept * S**2 + 1 - kept)


def analytic(scheduler) -> AnalyticDDPMScheduler:
    return make_sampler(scheduler, "analytic", x0_variance=variance_of_x0(scheduler).tolist())


@pytest.mark.parametrize("kind", KINDS)
def test_the_estimate_is_the_closed_form(kind):
    scheduler = make_scheduler(kind, "sample", clip_sample=False)
    x0 = S * torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    estimated = x0_variance(exact(scheduler), scheduler, x0, torch.Generator().manual_seed(1))
    assert torch.allclose(estimated, variance_of_x0(scheduler).float(), rtol=0.1)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_estimate_does_not_depend_on_the_parametrisation(prediction):
    x0 = S * torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    plain = make_scheduler("cosine", "sample", clip_sample=False, num_train_timesteps=50)
    other = make_scheduler("cosine", prediction, clip_sample=False, num_train_timesteps=50)
    estimates = [x0_variance(exact(s), s, x0, torch.Generator().manual_seed(1)) for s in (plain, other)]
    assert torch.allclose(estimates[0][:-1], estimates[1][:-1], rtol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [5, 16, 1000])
def test_each_step_s_variance_is_that_of_x_s_given_x_t(kind, steps):
    """Var(x_s | x_t) of a gaussian pair, from its covariance, with no use of the formula under test."""
    scheduler = make_scheduler(kind, "sample", clip_sample=False)
    sampler = analytic(scheduler)
    visited = resolve_timesteps(sampler, steps)
    chain = respaced(sampler, visited)
    kept = chain.alphas_cumprod.double()
    marginal = kept * S**2 + 1 - kept
    covariance = (kept[1:] / kept[:-1]).sqrt() * marginal[:-1]
    optimal = marginal[:-1] - covariance**2 / marginal[1:]
    ours = torch.stack([chain._get_variance(k) for k in range(1, len(visited))]).double()
    assert torch.allclose(ours, optimal, rtol=2e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_few_steps_keep_the_variance_of_the_data_and_plain_ddpm_does_not(kind):
    scheduler = make_scheduler(kind, "sample", clip_sample=False)
    generators = picture_generators(range(64), "prior")
    x_T = starting_noise((256,), generators)
    drawn = {}
    for name, sampler in {"analytic": analytic(scheduler), "ddpm": make_sampler(scheduler, "ddpm")}.items():
        steps = [*resolve_timesteps(sampler, 5), 0]  # the last step has no noise: at t = 0 nothing is left to add
        drawn[name] = sample(exact(scheduler), sampler, x_T, steps, picture_generators(range(64), "noise")).var().item()
    assert drawn["analytic"] == pytest.approx(S**2, rel=0.03)
    assert drawn["ddpm"] < 0.9 * S**2


def test_known_data_are_plain_ddpm_and_unknown_are_bounded():
    scheduler = make_scheduler("cosine", "sample", clip_sample=False)
    none = make_sampler(scheduler, "analytic", x0_variance=[0.0] * 1000)
    plain = make_sampler(scheduler, "ddpm")
    huge = make_sampler(scheduler, "analytic", x0_variance=[1e9] * 1000)
    for t in (1, 10, 500, 998):
        assert none._get_variance(t) == plain._get_variance(t)
        beta = 1 - scheduler.alphas_cumprod[t] / scheduler.alphas_cumprod[t - 1]
        assert huge._get_variance(t) == pytest.approx((beta / (1 - beta)).item(), rel=1e-3)  # the theorem's upper bound


def test_it_is_a_folder_and_samples_the_same_after_loading(tmp_path: Path):
    scheduler = analytic(make_scheduler("cosine", "sample", clip_sample=False))
    scheduler.save_pretrained(tmp_path)
    loaded = AnalyticDDPMScheduler.from_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"scheduler_config.json"}
    x_T = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    drawn = [
        sample(exact(scheduler), s, x_T, 4, picture_generators([0, 1], "noise"))
        for s in (scheduler, loaded, make_sampler(loaded, "analytic"))
    ]
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0], drawn[2])
    for solver in ("ddpm", "ddim", "dpm++"):  # what it stores beyond DDPM's is in nobody's way
        assert "x0_variance" not in make_sampler(loaded, solver).config


def test_a_missing_or_wrong_statistic_is_named():
    scheduler = make_scheduler("cosine", "sample", clip_sample=False)
    with pytest.raises(ValueError, match="no x0_variance: estimate it"):
        make_sampler(scheduler, "analytic")
    with pytest.raises(ValueError, match="has 3 values, expected one for each of 1000"):
        make_sampler(scheduler, "analytic", x0_variance=[0.0] * 3)
    with pytest.raises(ValueError, match="none of them negative"):
        make_sampler(scheduler, "analytic", x0_variance=[-1.0] * 1000)
