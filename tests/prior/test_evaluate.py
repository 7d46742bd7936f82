"""Figures of drawn embeddings, where they are known."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from prior.evaluate import compare, frechet_distance


@pytest.fixture
def z_i() -> Tensor:
    return F.normalize(torch.randn(60, 6, generator=torch.Generator().manual_seed(0)) + 1, dim=-1)


def test_drawing_the_truth_has_the_best_of_every_figure(z_i):
    names = [str(i) for i in range(60)]
    figures = compare(z_i, z_i, z_i.flip(0), names)
    assert figures["cosine"] == pytest.approx(1)
    assert (figures["top1"], figures["top5"], figures["count"]) == (1, 1, 60)
    assert figures["spread"] == pytest.approx(1)
    assert figures["frechet"] == pytest.approx(0, abs=1e-6)
    assert figures["cosine_shuffled"] == pytest.approx(figures["cosine_between"])
    assert figures["cosine_text"] < 1


def test_drawing_the_mean_and_another_pictures_are_told_apart(z_i):
    names = [str(i) for i in range(60)]
    mean = compare(z_i.mean(0).expand_as(z_i), z_i, z_i, names)
    assert mean["spread"] == pytest.approx(0, abs=1e-6)
    assert mean["frechet"] == pytest.approx(1, rel=1e-4)
    shuffled = compare(z_i.roll(1, 0), z_i, z_i, names)
    assert (shuffled["top1"], shuffled["frechet"]) == (0, pytest.approx(0, abs=1e-6))
    others = [F.cosine_similarity(z_i[[i]], z_i[[j]]) for i in range(60) for j in range(60) if i != j]
    assert compare(z_i, z_i, z_i, names)["cosine_shuffled"] == pytest.approx(float(torch.cat(others).mean()), rel=1e-4)


def test_another_picture_of_the_concept_is_a_hit(z_i):
    pairs = z_i.view(30, 2, 6).flip(1).reshape(60, 6)
    assert compare(pairs, z_i, z_i, [str(i // 2) for i in range(60)])["top1"] == 1


def test_frechet_distance_is_that_of_normals():
    """|μ|² + Σ (σ_a − σ_b)² of covariances that share their axes, whatever the axes; fewer samples than dimensions."""
    white = torch.randn(500, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    white = torch.linalg.qr(white - white.mean(0)).Q * 500**0.5  # mean 0, covariance 1, exactly
    white = white - white.mean(0)
    a, b = torch.tensor([1.0, 2.0, 0.5, 0.0]).double(), torch.tensor([1.5, 0.1, 0.5, 3.0]).double()
    shift = torch.tensor([1.0, 0.0, 2.0, 0.0]).double()
    expected = (shift.square().sum() + (a - b).square().sum()).item()
    turn = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))).Q
    for axes in (torch.eye(4).double(), turn):
        assert frechet_distance(white * a @ axes, (white * b + shift) @ axes) == pytest.approx(expected, rel=1e-3)
    few = torch.randn(3, 8, generator=torch.Generator().manual_seed(2))
    assert frechet_distance(few, few) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(few, few + 2) == pytest.approx(32, rel=1e-5)
