"""The schedulers that `make_sampler` makes of stored ones, and the steps that a count gives."""

from itertools import pairwise

import pytest
import torch
from diffusers import DDPMScheduler, UnCLIPScheduler

from unclip.core.diffusion import Diffusion, make_scheduler
from unclip.core.sampling import SOLVERS, make_sampler, resolve_timesteps


def needs(solver: str, steps: int = 1000) -> dict[str, list[float]]:
    return {"x0_variance": [0.1] * steps} if solver == "analytic" else {}


def test_sampler_of_another_projects_config():
    karlo = UnCLIPScheduler(prediction_type="sample", clip_sample_range=5.0, variance_type="fixed_small_log")
    for solver in SOLVERS:
        sampler = make_sampler(karlo, solver, **needs(solver))
        torch.testing.assert_close(sampler.alphas_cumprod, karlo.alphas_cumprod)
        assert sampler.config["prediction_type"] == "sample"
        assert Diffusion.from_scheduler(sampler).clip == 5.0
    assert make_sampler(dict(karlo.config), "ddim").config["clip_sample_range"] == 5.0


@pytest.mark.parametrize("solver", SOLVERS)
def test_sampler_keeps_all_that_was_stored(solver, tmp_path):
    stored = DDPMScheduler(num_train_timesteps=200, beta_schedule="squaredcos_cap_v2", timestep_spacing="linspace")
    sampler = make_sampler(stored, solver, **needs(solver, 200))
    sampler.save_pretrained(tmp_path)
    loaded = type(sampler).from_pretrained(tmp_path)
    for scheduler in (sampler, loaded, make_sampler(loaded, "ddpm")):
        torch.testing.assert_close(scheduler.alphas_cumprod, stored.alphas_cumprod)
        assert Diffusion.from_scheduler(scheduler).clip == 1.0
        if solver != "unclip":
            assert scheduler.config["timestep_spacing"] == "linspace"


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_counts_give_falling_steps(solver, spacing):
    options = {} if solver == "unclip" else {"timestep_spacing": spacing}
    sampler = make_sampler(make_scheduler(), solver, **options, **needs(solver))
    for count in (1, 2, 3, 7, 27, 49, 333, 1000):
        steps = resolve_timesteps(sampler, count)
        assert all(a > b for a, b in pairwise(steps))
        assert 0 <= steps[-1] <= steps[0] <= 999 and len(steps) == count
