"""How near the embeddings a prior draws are to those of the pictures the captions belong to."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from prior.diffusion_prior import DiffusionPrior, best_of
from unclip.clip.model import CLIP
from unclip.core.data import ShardDataset, to_pixels
from unclip.core.sampling import guided, make_sampler, picture_generators, sample, starting_noise


@torch.no_grad()
def draw_embeddings(
    prior: DiffusionPrior,
    clip: CLIP,
    scheduler: Any,
    captions: list[str],
    seeds: list[int],
    steps: int = 20,
    guidance_scale: float = 1.0,
    candidates: int = 2,
) -> Tensor:
    """z_i (b, d), of unit norm, of the captions: the nearest to z_t of `candidates` draws (§2.2 keeps one of two)."""
    z_t, text, mask = clip.encode_text(captions)
    conditions = {"z_t": z_t.to(prior.dtype), "text": text.to(prior.dtype), "text_mask": mask}
    context = prior.encode_context(**conditions)
    null = None
    if guidance_scale != 1:
        null = prior.encode_context(**conditions, drop_text=torch.ones(len(z_t), dtype=torch.bool, device=z_t.device))
    denoise = guided(prior, context, null, guidance_scale)
    drawn = []
    for k in range(candidates):
        generators = picture_generators(seeds, f"prior-{k}")
        x_T = starting_noise((prior.embedding_dim,), generators, z_t.device)
        x0 = sample(denoise, make_sampler(scheduler, "dpm++"), x_T, steps, generators)
        drawn.append(F.normalize(prior.unstandardize(x0).float(), dim=-1))
    return best_of(torch.stack(drawn), z_t)


@torch.no_grad()
def evaluate(
    prior: DiffusionPrior, clip: CLIP, scheduler: Any, dataset: ShardDataset, guidance_scale: float = 1.0
) -> dict[str, float]:
    """Figures over the pictures of `dataset`, on white, and their first captions.

    `cosine`: of drawn and true z_i; `cosine_shuffled`: to another picture's; `cosine_between`: among true z_i of
    different pictures; `cosine_text`: of z_t and true z_i. `top1`, `top5`: the true z_i, or one of the same concept,
    is the nearest, or among the five nearest, of all true z_i to the drawn one; `count`: how many pictures.
    """
    device = clip.device
    true, drawn, text = [], [], []
    for first in range(0, len(dataset), 128):
        rows = range(first, min(first + 128, len(dataset)))
        pixels = torch.cat([to_pixels(dataset[i]["image"][None]) for i in rows]).to(device)
        captions = [dataset.meta[i]["captions"][0] for i in rows]
        true.append(F.normalize(clip.encode_image(pixels).float(), dim=-1))
        text.append(clip.encode_text(captions).z_t.float())
        drawn.append(draw_embeddings(prior, clip, scheduler, captions, list(rows), guidance_scale=guidance_scale))
    z_i, z_t, ours = torch.cat(true), torch.cat(text), torch.cat(drawn)
    concepts = [meta["concept"] for meta in dataset.meta]
    nearest = (ours @ z_i.T).topk(min(5, len(dataset))).indices.tolist()
    hits = [[concepts[j] == concepts[i] for j in row] for i, row in enumerate(nearest)]
    return {
        "cosine": float((ours * z_i).sum(-1).mean()),
        "cosine_shuffled": float((ours * z_i.roll(1, 0)).sum(-1).mean()),
        "cosine_between": float((z_i * z_i.roll(1, 0)).sum(-1).mean()),
        "cosine_text": float((z_t * z_i).sum(-1).mean()),
        "top1": sum(row[0] for row in hits) / len(hits),
        "top5": sum(any(row) for row in hits) / len(hits),
        "count": len(dataset),
    }
