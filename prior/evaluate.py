"""How near the embeddings a prior draws are to those of the pictures the captions belong to."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from prior.autoregressive_prior import AutoregressivePrior
from prior.diffusion_prior import DiffusionPrior, best_of
from unclip.clip.evaluate import concepts_of, embed_pictures
from unclip.clip.model import CLIP
from unclip.core.data import ShardDataset
from unclip.core.sampling import guided, make_sampler, picture_generators, sample, starting_noise


@torch.no_grad()
def draw_embeddings(
    prior: DiffusionPrior | AutoregressivePrior,
    clip: CLIP,
    scheduler: Any,
    captions: list[str],
    seeds: list[int],
    steps: int = 20,
    guidance_scale: float = 1.0,
    candidates: int = 2,
) -> Tensor:
    """z_i (b, d), of unit norm, of the captions: of the diffusion prior, the nearest to z_t of `candidates` draws (§2.2
    keeps one of two); of the autoregressive prior, which has neither scheduler nor steps, one draw.
    """
    z_t, text, mask = clip.encode_text(captions)
    z_t, text = z_t.to(prior.dtype), text.to(prior.dtype)
    if isinstance(prior, AutoregressivePrior):
        drawn = prior.sample(z_t, text, mask, picture_generators(seeds, "prior"), guidance_scale)
        return F.normalize(drawn, dim=-1)
    conditions = {"z_t": z_t, "text": text, "text_mask": mask}
    context = prior.encode_context(**conditions)
    null = None
    if guidance_scale != 1:
        null = prior.encode_context(**conditions, drop_text=torch.ones(len(z_t), dtype=torch.bool, device=z_t.device))
    denoise = guided(prior, context, null, guidance_scale)
    drawn = []
    for k in range(candidates):
        generators = picture_generators(seeds, "prior", k)
        x_T = starting_noise((prior.embedding_dim,), generators, z_t.device)
        x0 = sample(denoise, make_sampler(scheduler, "dpm++"), x_T, steps, generators)
        drawn.append(F.normalize(prior.unstandardize(x0).float(), dim=-1))
    return best_of(torch.stack(drawn), z_t)


@torch.no_grad()
def true_embeddings(clip: CLIP, dataset: ShardDataset) -> tuple[Tensor, list[str]]:
    """z_i (n, d), float32 of unit norm, of the pictures of `dataset` on white, and their first captions."""
    return embed_pictures(clip, dataset), [meta["captions"][0] for meta in dataset.meta]


def evaluate(
    prior: DiffusionPrior | AutoregressivePrior,
    clip: CLIP,
    scheduler: Any,
    dataset: ShardDataset,
    guidance_scale: float = 1.0,
) -> dict[str, float]:
    """The figures of `compare` over the pictures of `dataset`."""
    z_i, captions = true_embeddings(clip, dataset)
    text, drawn = [], []
    for first in range(0, len(captions), 128):
        part = captions[first : first + 128]
        seeds = list(range(first, first + len(part)))
        text.append(clip.encode_text(part).z_t.float())
        drawn.append(draw_embeddings(prior, clip, scheduler, part, seeds, guidance_scale=guidance_scale))
    return compare(torch.cat(drawn), z_i, torch.cat(text), concepts_of(dataset))


def cosine_to_others(a: Tensor, b: Tensor) -> Tensor:
    """Mean cosine () of each row of a (n, d) to all rows of b (n, d) but its own; 0 for a single row."""
    cosines = F.normalize(a.float(), dim=-1) @ F.normalize(b.float(), dim=-1).T  # n n
    return (cosines.sum() - cosines.diagonal().sum()) / max(1, len(a) * (len(a) - 1))


def compare(drawn: Tensor, z_i: Tensor, z_t: Tensor, concepts: list[str]) -> dict[str, float]:
    """How near drawn embeddings are to those of the pictures; all (n, d), of unit norm, row i of the same caption.

    `cosine`: of drawn and true z_i; `cosine_shuffled`: to all other pictures', in the mean; `cosine_between`: among
    true z_i of different pictures; `cosine_text`: of z_t and true z_i. `top1`, `top5`: the true z_i, or one of the same
    concept, is the nearest, or among the five nearest, of all true z_i to the drawn one. `spread`: the drawn ones'
    variance as a part of the true ones'; `frechet`: the Fréchet distance of the two as normals, as a part of it too (0
    for the same mean and covariance, 1 for all of them at the true mean); few samples raise it. `count`: how many
    pictures.
    """
    nearest = (drawn @ z_i.T).topk(min(5, len(z_i))).indices.tolist()
    hits = [[concepts[j] == concepts[i] for j in row] for i, row in enumerate(nearest)]
    return {
        "cosine": float((drawn * z_i).sum(-1).mean()),
        "cosine_shuffled": float(cosine_to_others(drawn, z_i)),
        "cosine_between": float(cosine_to_others(z_i, z_i)),
        "cosine_text": float((z_t * z_i).sum(-1).mean()),
        "top1": sum(row[0] for row in hits) / len(hits),
        "top5": sum(any(row) for row in hits) / len(hits),
        "spread": float(drawn.var(0, correction=0).sum() / z_i.var(0, correction=0).sum()),
        "frechet": frechet_distance(drawn, z_i) / float(z_i.var(0, correction=0).sum()),
        "count": len(z_i),
    }


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """|μ_a − μ_b|² + tr(Σ_a + Σ_b − 2·(Σ_a·Σ_b)^½) of samples (n, d) and (m, d), as if they were normal."""
    a, b = a.double().cpu(), b.double().cpu()
    distance = (a.mean(0) - b.mean(0)).square().sum()
    # With Σ = XᵀX, tr (Σ_a·Σ_b)^½ is the sum of the singular values of X_a·X_bᵀ.
    halves = [torch.linalg.qr((x - x.mean(0)) / len(x) ** 0.5).R for x in (a, b)]
    both = torch.linalg.svdvals(halves[0] @ halves[1].mT).sum()
    return float((distance + halves[0].square().sum() + halves[1].square().sum() - 2 * both).clamp(min=0))
