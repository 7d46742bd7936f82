"""The basis: round trips, order, counts, and inputs that have little or nothing to decompose."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from prior.pca import PCA

KINDS = ("normal", "equal", "zero", "one direction", "opposite")


def embeddings(kind: str, n: int, d: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(n, d, generator=generator)
    if kind == "equal":
        z = z[:1].expand(n, d)
    elif kind == "zero":
        z = torch.zeros(n, d)
    elif kind == "one direction":
        z = z[:1] * torch.randn(n, 1, generator=generator)
    elif kind == "opposite":
        z = torch.cat([z[:1], -z[:1]]).repeat(n, 1)[:n]
    return z


samples = st.builds(
    embeddings, st.sampled_from(KINDS), st.integers(1, 12), st.integers(1, 8), st.integers(0, 2**31 - 1)
)


@settings(max_examples=60, deadline=None)
@given(samples)
def test_all_components_give_every_embedding_back(z: Tensor):
    basis = PCA.fit(z)
    assert torch.allclose(basis.components @ basis.components.mT, torch.eye(z.shape[1]), atol=1e-5)
    assert torch.allclose(basis.decode(basis.encode(z)), z, atol=1e-5)
    elsewhere = torch.randn(3, z.shape[1])
    assert torch.allclose(basis.decode(basis.encode(elsewhere)), elsewhere, atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(samples, st.integers(0, 8))
def test_the_error_of_k_components_is_the_variance_of_the_others(z: Tensor, k: int):
    basis = PCA.fit(z)
    k = min(k, z.shape[1])
    error = (basis.project(z, k) - z).square().sum(-1).mean()
    assert torch.allclose(error, basis.eigenvalues[k:].sum(), atol=1e-4)
    assert bool((basis.eigenvalues.diff() <= 0).all())
    assert bool((basis.eigenvalues >= 0).all())


@settings(max_examples=60, deadline=None)
@given(samples, st.integers(1, 8))
def test_projecting_twice_is_projecting_once(z: Tensor, k: int):
    basis = PCA.fit(z)
    k = min(k, z.shape[1])
    once = basis.project(z, k)
    assert torch.allclose(basis.project(once, k), once, atol=1e-5)
    assert torch.allclose(basis.kept(k).project(z, k), once, atol=1e-5)
    assert torch.allclose(basis.kept(k).encode(z), basis.encode(z)[:, :k], atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(samples, st.floats(0, 0.99))
def test_as_many_components_as_the_error_needs_and_no_more(z: Tensor, error: float):
    basis = PCA.fit(z)
    k = basis.components_for(error)
    total = basis.eigenvalues.double().sum()
    assert basis.eigenvalues.double()[k:].sum() <= error * total + 1e-12
    assert k == 1 or basis.eigenvalues.double()[k - 1 :].sum() > error * total


def test_no_component_is_the_mean_and_equal_vectors_need_one():
    z = torch.randn(5, 4)
    assert torch.allclose(PCA.fit(z).project(z, 0), z.mean(0).expand(5, 4), atol=1e-6)
    assert PCA.fit(z[:1].expand(5, 4)).components_for() == 1


def test_directions_of_known_variance_come_in_their_order():
    torch.manual_seed(0)
    axes = torch.linalg.qr(torch.randn(6, 6)).Q
    deviations = torch.tensor([0.1, 3.0, 1.0, 0.3, 2.0, 0.01])
    z = torch.randn(20000, 6) * deviations @ axes.mT + 5
    basis = PCA.fit(z)
    order = deviations.argsort(descending=True)
    assert torch.allclose(basis.eigenvalues.sqrt(), deviations[order], rtol=0.05)
    assert bool(((basis.components * axes.mT[order]).sum(-1).abs() > 0.99).all())
    assert basis.components_for(0.01) == 3  # 9, 4 and 1 of 14.1001
    assert basis.components_for(0.1) == 2


def test_the_same_data_give_the_same_signs():
    z = torch.randn(30, 6)
    assert torch.allclose(PCA.fit(z).components, PCA.fit(z.flip(0)).components, atol=1e-4)


def test_it_is_a_folder_and_stays_in_float32(tmp_path: Path):
    basis = PCA.fit(torch.randn(30, 6)).kept(4)
    basis.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "diffusion_pytorch_model.safetensors"}
    loaded = PCA.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    for name in ("mean", "components", "eigenvalues"):
        assert torch.equal(getattr(loaded, name), getattr(basis, name))


@pytest.mark.parametrize("wrong", [torch.zeros(0, 3), torch.zeros(3), torch.tensor([[1.0, torch.nan]])])
def test_what_has_no_components_is_refused(wrong: Tensor):
    with pytest.raises(ValueError, match="expected finite embeddings"):
        PCA.fit(wrong)


def test_counts_and_widths_that_do_not_fit_are_named():
    basis = PCA.fit(torch.randn(9, 4))
    with pytest.raises(ValueError, match=r"5 components .* this basis has 4"):
        basis.project(torch.zeros(1, 4), 5)
    with pytest.raises(ValueError, match="give 1 to that"):
        basis.kept(0)
    with pytest.raises(ValueError, match=r"expected \(…, 4\)"):
        basis.encode(torch.zeros(1, 3))
    with pytest.raises(ValueError, match="keep 1 to 4"):
        PCA(4, 5)
    with pytest.raises(ValueError, match="no part of the variance"):
        basis.components_for(1.5)
