"""Guidance, and the contexts that it joins."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from unclip.core.diffusion import PREDICTION_TYPES, Diffusion, make_scheduler
from unclip.core.sampling import cat_contexts, guided, map_context, repeat_context


class Kv(NamedTuple):
    key: Tensor
    layers: tuple[Tensor, Tensor]
    mask: Tensor | None


class Net:
    """Affine in its context, with variance channels that tell which half they came from."""

    dtype = torch.float32

    def __init__(self):
        self.sizes = []

    def __call__(self, x_t, t, context):
        self.sizes.append(len(x_t))
        assert len(t) == len(x_t) == len(context.key)
        return torch.cat([x_t * context.key + t.view(-1, 1), context.layers[0].expand_as(x_t)], 1)


def contexts(b=2):
    return [Kv(torch.full((b, 1), s), (torch.full((b, 1), s), torch.zeros(b, 2, 3)), None) for s in (1.0, 3.0)]


@pytest.mark.parametrize(
    ("scale", "null", "interval", "size"),
    [(2.0, True, None, 4), (1.0, True, None, 2), (0.0, True, None, 2), (2.0, False, None, 2), (2.0, True, (0, 4), 2)],
)
def test_number_and_size_of_calls(scale, null, interval, size):
    net, (null_context, context) = Net(), contexts()
    denoise = guided(net, context, null_context if null else None, scale, interval)
    denoise(torch.ones(2, 3), torch.tensor([5, 5]))
    assert net.sizes == [size]


def test_guidance_is_the_formula_and_its_ends():
    null_context, context = contexts()
    x_t, t = torch.randn(2, 3), torch.tensor([5, 7])
    net = Net()
    null, conditional = net(x_t, t, null_context), net(x_t, t, context)
    torch.testing.assert_close(guided(net, context, null_context, 1.0)(x_t, t), conditional)
    torch.testing.assert_close(guided(net, context, null_context, 0.0)(x_t, t), null)
    torch.testing.assert_close(guided(net, context, None, 4.0)(x_t, t), conditional)
    for scale in (0.5, 2.0, 7.5):
        output = guided(net, context, null_context, scale)(x_t, t)
        torch.testing.assert_close(output[:, :3], null[:, :3] + scale * (conditional - null)[:, :3])
        torch.testing.assert_close(output[:, 3:], conditional[:, 3:])
    inside = guided(net, context, null_context, 2.0, (5, 5))
    torch.testing.assert_close(inside(x_t, t * 0 + 5)[:, :3], (x_t * 5 + 5))
    torch.testing.assert_close(inside(x_t, t * 0 + 6)[:, :3], (x_t * 3 + 6))


@pytest.mark.parametrize("prediction", PREDICTION_TYPES)
def test_guiding_any_parametrisation_is_guiding_eps(prediction):
    diffusion = Diffusion.from_scheduler(make_scheduler("cosine", prediction))
    t, s = torch.tensor([100, 800]), 3.0
    x_t, a, b = torch.randn(3, 2, 3, 4, 4)
    guided_output = a + s * (b - a)
    expected = diffusion.to_eps(x_t, a, t) + s * (diffusion.to_eps(x_t, b, t) - diffusion.to_eps(x_t, a, t))
    torch.testing.assert_close(diffusion.to_eps(x_t, guided_output, t), expected, rtol=1e-4, atol=1e-4)


def test_net_gets_its_own_dtype():
    class Half(Net):
        dtype = torch.bfloat16

        def __call__(self, x_t, t, context):
            assert x_t.dtype == torch.bfloat16
            return super().__call__(x_t, t, context)

    assert guided(Half(), contexts()[1])(torch.ones(2, 3), torch.tensor([1, 1])).dtype == torch.float32


def test_contexts_keep_their_structure():
    a, b = contexts(2)
    both = cat_contexts(a, b)
    assert isinstance(both, Kv) and both.mask is None and both.layers[1].shape == (4, 2, 3)
    assert both.key.flatten().tolist() == [1, 1, 3, 3]
    halves = map_context(lambda x: x[:2], both)
    assert torch.equal(halves.key, a.key) and torch.equal(halves.layers[0], a.layers[0])
    assert repeat_context(
        cat_contexts(map_context(lambda x: x[:1], a), map_context(lambda x: x[:1], b)), 2
    ).key.flatten().tolist() == [1, 1, 3, 3]


def test_bad_input_gets_one_sentence():
    with pytest.raises(ValueError, match="interval"):
        guided(Net(), contexts()[0], interval=(5, 1))
    with pytest.raises(ValueError, match="do not join"):
        cat_contexts(torch.ones(1, 2), torch.ones(1, 3))
    with pytest.raises(ValueError, match="differ"):
        cat_contexts((torch.ones(1, 2),), (None,))
