"""Both priors' losses (§2.2); `python -m prior.train --config recipes/emoji/prior.yaml` trains it."""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from torch import Tensor, nn
from tqdm.auto import tqdm

from prior.autoregressive_prior import AutoregressivePrior
from prior.diffusion_prior import DiffusionPrior
from prior.evaluate import cosine_to_others, evaluate
from prior.pca import PCA
from unclip.clip.evaluate import concepts_of
from unclip.clip.model import CLIP
from unclip.clip.remember import RememberedCLIP, empty_where, picture_embeddings, training_embeddings
from unclip.core.analytic import x0_variance
from unclip.core.config import TrainConfig, check_parts, main
from unclip.core.data import DataConfig, ShardDataset, draw_pictures_and_captions
from unclip.core.diffusion import Diffusion, Weighting, make_scheduler
from unclip.core.files import whole_folder, write_json
from unclip.core.sampling import guided, make_sampler
from unclip.core.train import Batch, LossFn, check, datasets_of, processes, save_scheduler, train


@dataclass
class PriorConfig:
    """Trains a prior: captions to CLIP image embeddings."""

    model: dict[str, Any]  # arguments of DiffusionPrior or AutoregressivePrior; CLIP's three sizes may be left out
    train: TrainConfig
    data: DataConfig
    clip: str  # folder or hub name of the CLIP whose embeddings it predicts
    kind: Literal["diffusion", "ar"] = "diffusion"
    validation: DataConfig | None = None
    schedule: Literal["cosine", "linear"] = "cosine"
    weighting: Weighting = "none"
    gamma: float = 5.0  # the largest weight, in x0 space
    error: float = 0.01  # ar: how much of z_i's variance components may leave out, where model.components is not given
    drop_text: float = 0.1
    statistics: int = 10_000  # pictures that mean and deviation of z_i are estimated from, at most
    remember: int = 1 << 30  # bytes of CLIP's results kept in memory; 0 computes them at every step
    evaluate: list[str] = field(default_factory=list)  # splits sampled at the end; figures go to OUT/evaluation.json
    estimate_variance: int = 0  # pictures; nothing is trained: OUT/scheduler gets the analytic variance of OUT/model


def prior_loss(config: PriorConfig, clip: RememberedCLIP, diffusion: Diffusion) -> LossFn:
    """Mean squared error of the predicted, standardised x0.

    Metrics: cosine of the predicted z_i to the true one, and to the other samples', which is what it must rise above.
    """

    def loss_fn(model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss () of a batch of pictures and captions, and what is logged beside it, each ()."""
        draws = batch["draws"]
        pixels, captions = draw_pictures_and_captions(batch, draws, config.data.background)
        net: Any = getattr(model, "module", model)  # the statistics, under whatever wrapper
        with torch.no_grad():
            z_i = picture_embeddings(clip, batch, pixels, config.data.background)
            x0 = net.standardize(z_i)
        t = draws.integers(diffusion.num_train_timesteps)
        noise = draws.normal(x0.shape[1])
        x_t = diffusion.add_noise(x0, noise, t)
        drop, learned = draws.uniform() < config.drop_text, net.config["learned_null"]
        z_t, text, mask = clip.encode_text(captions if learned else empty_where(drop, captions))
        conditions = {"z_t": z_t.float(), "text": text.float(), "text_mask": mask}
        output = model(x_t, t, **conditions, drop_text=drop if learned else None)
        loss = diffusion.loss(output, x0, x_t, noise, t, config.weighting, config.gamma).mean()
        with torch.no_grad():
            predicted = net.unstandardize(output.float())
            cosine, shuffled = F.cosine_similarity(predicted, z_i).mean(), cosine_to_others(predicted, z_i)
        return loss, {"cosine": cosine, "cosine_shuffled": shuffled}

    return loss_fn


def autoregressive_loss(config: PriorConfig, clip: RememberedCLIP) -> LossFn:
    """Cross-entropy of every token given the true ones before it, in nats a token; ln(buckets) is guessing.

    Metrics: cosine of the z_i whose components are each the mean of their token's distribution to the true one, and to
    the other samples'. The tokens before being the true ones, they are higher than those of drawn z_i.
    """

    def loss_fn(model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss () of a batch of pictures and captions, and what is logged beside it, each ()."""
        draws = batch["draws"]
        pixels, captions = draw_pictures_and_captions(batch, draws, config.data.background)
        net: Any = getattr(model, "module", model)  # what tokens mean, under whatever wrapper
        with torch.no_grad():
            z_i = picture_embeddings(clip, batch, pixels, config.data.background)
            z_t, text, mask = clip.encode_text(captions)
            y, dot = net.quantise(z_i), (z_i * z_t.float()).sum(-1)
        drop = draws.uniform() < config.drop_text
        logits = model(y, z_t=z_t.float(), text=text.float(), text_mask=mask, dot=dot, drop_text=drop)
        loss = F.cross_entropy(logits.float().flatten(0, 1), y.flatten())
        with torch.no_grad():
            buckets = torch.arange(logits.shape[-1], device=logits.device, dtype=torch.float32)
            predicted = net.dequantise(logits.float().softmax(-1) @ buckets)
            cosine, shuffled = F.cosine_similarity(predicted, z_i).mean(), cosine_to_others(predicted, z_i)
        return loss, {"cosine": cosine, "cosine_shuffled": shuffled}

    return loss_fn


def embedding_statistics(clip: RememberedCLIP, dataset: ShardDataset, config: PriorConfig) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of z_i, each (d,)."""
    z, _ = training_embeddings(clip, dataset, config.statistics, config.data.background, config.train.seed)
    return z.mean(0), z.std(0, correction=0).clamp(min=1e-4)  # a constant dimension stays finite


def sizes_of(config: PriorConfig, clip: CLIP) -> dict[str, int]:
    """The sizes that a prior has from its CLIP. Raises ValueError where the config contradicts them."""
    sizes = {"embedding_dim": clip.dim, "text_width": clip.text_width, "context_length": clip.context_length}
    for name, size in sizes.items():
        if config.model.get(name, size) != size:
            raise ValueError(f"model.{name} is {config.model[name]}, the CLIP's is {size}; leave it out or match it.")
    return sizes


def make_prior(config: PriorConfig, clip: CLIP) -> DiffusionPrior:
    """The network of the config, with CLIP's sizes. Raises ValueError where the config contradicts them."""
    return DiffusionPrior(**{**config.model, **sizes_of(config, clip)})


def make_autoregressive_prior(config: PriorConfig, clip: RememberedCLIP, dataset: ShardDataset) -> AutoregressivePrior:
    """The network of the config, with CLIP's sizes, and as many components as the samples' error needs."""
    sizes = sizes_of(config, clip.clip)
    if config.schedule != "cosine" or config.weighting != "none":
        raise ValueError("an autoregressive prior has no noise: leave schedule and weighting out of its recipe.")
    z_i, captions = training_embeddings(clip, dataset, config.statistics, config.data.background, config.train.seed)
    basis = PCA.fit(z_i)
    components = config.model.get("components") or basis.components_for(config.error)
    z_t = torch.cat([clip.encode_text(captions[i : i + 128]).z_t for i in range(0, len(captions), 128)])
    prior = AutoregressivePrior(**{**config.model, **sizes, "components": components})
    prior.set_statistics(basis, z_i.cpu(), (z_i * z_t).sum(-1).cpu())
    return prior


@torch.no_grad()
def estimate_variance(config: PriorConfig, clip: RememberedCLIP, dataset: ShardDataset) -> Path:
    """Stores in OUT/scheduler how well OUT/model knows x0 at each step, by `estimate_variance` of the training samples.

    Solver "analytic" rests on it. Returns the folder. Raises FileNotFoundError where no diffusion prior is trained yet.
    """
    folder = Path(config.train.out) / "scheduler"
    if not (folder.parent / "model").is_dir() or not folder.is_dir():
        raise FileNotFoundError(f"{folder.parent} holds no trained diffusion prior; train it before its variance.")
    prior: Any = DiffusionPrior.from_pretrained(folder.parent / "model")
    prior = prior.to(clip.device).eval()
    scheduler = make_sampler(DDPMScheduler.load_config(folder), "ddpm")
    z_i, captions = training_embeddings(
        clip, dataset, config.estimate_variance, config.data.background, config.train.seed
    )
    generator = torch.Generator().manual_seed(config.train.seed)
    total = torch.zeros(int(scheduler.config["num_train_timesteps"]))
    for first in tqdm(range(0, len(z_i), 128), desc="variance", unit=" batch"):
        part = z_i[first : first + 128]
        z_t, text, mask = clip.encode_text(captions[first : first + 128])
        context = prior.encode_context(z_t=z_t.float(), text=text.float(), text_mask=mask)
        total += len(part) * x0_variance(guided(prior, context), scheduler, prior.standardize(part), generator)
    found = (total / len(z_i)).tolist()
    with whole_folder(folder) as partial:
        make_sampler(scheduler, "analytic", x0_variance=found).save_pretrained(partial)
    return folder


def run(config: PriorConfig) -> Path:
    """Trains a prior, samples from it on the splits `evaluate`; returns the folder of the exported network."""
    check_parts(config, "drop_text")
    dataset, validation = datasets_of(config.data, config.validation)
    splits = {split: ShardDataset(replace(config.data, split=split, background=0.0)) for split in config.evaluate}
    for split in splits.values():
        concepts_of(split)  # what lacks them is named before the training, not after
    device: Any = processes().device
    clip = CLIP.from_pretrained(config.clip).to(device)
    remembered = RememberedCLIP(clip, config.remember)
    if config.estimate_variance:
        return estimate_variance(config, remembered, dataset)
    torch.manual_seed(config.train.seed)
    scheduler = None
    check(config.train)  # before all pictures are embedded
    if config.kind == "ar":
        model, loss_fn = make_autoregressive_prior(config, remembered, dataset), autoregressive_loss(config, remembered)
    else:
        model = make_prior(config, clip)
        scheduler = make_scheduler(config.schedule, "sample", clip_sample=False)
        save_scheduler(config.train, model, scheduler)
        if not config.train.resume:
            mean, std = embedding_statistics(remembered, dataset, config)
            model.set_statistics(mean.cpu(), std.cpu())
        loss_fn = prior_loss(config, remembered, Diffusion.from_scheduler(scheduler).to(device))
    folder = train(config.train, model, loss_fn, dataset, validation)
    if splits and processes().is_main_process:
        trained = type(model).from_pretrained(folder).to(device).eval()
        figures = {split: evaluate(trained, clip, scheduler, data) for split, data in splits.items()}
        write_json(figures, Path(config.train.out) / "evaluation.json")
        print(json.dumps(figures))
    return folder


if __name__ == "__main__":
    main(PriorConfig, run)
