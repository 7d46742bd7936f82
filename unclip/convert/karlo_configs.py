"""Arguments of our networks from the configs of Karlo's, and back; nothing here reads a file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ANY_UNET = {
    "act_fn": "silu",
    "center_input_sample": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "norm_eps": 1e-5,
    "mid_block_scale_factor": 1,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "num_class_embeds": None,
}
DECODER = ANY_UNET | {
    "class_embed_type": "identity",
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "only_cross_attention": False,
    "cross_attention_norm": None,
    "resnet_skip_time_act": False,
    "resnet_out_scale_factor": 1.0,
    "addition_embed_type": None,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "time_embedding_act_fn": None,
    "timestep_post_act": None,
    "time_cond_proj_dim": None,
    "class_embeddings_concat": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
}
UPSAMPLER = ANY_UNET | {"add_attention": False, "mid_block_type": "UNetMidBlock2D", "class_embed_type": None}
PRIOR = {
    "additional_embeddings": 4,
    "time_embed_act_fn": "silu",
    "norm_in_type": None,
    "embedding_proj_norm_type": None,
    "encoder_hid_proj_type": "linear",
    "added_emb_type": "prd",
    "time_embed_dim": None,
    "embedding_proj_dim": None,
    "clip_embed_dim": None,
}
TIMES = {"scale_shift": "scale_shift", "default": "additive"}


def check_fixed(config: Mapping[str, Any], fixed: Mapping[str, Any]) -> None:
    """Raises ValueError where a config says otherwise than what our networks are; what it leaves out is diffusers'."""
    for name, value in fixed.items():
        if config.get(name, value) != value:
            raise ValueError(f"says {name} is {config[name]!r} where this map knows {value!r}")


def prior_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `DiffusionPrior` from a PriorTransformer's config. Raises ValueError for another architecture."""
    heads, dim = config.get("num_attention_heads", 32), config.get("embedding_dim", 768)
    width = heads * config.get("attention_head_dim", 64)
    implied = {"time_embed_dim": width, "embedding_proj_dim": dim, "clip_embed_dim": dim}
    check_fixed({name: None if value == implied.get(name) else value for name, value in config.items()}, PRIOR)
    return {
        "embedding_dim": dim,
        "text_width": dim,
        "context_length": config.get("num_embeddings", 77),
        "width": width,
        "depth": config.get("num_layers", 20),
        "heads": heads,
        "dropout": config.get("dropout", 0.0),
        "learned_null": False,
    }


def prior_config(ours: Mapping[str, Any]) -> dict[str, Any]:
    """A PriorTransformer's config from `DiffusionPrior`'s arguments."""
    return PRIOR | {
        "num_attention_heads": ours["heads"],
        "attention_head_dim": ours["width"] // ours["heads"],
        "num_layers": ours["depth"],
        "embedding_dim": ours["embedding_dim"],
        "num_embeddings": ours["context_length"],
        "dropout": ours["dropout"],
    }


def _unet_arguments(config: Mapping[str, Any], channels: int) -> dict[str, Any]:
    widths, out = list(config["block_out_channels"]), config["out_channels"]
    time = config.get("resnet_time_scale_shift", "default")
    if out not in (channels, 2 * channels) or time not in TIMES:
        raise ValueError(f"has {out} out_channels and resnet_time_scale_shift {time!r}, which this map does not know")
    multipliers = [width / widths[0] for width in widths]
    count = config.get("layers_per_block", 2)
    return {
        "sample_size": config["sample_size"],
        "in_channels": channels,
        "out_channels": channels,
        "learned_variance": out == 2 * channels,
        "model_channels": widths[0],
        "channel_multipliers": [int(m) if m == int(m) else m for m in multipliers],
        "num_res_blocks": count if isinstance(count, int) else list(count),
        "dropout": config.get("dropout", 0.0),
        "time_conditioning": TIMES[time],
        "norm_groups": config.get("norm_num_groups", 32),
    }


def _unet_config(ours: Mapping[str, Any], channels: int) -> dict[str, Any]:
    count = ours["num_res_blocks"]
    return {
        "sample_size": ours["sample_size"],
        "in_channels": channels,
        "out_channels": ours["out_channels"] * (2 if ours["learned_variance"] else 1),
        "block_out_channels": [round(ours["model_channels"] * m) for m in ours["channel_multipliers"]],
        "layers_per_block": count if isinstance(count, int) else list(count),
        "dropout": ours["dropout"],
        "resnet_time_scale_shift": {ours: theirs for theirs, ours in TIMES.items()}[ours["time_conditioning"]],
        "norm_num_groups": ours["norm_groups"],
    }


def decoder_arguments(config: Mapping[str, Any], proj: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `Decoder` from the configs of decoder and text_proj. Raises ValueError for another architecture."""
    check_fixed(config, DECODER)
    arguments = _unet_arguments(config, config["in_channels"])
    attention = ["CrossAttn" in kind for kind in config["down_block_types"]]
    check_fixed({name: list(config[name]) for name in block_types(attention)}, block_types(attention))
    width = proj.get("clip_embeddings_dim", 768)
    for name, value in (("time_embed_dim", 4 * arguments["model_channels"]), ("cross_attention_dim", None)):
        value = value or _one(config, "cross_attention_dim")
        if proj[name] != value:
            raise ValueError(f"has a text_proj whose {name} is {proj[name]}, where the decoder's is {value}")
    return arguments | {
        "attention_resolutions": [config["sample_size"] // 2**i for i, flag in enumerate(attention) if flag],
        "head_channels": _one(config, "attention_head_dim"),
        "z_i_width": width,
        "z_i_tokens": proj.get("clip_extra_context_tokens", 4),
        "z_t_width": width,
        "text_width": width,
        "context_width": _one(config, "cross_attention_dim"),
        "norm_context": "text",
    }


def _one(config: Mapping[str, Any], name: str) -> Any:
    """A number that diffusers may write once or once for each level."""
    values = config[name] if isinstance(config[name], list | tuple) else [config[name]]
    if len(set(values)) != 1:
        raise ValueError(f"says {name} is {values}, where this map knows one for all levels")
    return values[0]


def decoder_config(ours: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The configs of decoder and text_proj from `Decoder`'s arguments."""
    levels = range(len(ours["channel_multipliers"]))
    attention = [ours["sample_size"] // 2**i in ours["attention_resolutions"] for i in levels]
    config = _unet_config(ours, ours["in_channels"]) | block_types(attention)
    config |= {"attention_head_dim": ours["head_channels"], "cross_attention_dim": ours["context_width"]}
    proj = {
        "clip_extra_context_tokens": ours["z_i_tokens"],
        "clip_embeddings_dim": ours["z_i_width"],
        "time_embed_dim": 4 * ours["model_channels"],
        "cross_attention_dim": ours["context_width"],
    }
    return DECODER | config, proj


def block_types(attention: list[bool]) -> dict[str, list[str]]:
    """Names of diffusers' blocks, of levels with attention and without, the finest first."""
    return {
        "down_block_types": [f"{'SimpleCrossAttnDown' if a else 'ResnetDownsample'}Block2D" for a in attention],
        "up_block_types": [f"{'SimpleCrossAttnUp' if a else 'ResnetUpsample'}Block2D" for a in reversed(attention)],
    }


def upsampler_arguments(config: Mapping[str, Any], factor: int) -> dict[str, Any]:
    """Arguments of `Upsampler` from a UNet2DModel's config. Raises ValueError for another architecture."""
    check_fixed(config, UPSAMPLER)
    types = block_types([False] * len(config["block_out_channels"]))
    check_fixed({name: list(config[name]) for name in types}, types)
    arguments = _unet_arguments(config, config["in_channels"] - 3)
    return arguments | {"factor": factor, "interpolation": "bicubic", "antialias": True}


def upsampler_config(ours: Mapping[str, Any]) -> dict[str, Any]:
    """A UNet2DModel's config from `Upsampler`'s arguments."""
    return (
        UPSAMPLER
        | _unet_config(ours, ours["in_channels"] + 3)
        | block_types([False] * len(ours["channel_multipliers"]))
    )
