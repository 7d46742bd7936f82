"""The losses of three steps of each stage's training, as stored: what "no change in numerics" means.

A change that is meant to change them stores new ones: `python -m pytest tests/goldens --update-goldens`.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import decoder.train
import prior.train
import unclip.clip.train
import upsamplers.train
from unclip.clip.model import CLIPArguments
from unclip.core.data import DataConfig
from unclip.core.train import TrainConfig

FOLDER = Path(__file__).parent
NETWORK = {"model_channels": 8, "channel_multipliers": (1, 2), "num_res_blocks": 1}
Train = Callable[[TrainConfig, DataConfig, str], Path]


def train_clip(settings: TrainConfig, data: DataConfig, clip: str) -> Path:
    image = {"image_size": 32, "patch_size": 16, "image_width": 16, "image_depth": 1, "image_heads": 2}
    text = {"text_width": 16, "text_depth": 1, "text_heads": 2, "vocab_size": 259, "context_length": 24}
    config = unclip.clip.train.CLIPConfig(CLIPArguments(dim=12, **image, **text), settings, data, shift=0.05, flip=0.5)
    return unclip.clip.train.run(config)


def train_prior(settings: TrainConfig, data: DataConfig, clip: str) -> Path:
    return prior.train.run(prior.train.PriorConfig({"width": 16, "depth": 2, "heads": 2}, settings, data, clip))


def train_decoder(settings: TrainConfig, data: DataConfig, clip: str) -> Path:
    context = {"z_i_width": 12, "z_i_scale": 3.0, "z_i_tokens": 2, "text_width": 16, "context_width": 16}
    attention = {"sample_size": 32, "patch_size": 2, "attention_resolutions": (8,), "head_channels": 8}
    model = {**NETWORK, **context, **attention, "learned_variance": True}
    return decoder.train.run(decoder.train.DecoderConfig(model, settings, data, clip))


def train_upsampler(settings: TrainConfig, data: DataConfig, clip: str) -> Path:
    options = {"crop": 16, "degradation": "blur", "prediction": "v_prediction", "weighting": "min_snr"}
    return upsamplers.train.run(upsamplers.train.UpsamplerConfig(NETWORK, settings, data, **options))


STAGES: dict[str, Train] = {
    "clip": train_clip,
    "prior": train_prior,
    "decoder": train_decoder,
    "upsampler": train_upsampler,
}


@pytest.mark.parametrize("stage", STAGES)
def test_losses_are_the_stored_ones(stage: str, tiny_corpus: Path, tiny_clip: Path, tmp_path: Path, request):
    settings = TrainConfig(
        str(tmp_path), steps=3, batch_size=4, learning_rate=1e-3, warmup=2, precision="no", tracker="none", log_every=1
    )
    STAGES[stage](settings, DataConfig(str(tiny_corpus)), str(tiny_clip))
    losses = [json.loads(line)["loss"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    golden = FOLDER / f"{stage}.json"
    if request.config.getoption("update_goldens"):
        golden.write_text(json.dumps({"losses": losses, "torch": torch.__version__.split("+")[0]}, indent=1) + "\n")
    stored = json.loads(golden.read_text())
    # Between processors and numbers of threads sums differ in their last bits: measured 2e-6 at most.
    assert losses == pytest.approx(stored["losses"], rel=2e-5), f"stored with torch {stored['torch']}"
