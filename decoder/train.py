"""The decoder's loss (§2.1); `python -m decoder.train --config recipes/emoji/decoder.yaml` trains it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from decoder.decoder import Decoder
from unclip.clip.model import CLIP
from unclip.clip.remember import RememberedCLIP, empty_where, picture_embeddings, training_embeddings
from unclip.core.checkpoint import start_from
from unclip.core.config import TrainConfig, check_parts, main
from unclip.core.data import DataConfig, Draws, ShardDataset, draw_pictures_and_captions
from unclip.core.diffusion import Diffusion, PredictionType, Weighting, check_weighting, make_scheduler
from unclip.core.masks import known_channels, random_masks
from unclip.core.sampling import guided, make_sampler, picture_generators, sample, starting_noise
from unclip.core.train import Batch, LossFn, SampleFn, datasets_of, processes, save_scheduler, train


@dataclass
class DecoderConfig:
    """Trains the decoder: CLIP image embeddings and captions to pictures."""

    model: dict[str, Any]  # arguments of decoder.Decoder
    train: TrainConfig
    data: DataConfig
    clip: str  # folder or hub name of the CLIP whose embeddings it decodes
    validation: DataConfig | None = None
    start: str | None = None  # folder of a trained decoder to start from; input channels it lacks start at zero
    schedule: Literal["cosine", "linear"] = "cosine"
    prediction: PredictionType = "epsilon"
    weighting: Weighting = "none"
    gamma: float = 5.0  # the largest weight, in x0 space
    lambda_vlb: float = 0.001  # weight of L_vlb where the variance is learned
    noisy_share: float = 0.0  # of the samples, with t drawn from the noisiest: `noisy_from` up
    noisy_from: int = 700
    own_share: float = 0.0  # of the samples, whose x_t holds the decoder's own x0 from a noisier step
    edges: float = 0.0  # weight of the absolute error of neighbouring pixels' differences, beside that of x0
    drop_z_i: float = 0.1  # §2.1; §5.1 says 0.05
    drop_text: float = 0.5
    z_i_noise: float = 0.0  # noise added to z_i, up to so many of the training embeddings' own deviations
    sketch_alone: bool = False  # the U-Net rests: a thousand sketches cost what one of its steps does
    swap_captions: float = 0.0  # of the samples, with a caption of any drawing of their concept
    remember: int = 1 << 30  # bytes of CLIP's results kept in memory; 0 computes them at every step


@torch.no_grad()
def hear(
    clip: RememberedCLIP, captions: list[str], model: Mapping[str, Any], drop_text: Tensor | None = None
) -> dict[str, Tensor]:
    """What a decoder of this config takes of b captions; of those that drop_text (b,) chooses, as without text.

    A decoder that takes z_t is given the empty prompt for none, as in sampling.
    """
    if model.get("text_width") is None:
        return {}
    takes_z_t = model.get("z_t_width") is not None
    if takes_z_t and drop_text is not None:
        captions = empty_where(drop_text, captions)
    z_t, states, mask = clip.encode_text(captions)
    heard = {"text": states.float(), "text_mask": mask}
    if takes_z_t:
        return {**heard, "z_t": z_t.float()}
    return heard if drop_text is None else {**heard, "drop_text": drop_text}


def embedding_spread(clip: RememberedCLIP, dataset: ShardDataset, config: DecoderConfig) -> Tensor:
    """A matrix L (d, d) of which noise @ L.T varies as the z_i of the training pictures do."""
    z_i, _ = training_embeddings(clip, dataset, 10_000, config.data.background, config.train.seed)
    if len(z_i) < 2:
        raise ValueError("z_i_noise takes its spread from the training pictures, and there is one: leave it out.")
    covariance = torch.cov(z_i.double().T)
    floor = 1e-6 * covariance.diagonal().mean() * torch.eye(len(covariance), device=z_i.device)  # fewer rows than d
    return torch.linalg.cholesky(covariance + floor).float()


def blur_z_i(z_i: Tensor, spread: Tensor, draws: Draws, most: float) -> Tensor:
    """z_i (b, d) with noise of that spread (d, d), up to `most` times as large, at its own norm again.

    A decoder that has seen the embeddings of its pictures alone knows each by heart, and draws a smear of several for
    the prior's z_i, which lie between them.
    """
    noise = draws.normal(z_i.shape[1]) @ spread.T * (most * draws.uniform()[:, None])
    return F.normalize(z_i + noise, dim=-1) * z_i.norm(dim=-1, keepdim=True)


def captions_by_concept(dataset: ShardDataset) -> dict[str, list[list[str]]]:
    """The captions of each concept's drawings, a list for each drawing."""
    found: dict[str, list[list[str]]] = {}
    for meta in dataset.meta:
        if meta.get("concept"):
            found.setdefault(meta["concept"], []).append(meta["captions"])
    return found


def swap_captions(batch: Batch, captions: dict[str, list[list[str]]], draws: Draws, share: float) -> Batch:
    """The batch, a share of its samples with the captions of a drawing of their concept, drawn evenly.

    What those drawings do not share, their style, is then z_i's alone to say. A decoder that reads it in captions
    learns each pair of concept and style by heart, and fails on a caption that pairs them anew.
    """
    coin, place = draws.uniform().tolist(), draws.uniform().tolist()
    swapped = []
    for concept, own, c, u in zip(batch["concept"], batch["captions"], coin, place, strict=True):
        known = captions.get(concept, [own])
        swapped.append(known[int(u * len(known))] if c < share else own)
    return {**batch, "captions": swapped}


def draw_timesteps(draws: Draws, num_train_timesteps: int, noisy_share: float, noisy_from: int) -> Tensor:
    """t (b,) of all steps alike, or for a share of the samples of the steps from `noisy_from` up.

    Outlines are decided there, and each drawing's must be seen there often; less noise teaches what all drawings share.
    """
    t = draws.integers(num_train_timesteps)
    if noisy_share == 0:
        return t
    noisy = noisy_from + draws.integers(num_train_timesteps - noisy_from)
    return torch.where(draws.uniform() < noisy_share, noisy, t)


def own_predictions(
    model: nn.Module,
    diffusion: Diffusion,
    x0: Tensor,
    t: Tensor,
    conditions: dict[str, Tensor],
    draws: Draws,
    share: float,
) -> Tensor:
    """x0 (b, 3, h, w), a share of the samples as the decoder itself sees them from a step between t and the noisiest.

    In sampling x_t holds the network's own earlier predictions. One that has seen real pictures alone takes what is
    wrong with them for content, and keeps it (exposure bias, arXiv 2305.15583).
    """
    noisier = t + (draws.uniform() * (diffusion.num_train_timesteps - t)).long()
    noise, chosen = draws.normal(*x0.shape[1:]), (draws.uniform() < share).nonzero().flatten()
    # one row at least is run: other processes may have chosen some, and shards of weights are gathered together
    rows = chosen if len(chosen) else chosen.new_zeros(1)
    with torch.no_grad():
        x_t, noisier = diffusion.add_noise(x0, noise, noisier)[rows], noisier[rows]
        output = model(x_t, noisier, **{name: value[rows] for name, value in conditions.items()})
        own = diffusion.to_x0(x_t, diffusion.split(output)[0], noisier).float().clamp(-1, 1)
    return x0.index_copy(0, rows, own) if len(chosen) else x0


def decoder_loss(
    config: DecoderConfig,
    clip: RememberedCLIP,
    diffusion: Diffusion,
    spread: Tensor | None = None,
    captions_of: dict[str, list[list[str]]] | None = None,
) -> LossFn:
    """L_simple of the config's parametrisation, plus λ·L_vlb where the variance is learned, plus a sketch's error.

    spread: `embedding_spread`, where z_i gets noise; captions_of: `captions_by_concept`, where they are swapped. A
    decoder that inpaints is shown what random masks keep of x0.
    """
    sketches, inpaints = config.model.get("sketch_side") is not None, config.model.get("inpaint", False)

    def loss_fn(model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss () of a batch of pictures, and its parts that are logged, each ()."""
        draws = batch["draws"]
        if captions_of is not None:
            batch = swap_captions(batch, captions_of, draws, config.swap_captions)
        x0, captions = draw_pictures_and_captions(batch, draws, config.data.background)
        conditions = {"z_i": picture_embeddings(clip, batch, x0, config.data.background)}
        if spread is not None:
            conditions["z_i"] = blur_z_i(conditions["z_i"], spread, draws, config.z_i_noise)
        if config.sketch_alone:
            conditions |= draw_caption(clip, captions, draws, config)
            loss = sketch_error(model(None, None, return_sketch=True, **conditions)[1], x0)
            return loss, {"sketch": loss.detach()}
        t = draw_timesteps(draws, diffusion.num_train_timesteps, config.noisy_share, config.noisy_from)
        noise, shown = draws.normal(*x0.shape[1:]), x0
        conditions |= draw_caption(clip, captions, draws, config)
        if inpaints:
            conditions["known"] = known_channels(x0, random_masks(draws, *x0.shape[2:]))
        if config.own_share:
            shown = own_predictions(model, diffusion, x0, t, conditions, draws, config.own_share)
        x_t = diffusion.add_noise(shown, noise, t)
        if not sketches:
            output, sketch = model(x_t, t, **conditions), None
        else:
            output, sketch = model(x_t, t, return_sketch=True, **conditions)
        loss = diffusion.loss(output, x0, x_t, noise, t, config.weighting, config.gamma, config.lambda_vlb).mean()
        errors = {} if sketch is None else {"sketch": sketch_error(sketch, x0)}
        if config.edges:
            errors["edges"] = config.edges * edge_error(diffusion.split(output)[0], x0)
        return loss + sum(errors.values()), {name: error.detach() for name, error in errors.items()}

    return loss_fn


def draw_caption(clip: RememberedCLIP, captions: list[str], draws: Draws, config: DecoderConfig) -> dict[str, Tensor]:
    """The captions as the decoder hears them, for some samples not at all; and which go without z_i, (b,) bool."""
    drop_z_i, drop_text = draws.uniform() < config.drop_z_i, draws.uniform() < config.drop_text
    return {"drop_z_i": drop_z_i, **hear(clip, captions, config.model, drop_text)}


def freeze_all_but_sketch(model: Decoder) -> None:
    """Leaves what the sketch does not come from untrained: decay would shrink it, and processes would wait for it."""
    model.unet.requires_grad_(False)
    model.context_z_i.requires_grad_(False)
    if model.text_width is None or model.z_t_width is not None:  # else the caption enters the time embedding by them
        model.context_norm.requires_grad_(False)
    if model.z_t_width is not None:
        model.context_text.requires_grad_(False)
        model.text_blocks.requires_grad_(False)


def sketch_error(sketch: Tensor, x0: Tensor) -> Tensor:
    """Mean squared error of sketches (b, 3, side, side) of the pictures x0 (b, 3, h, w)."""
    return F.mse_loss(sketch.float(), F.interpolate(x0, sketch.shape[2:], mode="area"))


def edge_error(x: Tensor, x0: Tensor) -> Tensor:
    """Mean absolute error of the differences of neighbouring pixels, both (b, 3, h, w).

    Where most differences are zero, as in drawings, zero is their median: a squared error alone leaves faint mottling.
    """
    error = x.float() - x0
    return error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()


def decoder_samples(clip: RememberedCLIP, scheduler: Any, guidance_scale: float = 2.0, steps: int = 20) -> SampleFn:
    """Decodes the true z_i of a batch's pictures, with its captions, for the grid of a tracker."""

    def sample_fn(model: nn.Module, batch: Batch) -> Tensor:
        """Pictures (b, 3, h, w) in [−1, 1], one for each of the batch's."""
        x0, captions = draw_pictures_and_captions(batch, batch["draws"], 0.0)
        net, z_i = cast(Decoder, model), picture_embeddings(clip, batch, x0, 0.0)
        dropped = torch.arange(2 * len(x0), device=x0.device) >= len(x0)  # encoded together, both are of as many tokens
        both = {"drop_z_i": dropped, **hear(clip, captions * 2, net.config, dropped)}
        halves = (slice(len(x0)), slice(len(x0), None))
        context, null = (net.encode_context(z_i, **{k: v[half] for k, v in both.items()}) for half in halves)
        generators = picture_generators(range(len(x0)), "decoder")
        x_T = starting_noise(x0.shape[1:], generators, x0.device)
        denoise = guided(model, context, null, guidance_scale)
        return sample(denoise, make_sampler(scheduler, "dpm++"), x_T, steps, generators)

    return sample_fn


def check_shares(config: DecoderConfig) -> None:
    """Raises ValueError unless what is dropped, swapped, blurred and noisy can be."""
    check_weighting(config.prediction, config.weighting)
    check_parts(config, "drop_z_i", "drop_text", "swap_captions", "noisy_share", "own_share")
    if config.z_i_noise < 0:
        raise ValueError(f"z_i_noise is {config.z_i_noise}; expected deviations of the embeddings, 0 or more.")
    if not 0 <= config.noisy_from <= 999:
        raise ValueError(f"noisy_from is {config.noisy_from}; expected a step, 0 to 999.")
    if config.edges < 0:
        raise ValueError(f"edges is {config.edges}; expected a weight, 0 or more.")
    for name in ("own_share", "edges"):
        if getattr(config, name) and config.prediction != "sample":
            raise ValueError(f"{name} needs the prediction sample, and it is {config.prediction}: leave one out.")
    if config.own_share and config.model.get("learned_variance", True):
        raise ValueError("own_share shows x_t of which L_vlb knows nothing: give model.learned_variance=false.")
    if config.sketch_alone and config.model.get("sketch_side") is None:
        raise ValueError("sketch_alone trains a sketch, and the model has none: give model.sketch_side.")
    unheard = [name for name in ("own_share", "edges", "noisy_share") if getattr(config, name)]
    if config.sketch_alone and unheard:
        raise ValueError(f"sketch_alone trains before any noise, where {unheard[0]} does nothing: leave one out.")


def run(config: DecoderConfig) -> Path:
    """Trains a decoder; returns the folder of the exported network."""
    check_shares(config)
    dataset, validation = datasets_of(config.data, config.validation)
    captions_of = captions_by_concept(dataset) if config.swap_captions else None
    if captions_of == {}:
        raise ValueError(
            f"swap_captions goes by concepts, and no sample of {config.data.path} names one: leave it out."
        )
    device: Any = processes().device
    clip = RememberedCLIP(CLIP.from_pretrained(config.clip).to(device), config.remember)
    torch.manual_seed(config.train.seed)
    model = Decoder(**config.model)
    start_from(model, None if config.train.resume else config.start)
    if config.sketch_alone:
        freeze_all_but_sketch(model)
    scheduler = make_scheduler(config.schedule, config.prediction, model.config["learned_variance"])
    save_scheduler(config.train, model, scheduler)
    spread = embedding_spread(clip, dataset, config) if config.z_i_noise else None
    loss_fn = decoder_loss(config, clip, Diffusion.from_scheduler(scheduler).to(device), spread, captions_of)
    sample_fn = None if config.sketch_alone else decoder_samples(clip, scheduler)
    return train(config.train, model, loss_fn, dataset, validation, sample_fn)


if __name__ == "__main__":
    main(DecoderConfig, run)
