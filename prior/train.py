"""The prior's loss (§2.2); `python -m prior.train --config recipes/emoji/prior.yaml` trains it."""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from accelerate import PartialState
from torch import Tensor, nn

from prior.diffusion_prior import DiffusionPrior
from prior.evaluate import evaluate
from unclip.clip.model import CLIP
from unclip.clip.remember import RememberedCLIP
from unclip.core.data import DataConfig, Draws, ShardDataset, collate, draw_pictures_and_captions
from unclip.core.diffusion import Diffusion, make_scheduler
from unclip.core.train import Batch, LossFn, TrainConfig, main, save_scheduler, train


@dataclass
class PriorConfig:
    """Trains the diffusion prior: captions to CLIP image embeddings."""

    model: dict[str, Any]  # arguments of prior.DiffusionPrior; CLIP's three sizes may be left out
    train: TrainConfig
    data: DataConfig
    clip: str  # folder or hub name of the CLIP whose embeddings it predicts
    validation: DataConfig | None = None
    schedule: Literal["cosine", "linear"] = "cosine"
    weighting: Literal["none", "min_snr"] = "none"
    gamma: float = 5.0  # of min-SNR
    drop_text: float = 0.1
    statistics: int = 10_000  # pictures that mean and deviation of z_i are estimated from, at most
    remember: int = 1 << 30  # bytes of CLIP's results kept in memory; 0 computes them at every step
    evaluate: list[str] = field(default_factory=list)  # splits sampled at the end; figures go to OUT/evaluation.json


def picture_embeddings(clip: RememberedCLIP, batch: Batch, x0: Tensor, background: float) -> Tensor:
    """z_i (b, d), float32: as stored with the data where backgrounds are not drawn, else of the pictures x0."""
    if "z_i" in batch and background == 0:
        return batch["z_i"].to(x0.device)
    return clip.encode_image(x0).float()


def prior_loss(config: PriorConfig, clip: RememberedCLIP, diffusion: Diffusion) -> LossFn:
    """Mean squared error of the predicted, standardised x0.

    Metrics: cosine of the predicted z_i to the true one, and to another sample's, which is what it must rise above.
    """

    def loss_fn(model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        draws = batch["draws"]
        pixels, captions = draw_pictures_and_captions(batch, draws, config.data.background)
        net: Any = getattr(model, "module", model)  # the statistics, under whatever wrapper
        with torch.no_grad():
            z_i = picture_embeddings(clip, batch, pixels, config.data.background)
            z_t, text, mask = clip.encode_text(captions)
            x0 = net.standardize(z_i)
        t = draws.integers(diffusion.num_train_timesteps)
        noise = draws.normal(x0.shape[1])
        x_t = diffusion.add_noise(x0, noise, t)
        drop = draws.uniform() < config.drop_text
        output = model(x_t, t, z_t=z_t.float(), text=text.float(), text_mask=mask, drop_text=drop)
        loss = diffusion.loss(output, x0, x_t, noise, t, config.weighting, config.gamma).mean()
        with torch.no_grad():
            predicted = net.unstandardize(output.float())
            true, shuffled = F.cosine_similarity(predicted, z_i), F.cosine_similarity(predicted, z_i.roll(1, 0))
        return loss, {"cosine": true.mean(), "cosine_shuffled": shuffled.mean()}

    return loss_fn


@torch.no_grad()
def embedding_statistics(clip: RememberedCLIP, dataset: ShardDataset, config: PriorConfig) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of z_i, each (d,), over evenly spaced samples with the backgrounds of training."""
    count = min(len(dataset), config.statistics)
    rows = [i * len(dataset) // count for i in range(count)]
    z_i = []
    for first in range(0, count, 128):
        part = rows[first : first + 128]
        batch = collate([dataset[i] for i in part])
        pixels, _ = draw_pictures_and_captions(batch, Draws(config.train.seed, 0, part), config.data.background)
        z_i.append(picture_embeddings(clip, batch, pixels.to(clip.device), config.data.background))
    z = torch.cat(z_i)
    return z.mean(0), z.std(0, correction=0).clamp(min=1e-4)  # a constant dimension stays finite


def make_prior(config: PriorConfig, clip: CLIP) -> DiffusionPrior:
    """The network of the config, with CLIP's sizes. Raises ValueError where the config contradicts them."""
    sizes = {"embedding_dim": clip.dim, "text_width": clip.text_width, "context_length": clip.context_length}
    for name, size in sizes.items():
        if config.model.get(name, size) != size:
            raise ValueError(f"model.{name} is {config.model[name]}, the CLIP's is {size}; leave it out or match it.")
    return DiffusionPrior(**{**config.model, **sizes})


def run(config: PriorConfig) -> Path:
    """Trains a prior, samples from it on the splits `evaluate`; returns the folder of the exported network."""
    dataset = ShardDataset(config.data)
    validation = ShardDataset(config.validation) if config.validation else None
    device: Any = PartialState().device
    clip = CLIP.from_pretrained(config.clip).to(device)
    remembered = RememberedCLIP(clip, config.remember)
    torch.manual_seed(config.train.seed)
    model = make_prior(config, clip)
    if not config.train.resume:
        mean, std = embedding_statistics(remembered, dataset, config)
        model.set_statistics(mean.cpu(), std.cpu())
    scheduler = make_scheduler(config.schedule, "sample", clip_sample=False)
    save_scheduler(config.train, scheduler)
    diffusion = Diffusion.from_scheduler(scheduler).to(device)
    folder = train(config.train, model, prior_loss(config, remembered, diffusion), dataset, validation)
    if config.evaluate and PartialState().is_main_process:
        trained = DiffusionPrior.from_pretrained(folder).to(device).eval()
        figures = {
            split: evaluate(trained, clip, scheduler, ShardDataset(replace(config.data, split=split, background=0.0)))
            for split in config.evaluate
        }
        (Path(config.train.out) / "evaluation.json").write_text(json.dumps(figures, indent=2))
        print(json.dumps(figures))
    return folder


if __name__ == "__main__":
    main(PriorConfig, run)
