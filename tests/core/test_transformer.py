"""Transformer blocks: a prefix changes nothing but the amount of work, and masks mean what they say."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from unclip.core.transformer import Attention, Block, causal_mask

B, M, N, W = 2, 5, 3, 16


@pytest.fixture
def block() -> Block:
    torch.manual_seed(0)
    return Block(W, heads=4)


@pytest.fixture
def h():
    return torch.randn(B, M + N, W, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def mask():
    return torch.tensor([[1, 1, 1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 1, 1, 1, 1]], dtype=torch.bool)


def test_prefix_and_rest_are_the_whole(block, h, mask):
    whole = block(h, mask=causal_mask(mask))
    head, kv = block.prefix(h[:, :M], causal_mask(mask[:, :M]))
    rest = causal_mask(mask[:, M:], mask[:, :M])
    assert torch.allclose(head, whole[:, :M], atol=1e-6)
    assert torch.allclose(block(h[:, M:], kv, rest), whole[:, M:], atol=1e-6)
    assert torch.allclose(block(h[:, M:], kv, rest, rows=1), whole[:, -1:], atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(block.keys_values(h[:, :M]), kv, strict=True))


def test_attention_is_torchs_own(h):
    torch.manual_seed(2)
    ours, reference = Attention(W, heads=4), nn.MultiheadAttention(W, 4, batch_first=True)
    with torch.no_grad():
        reference.in_proj_weight.copy_(torch.cat([ours.to_q.weight, ours.to_k.weight, ours.to_v.weight]))
        reference.in_proj_bias.copy_(torch.cat([ours.to_q.bias, ours.to_k.bias, ours.to_v.bias]))
        reference.out_proj.load_state_dict(ours.to_out.state_dict())
    allowed = torch.ones(M + N, M + N).tril().bool()
    expected, _ = reference(h, h, h, attn_mask=~allowed)
    assert torch.allclose(ours(h, ours.keys_values(h), allowed), expected, atol=1e-6)


def test_a_block_is_causal_by_gradient(block, h, mask):
    h.requires_grad_()
    out = block(h, mask=causal_mask(torch.ones_like(mask)))
    for i in range(M + N):
        gradient = torch.autograd.grad(out[:, i].sum(), h, retain_graph=True)[0]
        assert gradient[:, i + 1 :].abs().sum() == 0
        assert (gradient[:, : i + 1].abs().sum(-1) > 0).all()


def test_nobody_attends_to_a_masked_token(block, h, mask):
    h.requires_grad_()
    out = block(h, mask=causal_mask(mask))
    gradient = torch.autograd.grad(out[1, 4:].square().sum(), h)[0]
    assert gradient[1, 2:4].abs().sum() == 0
    assert (gradient[1, :2].abs().sum(-1) > 0).all()


def test_dropout_is_training_alone(h):
    torch.manual_seed(0)
    block = Block(W, 4, dropout=0.5)
    assert not torch.equal(block(h), block(h))
    block.eval()
    assert torch.equal(block(h), block(h))


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="does not divide"):
        Attention(10, 4)


def test_mlp_is_four_times_as_wide(block, h):
    wide = block.mlp[0](h)
    assert wide.shape[-1] == 4 * W
    assert torch.allclose(block.mlp(h), block.mlp[2](F.gelu(wide)))
