"""A frozen CLIP that computes each caption and each picture once: training a stage sees them hundreds of times."""

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from unclip.clip.model import CLIP, TextFeatures
from unclip.core.data import Draws, ShardDataset, collate, draw_pictures_and_captions


class RememberedCLIP:
    """`encode_text` and `encode_image` of a frozen CLIP, without gradient, remembered by content.

    `room`: bytes to remember at most; what comes after is computed each time. 0 remembers nothing. Results are the
    CLIP's own up to rounding, which depends on what else was in a batch; states of padded tokens are 0.
    Pictures are recognised by their bytes on the CPU, so that on an accelerator computing anew is often quicker.
    """

    def __init__(self, clip: CLIP, room: int = 1 << 30):
        self.clip = clip.eval().requires_grad_(False)
        self.room = room
        self._texts: dict[str, tuple[Tensor, Tensor]] = {}
        self._pictures: dict[bytes, Tensor] = {}

    @property
    def device(self) -> torch.device:
        """Where CLIP is, and all results are."""
        return self.clip.device

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str]) -> TextFeatures:
        """As CLIP's, for a list of prompts: z_t (b, d), states (b, n, w), mask (b, n)."""
        if self.room == 0:
            return self.clip.encode_text(prompts)
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._texts]
        found = {prompt: self._texts[prompt] for prompt in prompts if prompt in self._texts}
        if new:
            z_t, states, mask = self.clip.encode_text(new)
            for i, prompt in enumerate(new):
                found[prompt] = (z_t[i].clone(), states[i][mask[i]])
                if self._fits(*found[prompt]):
                    self._texts[prompt] = found[prompt]
        rows = [found[prompt] for prompt in prompts]
        lengths = torch.tensor([len(states) for _, states in rows], device=self.device)
        states = pad_sequence([states for _, states in rows], batch_first=True)
        mask = torch.arange(states.shape[1], device=self.device) < lengths[:, None]
        return TextFeatures(torch.stack([z_t for z_t, _ in rows]), states, mask)

    @torch.no_grad()
    def encode_image(self, x: Tensor) -> Tensor:
        """As CLIP's: pictures (b, 3, h, w) in [−1, 1] to z_i (b, d), of unit norm."""
        if self.room == 0:
            return self.clip.encode_image(x)
        pictures = x.detach().float().cpu().contiguous().numpy()
        keys = [hashlib.blake2b(p, digest_size=16).digest() for p in pictures]
        found = {key: self._pictures[key] for key in keys if key in self._pictures}
        new = {key: i for i, key in enumerate(keys) if key not in found}
        if new:
            for key, z_i in zip(new, self.clip.encode_image(x[list(new.values())]), strict=True):
                found[key] = z_i.clone()
                if self._fits(z_i):
                    self._pictures[key] = found[key]
        return torch.stack([found[key] for key in keys])

    def _fits(self, *tensors: Tensor) -> bool:
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        if size > self.room:
            return False
        self.room = max(1, self.room - size)
        return True


def empty_where(dropped: Tensor, captions: Sequence[str]) -> list[str]:
    """Captions, the empty one in the place of those that dropped (b,) bool chooses: for networks without learned nulls,
    to which it stands for none in sampling too."""
    return ["" if gone else caption for gone, caption in zip(dropped.tolist(), captions, strict=True)]


def picture_embeddings(clip: RememberedCLIP, batch: dict[str, Any], x0: Tensor, background: float) -> Tensor:
    """z_i (b, d), float32: as stored with the data where backgrounds are not drawn, else of the pictures x0."""
    if "z_i" in batch and background == 0:
        return batch["z_i"].to(x0.device)
    return clip.encode_image(x0).float()


@torch.no_grad()
def training_embeddings(
    clip: RememberedCLIP, dataset: ShardDataset, count: int, background: float, seed: int
) -> tuple[Tensor, list[str]]:
    """z_i (n, d) of n evenly spaced samples, `count` at most, with the backgrounds of training; and their captions."""
    if count < 1:
        raise ValueError(f"embeddings of {count} pictures are asked for: set statistics, or estimate_variance, higher.")
    count = min(len(dataset), count)
    rows = [i * len(dataset) // count for i in range(count)]
    z_i, captions = [], []
    for first in range(0, count, 128):
        part = rows[first : first + 128]
        batch = collate([dataset[i] for i in part])
        pixels, drawn = draw_pictures_and_captions(batch, Draws(seed, 0, part), background)
        z_i.append(picture_embeddings(clip, batch, pixels.to(clip.device), background))
        captions += drawn
    return torch.cat(z_i), captions
