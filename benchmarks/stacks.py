"""Stacks of Karlo's kind of several sizes: diffusers' networks with random weights, and ours with the same weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import PriorTransformer, UnCLIPScheduler, UNet2DConditionModel, UNet2DModel
from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel
from torch import Tensor, nn

from decoder.decoder import Decoder
from prior.diffusion_prior import DiffusionPrior
from unclip.clip.model import CLIP, CLIPArguments, TextFeatures
from unclip.convert import karlo_configs, karlo_keys
from unclip.pipeline import UnCLIP
from unclip.presets import KARLO
from upsamplers.upsampler import Upsampler

STAGES = ("prior", "decoder", "super_resolution")
CONTEXT_LENGTH = 77  # to which diffusers' pipeline pads every prompt
FACTOR = 4

# widths and layers of a stage; sides: of the decoder's grid, 4 times of super-resolution's
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "embedding": 32,
        "side": 16,
        "prior": {"heads": 2, "head_dim": 16, "layers": 2},
        "decoder": {"widths": (16, 32), "layers": 1, "head_channels": 16, "context": 32, "groups": 8},
        "super_resolution": {"widths": (16, 32), "layers": 1, "groups": 8},
    },
    "mid": {
        "embedding": 768,
        "side": 64,
        "prior": {"heads": 8, "head_dim": 64, "layers": 8},
        "decoder": {"widths": (64, 128, 192, 256), "layers": 3, "head_channels": 64, "context": 512, "groups": 32},
        "super_resolution": {"widths": (64, 96, 128, 160), "layers": 3, "groups": 32},
    },
    "karlo": {
        "embedding": 768,
        "side": 64,
        "prior": {"heads": 32, "head_dim": 64, "layers": 20},
        "decoder": {"widths": (320, 640, 960, 1280), "layers": 3, "head_channels": 64, "context": 1536, "groups": 32},
        "super_resolution": {"widths": (320, 640, 960, 1280), "layers": 3, "groups": 32},
    },
}


def sizes(size: str, stages: Sequence[str]) -> dict[str, Any]:
    """The sizes of a stack whose stages not asked for are tiny: they are there, and are never run."""
    chosen = SIZES[size]
    return {**chosen, **{stage: SIZES["tiny"][stage] for stage in STAGES if stage not in stages}}


def make_theirs(chosen: Mapping[str, Any], seed: int = 0) -> dict[str, nn.Module]:
    """diffusers' networks, in fp32 on the CPU, with random weights; parameters that start at zero are moved off it."""
    torch.manual_seed(seed)
    dim, prior, decoder, side = chosen["embedding"], chosen["prior"], chosen["decoder"], chosen["side"]
    up = chosen["super_resolution"]
    attention = [False, *[True] * (len(decoder["widths"]) - 1)]
    levels: dict[str, Any] = {**karlo_configs.block_types(attention)}
    plain: dict[str, Any] = {**karlo_configs.block_types([False] * len(up["widths"]))}
    super_res: dict[str, Any] = {
        "in_channels": 6,
        "out_channels": 3,
        "add_attention": False,
        "sample_size": side * FACTOR,
    }
    networks: dict[str, Any] = {
        "prior": PriorTransformer(
            num_attention_heads=prior["heads"],
            attention_head_dim=prior["head_dim"],
            num_layers=prior["layers"],
            embedding_dim=dim,
            num_embeddings=CONTEXT_LENGTH,
        ),
        "decoder": UNet2DConditionModel(
            **_unet(decoder),
            **levels,
            sample_size=side,
            in_channels=3,
            out_channels=6,
            mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            attention_head_dim=decoder["head_channels"],
            cross_attention_dim=decoder["context"],
            class_embed_type="identity",
            resnet_time_scale_shift="scale_shift",
        ),
        "text_proj": UnCLIPTextProjModel(
            clip_embeddings_dim=dim, time_embed_dim=4 * decoder["widths"][0], cross_attention_dim=decoder["context"]
        ),
        "super_res_first": UNet2DModel(**_unet(up), **plain, **super_res),
        "super_res_last": UNet2DModel(**_unet(up), **plain, **super_res),
    }
    for network in networks.values():
        network.eval().requires_grad_(False)
        for parameter in network.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.02)
    return networks


def _unet(sizes: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "block_out_channels": sizes["widths"],
        "layers_per_block": sizes["layers"],
        "norm_num_groups": sizes["groups"],
    }


def make_schedulers() -> dict[str, Any]:
    """Karlo's, by our names of the stages."""
    small_log: dict[str, Any] = {"variance_type": "fixed_small_log"}
    return {
        "prior_scheduler": UnCLIPScheduler(**small_log, prediction_type="sample", clip_sample_range=5.0),
        "decoder_scheduler": UnCLIPScheduler(variance_type="learned_range"),
        "upsampler_256_scheduler": UnCLIPScheduler(**small_log),
    }


def make_clip(dim: int) -> CLIP:
    """A small CLIP: encoding prompts is no part of a stage."""
    torch.manual_seed(0)
    tower: dict[str, Any] = {
        "image_width": 16,
        "image_depth": 1,
        "image_heads": 2,
        "text_depth": 1,
        "text_heads": 2,
        "vocab_size": 259,
    }
    arguments = CLIPArguments(dim=dim, text_width=dim, context_length=CONTEXT_LENGTH, **tower)
    return CLIP.build(arguments, ["a"]).eval().requires_grad_(False)


def make_ours(clip: CLIP, theirs: Mapping[str, Any], dtype: torch.dtype) -> UnCLIP:
    """Our pipeline over the same weights in `dtype`."""
    state: dict[str, dict[str, Tensor]] = {name: net.state_dict() for name, net in theirs.items()}
    both = {f"{name}.{key}": tensor for name in ("decoder", "text_proj") for key, tensor in state[name].items()}
    up = karlo_configs.upsampler_arguments(theirs["super_res_first"].config, FACTOR)
    arguments = karlo_configs.decoder_arguments(theirs["decoder"].config, theirs["text_proj"].config)
    prior = karlo_configs.prior_arguments(theirs["prior"].config)
    parts: dict[str, Any] = {
        "prior": _converted(DiffusionPrior, prior, karlo_keys.prior_keys, state["prior"], dtype),
        "decoder": _converted(Decoder, arguments, karlo_keys.decoder_keys, both, dtype),
        "upsampler_256": _converted(Upsampler, up, karlo_keys.upsampler_keys, state["super_res_first"], dtype),
        "upsampler_256_last": _converted(Upsampler, up, karlo_keys.upsampler_keys, state["super_res_last"], dtype),
    }
    parts |= make_schedulers()
    return UnCLIP(clip, **parts, presets={"default": KARLO}, unit_norm=False)


def _converted(cls: Any, arguments: dict[str, Any], pieces_of: Any, state: dict[str, Tensor], dtype: torch.dtype):
    with torch.device("meta"):
        network = cls(**arguments)
    network.load_state_dict(karlo_keys.join(pieces_of(network), state, network, dtype), assign=True)
    return network.eval().requires_grad_(False)


def make_text(dim: int, batch: int, tokens: int, device: torch.device, seed: int = 1) -> TextFeatures:
    """Features of `batch` prompts of so many tokens, drawn at random: how fast a stage is does not depend on them."""
    generator = torch.Generator().manual_seed(seed)
    z_t, states = torch.randn(batch, dim, generator=generator), torch.randn(batch, tokens, dim, generator=generator)
    return TextFeatures(z_t.to(device), states.to(device), torch.ones(batch, tokens, dtype=torch.bool, device=device))


def make_inputs(clip: CLIP, chosen: Mapping[str, Any], batch: int, tokens: int, device: torch.device) -> dict[str, Any]:
    """What every stage is given, on either side: features of prompts and of the empty one, z_i, small pictures."""
    dim, side = chosen["embedding"], chosen["side"]
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        empty = clip.encode_text([""], normalize=False)
    return {
        "text": make_text(dim, batch, tokens, device),
        "empty": empty,
        "z_i": torch.randn(batch, dim, generator=generator).to(device),
        "low": (torch.rand(batch, 3, side, side, generator=generator) * 2 - 1).to(device),
    }
