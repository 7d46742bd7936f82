"""Masks are functions of the draws, of every kind."""

import torch

from unclip.core.data import Draws
from unclip.core.masks import random_masks


def test_a_mask_is_a_function_of_its_row_alone():
    masks = random_masks(Draws(0, 3, range(64)), 12, 20)
    assert masks.shape == (64, 1, 12, 20)
    assert masks.dtype == torch.bool
    for i in (0, 5, 63):
        assert torch.equal(random_masks(Draws(0, 3, [i]), 12, 20)[0], masks[i])
    assert not torch.equal(random_masks(Draws(0, 4, range(64)), 12, 20), masks)


def test_a_quarter_keeps_nothing_and_the_rest_keep_some_and_change_some():
    keep = random_masks(Draws(0, 0, range(2000)), 32, 32).float().mean(dim=(1, 2, 3))
    assert 0.22 < float((keep == 0).float().mean()) < 0.28
    rest = keep[keep > 0]
    assert float((rest < 1).float().mean()) > 0.98
    assert 0.4 < float(rest.mean()) < 0.75
    for low in (0.0, 0.25, 0.5, 0.75):
        assert float(((rest > low) & (rest <= low + 0.25)).float().mean()) > 0.08


def test_a_mask_is_the_same_at_every_size():
    """Told apart by their edges alone: a mask is a shape, not a pattern of pixels."""
    small, large = (random_masks(Draws(0, 1, range(50)), side, side).float() for side in (32, 128))
    pooled = torch.nn.functional.avg_pool2d(large, 4)
    assert float((pooled - small).abs().mean()) < 0.03
