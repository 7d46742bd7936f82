"""The prior's two halves, its causality, masks and null condition."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor

from prior.diffusion_prior import DiffusionPrior, best_of
from unclip.core.transformer import causal_mask

B, N, D, W = 3, 6, 8, 10


def make(**arguments) -> DiffusionPrior:
    torch.manual_seed(0)
    sizes = {"embedding_dim": D, "text_width": W, "context_length": 9, "width": 32, "depth": 3, "heads": 4}
    prior = DiffusionPrior(**{**sizes, **arguments})
    with torch.no_grad():  # a fresh network hardly attends to anything
        for parameter in prior.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return prior


@pytest.fixture
def prior() -> DiffusionPrior:
    return make()


@pytest.fixture
def conditions() -> dict[str, Tensor]:
    torch.manual_seed(1)
    mask = torch.arange(N)[None] < torch.tensor([6, 2, 4])[:, None]
    return {"z_t": torch.randn(B, D), "text": torch.randn(B, N, W), "text_mask": mask}


@pytest.fixture
def x() -> Tensor:
    return torch.randn(B, D, generator=torch.Generator().manual_seed(2))


T = torch.tensor([0, 500, 999])


def full_sequence(prior: DiffusionPrior, x: Tensor, t: Tensor, z_t: Tensor, text: Tensor, text_mask: Tensor) -> Tensor:
    """All n + 4 tokens through every block at once, attention written out."""
    n = text.shape[1]
    time = prior.embed_time(prior.sinusoid(t))
    tokens = [prior.embed_z_t(z_t), time, prior.embed_x(x), prior.query.expand(len(x), -1)]
    h = torch.cat([prior.embed_text(text), torch.stack(tokens, 1)], 1)
    h = h + torch.cat([prior.positions[:n], prior.positions[-4:]])
    keep = torch.cat([text_mask, torch.ones(len(x), 4, dtype=torch.bool)], 1)
    allowed = torch.ones(n + 4, n + 4).tril().bool() & keep[:, None]
    allowed = allowed | torch.eye(n + 4).bool()
    for block in prior.blocks:
        normed = block.norm1(h)
        q, k, v = (
            layer(normed).unflatten(-1, (block.attention.heads, -1)).transpose(1, 2)
            for layer in (block.attention.to_q, block.attention.to_k, block.attention.to_v)
        )
        weights = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~allowed[:, None], -torch.inf).softmax(-1)
        h = h + block.attention.to_out((weights @ v).transpose(1, 2).flatten(2))
        h = h + block.mlp(block.norm2(h))
    return prior.head(prior.norm_out(h[:, -1]))


def test_a_step_over_the_prefix_is_the_full_sequence(prior, conditions, x):
    context = prior.encode_context(**conditions)
    reference = full_sequence(prior, x, T, **conditions)
    assert torch.allclose(prior(x, T, context), reference, atol=1e-5)
    assert torch.equal(prior(x, T, context), prior(x, T, **conditions))
    assert all(len(tensor) == B for kv in context.prefix for tensor in kv)
    assert len(context.mask) == B


def test_gradients_through_both_halves_are_the_full_sequences(prior, conditions, x):
    weights = torch.randn(B, D)
    gradients = []
    for output in (prior(x, T, **conditions), full_sequence(prior, x, T, **conditions)):
        prior.zero_grad()
        (output * weights).sum().backward()
        gradients.append({n: p.grad.clone() for n, p in prior.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert {n for n, _ in prior.named_parameters()} - gradients[0].keys() == {"null_text", "null_z_t"}
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], atol=1e-5, rtol=1e-4), name


def test_every_parameter_is_trained_where_some_samples_are_dropped(prior, conditions, x):
    prior(x, T, **conditions, drop_text=torch.tensor([True, False, False])).sum().backward()
    assert [n for n, p in prior.named_parameters() if p.grad is None] == []


def test_no_token_of_the_prefix_sees_a_later_one(prior, conditions):
    text = conditions["text"].requires_grad_()
    z_t = conditions["z_t"].requires_grad_()
    context = prior.encode_context(z_t, text, torch.ones(B, N, dtype=torch.bool))
    for i in range(N):
        at_i = sum(kv.k[:, i].sum() + kv.v[:, i].square().sum() for kv in context.prefix)
        by_text, by_z_t = torch.autograd.grad(at_i, (text, z_t), retain_graph=True, allow_unused=True)
        assert by_text[:, i + 1 :].abs().max().item() == 0 if i + 1 < N else True
        assert by_text[:, : i + 1].abs().amin(dim=(0, 2)).min() > 0
        assert by_z_t is None or by_z_t.abs().max() == 0
    at_z_t = sum(kv.k[:, N].sum() for kv in context.prefix)
    assert torch.autograd.grad(at_z_t, z_t)[0].abs().min() > 0


def test_padding_is_invisible_and_dropping_it_is_exact(prior, conditions, x):
    row = {name: tensor[1:2] for name, tensor in conditions.items()}
    short = {**row, "text": row["text"][:, :2], "text_mask": row["text_mask"][:, :2]}
    assert torch.allclose(prior(x[1:2], T[1:2], **row), prior(x[1:2], T[1:2], **short), atol=1e-6)
    padded = row["text"].masked_fill(~row["text_mask"][..., None], torch.nan)
    assert torch.equal(prior(x[1:2], T[1:2], **{**row, "text": padded}), prior(x[1:2], T[1:2], **row))


def test_the_null_condition_depends_on_nothing_but_x_and_t(prior, conditions, x):
    drop = torch.ones(B, dtype=torch.bool)
    other = {"z_t": torch.randn(B, D), "text": torch.randn(B, 2, W), "text_mask": torch.ones(B, 2, dtype=torch.bool)}
    assert torch.allclose(prior(x, T, **conditions, drop_text=drop), prior(x, T, **other, drop_text=drop), atol=1e-6)
    some = torch.tensor([True, False, True])
    mixed = prior(x, T, **conditions, drop_text=some)
    assert torch.allclose(mixed[1], prior(x, T, **conditions)[1], atol=1e-6)
    assert torch.allclose(mixed[::2], prior(x, T, **conditions, drop_text=drop)[::2], atol=1e-6)
    assert (prior(x, T, **conditions) - prior(x, T, **conditions, drop_text=drop)).abs().max() > 1e-3


def test_statistics_undo_themselves_and_are_saved(prior, conditions, x, tmp_path: Path):
    prior.set_statistics(torch.randn(D), torch.rand(D) + 0.1)
    assert torch.allclose(prior.unstandardize(prior.standardize(x)), x, atol=1e-5)
    prior.save_pretrained(tmp_path)
    loaded = DiffusionPrior.from_pretrained(tmp_path)
    assert torch.equal(loaded.clip_mean, prior.clip_mean)
    assert torch.equal(loaded.clip_std, prior.clip_std)
    assert torch.equal(loaded(x, T, **conditions), prior.eval()(x, T, **conditions))
    with pytest.raises(ValueError, match="positive"):
        prior.set_statistics(torch.zeros(D), torch.zeros(D))


def test_it_overfits_one_batch(conditions):
    prior = make(depth=2)
    torch.manual_seed(3)
    x0 = torch.randn(B, D)
    optimizer = torch.optim.Adam(prior.parameters(), 3e-3)
    for _ in range(200):
        noise, t = torch.randn(B, D), torch.randint(1000, (B,))
        a = torch.cos(t / 1000 * torch.pi / 2)[:, None]
        loss = F.mse_loss(prior(a * x0 + (1 - a**2).sqrt() * noise, t, **conditions), x0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    pure_noise = prior(torch.randn(B, D), torch.full((B,), 999), **conditions)
    assert F.mse_loss(pure_noise, x0) < 0.05


def test_the_better_draw_is_kept():
    z_t = F.normalize(torch.randn(4, D), dim=-1)
    draws = torch.randn(5, 4, D)
    best = best_of(draws, z_t)
    assert torch.equal((best * z_t).sum(-1), (draws * z_t).sum(-1).amax(0))
    with pytest.raises(ValueError, match="z_i is"):
        best_of(draws, z_t[:3])


def test_a_masked_first_token_leaves_no_empty_row():
    mask = causal_mask(torch.tensor([[False, True]]))
    assert mask[0, 0].any(-1).all()
    assert not mask[0, 0, 1, 0]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"z_t": torch.zeros(B, D + 1)}, "z_t is"),
        ({"text": torch.zeros(B, N, W + 1)}, "text is"),
        ({"text": torch.zeros(B, 10, W)}, "10 tokens"),
        ({"text_mask": torch.ones(B, N)}, "text_mask is"),
        ({"drop_text": torch.zeros(B)}, "drop_text is"),
    ],
)
def test_wrong_shapes_are_named(prior, conditions, x, wrong, message):
    with pytest.raises(ValueError, match=message):
        prior(x, T, **{**conditions, **wrong})


def test_a_step_checks_its_own_input(prior, conditions, x):
    with pytest.raises(ValueError, match="give one of the two"):
        prior(x, T)
    with pytest.raises(ValueError, match="x_t is"):
        prior(x[:, :3], T, **conditions)


def test_papers_sizes(request):
    """Table 3's width, depth and heads; 12·w² a block, plus biases, norms and embeddings."""
    recipe = Path(request.config.rootpath) / "recipes/paper/prior.yaml"
    arguments = yaml.safe_load(recipe.read_text())["model"]
    assert (arguments["width"], arguments["depth"], arguments["heads"]) == (2048, 24, 32)
    with torch.device("meta"):
        prior = DiffusionPrior(**arguments)
    count = sum(p.numel() for p in prior.parameters())
    assert abs(count / (24 * 12 * 2048**2) - 1) < 0.02


def test_karlos_sizes_are_its_defaults():
    with torch.device("meta"):
        prior = DiffusionPrior()
    # 1,022,030,080 are Karlo's, statistics among them; ours has two null tokens of 2048 more
    count = sum(p.numel() for p in (*prior.parameters(), *prior.buffers()))
    assert count == 1_022_030_080 + 2 * 2048


def test_without_learned_tokens_the_null_condition_is_given_not_dropped(conditions, x):
    prior, other = make(learned_null=False), make()
    extra = other.state_dict().keys() - prior.state_dict().keys()
    assert extra == {"null_text", "null_z_t"}
    with pytest.raises(ValueError, match="no learned null tokens"):
        prior.encode_context(**conditions, drop_text=torch.zeros(B, dtype=torch.bool))
    missing = prior.load_state_dict({name: w for name, w in other.state_dict().items() if name not in extra})
    assert not missing.missing_keys
    assert torch.equal(prior(x, T, **conditions), other(x, T, **conditions))
