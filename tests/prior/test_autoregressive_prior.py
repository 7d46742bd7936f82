"""The autoregressive prior's two halves, its causality, its null condition, and how it draws."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor

from prior.autoregressive_prior import AutoregressivePrior, draw_tokens
from prior.pca import PCA
from unclip.core.sampling import picture_generators

B, N, D, W, K = 3, 6, 8, 10, 5


def make(**arguments) -> AutoregressivePrior:
    torch.manual_seed(0)
    sizes = {"embedding_dim": D, "text_width": W, "context_length": 9, "width": 32, "depth": 3, "heads": 4}
    counts = {"components": K, "buckets": 16, "dot_buckets": 10}
    prior = AutoregressivePrior(**{**sizes, **counts, **arguments})
    with torch.no_grad():  # a fresh network hardly attends to anything
        for parameter in prior.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    z_i = F.normalize(torch.randn(100, D, generator=torch.Generator().manual_seed(3)), dim=-1)
    prior.set_statistics(PCA.fit(z_i), z_i, torch.rand(100) * 0.5)
    return prior


@pytest.fixture(params=[0, 2], ids=["", "caption transformer"])
def prior(request) -> AutoregressivePrior:
    return make(caption_depth=request.param, caption_width=24, caption_heads=3)


@pytest.fixture
def conditions() -> dict[str, Tensor]:
    torch.manual_seed(1)
    mask = torch.arange(N)[None] < torch.tensor([6, 2, 4])[:, None]
    return {
        "z_t": torch.randn(B, D),
        "text": torch.randn(B, N, W),
        "text_mask": mask,
        "dot": torch.tensor([0.1, 0.3, 0.4]),
    }


@pytest.fixture
def y() -> Tensor:
    return torch.randint(16, (B, K), generator=torch.Generator().manual_seed(2))


def through(blocks, h: Tensor, keep: Tensor) -> Tensor:
    """Every token through every block at once, attention written out."""
    n = h.shape[1]
    allowed = torch.ones(n, n).tril().bool() & keep[:, None] | torch.eye(n).bool()
    for block in blocks:
        normed = block.norm1(h)
        q, k, v = (
            layer(normed).unflatten(-1, (block.attention.heads, -1)).transpose(1, 2)
            for layer in (block.attention.to_q, block.attention.to_k, block.attention.to_v)
        )
        weights = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~allowed[:, None], -torch.inf).softmax(-1)
        h = h + block.attention.to_out((weights @ v).transpose(1, 2).flatten(2))
        h = h + block.mlp(block.norm2(h))
    return h


def full_sequence(
    prior: AutoregressivePrior, y: Tensor, z_t: Tensor, text: Tensor, text_mask: Tensor, dot: Tensor
) -> Tensor:
    """Logits of all k tokens from one pass over the whole sequence."""
    n = text.shape[1]
    caption = prior.caption
    if caption is not None:
        text = caption.norm_out(through(caption.blocks, caption.embed(text) + caption.positions[:n], text_mask))
    tokens = [prior.embed_z_t(z_t), prior.embed_dot(prior.dots.encode(dot)), prior.start.expand(len(y), -1)]
    h = torch.cat([prior.embed_text(text), torch.stack(tokens, 1), prior.embed_y(y[:, :-1])], 1)
    h = h + torch.cat([prior.positions[:n], prior.positions[-2 - K :]])
    keep = torch.cat([text_mask, torch.ones(len(y), 2 + K, dtype=torch.bool)], 1)
    return prior.head(prior.norm_out(through(prior.blocks, h, keep)[:, -K:]))


def test_both_halves_are_the_full_sequence(prior, conditions, y):
    context = prior.encode_context(**conditions)
    reference = full_sequence(prior, y, **conditions)
    assert reference.shape == (B, K, 16)
    assert torch.allclose(prior(y, context), reference, atol=1e-5)
    assert torch.equal(prior(y, context), prior(y, **conditions))
    assert all(len(tensor) == B for kv in context.seen for tensor in kv)


def test_one_token_after_another_is_all_at_once(prior, conditions, y):
    reference = full_sequence(prior, y, **conditions)
    context = prior.encode_context(**conditions)
    for j in range(K):
        logits, context = prior.extend(y[:, j - 1 : j] if j else y[:, :0], context)
        assert logits.shape == (B, 1, 16)
        assert torch.allclose(logits[:, 0], reference[:, j], atol=1e-5)
    first, context = prior.extend(y[:, :2], prior.encode_context(**conditions))
    rest, _ = prior.extend(y[:, 2:-1], context)
    assert torch.allclose(torch.cat([first, rest], 1), reference, atol=1e-5)


def test_gradients_through_both_halves_are_the_full_sequences(prior, conditions, y):
    weights = torch.randn(B, K, 16)
    gradients = []
    for output in (prior(y, **conditions), full_sequence(prior, y, **conditions)):
        prior.zero_grad()
        (output * weights).sum().backward()
        gradients.append({n: p.grad.clone() for n, p in prior.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    unused = {n for n, _ in prior.named_parameters()} - gradients[0].keys()
    assert unused == {"null_text", "null_z_t", "null_dot"}
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], atol=1e-4, rtol=1e-4), name


def test_every_parameter_is_trained_where_some_samples_are_dropped(prior, conditions, y):
    prior(y, **conditions, drop_text=torch.tensor([True, False, False])).sum().backward()
    assert [n for n, p in prior.named_parameters() if p.grad is None] == []


def test_no_output_sees_its_own_token_or_a_later_one(prior, conditions, y):
    """By gradient: through the embedding of each token."""
    embedded = prior.embed_y(y).detach().requires_grad_()
    prior.embed_y.forward = lambda tokens: embedded[:, : tokens.shape[1]]
    logits = prior(y, **conditions)
    for j in range(K):
        gradient = torch.autograd.grad(logits[:, j].square().sum(), embedded, retain_graph=True)[0]
        assert gradient[:, j:].abs().sum() == 0
        assert j == 0 or (gradient[:, :j].abs().sum(-1) > 0).all()


def test_no_token_of_the_prefix_sees_a_later_one(prior, conditions):
    text, z_t = conditions["text"].requires_grad_(), conditions["z_t"].requires_grad_()
    context = prior.encode_context(**{**conditions, "text_mask": torch.ones(B, N, dtype=torch.bool)})
    for i in range(N):
        at_i = sum(kv.k[:, i].sum() + kv.v[:, i].square().sum() for kv in context.seen)
        by_text, by_z_t = torch.autograd.grad(at_i, (text, z_t), retain_graph=True, allow_unused=True)
        assert i + 1 == N or by_text[:, i + 1 :].abs().max() == 0
        assert by_text[:, : i + 1].abs().amin(dim=(0, 2)).min() > 0
        assert by_z_t is None or by_z_t.abs().max() == 0


def test_padding_is_invisible_and_dropping_it_is_exact(prior, conditions, y):
    row = {name: tensor[1:2] for name, tensor in conditions.items()}
    short = {**row, "text": row["text"][:, :2], "text_mask": row["text_mask"][:, :2]}
    assert torch.allclose(prior(y[1:2], **row), prior(y[1:2], **short), atol=1e-5)
    padded = row["text"].masked_fill(~row["text_mask"][..., None], torch.nan)
    assert torch.equal(prior(y[1:2], **{**row, "text": padded}), prior(y[1:2], **row))


def test_the_null_condition_depends_on_nothing_but_the_tokens(prior, conditions, y):
    drop = torch.ones(B, dtype=torch.bool)
    other = {
        "z_t": torch.randn(B, D),
        "text": torch.randn(B, 2, W),
        "text_mask": torch.ones(B, 2, dtype=torch.bool),
        "dot": torch.zeros(B),
    }
    assert torch.allclose(prior(y, **conditions, drop_text=drop), prior(y, **other, drop_text=drop), atol=1e-5)
    mixed = prior(y, **conditions, drop_text=torch.tensor([True, False, True]))
    assert torch.allclose(mixed[1], prior(y, **conditions)[1], atol=1e-5)
    assert torch.allclose(mixed[::2], prior(y, **conditions, drop_text=drop)[::2], atol=1e-5)


def test_each_condition_matters(prior, conditions, y):
    for name in ("z_t", "text", "dot"):
        changed = {**conditions, name: conditions[name].flip(0)}
        assert (prior(y, **changed) - prior(y, **conditions))[0].abs().max() > 1e-3, name


def test_quantising_twice_is_quantising_once_and_errs_by_the_components_left_out():
    prior = make(components=D, buckets=1024)
    z_i = F.normalize(torch.randn(50, D), dim=-1)
    y = prior.quantise(z_i)
    assert y.shape == (50, D)
    z = prior.dequantise(y)
    assert torch.equal(prior.quantise(z), y)
    inside = ((y > 0) & (y < 1023)).all(-1)
    assert F.mse_loss(z[inside], z_i[inside]) < 1e-5
    few = make(components=2, buckets=1024)
    assert torch.allclose(few.dequantise(few.quantise(z))[inside], prior.pca.project(z, 2)[inside], atol=5e-3)
    assert torch.allclose(prior.dequantise(y[:, :2])[inside], prior.pca.project(z, 2)[inside], atol=5e-3)


def test_it_is_saved_with_its_statistics(prior, conditions, y, tmp_path: Path):
    prior.save_pretrained(tmp_path)
    loaded = AutoregressivePrior.from_pretrained(tmp_path)
    assert torch.equal(loaded(y, **conditions), prior.eval()(y, **conditions))
    for name, buffer in prior.named_buffers():
        assert torch.equal(dict(loaded.named_buffers())[name], buffer), name
    half = AutoregressivePrior.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert torch.equal(half.dequantise(y), prior.dequantise(y))


def test_it_overfits_one_batch(conditions):
    prior = make(depth=2)
    z_i = F.normalize(torch.randn(B, D), dim=-1)
    y = prior.quantise(z_i)
    optimizer = torch.optim.Adam(prior.parameters(), 3e-3)
    first = last = torch.tensor(0.0)
    for step in range(120):
        last = F.cross_entropy(prior(y, **conditions).flatten(0, 1), y.flatten())
        first = last if step == 0 else first
        optimizer.zero_grad()
        last.backward()
        optimizer.step()
    assert first > 2
    assert last < 0.01
    given = {name: conditions[name] for name in ("z_t", "text", "text_mask")}
    drawn = prior.eval().sample(**given, generators=picture_generators([0, 1, 2], "prior"))
    assert torch.allclose(drawn, prior.dequantise(y), atol=1e-6)


# Drawing


@pytest.fixture
def given(conditions) -> dict[str, Tensor]:
    return {name: conditions[name] for name in ("z_t", "text", "text_mask")}


def test_a_draw_is_its_seed_s_whatever_the_batch(prior, given):
    every = prior.sample(**given, generators=picture_generators([7, 8, 9], "prior"))
    assert every.shape == (B, D)
    for i in range(B):
        row = {name: tensor[i : i + 1] for name, tensor in given.items()}
        alone = prior.sample(**row, generators=picture_generators([7 + i], "prior"))
        assert torch.allclose(alone[0], every[i], atol=1e-6)
    again = prior.sample(**given, generators=picture_generators([7, 8, 9], "prior"))
    assert torch.equal(again, every)
    other = prior.sample(**given, generators=picture_generators([17, 18, 19], "prior"))
    assert not torch.allclose(other, every, atol=1e-3)


def test_guidance_one_is_conditional_zero_unconditional_and_both_are_one_formula(prior, given, conditions):
    """As no guidance is: against the network with its text dropped, and against the mixed logits written out."""

    def draw(scale: float, **changed) -> Tensor:
        return prior.sample(
            **{**given, **changed}, generators=picture_generators([1, 2, 3], "prior"), guidance_scale=scale
        )

    other = {"z_t": torch.randn(B, D), "text": torch.randn(B, N, W)}
    assert torch.equal(draw(0), draw(0, **other))
    assert not torch.allclose(draw(1), draw(1, **other), atol=1e-3)
    assert torch.allclose(draw(1), draw(1 + 1e-7), atol=1e-6)
    assert torch.allclose(draw(0), draw(1e-7), atol=1e-6)

    numbers = torch.stack(
        [torch.rand(K + 1, generator=g, dtype=torch.float64) for g in picture_generators([1, 2, 3], "prior")]
    )
    dot = prior.dots.quantile(0.5 + numbers[:, 0].float() / 2)
    y = torch.zeros(B, K, dtype=torch.long)
    drop = torch.ones(B, dtype=torch.bool)
    for j in range(K):
        conditional = prior(y, **given, dot=dot)
        null = prior(y, **given, dot=dot, drop_text=drop)
        y[:, j] = draw_tokens((null + 3 * (conditional - null))[:, j], numbers[:, j + 1])
    assert torch.allclose(draw(3), prior.dequantise(y), atol=1e-6)
    away = {**given, **other}
    assert torch.equal(
        prior.sample(**given, generators=picture_generators([1, 2, 3], "prior"), guidance_scale=0, negative=away),
        draw(1, **other),
    )


def test_the_product_is_drawn_from_the_top_half(prior, given):
    asked = []
    encode = prior.encode_context
    prior.encode_context = lambda z_t, text, mask, dot: (asked.append(dot), encode(z_t, text, mask, dot))[1]
    for seed in range(20):
        prior.sample(**given, generators=picture_generators(range(3 * seed, 3 * seed + 3), "prior"))
    dots = torch.cat(asked)
    median = prior.dots.edges[5]
    assert dots.min() >= median
    assert dots.max() <= prior.dots.edges[-1]
    assert dots.max() > prior.dots.edges[-2] > median + (prior.dots.edges[-1] - median) / 2 > dots.min()


def test_every_call_is_reported(prior, given):
    steps: list[tuple[int, int]] = []
    states: list[Tensor] = []

    def see(i: int, left: int, z_i: Tensor) -> None:
        steps.append((i, left))
        states.append(z_i)

    drawn = prior.sample(**given, generators=picture_generators([1, 2, 3], "prior"), callback=see)
    assert steps == [(j, K - 1 - j) for j in range(K)]
    assert torch.equal(states[-1], drawn)


def test_tokens_are_drawn_as_often_as_their_probability():
    logits = torch.tensor([[0.1, 0.5, 0.05, 0.35]]).log().expand(10_000, 4)
    number = (torch.arange(10_000) + 0.5) / 10_000
    counts = draw_tokens(logits, number).bincount(minlength=4) / 10_000
    assert torch.allclose(counts, torch.tensor([0.1, 0.5, 0.05, 0.35]), atol=2e-4)
    cooled = draw_tokens(logits, number, temperature=0.5).bincount(minlength=4) / 10_000
    squares = torch.tensor([0.1, 0.5, 0.05, 0.35]) ** 2
    assert torch.allclose(cooled, squares / squares.sum(), atol=2e-4)


def test_top_p_keeps_the_fewest_that_reach_it():
    logits = torch.tensor([[0.1, 0.5, 0.05, 0.35]]).log().expand(10_000, 4)
    number = (torch.arange(10_000) + 0.5) / 10_000
    for top_p, kept in ((0.4, [1]), (0.6, [1, 3]), (0.9, [0, 1, 3]), (0.99, [0, 1, 2, 3])):
        assert draw_tokens(logits, number, top_p=top_p).unique().tolist() == kept, top_p
    both = draw_tokens(logits, number, top_p=0.6).bincount(minlength=4) / 10_000
    assert torch.allclose(both, torch.tensor([0, 0.5, 0, 0.35]) / 0.85, atol=2e-4)


def test_top_p_toward_zero_is_greedy_and_so_is_temperature():
    logits = 3 * torch.randn(200, 64, generator=torch.Generator().manual_seed(0))
    number = torch.rand(200, generator=torch.Generator().manual_seed(1))
    greedy = logits.argmax(-1)
    assert torch.equal(draw_tokens(logits, number, top_p=0), greedy)
    assert torch.equal(draw_tokens(logits, number, top_p=1e-6), greedy)
    assert torch.equal(draw_tokens(logits, number, temperature=1e-4), greedy)
    assert torch.equal(draw_tokens(logits, number, top_p=1), draw_tokens(logits, number))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"z_t": torch.zeros(B, D + 1)}, "z_t is"),
        ({"text": torch.zeros(B, N, W + 1)}, "text is"),
        ({"text": torch.zeros(B, 10, W)}, "10 tokens"),
        ({"text_mask": torch.ones(B, N)}, "text_mask is"),
        ({"drop_text": torch.zeros(B)}, "drop_text is"),
        ({"dot": torch.zeros(B, 1)}, "dot is"),
    ],
)
def test_wrong_shapes_are_named(conditions, y, wrong, message):
    with pytest.raises(ValueError, match=message):
        make()(y, **{**conditions, **wrong})


def test_what_a_draw_can_not_do_is_named(conditions, y, given):
    prior = make()
    with pytest.raises(ValueError, match="give one of the two"):
        prior(y)
    for wrong in (y[:, 1:], y.float()):
        with pytest.raises(ValueError, match=r"expected int64 \(b, 5\)"):
            prior(wrong, **conditions)
    with pytest.raises(ValueError, match="2 generators for 3"):
        prior.sample(**given, generators=picture_generators([1, 2], "prior"))
    for options in ({"temperature": 0.0}, {"top_p": 1.5}, {"temperature": float("nan")}):
        with pytest.raises(ValueError, match="temperature"):
            prior.sample(**given, generators=picture_generators([1, 2, 3], "prior"), **options)


def test_papers_sizes(request):
    """Table 3's widths, depths and heads of both transformers, and 1,024 buckets of 319 components."""
    recipe = Path(request.config.rootpath) / "recipes/paper/prior_ar.yaml"
    arguments = yaml.safe_load(recipe.read_text())["model"]
    assert (arguments["width"], arguments["depth"], arguments["heads"]) == (1664, 24, 26)
    assert tuple(arguments[f"caption_{name}"] for name in ("width", "depth", "heads")) == (2048, 24, 32)
    assert (arguments["components"], arguments["buckets"]) == (319, 1024)
    with torch.device("meta"):
        prior = AutoregressivePrior(**arguments)
    count = sum(p.numel() for p in prior.parameters())
    assert abs(count / (24 * 12 * (1664**2 + 2048**2)) - 1) < 0.02
