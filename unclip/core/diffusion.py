"""The forward process and what follows from it: one object owns the parametrisation, networks know nothing of it.

    q(x_t | x_0) = N(a_t·x_0, σ_t²),   a_t = √ᾱ_t,   σ_t = √(1 − ᾱ_t),   ᾱ_t = Π_{s≤t} (1 − β_s)

A network predicts one of three, each of which gives the others together with x_t:
ε ("epsilon"), x0 ("sample") or v = a_t·ε − σ_t·x0 ("v_prediction").
"""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import torch
from diffusers import DDPMScheduler
from torch import Tensor

PredictionType = Literal["epsilon", "sample", "v_prediction"]
PREDICTION_TYPES: tuple[PredictionType, ...] = get_args(PredictionType)
Weighting = Literal["none", "min_snr", "snr_plus_one"]


def make_scheduler(
    kind: Literal["cosine", "linear"] = "cosine",
    prediction_type: PredictionType = "epsilon",
    learned_variance: bool = False,
    num_train_timesteps: int = 1000,
    clip_sample: bool = True,
    clip_sample_range: float = 1.0,
    timestep_spacing: Literal["trailing", "linspace", "leading"] = "trailing",
) -> DDPMScheduler:
    """The scheduler a stage is trained with and stores (Table 3: cosine, but linear for 256→1024).

    clip_sample: whether sampling clamps x0 to ±clip_sample_range: true for pixels, false for latents.
    Raises ValueError for an unknown kind or prediction type.
    """
    schedules: dict[str, Any] = {"cosine": "squaredcos_cap_v2", "linear": "linear"}
    if kind not in schedules:
        raise ValueError(f"schedule {kind!r} is unknown, expected 'cosine' or 'linear'")
    _check_prediction_type(prediction_type)
    return DDPMScheduler(
        num_train_timesteps=num_train_timesteps,
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule=schedules[kind],
        variance_type="learned_range" if learned_variance else "fixed_small",
        clip_sample=clip_sample,
        clip_sample_range=clip_sample_range,
        prediction_type=prediction_type,
        timestep_spacing=timestep_spacing,
    )


def _check_prediction_type(prediction_type: str) -> None:
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(f"prediction_type {prediction_type!r} is unknown, expected {', '.join(PREDICTION_TYPES)}")


def check_weighting(prediction_type: str, weighting: Weighting) -> None:
    """Raises ValueError where a weight has no bound for errors of this parametrisation (`Diffusion.loss_weight`)."""
    if weighting == "snr_plus_one" and prediction_type == "epsilon":
        raise ValueError("weighting snr_plus_one has no bound for the prediction epsilon: take sample, or min_snr.")


class Diffusion:
    """A noise schedule and a parametrisation. Build it with `from_scheduler`.

    Tensors over t, each `(num_train_timesteps,)`, computed in float64 and held in float32: `betas`, `alphas_cumprod`,
    `sqrt_alphas_cumprod` (a_t), `sqrt_one_minus_alphas_cumprod` (σ_t), `posterior_log_variance` (log β̃_t, clipped),
    `log_betas`, `posterior_x0`, `posterior_x_t` (the coefficients of the posterior's mean).
    In all methods t is an integer tensor (b,) of steps 0 … num_train_timesteps − 1 and x is (b, …).
    """

    def __init__(
        self,
        betas: Tensor,
        prediction_type: PredictionType,
        learned_variance: bool = False,
        clip: float | None = None,
    ):
        """betas: (n,), each in (0, 1]; clip: the range ±clip to which sampling clamps x0, or None.

        Raises ValueError for another range of betas or an unknown prediction type.
        """
        _check_prediction_type(prediction_type)
        betas = betas.detach().cpu().double()
        if betas.ndim != 1 or len(betas) < 2 or not bool(((betas > 0) & (betas <= 1)).all()):
            raise ValueError(f"betas of shape {tuple(betas.shape)} must be a vector of at least two values in (0, 1]")
        self.prediction_type: PredictionType = prediction_type
        self.learned_variance = learned_variance
        self.clip = clip
        self.num_train_timesteps = len(betas)

        alphas_cumprod = torch.cumprod(1 - betas, 0)
        previous = torch.cat([alphas_cumprod.new_ones(1), alphas_cumprod[:-1]])
        posterior_variance = betas * (1 - previous) / (1 - alphas_cumprod)
        # β̃_0 is 0; β̃_1 stands in for it so that the logarithm is finite (Improved DDPM).
        posterior_variance[0] = posterior_variance[1]

        self.betas = betas.float()
        self.alphas_cumprod = alphas_cumprod.float()
        self.sqrt_alphas_cumprod = alphas_cumprod.sqrt().float()
        self.sqrt_one_minus_alphas_cumprod = (1 - alphas_cumprod).sqrt().float()
        self.signal_to_noise = (alphas_cumprod / (1 - alphas_cumprod)).float()
        self.log_betas = betas.log().float()
        self.posterior_log_variance = posterior_variance.log().float()
        self.posterior_x0 = (previous.sqrt() * betas / (1 - alphas_cumprod)).float()
        self.posterior_x_t = ((1 - betas).sqrt() * (1 - previous) / (1 - alphas_cumprod)).float()

    @classmethod
    def from_scheduler(cls, scheduler: Any) -> Diffusion:
        """The process of any diffusers scheduler: its betas, prediction type, clamping, learned variance or not."""
        config = scheduler.config
        learned = config.get("variance_type") == "learned_range"
        clips = config.get("clip_sample") and not config.get("thresholding")
        clip = float(config.get("clip_sample_range") or 1.0) if clips else None
        return cls(scheduler.betas, config["prediction_type"], learned, clip)

    def to(self, device: torch.device | str) -> Diffusion:
        """Moves the tensors; returns self."""
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value.to(device))
        return self

    def _at(self, table: Tensor, t: Tensor, like: Tensor) -> Tensor:
        if t.is_floating_point() or t.ndim != 1 or len(t) != len(like):
            raise ValueError(f"t is {t.dtype} {tuple(t.shape)}, expected integers of shape ({len(like)},)")
        return table.to(t.device)[t].to(like.device).view(-1, *[1] * (like.ndim - 1))

    def _a_sigma(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        return (
            self._at(self.sqrt_alphas_cumprod, t, like),
            self._at(self.sqrt_one_minus_alphas_cumprod, t, like),
        )

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t = a_t·x0 + σ_t·noise, (b, …), in at least float32."""
        a, sigma = self._a_sigma(t, x0)
        return a * x0 + sigma * noise

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network is to predict, (b, …)."""
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "sample":
            return x0
        a, sigma = self._a_sigma(t, x0)
        return a * noise - sigma * x0

    def to_x0(self, x_t: Tensor, output: Tensor, t: Tensor) -> Tensor:
        """x0 of the network's prediction `output` (no variance channels), (b, …).

        For ε this divides by a_t, which is 5e-5 at the cosine schedule's last step.
        """
        a, sigma = self._a_sigma(t, x_t)
        if self.prediction_type == "epsilon":
            return (x_t - sigma * output) / a
        if self.prediction_type == "sample":
            return output
        return a * x_t - sigma * output

    def to_eps(self, x_t: Tensor, output: Tensor, t: Tensor) -> Tensor:
        """ε of the network's prediction `output`, (b, …)."""
        a, sigma = self._a_sigma(t, x_t)
        if self.prediction_type == "epsilon":
            return output
        if self.prediction_type == "sample":
            return (x_t - a * output) / sigma
        return sigma * x_t + a * output

    def from_x0(self, x_t: Tensor, x0: Tensor, t: Tensor) -> Tensor:
        """The prediction that means x0: the inverse of `to_x0`, (b, …)."""
        a, sigma = self._a_sigma(t, x_t)
        if self.prediction_type == "epsilon":
            return (x_t - a * x0) / sigma
        if self.prediction_type == "sample":
            return x0
        return (a * x_t - x0) / sigma

    def snr(self, t: Tensor) -> Tensor:
        """ᾱ_t / (1 − ᾱ_t), (b,)."""
        return self._at(self.signal_to_noise, t, t)

    def posterior(self, x0: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (b, …) and log variance log β̃_t (b, 1, …) of q(x_{t−1} | x_t, x0). At t = 0 the mean is x0."""
        mean = self._at(self.posterior_x0, t, x_t) * x0 + self._at(self.posterior_x_t, t, x_t) * x_t
        return mean, self._at(self.posterior_log_variance, t, x_t)

    def split(self, output: Tensor) -> tuple[Tensor, Tensor | None]:
        """A network's output (b, 2c, …) or (b, c, …) → prediction (b, c, …), variance channels (b, c, …) or None."""
        if not self.learned_variance:
            return output, None
        if output.shape[1] % 2:
            raise ValueError(f"a network with learned variance has 2c output channels, got {output.shape[1]}")
        prediction, variance = output.chunk(2, dim=1)
        return prediction, variance

    def learned_log_variance(self, v: Tensor, t: Tensor) -> Tensor:
        """log σ² = v'·log β_t + (1 − v')·log β̃_t, v' = (v + 1)/2 (Improved DDPM, eq. 15); v: (b, …), raw channels."""
        # Far outside its range the exponentials of the KL overflow; within ±10 nothing is changed.
        fraction = ((v + 1) / 2).clamp(-10, 10)
        log_beta, log_posterior = self._at(self.log_betas, t, v), self._at(self.posterior_log_variance, t, v)
        return fraction * log_beta + (1 - fraction) * log_posterior

    def loss_weight(self, t: Tensor, weighting: Weighting = "none", gamma: float = 5.0) -> Tensor:
        """Weight of the squared error of this parametrisation, (b,).

        In x0 space, "min_snr" (Hang et al. 2023) is min(SNR, γ), which leaves what is almost all noise almost out;
        "snr_plus_one" (Salimans & Ho 2022) is min(SNR + 1, γ). An error in x0 is √SNR times as large in ε and
        √(SNR + 1) times in v: said of ε, "snr_plus_one" would weigh the noisiest steps without bound. Raises ValueError
        for that, and for another name.
        """
        if weighting == "none":
            return torch.ones(t.shape, device=t.device)
        if weighting not in get_args(Weighting):
            raise ValueError(f"weighting {weighting!r} is unknown, expected one of {', '.join(get_args(Weighting))}")
        check_weighting(self.prediction_type, weighting)
        snr = self.snr(t)
        weight = (snr + (weighting == "snr_plus_one")).clamp(max=gamma)
        if self.prediction_type == "epsilon":
            return weight / snr
        return weight if self.prediction_type == "sample" else weight / (snr + 1)

    def loss(
        self,
        model_output: Tensor,
        x0: Tensor,
        x_t: Tensor,
        noise: Tensor,
        t: Tensor,
        weighting: Weighting = "none",
        gamma: float = 5.0,
        lambda_vlb: float = 0.001,
    ) -> Tensor:
        """Loss of each sample, (b,), in float32: w_t·L_simple, plus λ·L_vlb where the variance is learned.

        L_simple is the mean squared error of the prediction. L_vlb (Improved DDPM §3.1) is estimated by its term at t
        times the number of steps, in bits per dimension, with the mean's gradient stopped; its last term, at t = 0,
        reads x0 as pixels in [−1, 1]. model_output: (b, c, …), or (b, 2c, …) with learned variance.
        """
        channels = x0.shape[1] * (2 if self.learned_variance else 1)
        if model_output.shape != (x0.shape[0], channels, *x0.shape[2:]) or not x0.shape == x_t.shape == noise.shape:
            raise ValueError(
                f"output {tuple(model_output.shape)} does not fit x0 {tuple(x0.shape)}, x_t {tuple(x_t.shape)}, "
                f"noise {tuple(noise.shape)}: expected {channels} channels and one shape"
            )
        x0, x_t, noise = x0.float(), x_t.float(), noise.float()
        prediction, v = self.split(model_output.float())
        error = (prediction - self.target(x0, noise, t)) ** 2
        loss = self.loss_weight(t, weighting, gamma) * error.flatten(1).mean(1)
        if v is None or lambda_vlb == 0:
            return loss
        return loss + lambda_vlb * self.num_train_timesteps * self._vlb_term(prediction.detach(), v, x0, x_t, t)

    def _vlb_term(self, prediction: Tensor, v: Tensor, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """KL(q(x_{t−1}|x_t,x0) ‖ p(x_{t−1}|x_t)), at t = 0 −log p(x0|x_1), (b,), bits per dimension."""
        true_mean, true_log_variance = self.posterior(x0, x_t, t)
        predicted_x0 = self.to_x0(x_t, prediction, t)
        if self.clip is not None:
            # The mean that will be sampled; without it an error in ε counts 20 000-fold at the cosine schedule's end.
            predicted_x0 = predicted_x0.clamp(-self.clip, self.clip)
        mean, _ = self.posterior(predicted_x0, x_t, t)
        log_variance = self.learned_log_variance(v, t)
        kl = 0.5 * (
            log_variance
            - true_log_variance
            + torch.exp(true_log_variance - log_variance)
            + (true_mean - mean) ** 2 * torch.exp(-log_variance)
            - 1
        )
        nll = -discretized_gaussian_log_likelihood(x0, mean, log_variance)
        nats = torch.where(t == 0, nll.flatten(1).mean(1), kl.flatten(1).mean(1))
        return nats / math.log(2)


def discretized_gaussian_log_likelihood(x0: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """log of the mass a gaussian puts on the 8-bit bin of each pixel of x0 in [−1, 1], elementwise (DDPM §3.3), nats.

    The outer bins reach to infinity. Never less than log 1e-12, where the gradient is zero.
    """
    inverse_std = torch.exp(-0.5 * log_variance)
    low = ((x0 - mean - 1 / 255) * inverse_std).masked_fill(x0 < -0.999, -math.inf)
    high = ((x0 - mean + 1 / 255) * inverse_std).masked_fill(x0 > 0.999, math.inf)
    # The difference of two numbers near 1 has no digits left: measure in the tail that is near 0.
    upper = low + high > 0
    low, high = torch.where(upper, -high, low), torch.where(upper, -low, high)
    return (torch.special.ndtr(high) - torch.special.ndtr(low)).clamp(min=1e-12).log()
