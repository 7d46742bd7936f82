"""The figures of inpainting: on pictures whose seam is known, and on a tiny model."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from decoder.decoder import Decoder
from unclip.core.data import pil_from_pixels
from unclip.evals.concepts import Gallery
from unclip.evals.inpainting import choose_mask, measure, seam
from unclip.pipeline import UnCLIP


def test_a_seam_is_the_step_across_it() -> None:
    keep = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    keep[..., :4] = True
    x = torch.rand(1, 3, 8, 1, generator=torch.Generator().manual_seed(0)).expand(-1, -1, -1, 8)
    assert seam(x, keep) == 0
    assert seam(torch.where(keep, x, x + 0.5), keep) == pytest.approx(0.5)
    assert seam((x * keep).transpose(2, 3), keep.transpose(2, 3)) == pytest.approx(float(x[..., 3].mean()))


def test_masks_keep_enough_and_leave_enough() -> None:
    masks = [choose_mask(row) for row in range(30)]
    assert all(0.25 <= float(mask.float().mean()) <= 0.75 for mask in masks)
    assert torch.equal(masks[3], choose_mask(3))
    assert not torch.equal(masks[3], choose_mask(3, seed=1))


def mean_colour(pictures: Tensor) -> Tensor:
    """A judge that sees the mean colour alone; uint8 (n, 3, h, w) → (n, 3)."""
    return pictures.float().mean(dim=(2, 3)) / 255


def test_the_measure_runs_on_a_model(tiny_model: Path) -> None:
    pipe = UnCLIP.from_pretrained(tiny_model)
    generator = torch.Generator().manual_seed(0)
    pictures = pil_from_pixels(torch.rand(3, 3, 64, 64, generator=generator) * 2 - 1)
    gallery = Gallery(torch.rand(6, 3, generator=generator), ["a", "a", "b", "b", "c", "c"])
    captions = ["a red apple", "two yellow stars", "a blue fish, glossy 3D"]
    found = measure(pipe, pictures, captions, [0, 2, 4], gallery, mean_colour)
    ways = ("pasted", "one walk", "4 walks")
    assert list(found) == ["count", "size", "drawings", *ways]  # of a model without tuned networks
    assert [found[way]["known"] for way in ways] == [1.0, 1.0, 1.0]
    assert all(found[way]["seam"] > 0 for way in ways)
    assert measure(pipe, pictures, captions, [0, 2, 4], gallery, mean_colour) == found

    pipe.register_modules(decoder=Decoder(**{**pipe.decoder.config, "inpaint": True}).eval())
    found = measure(pipe, pictures[:1], captions[:1], [0], gallery, mean_colour)
    assert list(found) == ["count", "size", "drawings", *ways, "tuned"]
    assert found["tuned"]["known"] == 1.0
