"""Karlo's networks and ours, key by key, in both directions; nothing here reads a file.

Ours keep joined what diffusers keeps apart: one matrix for queries, keys and values, one for a context's keys and
values, one for the time projections of all residual blocks. So each of their tensors is a block of rows of one of ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from decoder.decoder import Decoder
from prior.diffusion_prior import DiffusionPrior
from unclip.core.layers import Attention, ResBlock
from unclip.core.unet import UNet
from upsamplers.upsampler import Upsampler


class Piece(NamedTuple):
    """Their tensor `theirs` is our tensor `ours`, or its rows [start, stop), rearranged as the einops pattern says."""

    theirs: str
    ours: str
    rows: tuple[int, int] | None = None
    pattern: str = ""  # theirs -> ours
    axes: tuple[tuple[str, int], ...] = ()

    def forth(self, theirs: Tensor) -> Tensor:
        """Their tensor as it stands in ours."""
        return rearrange(theirs, self.pattern, **dict(self.axes)) if self.pattern else theirs

    def back(self, ours: Tensor) -> Tensor:
        """Their tensor, out of the whole of ours."""
        part = ours if self.rows is None else ours[slice(*self.rows)]
        left, _, right = self.pattern.partition(" -> ")
        return rearrange(part, f"{right} -> {left}", **dict(self.axes)) if self.pattern else part


# Keys


def layer(theirs: str, ours: str, rows: tuple[int, int] | None = None) -> list[Piece]:
    """A layer's weight and bias."""
    return [Piece(f"{theirs}.{end}", f"{ours}.{end}", rows) for end in ("weight", "bias")]


def layers(names: Mapping[str, str], theirs: str = "", ours: str = "") -> list[Piece]:
    """Layers by their names and ours, below two prefixes."""
    return [piece for their, our in names.items() for piece in layer(theirs + their, ours + our)]


def prior_keys(prior: DiffusionPrior) -> list[Piece]:
    """`PriorTransformer`, of Karlo and of Kandinsky 2."""
    pieces = [
        Piece("positional_embedding", "positions", pattern="1 n w -> n w"),
        Piece("prd_embedding", "query", pattern="1 1 w -> w"),
        Piece("clip_mean", "clip_mean", pattern="1 d -> d"),
        Piece("clip_std", "clip_std", pattern="1 d -> d"),
    ]
    pieces += layers(
        {
            "time_embedding.linear_1": "embed_time.linear_1",
            "time_embedding.linear_2": "embed_time.linear_2",
            "proj_in": "embed_x",
            "embedding_proj": "embed_z_t",
            "encoder_hidden_states_proj": "embed_text",
            "norm_out": "norm_out",
            "proj_to_clip_embeddings": "head",
        }
    )
    block = {
        "norm1": "norm1",
        "attn1.to_q": "attention.to_q",
        "attn1.to_k": "attention.to_k",
        "attn1.to_v": "attention.to_v",
        "attn1.to_out.0": "attention.to_out",
        "norm3": "norm2",
        "ff.net.0.proj": "mlp.0",
        "ff.net.2": "mlp.2",
    }
    for i in range(len(prior.blocks)):
        pieces += layers(block, f"transformer_blocks.{i}.", f"blocks.{i}.")
    return pieces


def stage_names(unet: UNet, blocks: list[int]) -> Iterator[tuple[str, str, str, str]]:
    """Of each stage in the order of `UNet.stages`: our name; theirs for residual block, attention and resize."""
    levels, down, up = len(blocks), 0, 0
    for level, count in enumerate(blocks):
        for i in range(count + (level < levels - 1)):
            theirs = f"down_blocks.{level}"
            resize = f"{theirs}.downsamplers.0"
            yield f"down.{down}", f"{theirs}.resnets.{i}", f"{theirs}.attentions.{i}", resize
            down += 1
    for i in range(len(unet.middle)):
        yield f"middle.{i}", f"mid_block.resnets.{i}", f"mid_block.attentions.{i}", ""
    for level, count in enumerate(reversed(blocks)):
        for i in range(count + 1):
            theirs = f"up_blocks.{level}"
            yield f"up.{up}", f"{theirs}.resnets.{i}", f"{theirs}.attentions.{i}", f"{theirs}.upsamplers.0"
            up += 1


def unet_keys(unet: UNet, blocks: list[int]) -> list[Piece]:
    """`UNet2DConditionModel` and `UNet2DModel`; blocks: residual blocks of each level."""
    pieces = layers(
        {
            "conv_in": "input",
            "time_embedding.linear_1": "time_embedding.linear_1",
            "time_embedding.linear_2": "time_embedding.linear_2",
            "conv_norm_out": "norm",
            "conv_out": "output",
        }
    )
    start = 0
    for stage, (ours, resnet, attention, resize) in zip(unet.stages(), stage_names(unet, blocks), strict=True):
        for name, theirs, block in (("block", resnet, stage.block), ("resize", resize, stage.resize)):
            if isinstance(block, ResBlock):
                stop = start + block.time_channels
                pieces += layer(f"{theirs}.time_emb_proj", "time_projection", (start, stop))
                pieces += res_block_keys(block, theirs, f"{ours}.{name}")
                start = stop
        if stage.attention is not None:
            pieces += attention_keys(stage.attention, attention, f"{ours}.attention")
    return pieces


def res_block_keys(block: ResBlock, theirs: str, ours: str) -> list[Piece]:
    names = {name: name for name in ("norm1", "conv1", "norm2", "conv2")}
    if not isinstance(block.skip, nn.Identity):
        names["conv_shortcut"] = "skip"
    return layers(names, f"{theirs}.", f"{ours}.")


def attention_keys(attention: Attention, theirs: str, ours: str) -> list[Piece]:
    width = attention.out.out_features
    pieces = layers({"group_norm": "norm", "to_out.0": "out"}, f"{theirs}.", f"{ours}.")
    for joined, parts in (("qkv", ("to_q", "to_k", "to_v")), ("context_kv", ("add_k_proj", "add_v_proj"))):
        for i, part in enumerate(parts):
            pieces += layer(f"{theirs}.{part}", f"{ours}.{joined}", (i * width, (i + 1) * width))
    return pieces


def decoder_keys(decoder: Decoder) -> list[Piece]:
    """`UNet2DConditionModel`, below "decoder.", and `UnCLIPTextProjModel`, below "text_proj."."""
    pieces = unet_keys(decoder.unet, _blocks(decoder))
    pieces = [p._replace(theirs=f"decoder.{p.theirs}", ours=f"unet.{p.ours}") for p in pieces]
    pieces += layers(
        {
            "embedding_proj": "time_z_t",
            "clip_image_embeddings_project_to_time_embeddings": "time_z_i",
            "encoder_hidden_states_proj": "context_text",
            "text_encoder_hidden_states_norm": "context_norm",
        },
        "text_proj.",
    )
    # their four tokens lie across the channels of one vector, ours one after the other
    tokens, name = (("n", decoder.z_i_tokens),), "text_proj.clip_extra_context_tokens_proj"
    pieces.append(Piece(f"{name}.weight", "context_z_i.weight", None, "(w n) d -> (n w) d", tokens))
    pieces.append(Piece(f"{name}.bias", "context_z_i.bias", None, "(w n) -> (n w)", tokens))
    return [*pieces, Piece("text_proj.learned_classifier_free_guidance_embeddings", "null_embedding")]


def upsampler_keys(upsampler: Upsampler) -> list[Piece]:
    """`UNet2DModel`."""
    return [p._replace(ours=f"unet.{p.ours}") for p in unet_keys(upsampler.unet, _blocks(upsampler))]


def _blocks(network: Any) -> list[int]:
    count, levels = network.config["num_res_blocks"], len(network.config["channel_multipliers"])
    return [count] * levels if isinstance(count, int) else list(count)


def join(pieces: list[Piece], theirs: Mapping[str, Tensor], network: nn.Module, dtype: torch.dtype | None = None):
    """Our state dict of their tensors, in `dtype` if given; network: ours, on any device, the meta device too.

    Raises ValueError naming their keys that are missing, unknown or of another shape.
    """
    empty = {name: tensor.to("meta") for name, tensor in network.state_dict().items()}
    shapes = {piece.theirs: tuple(piece.back(empty[piece.ours]).shape) for piece in pieces}
    misshapen = [
        f"{key} {tuple(theirs[key].shape)} (expected {shape})"
        for key, shape in shapes.items()
        if key in theirs and tuple(theirs[key].shape) != shape
    ]
    problems = {
        "lacks the keys": [key for key in shapes if key not in theirs],
        "has the unknown keys": [key for key in theirs if key not in shapes],
        "has keys of another shape:": misshapen,
    }
    if found := [f"{says} {some(keys)}" for says, keys in problems.items() if keys]:
        raise ValueError(" and ".join(found))
    state: dict[str, Tensor] = {}
    for piece in pieces:
        tensor = piece.forth(theirs[piece.theirs])
        tensor = tensor.to(dtype or tensor.dtype)
        if piece.rows is None:
            state[piece.ours] = tensor.contiguous()
        else:
            if piece.ours not in state:
                state[piece.ours] = torch.empty(empty[piece.ours].shape, dtype=tensor.dtype)
            state[piece.ours][slice(*piece.rows)] = tensor
    return state


def split(pieces: list[Piece], ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Their state dict of our tensors: the inverse of `join`."""
    return {piece.theirs: piece.back(ours[piece.ours]).contiguous() for piece in pieces}


def some(keys: list[str]) -> str:
    """The first three of some keys, and how many there are if more."""
    return ", ".join(keys[:3]) + (f", … ({len(keys)} in all)" if len(keys) > 3 else "")
