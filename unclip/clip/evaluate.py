"""What a CLIP knows: zero-shot concepts, and retrieval both ways, on splits of a corpus."""

from collections.abc import Sequence

import torch
from torch import Tensor

from unclip.clip.model import CLIP
from unclip.core.data import ShardDataset, to_pixels


def concepts_of(dataset: ShardDataset, use: str = "evaluate") -> list[str]:
    """What each picture shows. use: the setting that asks. Raises ValueError where a sample does not say."""
    concepts = [meta.get("concept", "") for meta in dataset.meta]
    if unnamed := concepts.count(""):
        raise ValueError(
            f"{unnamed} of {len(concepts)} samples of {dataset.config.path}, {dataset.config.split}, name no concept, "
            f"by which `{use}` goes: pack pictures with a concept each, or leave it out."
        )
    return concepts


@torch.no_grad()
def embed_pictures(clip: CLIP, dataset: ShardDataset, normalize: bool = True) -> Tensor:
    """z_i (n, d), float32, of the pictures of `dataset` on white; of unit norm unless `normalize` is false."""
    z_i = []
    for rows in _chunks(len(dataset), 128):
        pixels = torch.cat([to_pixels(dataset[i]["image"][None]) for i in rows])
        z_i.append(clip.encode_image(pixels.to(clip.device), normalize).float())
    return torch.cat(z_i)


@torch.no_grad()
def evaluate(
    clip: CLIP, dataset: ShardDataset, labels: Sequence[str], templates: Sequence[str] = ("{}",)
) -> dict[str, float]:
    """Figures of the pictures of `dataset` on white, each in [0, 1] but the counts.

    `top1`, `top5`: the picture's concept among `labels`, each the mean of its prompts over `templates`.
    `image_to_text`, `text_to_image`: the nearest of all first captions, or pictures, of the data set carries the same
    caption. `count`, `labels`: how many pictures and labels. Raises ValueError for a picture without a concept, and for
    a concept that is not a label.
    """
    index = {label: i for i, label in enumerate(labels)}
    concepts = concepts_of(dataset)
    missing = sorted(set(concepts) - index.keys())
    if missing:
        raise ValueError(f"{len(missing)} concepts, such as {missing[0]!r}, are no label; add them to the labels.")
    was_training = clip.training
    clip.eval()
    z_i = embed_pictures(clip, dataset)
    texts = [meta["captions"][0] for meta in dataset.meta]
    z_t = torch.cat([clip.encode_text([texts[i] for i in rows]).z_t for rows in _chunks(len(texts), 128)])
    truth = torch.tensor([index[concept] for concept in concepts], device=clip.device)
    best = (z_i @ clip.label_embeddings(labels, templates).T).topk(min(5, len(labels))).indices
    hit = best == truth[:, None]
    clip.train(was_training)
    return {
        "top1": float(hit[:, 0].float().mean()),
        "top5": float(hit.any(1).float().mean()),
        "image_to_text": _recall(z_i @ z_t.T, texts),
        "text_to_image": _recall(z_t @ z_i.T, texts),
        "count": len(dataset),
        "labels": len(labels),
    }


def _chunks(length: int, size: int) -> list[range]:
    return [range(first, min(first + size, length)) for first in range(0, length, size)]


def _recall(similarity: Tensor, texts: Sequence[str]) -> float:
    nearest = similarity.argmax(1).tolist()
    return sum(texts[i] == texts[j] for i, j in enumerate(nearest)) / len(texts)
