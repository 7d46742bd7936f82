"""A small Karlo of random weights, in both of its layouts, as diffusers writes them."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import PriorTransformer, UnCLIPScheduler, UNet2DConditionModel, UNet2DModel
from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel
from PIL import Image
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessorPil,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

WIDTH = 24  # of CLIP's embeddings and token states, which are one in Karlo
Parts = dict[str, Any]


@torch.no_grad()
def stirred(module: nn.Module, seed: int) -> nn.Module:
    """Every parameter moved off where it starts, those that start at zero too: zeros hide what runs through them."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        assert parameter.abs().min() > 0
    return module.eval()


def make_tokenizer(folder: Path) -> CLIPTokenizer:
    """CLIP's kind, of single letters; its end token has the largest id and pads."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)] + [",", "."]
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(pieces)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=77)


def make_unet(seed: int) -> nn.Module:
    types = {"down_block_types": ["ResnetDownsampleBlock2D"] * 2, "up_block_types": ["ResnetUpsampleBlock2D"] * 2}
    sizes = {"sample_size": 32, "in_channels": 6, "out_channels": 3, "layers_per_block": 1, "norm_num_groups": 8}
    return stirred(UNet2DModel(**types, **sizes, block_out_channels=(16, 24), add_attention=False), seed)


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    """All components of both layouts. Widths 16, 24, 40 are no whole multiples of the first, as 64, 96, 128 are not."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer")
    tower = {"hidden_size": WIDTH, "intermediate_size": 32, "projection_dim": WIDTH, "num_attention_heads": 2}
    text = CLIPTextConfig(**tower, vocab_size=len(tokenizer), num_hidden_layers=2, eos_token_id=2)
    image = CLIPVisionConfig(**tower, image_size=20, patch_size=10, num_hidden_layers=1)
    prior = {"num_attention_heads": 4, "attention_head_dim": 8, "num_layers": 3, "embedding_dim": WIDTH}
    decoder = UNet2DConditionModel(
        sample_size=8,
        in_channels=3,
        out_channels=6,
        layers_per_block=2,
        block_out_channels=(16, 24, 40),
        norm_num_groups=8,
        attention_head_dim=8,
        cross_attention_dim=36,
        class_embed_type="identity",
        resnet_time_scale_shift="scale_shift",
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    )
    proj = UnCLIPTextProjModel(clip_embeddings_dim=WIDTH, time_embed_dim=64, cross_attention_dim=36)
    small_log = {"variance_type": "fixed_small_log"}
    return {
        "prior": stirred(PriorTransformer(**prior), 1),
        "decoder": stirred(decoder, 2),
        "text_proj": stirred(proj, 3),
        "super_res_first": make_unet(4),
        "super_res_last": make_unet(5),
        "text_encoder": stirred(CLIPTextModelWithProjection(text), 6),
        "image_encoder": stirred(CLIPVisionModelWithProjection(image), 7),
        "tokenizer": tokenizer,
        "feature_extractor": CLIPImageProcessorPil(size={"shortest_edge": 20}, crop_size={"height": 20, "width": 20}),
        "prior_scheduler": UnCLIPScheduler(**small_log, prediction_type="sample", clip_sample_range=5.0),
        "decoder_scheduler": UnCLIPScheduler(variance_type="learned_range"),
        "super_res_scheduler": UnCLIPScheduler(**small_log),
    }


def write_karlo(folder: Path, parts: Parts, library: str = "unclip") -> Path:
    """A folder of Karlo's layout from its components, as the hub has it."""
    index: dict[str, Any] = {"_class_name": "UnCLIPPipeline", "_diffusers_version": "0.12.0"}
    if "prior" not in parts:
        index["_class_name"] = "UnCLIPImageVariationPipeline"
    for name, part in parts.items():
        part.save_pretrained(folder / name)
        known = "transformers" if "encoder" in name or name in ("tokenizer", "feature_extractor") else "diffusers"
        index[name] = [library if name == "text_proj" else known, type(part).__name__]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def of_layout(parts: Parts, variations: bool) -> Parts:
    left_out = ("prior", "prior_scheduler") if variations else ("image_encoder", "feature_extractor")
    return {name: part for name, part in parts.items() if name not in left_out}


@pytest.fixture(scope="session")
def text2img(parts: Parts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like kakaobrain/karlo-v1-alpha."""
    return write_karlo(tmp_path_factory.mktemp("hub") / "karlo", of_layout(parts, variations=False))


@pytest.fixture(scope="session")
def variations(parts: Parts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like kakaobrain/karlo-v1-alpha-image-variations."""
    return write_karlo(tmp_path_factory.mktemp("hub") / "variations", of_layout(parts, variations=True))


@pytest.fixture(scope="session")
def pictures() -> list[Image.Image]:
    """Noise of three sizes, which no rounding of a resize forgives."""
    generator = torch.Generator().manual_seed(0)
    sizes = [(31, 45), (20, 20), (64, 33)]
    pixels: list[Tensor] = [torch.randint(0, 256, (h, w, 3), generator=generator).byte() for w, h in sizes]
    return [Image.fromarray(p.numpy()) for p in pixels]


@pytest.fixture(scope="session")
def reference(parts: Parts):
    """diffusers' own two pipelines over the same components, by name."""
    from diffusers import UnCLIPImageVariationPipeline, UnCLIPPipeline

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        pipes = {
            "text2img": UnCLIPPipeline(**of_layout(parts, variations=False)),
            "variations": UnCLIPImageVariationPipeline(**of_layout(parts, variations=True)),
        }
    for pipe in pipes.values():
        pipe.set_progress_bar_config(disable=True)
    return pipes
