"""Buckets and quantiles: round trips, order, and samples that hardly differ."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from prior.quantiser import Buckets, Quantiles

KINDS = ("normal", "equal", "zero", "some constant", "opposite", "few values")


def samples(kind: str, n: int, k: int, scale: float, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = scale * torch.randn(n, k, generator=generator)
    if kind == "equal":
        x = x[:1].expand(n, k).clone()
    elif kind == "zero":
        x = torch.zeros(n, k)
    elif kind == "some constant":
        x[:, ::2] = x[0, ::2].clone()
    elif kind == "opposite":
        x = torch.cat([x[:1], -x[:1]]).repeat(n, 1)[:n]
    elif kind == "few values":
        x = x.sign() * scale
    return x


tables = st.builds(
    samples,
    st.sampled_from(KINDS),
    st.integers(1, 40),
    st.integers(1, 6),
    st.sampled_from([1e-3, 1.0, 50.0]),
    st.integers(0, 2**31 - 1),
)
many = settings(max_examples=80, deadline=None)


def fitted(x: Tensor, count: int) -> Buckets:
    buckets = Buckets(x.shape[1], count)
    buckets.fit(x)
    return buckets


@many
@given(tables, st.sampled_from([1, 2, 3, 64, 1024]))
def test_a_round_trip_is_off_by_half_a_bucket_at_most(x: Tensor, count: int):
    buckets = fitted(x, count)
    index = buckets.encode(x)
    assert index.dtype == torch.long
    assert 0 <= index.min() <= index.max() < count
    width = (buckets.high - buckets.low) / count
    slack = 4e-7 * x.abs().amax(0)  # digits of float32
    assert bool(((buckets.decode(index) - x).abs() <= width / 2 + slack).all())


@many
@given(tables, st.sampled_from([1, 2, 3, 64, 1024]))
def test_a_bucket_s_middle_is_in_that_bucket(x: Tensor, count: int):
    buckets = fitted(x, count)
    index = torch.arange(count)[:, None].expand(count, x.shape[1])
    resolved = (buckets.high - buckets.low) / count > 1e-5 * x.abs().amax(0)
    again = buckets.encode(buckets.decode(index))
    assert torch.equal(again[:, resolved], index[:, resolved])


@many
@given(tables)
def test_more_is_never_a_lower_bucket_and_outliers_are_in_the_outer_ones(x: Tensor):
    buckets = fitted(x, 16)
    assert bool((buckets.encode(x.sort(0).values).diff(dim=0) >= 0).all())
    varies = buckets.high > buckets.low
    assert bool((buckets.encode(x - 1e3)[:, varies] == 0).all())
    assert bool((buckets.encode(x + 1e3)[:, varies] == 15).all())


def test_a_constant_coordinate_comes_back_and_is_one_token():
    buckets = fitted(torch.full((5, 2), 0.7), 8)
    assert torch.equal(buckets.encode(torch.tensor([[0.7, 0.9]])), torch.zeros(1, 2, dtype=torch.long))
    assert torch.allclose(buckets.decode(torch.tensor([[0, 7]])), torch.tensor([[0.7, 0.7]]))


def test_the_first_coordinates_alone_are_decoded_as_among_all():
    x = torch.randn(20, 5)
    buckets = fitted(x, 32)
    assert torch.equal(buckets.decode(buckets.encode(x)[:, :2]), buckets.decode(buckets.encode(x))[:, :2])


@many
@given(tables, st.integers(1, 30))
def test_a_quantile_lies_in_its_bucket(table: Tensor, count: int):
    x = table[:, 0]
    quantiles = Quantiles(count)
    quantiles.fit(x)
    edges = quantiles.edges
    assert edges[0] == x.min()
    assert edges[-1] == x.max()
    assert bool((edges.diff() >= 0).all())
    middles = quantiles.quantile((torch.arange(count) + 0.5) / count)
    index = quantiles.encode(middles)
    clear = edges.diff() > 1e-5 * x.abs().max()
    assert torch.equal(index[clear], torch.arange(count)[clear])
    again = quantiles.quantile((index + 0.5) / count)
    assert torch.equal(quantiles.encode(again), index)  # where edges fall together too


@many
@given(tables, st.floats(0, 1))
def test_a_number_drawn_from_the_top_half_has_a_token_that_training_saw(table: Tensor, u: float):
    """Also where all products are equal, so that most buckets are empty."""
    x = table[:, 0]
    x = x[:1].expand(len(x)) if len(x.unique()) < 3 else x
    quantiles = Quantiles(10)
    quantiles.fit(x)
    drawn = quantiles.quantile(torch.tensor([0.5 + u / 2]))
    assert drawn >= x.double().quantile(0.5).float() - 1e-6 * x.abs().max()
    if len(x.unique()) == 1:
        assert int(quantiles.encode(drawn)) in quantiles.encode(x).tolist()


def test_buckets_of_the_product_hold_equally_many():
    torch.manual_seed(0)
    x = torch.randn(1000).exp()
    quantiles = Quantiles(20)
    quantiles.fit(x)
    counts = quantiles.encode(x).bincount(minlength=20)
    assert 45 <= counts.min() <= counts.max() <= 55


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match="give at least 1"):
        Buckets(0)
    with pytest.raises(ValueError, match=r"expected finite numbers \(n, 2\)"):
        Buckets(2).fit(torch.tensor([[0.0, torch.inf]]))
    with pytest.raises(ValueError, match=r"finite numbers \(n,\)"):
        Quantiles(3).fit(torch.zeros(0))
