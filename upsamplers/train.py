"""The upsamplers' loss (§2.1); `python -m upsamplers.train --config recipes/emoji/upsampler_256.yaml` trains one."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from unclip.core.checkpoint import start_from
from unclip.core.config import TrainConfig, check_parts, main
from unclip.core.data import DataConfig, Draws, draw_pictures_and_captions
from unclip.core.diffusion import Diffusion, PredictionType, Weighting, check_weighting, make_scheduler
from unclip.core.masks import known_channels, random_masks
from unclip.core.sampling import guided, make_sampler, picture_generators, sample, starting_noise
from unclip.core.train import Batch, LossFn, SampleFn, datasets_of, processes, save_scheduler, train
from upsamplers.degradations import bsr, downsample, gaussian_blur
from upsamplers.upsampler import Upsampler

Degradation = Literal["none", "blur", "bsr-light", "bsr-full"]


@dataclass
class UpsamplerConfig:
    """Trains an upsampler on random crops of pictures of its target size."""

    model: dict[str, Any]  # arguments of upsamplers.Upsampler
    train: TrainConfig
    data: DataConfig
    crop: int  # side of a training crop in pixels of the target; the paper takes a quarter of the picture's side
    degradation: Degradation
    degraded_share: float = 1.0  # of the samples; where all are, pictures that are not come out over-sharpened
    validation: DataConfig | None = None
    start: str | None = None  # folder of a trained upsampler to start from; input channels it lacks start at zero
    schedule: Literal["cosine", "linear"] = "cosine"
    prediction: PredictionType = "epsilon"
    weighting: Weighting = "none"
    gamma: float = 5.0  # the largest weight, in x0 space
    lambda_vlb: float = 0.001  # weight of L_vlb where the variance is learned


def random_crops(x0: Tensor, size: int, draws: Draws) -> Tensor:
    """One crop (b, 3, size, size) of each picture (b, 3, h, w), its corner uniform over the picture."""
    height, width = x0.shape[-2:]
    if size > min(height, width):
        raise ValueError(f"a crop of {size} px does not fit a {width}×{height} picture: lower `crop`.")
    tops, lefts = draws.integers(height - size + 1).tolist(), draws.integers(width - size + 1).tolist()
    rows = zip(x0, tops, lefts, strict=True)
    return torch.stack([x[:, top : top + size, left : left + size] for x, top, left in rows])


def degrade(x0: Tensor, factor: int, degradation: Degradation, draws: Draws, share: float = 1.0) -> Tensor:
    """The low-resolution picture (b, 3, h/factor, w/factor) that an upsampler is given for x0 (b, 3, h, w).

    share: the part of the pictures that are degraded; the paper degrades all, Ho et al. (arXiv 2106.15282) half.
    """
    if degradation == "none":
        return downsample(x0, factor)
    if degradation == "blur":
        low = gaussian_blur(downsample(x0, factor))
    else:
        low = bsr(x0, draws, degradation.removeprefix("bsr-"), factor)
    if share == 1:
        return low
    chosen = draws.uniform().to(x0.device) < share  # b
    return torch.where(chosen[:, None, None, None], low, downsample(x0, factor))


def upsampler_loss(config: UpsamplerConfig, factor: int, diffusion: Diffusion) -> LossFn:
    """L_simple of the config's parametrisation on a crop, given the crop's degraded low-resolution picture.

    An upsampler that inpaints is also shown what random masks keep of the crop, and always all of the low-resolution
    picture (GLIDE §4.3).
    """
    inpaints = config.model.get("inpaint", False)

    def loss_fn(model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss () of a batch of pictures, of which nothing else is logged."""
        draws = batch["draws"]
        x0, _ = draw_pictures_and_captions(batch, draws, config.data.background)
        x0 = random_crops(x0, config.crop, draws)
        low = degrade(x0, factor, config.degradation, draws, config.degraded_share)
        t = draws.integers(diffusion.num_train_timesteps)
        noise = draws.normal(*x0.shape[1:])
        x_t = diffusion.add_noise(x0, noise, t)
        known = {"known": known_channels(x0, random_masks(draws, *x0.shape[2:]))} if inpaints else {}
        output = model(x_t, t, low=low, **known)
        loss = diffusion.loss(output, x0, x_t, noise, t, config.weighting, config.gamma, config.lambda_vlb)
        return loss.mean(), {}

    return loss_fn


def upsampler_samples(config: UpsamplerConfig, factor: int, scheduler: Any, steps: int = 8) -> SampleFn:
    """Upsamples degraded crops of a batch, for the grid of a tracker."""

    def sample_fn(model: nn.Module, batch: Batch) -> Tensor:
        """Crops (b, 3, crop, crop), about in [−1, 1], drawn from what is degraded of a batch's."""
        x0, _ = draw_pictures_and_captions(batch, batch["draws"], 0.0)
        x0 = random_crops(x0, config.crop, batch["draws"])
        low = degrade(x0, factor, config.degradation, batch["draws"], config.degraded_share)
        context = model.encode_context(low=low)  # pyright: ignore[reportCallIssue]
        generators = picture_generators(range(len(x0)), "upsampler")
        x_T = starting_noise(x0.shape[1:], generators, x0.device)
        denoise = guided(model, context)
        return sample(denoise, make_sampler(scheduler, "ddim"), x_T, steps, generators)

    return sample_fn


def run(config: UpsamplerConfig) -> Path:
    """Trains an upsampler; returns the folder of the exported network."""
    check_parts(config, "degraded_share")
    check_weighting(config.prediction, config.weighting)
    dataset, validation = datasets_of(config.data, config.validation)
    torch.manual_seed(config.train.seed)
    model = Upsampler(**config.model)
    start_from(model, None if config.train.resume else config.start)
    factor = model.config["factor"]
    scheduler = make_scheduler(config.schedule, config.prediction, model.config["learned_variance"])
    save_scheduler(config.train, model, scheduler)
    device: Any = processes().device
    loss_fn = upsampler_loss(config, factor, Diffusion.from_scheduler(scheduler).to(device))
    return train(config.train, model, loss_fn, dataset, validation, upsampler_samples(config, factor, scheduler))


if __name__ == "__main__":
    main(UpsamplerConfig, run)
