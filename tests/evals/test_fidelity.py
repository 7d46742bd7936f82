"""Distances between sets of features: on sets whose distance is known."""

import pytest
import torch

from unclip.evals.fidelity import fidelity, kernel_distance, precision_recall


def normal(n: int, d: int = 4, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def test_a_set_is_within_itself_and_not_within_another() -> None:
    x = normal(40)
    assert precision_recall(x, x) == (1, 1)
    assert precision_recall(x, x + 100) == (0, 0)


def test_a_part_is_precise_and_does_not_recall_the_rest() -> None:
    """Two clusters, of which one is generated: all of it is real, half of what is real is in it."""
    near, far = normal(40), normal(40, seed=1) + 100
    assert precision_recall(near, torch.cat([near, far])) == (1, 0.5)
    assert precision_recall(torch.cat([near, far]), near) == (0.5, 1)


def test_within_is_what_the_paper_says() -> None:
    """By loops: a point is within where a real one's third neighbour is farther than the point."""
    x, y = normal(15), normal(20, seed=1) + 0.5
    expected = 0
    for point in x:
        hit = False
        for i, real in enumerate(y):
            others = sorted(float((real - other).norm()) for j, other in enumerate(y) if j != i)
            hit |= float((point - real).norm()) <= others[2]
        expected += hit
    assert 0 < expected < 15
    assert precision_recall(x, y)[0] == pytest.approx(expected / 15)


def test_kernel_distance_is_unbiased_and_grows_with_the_shift() -> None:
    same = [kernel_distance(normal(30, seed=2 * i), normal(30, seed=2 * i + 1)) for i in range(60)]
    assert min(same) < 0 < max(same)
    assert abs(sum(same) / 60) < 2.0
    x, y = normal(60), normal(60, seed=1)
    shifted = [kernel_distance(x + shift, y) for shift in (0.5, 1.0, 2.0)]
    assert max(same) < shifted[0] < shifted[1] < shifted[2]


def test_kernel_distance_ignores_scale_and_sees_spread() -> None:
    x, y = normal(60), normal(60, seed=1)
    assert kernel_distance(4 * x, 4 * y) == pytest.approx(kernel_distance(x, y), rel=1e-9)
    assert kernel_distance(0.2 * x, y) > 50  # the same mean: a distance of means alone would see nothing


def test_the_figures_of_a_copy_and_of_another_set() -> None:
    x, far = normal(50, 8), normal(50, 8, seed=1) + 3
    copy, other = fidelity((x, x), (x, x)), fidelity((far, x), (far, x))
    assert (copy["frechet"], copy["precision"], copy["recall"]) == (0, 1, 1)
    assert copy["kernel"] < 0 < other["kernel"]
    assert other["frechet"] == pytest.approx(8 * 9, rel=0.2)
    with pytest.raises(ValueError, match="4 generated and 50 real"):
        fidelity((x[:4], x), (x, x))
