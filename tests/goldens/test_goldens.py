"""The losses of three steps of each stage's training, as stored: what "no change in numerics" means.

A change that is meant to change them stores new ones: `python -m pytest tests/goldens --update-goldens`.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from decoder.decoder import Decoder
from decoder.train import DecoderConfig, captions_by_concept, decoder_loss, embedding_spread
from prior.train import (
    PriorConfig,
    autoregressive_loss,
    embedding_statistics,
    make_autoregressive_prior,
    make_prior,
    prior_loss,
)
from unclip.clip.model import CLIP, CLIPArguments
from unclip.clip.remember import RememberedCLIP
from unclip.clip.train import CLIPConfig, clip_loss, texts_of
from unclip.core.config import TrainConfig
from unclip.core.data import DataConfig, ShardDataset
from unclip.core.diffusion import Diffusion, make_scheduler
from unclip.core.train import LossFn, train
from upsamplers.train import UpsamplerConfig, upsampler_loss
from upsamplers.upsampler import Upsampler

FOLDER = Path(__file__).parent
NETWORK = {"model_channels": 8, "channel_multipliers": (1, 2), "num_res_blocks": 1}
CONTEXT = {"z_i_width": 12, "z_i_scale": 3.0, "z_i_tokens": 2, "text_width": 16, "context_width": 16}
ATTENTION = {"sample_size": 32, "patch_size": 2, "attention_resolutions": (8,), "head_channels": 8}
DECODER = {**NETWORK, **CONTEXT, **ATTENTION}
Made = tuple[nn.Module, LossFn]


def make_clip(settings: TrainConfig, data: DataConfig, clip: CLIP) -> Made:
    image = {"image_size": 32, "patch_size": 16, "image_width": 16, "image_depth": 1, "image_heads": 2}
    text = {"text_width": 16, "text_depth": 1, "text_heads": 2, "vocab_size": 259, "context_length": 24}
    config = CLIPConfig(CLIPArguments(dim=12, **image, **text), settings, data, shift=0.05, flip=0.5)
    network = CLIP.build(config.model, texts_of(ShardDataset(data)))
    return network, clip_loss(config, network)


def make_prior_of(settings: TrainConfig, data: DataConfig, clip: CLIP) -> Made:
    config = PriorConfig({"width": 16, "depth": 2, "heads": 2}, settings, data, "unused")
    network, remembered = make_prior(config, clip), RememberedCLIP(clip)
    network.set_statistics(*embedding_statistics(remembered, ShardDataset(data), config))
    diffusion = Diffusion.from_scheduler(make_scheduler("cosine", "sample", clip_sample=False))
    return network, prior_loss(config, remembered, diffusion)


def make_prior_ar(settings: TrainConfig, data: DataConfig, clip: CLIP) -> Made:
    model = {"width": 16, "depth": 2, "heads": 2, "components": 6, "buckets": 32, "dot_buckets": 4}
    config = PriorConfig(model, settings, data, "unused", kind="ar")
    remembered = RememberedCLIP(clip)
    network = make_autoregressive_prior(config, remembered, ShardDataset(data))
    return network, autoregressive_loss(config, remembered)


def make_decoder(settings: TrainConfig, data: DataConfig, clip: CLIP) -> Made:
    config = DecoderConfig({**DECODER, "learned_variance": True}, settings, data, "unused")
    diffusion = Diffusion.from_scheduler(make_scheduler("cosine", "epsilon", learned_variance=True))
    return Decoder(**config.model), decoder_loss(config, RememberedCLIP(clip), diffusion)


def make_decoder_sketch(settings: TrainConfig, data: DataConfig, clip: CLIP) -> Made:
    """As the embedded model's: x0, a sketch, noisy steps, blurred z_i, swapped captions, backgrounds."""
    model = {**DECODER, "learned_variance": False, "sketch_side": 8, "sketch_width": 16}
    data = replace(data, background=0.5)
    more = {"noisy_share": 0.6, "z_i_noise": 0.7, "swap_captions": 0.5}
    config = DecoderConfig(model, settings, data, "unused", prediction="sample", **more)
    diffusion = Diffusion.from_scheduler(make_scheduler("cosine", "sample"))
    remembered, dataset = RememberedCLIP(clip), ShardDataset(data)
    spread = embedding_spread(remembered, dataset, config)
    return Decoder(**model), decoder_loss(config, remembered, diffusion, spread, captions_by_concept(dataset))


def make_upsampler(settings: TrainConfig, data: DataConfig, clip: CLIP) -> Made:
    config = UpsamplerConfig(NETWORK, settings, data, crop=16, degradation="blur", weighting="min_snr")
    diffusion = Diffusion.from_scheduler(make_scheduler("linear", "v_prediction"))
    return Upsampler(**config.model), upsampler_loss(config, 4, diffusion)


def make_upsampler_bsr(settings: TrainConfig, data: DataConfig, clip: CLIP) -> Made:
    """As the embedded model's last."""
    config = UpsamplerConfig(NETWORK, settings, data, crop=16, degradation="bsr-light", prediction="sample")
    diffusion = Diffusion.from_scheduler(make_scheduler("linear", "sample"))
    return Upsampler(**config.model), upsampler_loss(config, 4, diffusion)


STAGES = {
    "clip": make_clip,
    "prior": make_prior_of,
    "prior_ar": make_prior_ar,
    "decoder": make_decoder,
    "decoder_sketch": make_decoder_sketch,
    "upsampler": make_upsampler,
    "upsampler_bsr": make_upsampler_bsr,
}


@torch.no_grad()
def perturb(network: nn.Module) -> None:
    """Moves weights off zero: behind a branch that starts at zero nothing could be seen in three steps."""
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


def train_stage(stage: str, out: Path, corpus: Path, clip: Path, **more) -> tuple[nn.Module, list[float]]:
    """The network after three steps, and their losses."""
    settings = {"steps": 3, "batch_size": 4, "learning_rate": 1e-2, "warmup": 2, "precision": "no", "log_every": 1}
    config = TrainConfig(str(out), **settings, tracker="none", **more)
    data = DataConfig(str(corpus))
    torch.manual_seed(0)
    network, loss_fn = STAGES[stage](config, data, CLIP.from_pretrained(clip))
    perturb(network)
    train(config, network, loss_fn, ShardDataset(data))
    return network, [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("stage", STAGES)
def test_losses_are_the_stored_ones(stage: str, tiny_corpus: Path, tiny_clip: Path, tmp_path: Path, request):
    _, losses = train_stage(stage, tmp_path, tiny_corpus, tiny_clip)
    golden = FOLDER / f"{stage}.json"
    if request.config.getoption("update_goldens"):
        golden.write_text(json.dumps({"losses": losses, "torch": torch.__version__.split("+")[0]}, indent=1) + "\n")
    stored = json.loads(golden.read_text())
    # Instruction sets and numbers of threads change the last bits of sums, which is TOLERANCE at most.
    assert losses == pytest.approx(stored["losses"], rel=5e-5), f"stored with torch {stored['torch']}"


@pytest.mark.parametrize("stage", STAGES)
def test_gradient_checkpointing_changes_no_weight(stage: str, tiny_corpus: Path, tiny_clip: Path, tmp_path: Path):
    """Three steps of AdamW end at the same bits only where every gradient has the same."""
    if not stage.startswith(("decoder", "upsampler")):
        with pytest.raises(ValueError, match="has no gradient checkpointing"):
            train_stage(stage, tmp_path, tiny_corpus, tiny_clip, gradient_checkpointing=True)
        return
    kept, losses = train_stage(stage, tmp_path / "kept", tiny_corpus, tiny_clip)
    again, same = train_stage(stage, tmp_path / "again", tiny_corpus, tiny_clip, gradient_checkpointing=True)
    assert [network.is_gradient_checkpointing for network in (kept, again)] == [False, True]  # pyright: ignore
    assert losses == same
    for (name, there), here in zip(kept.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(there, here), name
