"""Masks are functions of the draws, of every kind; what a network is shown by them."""

import pytest
import torch

from unclip.core.data import Draws
from unclip.core.layers import fold
from unclip.core.masks import KNOWN_CHANNELS, join_known, known_channels, random_masks


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


def test_a_network_sees_known_pixels_and_the_mask_and_nothing_else():
    x0, keep = torch.randn(40, 3, 12, 20), random_masks(Draws(0, 0, range(40)), 12, 20)
    known = known_channels(x0, keep)
    assert known.shape == (40, KNOWN_CHANNELS, 12, 20)
    assert torch.equal(known[:, :3], x0 * keep)
    assert torch.equal(known[:, 3:].bool(), keep)
    hidden = torch.where(keep, x0, torch.full_like(x0, torch.nan))  # not even that there was something
    assert torch.equal(known_channels(hidden, keep), known)
    assert not known_channels(x0, torch.zeros_like(keep)).any()


@pytest.mark.parametrize("patch_size", [1, 2, 4])
def test_known_channels_come_last_also_when_folded(patch_size: int):
    x, known = torch.randn(2, 6, 8, 8), torch.randn(2, KNOWN_CHANNELS, 8, 8)
    folded = fold(join_known(x, known), patch_size)
    count = 6 * patch_size**2
    assert torch.equal(folded[:, :count], fold(x, patch_size))
    assert torch.equal(folded[:, count:], fold(known, patch_size))
    assert torch.equal(join_known(x, None), join_known(x, torch.zeros_like(known)))


def test_known_channels_of_another_shape_are_one_sentence():
    x = torch.randn(2, 3, 8, 8)
    for wrong in (torch.zeros(1, 4, 8, 8), torch.zeros(2, 3, 8, 8), torch.zeros(2, 4, 8, 4)):
        with pytest.raises(ValueError, match=r"known has shape .*; expected \(2, 4, 8, 8\)"):
            join_known(x, wrong)
