"""Analytic-DPM: the best variance of each sampling step, from one number per noise level (Bao et al. 2022)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import DDPMScheduler
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from unclip.core.diffusion import Diffusion


class AnalyticDDPMScheduler(DDPMScheduler):
    """DDPM whose steps have the optimal variance (arXiv 2201.06503, Theorem 1; Table 3's "analytic" of the prior).

        σ² = β̃ + c²·v_t,    c = √ᾱ_s·β / (1 − ᾱ_t),    β = 1 − ᾱ_t/ᾱ_s

    for a step from t to s. β̃, plain DDPM's, is the variance of q(x_s | x_t, x0), and c the factor of x0 in its mean;
    v_t = E‖x0 − x̂0(x_t)‖²/d is how little x_t says about x0. With v = 0 the data would be known: the fewer the steps,
    the more β̃ leaves out.

    The theorem says it by the norm of the score, 1 − E‖ε̂‖²/d = ᾱ_t/(1 − ᾱ_t)·v_t, which for an exact network is the
    same. Where ᾱ is near 0 that difference has no digits left, and for an inexact network v_t, its own error, remains
    the optimum. v_t is at most (1 − ᾱ_t)/ᾱ_t, the error of x_t/√ᾱ_t (the theorem's bounds on σ²).

    Args, beyond DDPMScheduler's: x0_variance: v_t of each training step, of x0 as the network sees it. Raises
    ValueError where it is missing or does not fit.
    """

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: list[float] | None = None,
        variance_type: str = "fixed_small",
        clip_sample: bool = True,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "leading",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
        x0_variance: Sequence[float] | None = None,
    ):
        if x0_variance is None:
            raise ValueError(
                "this model's scheduler has no x0_variance: estimate it by prior.train --estimate_variance."
            )
        if len(x0_variance) != num_train_timesteps or not all(0 <= v < float("inf") for v in x0_variance):
            raise ValueError(
                f"x0_variance has {len(x0_variance)} values, expected one for each of {num_train_timesteps} steps, "
                "none of them negative: estimate it anew."
            )
        if variance_type != "fixed_small":
            raise ValueError(f"variance_type is {variance_type!r}, analytic variance takes the place of 'fixed_small'.")
        super().__init__(
            num_train_timesteps=num_train_timesteps,
            beta_start=beta_start,
            beta_end=beta_end,
            beta_schedule=beta_schedule,  # pyright: ignore[reportArgumentType]
            trained_betas=trained_betas,
            variance_type="fixed_small",
            clip_sample=clip_sample,
            prediction_type=prediction_type,  # pyright: ignore[reportArgumentType]
            thresholding=thresholding,
            dynamic_thresholding_ratio=dynamic_thresholding_ratio,
            clip_sample_range=clip_sample_range,
            sample_max_value=sample_max_value,
            timestep_spacing=timestep_spacing,  # pyright: ignore[reportArgumentType]
            steps_offset=steps_offset,
            rescale_betas_zero_snr=rescale_betas_zero_snr,
        )

    def _get_variance(self, t: int, predicted_variance: Tensor | None = None, variance_type: Any = None) -> Tensor:
        posterior = super()._get_variance(t)
        previous = self.previous_timestep(t)
        kept = self.alphas_cumprod[t]
        kept_before = self.alphas_cumprod[previous] if previous >= 0 else self.one
        beta = 1 - kept / kept_before
        of_x0 = torch.as_tensor(self.config["x0_variance"][int(t)]).clamp(max=(1 - kept) / kept)
        return posterior + kept_before * (beta / (1 - kept)) ** 2 * of_x0


@torch.no_grad()
def x0_variance(
    denoise: Callable[[Tensor, Tensor], Tensor], scheduler: Any, x0: Tensor, generator: torch.Generator
) -> Tensor:
    """v_t = E‖x0 − x̂0(x_t)‖²/d of every training step, float32 (num_train_timesteps,) on the CPU.

    denoise(x_t, t): as `core.sampling.sample`'s, without guidance; x0: samples of what the network was trained on,
    (b, …); generator: of the noise, on the CPU, drawn anew at each step.
    """
    diffusion = Diffusion.from_scheduler(scheduler).to(x0.device)
    error = torch.empty(diffusion.num_train_timesteps)
    for step in range(len(error)):
        t = torch.full((len(x0),), step, device=x0.device)
        noise = torch.randn(x0.shape, generator=generator).to(x0.device)
        x_t = diffusion.add_noise(x0.float(), noise, t)
        predicted = diffusion.to_x0(x_t, denoise(x_t, t)[:, : x0.shape[1]].float(), t)
        error[step] = (predicted - x0).square().mean()
    return error
