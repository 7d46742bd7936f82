import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from unclip.core import layers
from unclip.core.layers import Attention, ResBlock, attend, fold, group_norm, unfold, zero_init


@pytest.mark.parametrize("patch_size", [1, 2, 4])
def test_unfold_undoes_fold(patch_size):
    x = torch.randn(2, 3, 8, 16)
    folded = fold(x, patch_size)
    assert folded.shape == (2, 3 * patch_size**2, 8 // patch_size, 16 // patch_size)
    assert torch.equal(unfold(folded, patch_size), x)


def test_unfolding_keeps_prediction_before_variance():
    prediction, variance = torch.randn(1, 3, 8, 8), torch.randn(1, 3, 8, 8)
    assert torch.equal(unfold(fold(torch.cat([prediction, variance], 1), 2), 2)[:, :3], prediction)


@pytest.mark.parametrize("channels", [4, 6, 48, 96, 144, 192, 320, 512, 1280, 2048])
def test_norm_groups_are_at_most_32_and_whole_vectors_where_the_width_allows(channels):
    norm = group_norm(channels)
    assert channels % norm.num_groups == 0 and norm.num_groups <= 32
    if channels % 16 == 0:
        assert channels // norm.num_groups % 16 == 0
    assert group_norm(channels, 32).num_groups == max(n for n in range(1, 33) if channels % n == 0)


def plain_attention(layer: Attention, x, tokens, mask):
    """Attention written out: for each picture and head, softmax over its counted tokens and all its pixels."""
    b, c, h, w = x.shape
    pixels = layer.norm(x).flatten(2).mT  # b hw c
    q, k, v = layer.qkv(pixels).chunk(3, dim=-1)
    context_k, context_v = layer.context_kv(tokens).chunk(2, dim=-1)
    d = c // layer.heads
    out = torch.zeros_like(q)
    for i in range(b):
        keep = mask[i]
        for head in range(layer.heads):
            s = slice(head * d, (head + 1) * d)
            keys = torch.cat([context_k[i, keep, s], k[i, :, s]])
            values = torch.cat([context_v[i, keep, s], v[i, :, s]])
            out[i, :, s] = ((q[i, :, s] @ keys.T) / d**0.5).softmax(-1) @ values
    return x + layer.out(out).mT.reshape(b, c, h, w)


def test_attention_equals_softmax_written_out():
    layer = Attention(16, head_channels=8, context_width=12)
    nn.init.normal_(layer.out.weight)
    x, tokens = torch.randn(2, 16, 4, 6), torch.randn(2, 5, 12)
    mask = torch.tensor([[True, True, False, False, True], [True, True, True, True, True]])
    got = layer(x, layer.project_context(tokens), mask)
    torch.testing.assert_close(got, plain_attention(layer, x, tokens, mask), atol=1e-5, rtol=1e-4)


def test_attend_equals_the_fused_kernel_with_and_without_mask():
    q, k, v = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 7, 8), torch.randn(2, 3, 7, 8)
    mask = torch.rand(2, 7) < 0.6
    mask[:, 0] = True
    torch.testing.assert_close(attend(q, k, v, None), F.scaled_dot_product_attention(q, k, v))
    torch.testing.assert_close(
        attend(q, k, v, mask), F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])
    )


@pytest.mark.parametrize(("queries", "scores"), [(1000, 2**20), (128, 2**20), (128, 12_000), (7, 1)])
def test_attend_in_bf16_by_parts_is_the_whole(monkeypatch: pytest.MonkeyPatch, queries: int, scores: int):
    monkeypatch.setattr(layers, "QUERIES", queries)
    monkeypatch.setattr(layers, "SCORES", scores)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 8, generator=generator).bfloat16().requires_grad_() for n in (300, 40, 40))
    mask = torch.tensor([[True, False, True, True], [False] * 4])  # of the first four keys
    kept = F.pad(mask, (0, 36), value=True)[:, None, None]
    expected = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=kept)
    got = attend(q, k, v, mask)
    torch.testing.assert_close(got.float(), expected, atol=2e-2, rtol=0)
    with torch.no_grad():
        alone = attend(q, k, v, mask)
        torch.testing.assert_close(alone, got)
        assert torch.equal(attend(q, k.masked_fill(~kept.mT, 9.0), v.masked_fill(~kept.mT, 9.0), mask), alone)
    gradients = [torch.autograd.grad(x.float().square().sum(), (q, k, v)) for x in (got, expected)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=0.1, rtol=0.1)


def test_masked_tokens_get_no_gradient():
    layer = Attention(16, head_channels=8, context_width=12)
    nn.init.normal_(layer.out.weight)
    tokens = torch.randn(1, 3, 12, requires_grad=True)
    mask = torch.tensor([[True, False, True]])
    layer(torch.randn(1, 16, 4, 4), layer.project_context(tokens), mask).sum().backward()
    gradient = tokens.grad.abs().sum(-1)[0]
    assert gradient[1] == 0 and (gradient[[0, 2]] > 0).all()


@pytest.mark.parametrize("direction, side", [("down", 4), ("same", 8), ("up", 16)])
@pytest.mark.parametrize("time_conditioning", ["scale_shift", "additive"])
def test_res_block_starts_as_its_skip_and_stays_channels_last(direction, side, time_conditioning):
    block = ResBlock(16, 32, time_conditioning=time_conditioning, direction=direction)
    x = torch.randn(2, 16, 8, 8).contiguous(memory_format=torch.channels_last)
    block.to(memory_format=torch.channels_last)
    time = torch.randn(2, block.time_channels)
    out = block(x, time)
    assert out.shape == (2, 32, side, side) and out.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(out, block.skip(block.resize(x)))
    nn.init.normal_(block.conv2.weight)
    assert not torch.allclose(block(x, time), block(x, time + 1))


def test_scale_shift_is_the_affine_of_the_second_norm():
    block = ResBlock(16, 16)
    nn.init.normal_(block.conv2.weight)
    x, scale, shift = torch.randn(1, 16, 4, 4), torch.randn(1, 16), torch.randn(1, 16)
    h = block.norm2(block.conv1(F.silu(block.norm1(x)))) * (1 + scale[..., None, None]) + shift[..., None, None]
    expected = x + block.conv2(F.silu(h))
    torch.testing.assert_close(block(x, torch.cat([scale, shift], 1)), expected)


def test_refuses_what_cannot_be():
    with pytest.raises(ValueError, match="head_channels"):
        Attention(16, head_channels=5)
    with pytest.raises(ValueError, match="context_width"):
        Attention(16, head_channels=8).project_context(torch.zeros(1, 2, 12))


def test_zero_init_zeroes_and_returns_the_module():
    linear = nn.Linear(3, 3)
    assert zero_init(linear) is linear and not any(p.any() for p in linear.parameters())


@pytest.mark.parametrize("time_conditioning", ["scale_shift", "additive"])
@pytest.mark.parametrize("direction", ["same", "down", "up"])
@pytest.mark.parametrize("out_channels", [16, 24])
def test_overwriting_changes_no_bit_and_no_input(time_conditioning, direction, out_channels):
    block = ResBlock(16, out_channels, time_conditioning=time_conditioning, direction=direction)
    nn.init.normal_(block.conv2.weight)
    x = torch.randn(2, 16, 8, 8).contiguous(memory_format=torch.channels_last)
    time, before = torch.randn(2, block.time_channels), x.clone()
    kept = time.clone()
    expected = block(x, time)
    with torch.no_grad():
        assert torch.equal(block(x, time), expected)
    assert torch.equal(x, before) and torch.equal(time, kept)


def test_attention_overwrites_nothing_it_was_given():
    layer = Attention(32, head_channels=8, context_width=12)
    nn.init.normal_(layer.out.weight)
    x, tokens = torch.randn(2, 32, 32, 32).contiguous(memory_format=torch.channels_last), torch.randn(2, 5, 12)
    mask = torch.tensor([[True] * 5, [True, False, True, False, True]])
    expected, before = layer(x, layer.project_context(tokens), mask), x.clone()
    with torch.no_grad():
        context = layer.project_context(tokens)
        kept = [part.clone() for part in context]
        torch.testing.assert_close(layer(x, context, mask), expected, atol=1e-5, rtol=1e-4)
    assert torch.equal(x, before) and all(map(torch.equal, kept, context))


@pytest.mark.parametrize("grid", [4, 40])
def test_norms_of_small_groups_in_bf16_are_the_norms_in_fp32(grid):
    norm = group_norm(64, 32).requires_grad_(False)
    nn.init.normal_(norm.weight)
    x = (torch.randn(2, 64, grid, grid) * 3 + 1).bfloat16().contiguous(memory_format=torch.channels_last)
    got = copy.deepcopy(norm).bfloat16()(x)
    assert got.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(got.float(), norm(x.float()), atol=2e-2, rtol=2e-2)
