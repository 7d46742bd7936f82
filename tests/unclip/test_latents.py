"""Great circles, text differences and weighted means, over vectors of every kind."""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from unclip.latents import slerp, text_difference, weighted_mean

quick = settings(deadline=None, max_examples=60)

DIMENSIONS = st.integers(2, 24)
FRACTIONS = st.floats(0, 1)


@st.composite
def vectors(draw: st.DrawFn, count: int) -> tuple[Tensor, ...]:
    """`count` rows (1, d) of one width: normal, along an axis, zeros, equal to the one before or its opposite."""
    d, seed = draw(DIMENSIONS), draw(st.integers(0, 2**32 - 1))
    generator = torch.Generator().manual_seed(seed)
    rows: list[Tensor] = []
    for _ in range(count):
        kind = draw(st.sampled_from(["normal", "axis", "zeros", "equal", "opposite", "nearly opposite"]))
        row = torch.randn(1, d, generator=generator, dtype=torch.float64) * draw(st.sampled_from([1e-3, 1.0, 100.0]))
        if kind == "axis":
            row = torch.eye(d, dtype=torch.float64)[:1]
        elif kind == "zeros":
            row = torch.zeros_like(row)
        elif rows and kind != "normal":
            row = rows[-1] * (1 if kind == "equal" else -1) + (1e-7 * row if kind == "nearly opposite" else 0)
        rows.append(row)
    return tuple(rows)


@quick
@given(vectors(2), FRACTIONS)
def test_slerp_starts_and_ends_where_it_is_told_and_its_norm_runs_linearly(pair, t: float) -> None:
    a, b = pair
    assert torch.equal(slerp(a, b, 0), a)
    assert torch.equal(slerp(a, b, 1), b)
    between = slerp(a, b, t)
    expected = (1 - t) * float(a.norm()) + t * float(b.norm())
    assert between.isfinite().all()
    assert float(between.norm()) == pytest.approx(expected, rel=1e-6, abs=1e-9)


@quick
@given(vectors(2), FRACTIONS)
def test_slerp_goes_a_part_of_the_angle(pair, t: float) -> None:
    """Also between opposite vectors, through which there are many great circles, and no least angle is lost."""
    a, b = pair
    assume(float(a.norm()) > 0 and float(b.norm()) > 0)
    assert angle(a, slerp(a, b, t)) == pytest.approx(t * angle(a, b), abs=1e-6)
    assert angle(slerp(a, b, t), b) == pytest.approx((1 - t) * angle(a, b), abs=1e-6)


@quick
@given(vectors(2), FRACTIONS)
def test_slerp_is_the_same_from_either_end(pair, t: float) -> None:
    a, b = pair
    assume(float(a.norm()) > 0 and float(b.norm()) > 0 and angle(a, b) < math.pi - 1e-3)
    scale = float(a.norm() + b.norm())
    assert torch.allclose(slerp(a, b, t), slerp(b, a, 1 - t), atol=1e-6 * scale)


@quick
@given(vectors(1), FRACTIONS)
def test_slerp_from_or_to_nothing_is_a_straight_line(one, t: float) -> None:
    a, nothing = one[0], torch.zeros_like(one[0])
    assert torch.allclose(slerp(nothing, a, t), t * a)
    assert torch.allclose(slerp(a, nothing, t), (1 - t) * a)


def test_slerp_is_shoemakes_formula_where_that_has_digits() -> None:
    a, b = torch.nn.functional.normalize(normal(2, 5, 16).double(), dim=-1)
    theta = torch.acos((a * b).sum(-1, keepdim=True))
    t = torch.linspace(-0.5, 1.5, 5, dtype=torch.float64)
    expected = (torch.sin((1 - t[:, None]) * theta) * a + torch.sin(t[:, None] * theta) * b) / torch.sin(theta)
    assert torch.allclose(slerp(a, b, t), expected)


def test_slerp_takes_pictures_of_noise_and_keeps_their_dtype() -> None:
    a, b = normal(2, 3, 3, 8, 8)
    between = slerp(a, b, torch.tensor([0.0, 0.5, 1.0]))
    assert between.dtype == torch.float32
    assert torch.equal(between[0], a[0])
    assert torch.equal(between[2], b[2])
    assert float(between[1].std()) == pytest.approx(1, abs=0.15)  # the mean of two normals has 0.71
    with pytest.raises(ValueError, match=r"\(3, 3, 8, 8\) and \(2, 3, 8, 8\)"):
        slerp(a, b[:2], 0.5)


@quick
@given(vectors(2))
def test_a_text_difference_is_a_direction_and_turns_round(pair) -> None:
    a, b = pair
    if float((a - b).norm()) < 1e-6:
        with pytest.raises(ValueError, match="the same embedding"):
            text_difference(a, b)
        return
    forth = text_difference(a, b)
    assert float(forth.norm()) == pytest.approx(1)
    assert torch.equal(forth, -text_difference(b, a))
    assert torch.allclose(forth * (a - b).norm() + b, a, atol=1e-6 * float(a.norm() + b.norm()))


@quick
@given(vectors(2), FRACTIONS)
def test_the_mean_of_two_is_slerp(pair, t: float) -> None:
    a, b = pair
    assume(float(a.norm()) > 0 and float(b.norm()) > 0)
    scale = float(a.norm() + b.norm())
    mean = weighted_mean(torch.stack(pair), [2 * (1 - t), 2 * t])
    assert torch.allclose(mean, slerp(a, b, t), atol=1e-6 * scale)


@quick
@given(vectors(4), st.lists(st.floats(0.1, 3), min_size=4, max_size=4), st.permutations(range(4)))
def test_the_mean_of_many_knows_no_order_and_no_scale_of_weights(rows, weights, order) -> None:
    spread = torch.nn.functional.normalize(torch.cat(rows), dim=-1)
    middle = torch.nn.functional.normalize(torch.ones_like(spread[:1]), dim=-1)
    z = (middle + 0.5 * spread)[:, None]  # within half a right angle of each other, where the mean is one point
    mean = weighted_mean(z, weights)
    norms = z.norm(dim=-1).flatten().tolist()
    norm = sum(w * n for w, n in zip(weights, norms, strict=True)) / sum(weights)
    assert float(mean.norm()) == pytest.approx(norm)
    assert torch.allclose(mean, weighted_mean(z[list(order)], [7 * weights[i] for i in order]), atol=1e-6)
    assert torch.allclose(mean, weighted_mean(torch.cat([z, -z[:1]]), [*weights, 0.0]), atol=1e-6)


@quick
@given(vectors(5), st.lists(st.floats(0.1, 3), min_size=5, max_size=5))
def test_the_mean_of_anything_but_zeros_has_a_direction(rows, weights) -> None:
    z = torch.stack(rows)
    if bool((z.norm(dim=-1) == 0).any()):
        with pytest.raises(ValueError, match="all zeros"):
            weighted_mean(z, weights)
    else:
        assert float(weighted_mean(z, weights).norm()) >= 0.999 * float(z.norm(dim=-1).min())


def test_one_embedding_is_its_own_mean_to_the_last_bit() -> None:
    z = torch.nn.functional.normalize(normal(3, 2, 8), dim=-1)
    assert torch.equal(weighted_mean(z[:1], [1.5]), z[0])
    assert torch.equal(weighted_mean(z, [0, 2, 0]), z[1])


@pytest.mark.parametrize("weights", [[1.0, -1.0], [0.0, 0.0], [1.0], [math.nan, 1.0], [math.inf, 1.0]])
def test_weights_out_of_range(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="weights"):
        weighted_mean(torch.ones(2, 1, 4), weights)


def angle(a: Tensor, b: Tensor) -> float:
    u, v = a / a.norm(), b / b.norm()
    return 2 * math.atan2(float((u - v).norm()), float((u + v).norm()))


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))
