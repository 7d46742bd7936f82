"""CLIP's loss, and the command that trains it: `python -m unclip.clip.train --config recipes/emoji/clip.yaml`."""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.nn.functional import all_gather
from transformers import PretrainedConfig

from unclip.clip.evaluate import concepts_of, evaluate
from unclip.clip.model import CLIP, CLIPArguments
from unclip.core.config import TrainConfig, check_parts, main
from unclip.core.data import COLOURS, DataConfig, Draws, ShardDataset, draw_pictures_and_captions
from unclip.core.files import write_json
from unclip.core.train import Batch, LossFn, datasets_of, processes, train

Same = Literal["none", "caption", "concept"]


@dataclass
class CLIPConfig:
    """Trains CLIP by contrastive loss; afterwards evaluates it on the splits `evaluate`."""

    model: CLIPArguments
    train: TrainConfig
    data: DataConfig
    validation: DataConfig | None = None
    evaluate: list[str] = field(default_factory=list)  # splits; figures go to OUT/evaluation.json
    templates: list[str] = field(default_factory=lambda: ["{}"])  # prompt ensemble of the zero-shot figures
    lock_text: bool = False  # the text tower stays as it was pretrained, the image tower learns its space
    align: float = 0.0  # weight of 1 − cos(z_i, z_t), beside the contrastive loss, which leaves them apart
    same: Same = "caption"  # two samples that share it are no negatives of each other
    shift: float = 0.0  # pictures move by up to this part of their side
    zoom: float = 0.0  # and are scaled by a factor up to 1 ± this
    flip: float = 0.0  # and are mirrored with this probability


def contrastive_loss(
    z_i: Tensor, z_t: Tensor, logit_scale: Tensor, keys: Tensor | None = None, gather: bool = True
) -> Tensor:
    """Symmetric cross-entropy over the pairs of all processes (CLIP, fig. 3), ().

    z_i, z_t: unit norm (b, d), row by row pairs; logit_scale: () factor of the cosines. keys: integers (b,); a pair of
    different samples with equal keys (the same concept, say) is left out of both softmaxes: it is no negative.
    Other processes' embeddings are gathered with gradient, so that the mean of the processes' gradients, which is
    what DDP takes, is that of one process with the whole batch. gather false: the pairs of this process alone.
    """
    if z_i.shape != z_t.shape or z_i.ndim != 2:
        raise ValueError(f"z_i is {tuple(z_i.shape)} and z_t {tuple(z_t.shape)}, expected one shape (b, d).")
    all_i, all_t, all_keys, first = z_i, z_t, keys, 0
    if gather and dist.is_initialized() and dist.get_world_size() > 1:
        all_i, all_t = torch.cat(all_gather(z_i.contiguous())), torch.cat(all_gather(z_t.contiguous()))
        all_keys = None if keys is None else torch.cat(all_gather(keys))
        first = dist.get_rank() * len(z_i)
    own = torch.arange(first, first + len(z_i), device=z_i.device)
    logits_i = logit_scale * z_i @ all_t.T  # b, b of all processes
    logits_t = logit_scale * z_t @ all_i.T
    if keys is not None and all_keys is not None:
        same = keys[:, None] == all_keys[None]
        same[torch.arange(len(own), device=own.device), own] = False
        logits_i, logits_t = logits_i.masked_fill(same, -math.inf), logits_t.masked_fill(same, -math.inf)
    return (F.cross_entropy(logits_i, own) + F.cross_entropy(logits_t, own)) / 2


def keys_of(texts: Sequence[str], device: torch.device | str = "cpu") -> Tensor:
    """Equal int64 for equal texts, the same in every process: (b,)."""
    digests = (hashlib.blake2b(text.encode(), digest_size=8).digest() for text in texts)
    return torch.tensor([int.from_bytes(d, "big", signed=True) for d in digests], device=device)


def augment(x: Tensor, draws: Draws, shift: float = 0.0, zoom: float = 0.0, flip: float = 0.0) -> Tensor:
    """Pictures (b, 3, h, w) moved, scaled and mirrored, each by its own draw; edges are continued."""
    if shift == zoom == flip == 0:
        return x
    u = draws.uniform(4).to(x.device)
    scale = 1 + zoom * (2 * u[:, 0] - 1)
    mirror = 1 - 2 * (u[:, 1] < flip).to(x.dtype)
    theta = x.new_zeros(len(x), 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = mirror / scale, 1 / scale
    theta[:, :, 2] = 2 * shift * (2 * u[:, 2:] - 1)  # the grid's side is 2
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


def clip_loss(config: CLIPConfig, clip: CLIP) -> LossFn:
    """`clip` tokenises; it is the network that is trained, before any wrapper."""

    def loss_fn(model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss () of a batch of pictures and captions, and what is logged beside it, each ()."""
        draws = batch["draws"]
        x, captions = draw_pictures_and_captions(batch, draws, config.data.background)
        x = augment(x, draws, config.shift, config.zoom, config.flip) if model.training else x
        ids, mask = clip.tokenize(captions)
        z_i, z_t, scale = model(x, ids, mask)
        texts = {"none": None, "caption": captions, "concept": batch["concept"]}[config.same]
        keys = None if texts is None else keys_of(texts, z_i.device)
        # every process validates the same whole batch: gathered, each pair would be in it once a process
        loss = contrastive_loss(z_i, z_t, scale, keys, gather=model.training)
        cosine = (z_i * z_t).sum(-1).mean()
        if config.align:
            loss = loss + config.align * (1 - cosine)
        with torch.no_grad():
            accuracy = ((z_i @ z_t.T).argmax(1) == torch.arange(len(z_i), device=z_i.device)).float().mean()
        return loss, {"accuracy": accuracy, "cosine": cosine.detach(), "logit_scale": scale.detach()}

    return loss_fn


def texts_of(dataset: ShardDataset) -> list[str]:
    """All captions and keywords of a data set, each once: what the vocabulary is made from."""
    texts = (text for meta in dataset.meta for text in (*meta["captions"], *meta.get("keywords", [])))
    colours = [f"on a {name} background" for name in COLOURS]
    return [*dict.fromkeys(texts), *colours]


@torch.no_grad()
def lock_text(clip: CLIP, texts: Sequence[str] | None) -> None:
    """Leaves the text tower untrained, so that words no caption holds stay where pretraining put them.

    Locked tuning (LiT, Zhai et al. 2022, with the towers' roles exchanged). With `texts`, z_t becomes the pooled state
    on the principal directions of theirs (of 8,192 at most): their cosines stay, as far as d directions hold them.
    Raises ValueError where z_t is wider than the states.
    """
    clip.model.text_model.requires_grad_(False)
    for module in clip.model.text_model.modules():  # what is not trained gains nothing by dropout, and z_t would waver
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "dropout", None), float):  # as CLIP's attention has it
            module.dropout = 0.0
    projection = clip.model.text_projection.requires_grad_(False)
    if texts is None:
        return
    if clip.dim > clip.text_width:
        raise ValueError(
            f"model.dim is {clip.dim} and a locked text tower's states have {clip.text_width}: set it no higher."
        )
    clip.model.text_projection = nn.Identity()  # so that z_t, not normalised, is the pooled state
    rows = texts[:: math.ceil(len(texts) / 8192)]
    states = torch.cat([clip.encode_text(rows[i : i + 256], normalize=False).z_t for i in range(0, len(rows), 256)])
    directions = torch.linalg.eigh(states.double().T @ states.double()).eigenvectors.flip(1)  # w w, the largest first
    projection.weight.copy_(directions[:, : projection.out_features].T)
    clip.model.text_projection = projection


def check_resumed(clip: CLIP, folder: Path) -> None:
    """Raises ValueError where the CLIP in `folder` differs in what no weight's shape shows: words, heads."""
    if not (folder / "clip").is_dir():
        return
    stored = CLIP.from_pretrained(folder)
    if stored.tokenizer.get_vocab() != clip.tokenizer.get_vocab():
        raise ValueError(
            f"{folder} has another vocabulary than this corpus and model.vocab_size make: resume with the data that "
            "the run began with, or choose another train.out."
        )
    for tower in ("text", "vision"):
        there, here = (getattr(of.model.config, f"{tower}_config").num_attention_heads for of in (stored, clip))
        if there != here:
            raise ValueError(
                f"{folder} has a {tower} tower of {there} heads, the config says {here}: resume with the config that "
                "the run began with, or choose another train.out."
            )


def run(config: CLIPConfig) -> Path:
    """Trains a CLIP, evaluates it; returns the folder of the exported model (`clip/`, `tokenizer/`)."""
    if config.train.accumulation > 1:
        raise ValueError(
            f"train.accumulation is {config.train.accumulation}, but CLIP's negatives are the other samples of a "
            "micro-batch: leave it out, and take a smaller train.batch_size or more processes."
        )
    if config.model.start is None and config.model.text == "bpe" and (config.lock_text or config.model.text_layers):
        raise ValueError(
            "lock_text and model.text_layers are for a pretrained text tower, and model.text is bpe, which starts from "
            "nothing: leave them out, or set model.text to minilm."
        )
    if any("{}" not in template for template in config.templates):
        raise ValueError(f"templates are {config.templates}, expected '{{}}' in each, where the concept goes.")
    check_parts(config, "flip")
    if not (0 <= config.shift <= 1 and 0 <= config.zoom < 1):
        raise ValueError(
            f"shift is {config.shift} and zoom {config.zoom}; expected parts of a picture's side, zoom below 1."
        )
    dataset, validation = datasets_of(config.data, config.validation)
    if config.same == "concept":
        concepts_of(dataset, "same: concept")
    splits = {
        split: ShardDataset(DataConfig(config.data.path, split, config.data.groups, None, config.data.styles))
        for split in config.evaluate
    }
    judged = (dataset, *splits.values()) if splits else ()
    labels = sorted({concept for data in judged for concept in concepts_of(data)})
    torch.manual_seed(config.train.seed)
    texts = texts_of(dataset)
    clip = CLIP.build(config.model, texts)
    if config.lock_text:
        lock_text(clip, texts if config.model.start is None else None)
    if config.train.resume:
        check_resumed(clip, Path(config.train.out) / "model")
    device: Any = processes().device
    if device.type == "cpu":  # where plain products train two to six times as fast as the fused kernel
        for module in clip.modules():  # set_attn_implementation does not reach the towers inside a dual encoder
            if isinstance(config_of := getattr(module, "config", None), PretrainedConfig):
                config_of._attn_implementation = "eager"
    folder = train(config.train, clip, clip_loss(config, clip), dataset, validation)
    if splits and processes().is_main_process:
        trained = CLIP.from_pretrained(folder).to(device)
        figures = {split: evaluate(trained, data, labels, config.templates) for split, data in splits.items()}
        write_json(figures, Path(config.train.out) / "evaluation.json")
        print(json.dumps(figures))
    return folder


if __name__ == "__main__":
    main(CLIPConfig, run)
