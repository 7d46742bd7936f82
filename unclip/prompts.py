"""Prompts of several parts with weights, `a cat:1.5 | a dog`, and what they mean to prior and decoder."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from unclip.arguments import MAX_PICTURES, Callback, check_prompts
from unclip.clip.model import CLIP, NO_IMAGE_TOWER, TextFeatures
from unclip.core.sampling import Seed
from unclip.latents import slerp, weighted_mean
from unclip.presets import StageSettings
from unclip.stages import Known

if TYPE_CHECKING:
    from unclip.pipeline import UnCLIP

MAX_WEIGHT = 10.0
MAX_LONE_WEIGHT = 2.0
MAX_BEST_OF = 1000
# No weight where a digit comes before the colon ("at 10:30") or a space after it.
WEIGHTED = re.compile(r"(?P<text>(?:.*[^\d\s])?)\s*:(?P<weight>[+-]?\d*\.?\d+)", re.S)


class Part(NamedTuple):
    """A caption and how much it counts."""

    text: str
    weight: float


def parse(prompt: str) -> list[Part]:
    """The parts of a prompt, between bars, each with the weight after its last colon, or 1.

    Weights of several parts count relative to each other; a part of weight 0 is left out. A lone part's weight says how
    far its z_i is taken away from the average picture's (above 1) or towards it (below). Raises ValueError for an empty
    part, a weight out of range, or no part of weight above 0.
    """
    pieces = [piece.strip() for piece in prompt.split("|")]
    most = MAX_WEIGHT if len(pieces) > 1 else MAX_LONE_WEIGHT
    parts = []
    for piece in pieces:
        match = WEIGHTED.fullmatch(piece)
        text, weight = (match["text"].strip(), float(match["weight"])) if match else (piece, 1.0)
        if not text:
            raise ValueError(f"the prompt {prompt!r} has an empty part; say what to draw on both sides of a bar.")
        if weight < 0:
            raise ValueError(f"the weight of {text!r} is {weight:g}; name what to avoid as a negative prompt instead.")
        if weight > most:
            hint = "or put a space after the colon where it is part of the text"
            raise ValueError(f"the weight of {text!r} is {weight:g}; give one up to {most:g}, {hint}.")
        parts.append(Part(text, weight))
    if len(parts) > 1 and not any(part.weight for part in parts):
        raise ValueError(f"all parts of the prompt {prompt!r} have the weight 0; give one of them more.")
    kept = [part for part in parts if part.weight] if len(parts) > 1 else parts
    return [Part(kept[0].text, 1.0)] if len(kept) == 1 < len(parts) else kept


def plain(caption: str) -> str:
    """A caption that stands for one text. Raises TypeError, ValueError for none, for several parts, or a weight."""
    parts = parse(*check_prompts([caption]))
    if len(parts) > 1 or parts[0].weight != 1:
        raise ValueError(f"the caption {caption!r} has parts or a weight; give a plain one.")
    return parts[0].text


class Conditions(NamedTuple):
    """What b pictures are drawn from. z_i (b, d); z_t (b, d), by which drawings are ranked; text, b rows, of which the
    decoder sees those where `has_text` (b,) is true: a prompt of several parts reaches it as z_i alone."""

    z_i: Tensor
    z_t: Tensor
    text: TextFeatures
    has_text: Tensor


def embed_prompts(
    pipe: UnCLIP,
    prompts: Sequence[str],
    seeds: Sequence[Seed],
    settings: StageSettings,
    callback: Callback | None = None,
    negative: str | None = None,
    z_i: Tensor | None = None,
) -> Conditions:
    """What each prompt means at each of its seeds; `seeds` run over prompts, as many for each.

    Each part's z_i is the prior's, under its settings, at the picture's seed; z_i (b, d) stands in for the prior's.
    """
    parsed = [parse(prompt) for prompt in prompts]
    n = len(seeds) // len(prompts)
    encoded = pipe.encode_text([part.text for parts in parsed for part in parts])
    text = TextFeatures(*(x.repeat_interleave(n, 0) for x in encoded))
    if z_i is None:
        rows = [seed for i, parts in enumerate(parsed) for _ in parts for seed in seeds[i * n : (i + 1) * n]]
        drawn = pipe.sample_z_i(text, rows, settings, callback, negative)
        average = pipe.prior_ar.pca.mean if settings.solver == "ar" else pipe.prior.clip_mean
        z_i = join(drawn, parsed, n, average)
    sizes = [len(parts) * n for parts in parsed]
    first = TextFeatures(*(torch.cat([block[:n] for block in x.split(sizes)]) for x in text))
    has_text = torch.tensor([len(parts) == 1 for parts in parsed for _ in range(n)])
    return Conditions(z_i.to(text.z_t.device), join(text.z_t, parsed, n), first, has_text)


def join(z: Tensor, parsed: Sequence[Sequence[Part]], n: int, average: Tensor | None = None) -> Tensor:
    """One embedding of each prompt's parts: z (parts of all prompts · n, d) to (prompts · n, d).

    average (d,): the mean of pictures' embeddings, which a lone part's weight is measured from; None: it counts for
    nothing.
    """
    device, z, joined = z.device, z.cpu(), []  # means and great circles are taken in double, which MPS has not
    for block, parts in zip(z.split([len(parts) * n for parts in parsed]), parsed, strict=True):
        if len(parts) > 1:
            joined.append(weighted_mean(block.view(len(parts), n, -1), [part.weight for part in parts]))
        elif average is None or parts[0].weight == 1:
            joined.append(block)
        else:
            norm = block.norm(dim=-1, keepdim=True)
            start = F.normalize(average.to(block), dim=0).expand(n, -1)
            joined.append(norm * F.normalize(slerp(start, block / norm, parts[0].weight), dim=-1))
    return torch.cat(joined).to(device)


def decode_prompts(
    pipe: UnCLIP,
    conditions: Conditions,
    seeds: Sequence[Seed],
    settings: StageSettings,
    callback: Callback | None = None,
    negative: str | None = None,
    x_T: Tensor | None = None,
    known: Known | None = None,
) -> Tensor:
    """The decoder's pictures (b, 3, s, s), rows with text and rows without in a run each."""
    drawn: dict[int, Tensor] = {}
    for flag in (True, False):
        rows = [i for i, has_text in enumerate(conditions.has_text.tolist()) if has_text is flag]
        if rows:
            text = TextFeatures(*(x[rows] for x in conditions.text)) if flag else None
            noise = None if x_T is None else x_T[rows]
            some = [seeds[i] for i in rows]
            x = pipe.decode(conditions.z_i[rows], text, some, settings, callback, noise, negative, known)
            drawn |= dict(zip(rows, x, strict=True))
    return torch.stack([drawn[i] for i in range(len(seeds))])


# ------------------------------------------------------------------------------------------------ choosing


def best_rows(z_i: Tensor, z_t: Tensor, best_of: int) -> list[int]:
    """Of each `best_of` rows in a row the one whose picture is nearest to its caption: z_i (b, d) and z_t (b, d)."""
    scores = F.cosine_similarity(z_i.float(), z_t.float().to(z_i.device)).view(-1, best_of)
    return [i * best_of + best for i, best in enumerate(scores.argmax(1).tolist())]


def check_best_of(best_of: int, prompts: Sequence[str] | None, clip: CLIP, num_images: int = 1) -> int:
    """best_of itself. Raises TypeError or ValueError where it is no count, or there is nothing to rank by.

    num_images: how many of so many drawings each are asked for.
    """
    if isinstance(best_of, bool) or not isinstance(best_of, int):
        raise TypeError(f"best_of is {best_of!r}; give a whole number.")
    if not 1 <= best_of <= MAX_BEST_OF:
        raise ValueError(f"best_of is {best_of}; draw 1 to {MAX_BEST_OF} pictures for each that is kept.")
    if best_of * num_images > MAX_PICTURES:
        raise ValueError(
            f"{num_images} pictures, each the best of {best_of}, came; draw at most {MAX_PICTURES} in all."
        )
    if best_of > 1 and prompts is None:
        raise ValueError(f"best_of is {best_of} without a prompt to choose by; give a prompt, or leave it out.")
    if best_of > 1 and not clip.has_image_tower:
        raise ValueError(NO_IMAGE_TOWER)
    return best_of


def check_negative(
    negative: str | None,
    pipe: UnCLIP,
    settings: Mapping[str, StageSettings],
    hears: Collection[str] = ("prior", "decoder"),
) -> str | None:
    """A negative prompt, None for an empty one. Raises TypeError, or ValueError where no guidance would use it.

    hears: the stages that a prompt reaches.
    """
    if not isinstance(negative, str | None):
        raise TypeError(f"negative_prompt is of type {type(negative).__name__}; give a string.")
    if negative is None or not negative.strip():
        return None
    heard = [stage for stage in hears if stage != "decoder" or pipe.decoder.config["text_width"] is not None]
    if not heard:
        raise ValueError("negative_prompt came where nothing is drawn from a prompt; leave it out.")
    if all(settings[stage].guidance_scale == 1 for stage in heard):
        who = " or ".join(heard)
        raise ValueError(f"negative_prompt came with no guidance to use it; give the {who} a guidance scale above 1.")
    return plain(negative)
