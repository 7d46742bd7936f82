"""The two libraries' products are one product, and where a gradient is wanted, it is torch's own."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from unclip.core import products
from unclip.core.products import Linear, by_onednn, linear

SHAPES = [(1200, 64, 48), (6, 512, 512), (3, 700, 1000), (1, 2048, 1024)]


@pytest.mark.parametrize(("n", "i", "o"), SHAPES)
@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_linear_is_torchs(n: int, i: int, o: int, bias: bool):
    assert n * i * o >= products.WORTH
    x, weight, b = torch.randn(2, n, i), torch.randn(o, i), torch.randn(o) if bias else None
    torch.testing.assert_close(linear(x, weight, b), F.linear(x, weight, b), atol=2e-4, rtol=1e-5)
    strided = torch.randn(2, i, n).mT
    torch.testing.assert_close(linear(strided, weight, b), F.linear(strided, weight, b), atol=2e-4, rtol=1e-5)


class Largest(TorchDispatchMode):
    """The most numbers that any operation gives."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.most = max(self.most, result.untyped_storage().nbytes() // result.element_size())
        return result


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@torch.no_grad()
def test_a_slice_does_not_copy_the_weights_for_every_row(dtype: torch.dtype):
    """torch's own makes a batch of products of it, each with weights of its own, where these want no gradient."""
    layer = Linear(64, 64).to(dtype).requires_grad_(False)
    x = torch.randn(8, 3, 64).to(dtype)
    for rows in (x[:, -1:], x[:, 1:]):
        with Largest() as largest:
            y = layer(rows)
        assert largest.most <= layer.weight.numel()
        torch.testing.assert_close(y, layer(rows.clone()))


def test_with_a_gradient_or_another_type_or_autocast_it_is_torchs_to_the_last_bit():
    layer = Linear(512, 512)
    plain = nn.Linear(512, 512)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(8, 512, requires_grad=True)
    assert not by_onednn(x) and torch.equal(layer(x), plain(x))
    layer(x).square().sum().backward()
    assert layer.weight.grad is not None and layer.weight.grad.any()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16 and torch.equal(layer(x), plain(x))
    with torch.no_grad():
        assert torch.equal(layer.bfloat16()(x.bfloat16()), plain.bfloat16()(x.bfloat16()))
