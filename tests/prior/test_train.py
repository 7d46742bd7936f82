"""The prior's loss, its statistics, and a whole small run that learns which picture a caption asks for."""

import json
import tarfile
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from prior.autoregressive_prior import AutoregressivePrior
from prior.diffusion_prior import DiffusionPrior
from prior.evaluate import draw_embeddings
from prior.train import (
    PriorConfig,
    autoregressive_loss,
    embedding_statistics,
    make_autoregressive_prior,
    make_prior,
    prior_loss,
    run,
)
from unclip.clip.model import CLIP, CLIPArguments
from unclip.clip.remember import RememberedCLIP, training_embeddings
from unclip.core.analytic import AnalyticDDPMScheduler
from unclip.core.config import TrainConfig, parse
from unclip.core.data import COLOURS, DataConfig, Draws, ShardDataset, collate
from unclip.core.diffusion import Diffusion, make_scheduler
from unclip.core.sampling import guided, make_sampler, picture_generators, sample, starting_noise

IMAGE = {"dim": 12, "image_size": 16, "patch_size": 8, "image_width": 32, "image_depth": 1, "image_heads": 2}
TEXT = {"text_width": 32, "text_depth": 1, "text_heads": 2, "vocab_size": 300, "context_length": 20}


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Plain squares of eight colours."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    with tarfile.open(folder / "train-00000.tar", "w") as tar:
        for name in list(COLOURS)[:8]:
            picture, meta = BytesIO(), {"captions": [f"a {name} square"], "concept": name, "style": "plain"}
            Image.new("RGB", (16, 16), COLOURS[name]).save(picture, "webp", lossless=True)
            for suffix, content in {"webp": picture.getvalue(), "json": json.dumps(meta).encode()}.items():
                info = tarfile.TarInfo(f"{name}.{suffix}")
                info.size = len(content)
                tar.addfile(info, BytesIO(content))
    return folder


@pytest.fixture
def clip() -> CLIP:
    torch.manual_seed(0)
    clip = CLIP.build(CLIPArguments(**IMAGE, **TEXT), [f"a {name} square" for name in COLOURS])
    with torch.no_grad():
        for parameter in clip.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return clip.eval()


def config_of(corpus: Path, out: Path, clip: str = "unused", steps: int = 1, **more) -> PriorConfig:
    settings = TrainConfig(
        str(out), steps, batch_size=8, learning_rate=3e-3, warmup=10, ema=0.9, precision="no", tracker="none"
    )
    return PriorConfig({"width": 32, "depth": 2, "heads": 2}, settings, DataConfig(str(corpus)), clip, **more)


def test_statistics_are_those_of_the_embeddings(corpus: Path, clip: CLIP, tmp_path: Path):
    dataset, remembered = ShardDataset(DataConfig(str(corpus))), RememberedCLIP(clip)
    config = config_of(corpus, tmp_path)
    prior = make_prior(config, clip)
    prior.set_statistics(*embedding_statistics(remembered, dataset, config))
    pictures = torch.stack([dataset[i]["image"] for i in range(8)]).float() / 127.5 - 1
    x0 = prior.standardize(clip.encode_image(pictures))
    assert torch.allclose(x0.mean(0), torch.zeros(12), atol=1e-4)
    assert torch.allclose(x0.std(0, correction=0), torch.ones(12), atol=1e-3)


def test_loss_is_the_error_of_x0_and_a_function_of_the_draws(corpus: Path, clip: CLIP, tmp_path: Path):
    """A network that answers with x0 itself has no loss and cosine 1; one that answers 0 has the mean of x0²."""
    config = config_of(corpus, tmp_path)
    dataset = ShardDataset(config.data)
    diffusion = Diffusion.from_scheduler(make_scheduler("cosine", "sample", clip_sample=False))
    loss_fn = prior_loss(config, RememberedCLIP(clip), diffusion)
    batch = {**collate([dataset[i] for i in range(8)]), "draws": Draws(0, 0, range(8))}
    x0 = clip.encode_image(batch["image"].float() / 127.5 - 1)
    asked: list[dict] = []

    class Answer(DiffusionPrior):
        answer = x0

        def forward(self, x_t, t, context=None, **conditions):
            asked.append({"x_t": x_t, "t": t, **conditions})
            return self.answer

    net = Answer(12, 32, 20, 32, 1, 2)
    loss, metrics = loss_fn(net, batch)
    assert loss.item() == pytest.approx(0, abs=1e-10)
    assert metrics["cosine"].item() == pytest.approx(1, abs=1e-5)
    assert metrics["cosine_shuffled"] < 1
    net.answer = torch.zeros(8, 12)
    assert loss_fn(net, {**batch, "draws": Draws(0, 0, range(8))})[0].item() == pytest.approx(x0.square().mean().item())
    assert torch.equal(asked[0]["x_t"], asked[1]["x_t"])
    loss_fn(net, {**batch, "draws": Draws(0, 1, range(8))})
    assert not torch.equal(asked[1]["x_t"], asked[2]["x_t"])


def test_text_is_dropped_as_often_as_asked(corpus: Path, clip: CLIP, tmp_path: Path):
    dataset = ShardDataset(DataConfig(str(corpus)))
    batch = collate([dataset[i % 8] for i in range(400)])
    for probability in (0.0, 0.1, 1.0):
        config = config_of(corpus, tmp_path, drop_text=probability)
        diffusion = Diffusion.from_scheduler(make_scheduler("cosine", "sample", clip_sample=False))
        seen: list[torch.Tensor] = []

        class Net(DiffusionPrior):
            def forward(self, x_t, t, context=None, *, seen=seen, **conditions):
                seen.append(conditions["drop_text"])
                return x_t

        prior_loss(config, RememberedCLIP(clip), diffusion)(
            Net(12, 32, 20, 32, 1, 2), {**batch, "draws": Draws(0, 0, range(400))}
        )
        assert seen[0].float().mean().item() == pytest.approx(probability, abs=0.06)


def test_where_no_token_is_learned_the_empty_prompt_stands_for_none(corpus: Path, clip: CLIP, tmp_path: Path):
    dataset, seen = ShardDataset(DataConfig(str(corpus))), []
    batch = {**collate([dataset[i] for i in range(8)]), "draws": Draws(0, 0, range(8))}

    class Net(DiffusionPrior):
        def forward(self, x_t, t, context=None, **conditions):
            seen.append(conditions)
            return super().forward(x_t, t, **conditions)

    diffusion = Diffusion.from_scheduler(make_scheduler("cosine", "sample", clip_sample=False))
    loss_fn = prior_loss(config_of(corpus, tmp_path, drop_text=1.0), RememberedCLIP(clip), diffusion)
    assert loss_fn(Net(12, 32, 20, 32, 1, 2, learned_null=False), batch)[0].isfinite()
    assert seen[0]["drop_text"] is None
    assert torch.allclose(seen[0]["z_t"], clip.encode_text([""]).z_t.expand(8, -1), atol=1e-6)
    with pytest.raises(ValueError, match="drop_text is 10; expected a part of the samples"):
        run(config_of(corpus, tmp_path, drop_text=10))


def test_a_split_to_evaluate_that_is_not_there_is_refused_before_any_work(corpus: Path, clip: CLIP, tmp_path: Path):
    clip.save_pretrained(tmp_path / "clip")
    config = config_of(corpus, tmp_path / "out", str(tmp_path / "clip"), steps=1, evaluate=["train", "nowhere"])
    with pytest.raises(FileNotFoundError, match="holds no split 'nowhere'"):
        run(config)
    assert not (tmp_path / "out").exists()


def test_a_run_learns_to_draw_the_right_embedding(corpus: Path, clip: CLIP, tmp_path: Path):
    clip.save_pretrained(tmp_path / "clip")
    config = config_of(corpus, tmp_path / "out", str(tmp_path / "clip"), steps=400, evaluate=["train"])
    folder = run(config)
    figures = json.loads((tmp_path / "out/evaluation.json").read_text())["train"]
    assert figures["top1"] > 0.8
    assert figures["cosine"] > 0.9 > figures["cosine_shuffled"]
    prior = DiffusionPrior.from_pretrained(folder).eval()
    assert prior.clip_std.max() < 1  # the statistics came along
    assert (tmp_path / "out/scheduler/scheduler_config.json").is_file()

    scheduler = make_scheduler("cosine", "sample", clip_sample=False)
    captions, seeds = ["a red square", "a blue square"], [5, 6]
    both = draw_embeddings(prior, clip, scheduler, captions, seeds)
    assert torch.allclose(both[1:], draw_embeddings(prior, clip, scheduler, captions[1:], seeds[1:]), atol=1e-4)
    assert torch.allclose(both.norm(dim=-1), torch.ones(2))
    guided = draw_embeddings(prior, clip, scheduler, captions, seeds, guidance_scale=2.0)
    assert not torch.allclose(guided, both, atol=1e-3)
    z_t = clip.encode_text(captions).z_t
    one = draw_embeddings(prior, clip, scheduler, captions, seeds, candidates=1)
    assert bool((F.cosine_similarity(both, z_t) >= F.cosine_similarity(one, z_t) - 1e-6).all())

    learns_its_variance(replace(config, estimate_variance=8, evaluate=[]), prior, clip)


def learns_its_variance(config: PriorConfig, prior: DiffusionPrior, clip: CLIP) -> None:
    """Its statistic is what the network's own error is; sampling by it draws the right embeddings; twice is once."""
    folder = run(config)
    assert folder == Path(config.train.out) / "scheduler"
    scheduler = AnalyticDDPMScheduler.from_pretrained(folder)
    remembered, dataset = RememberedCLIP(clip), ShardDataset(config.data)
    z_i, captions = training_embeddings(remembered, dataset, 8, config.data.background, config.train.seed)
    x0, t = prior.standardize(z_i), torch.full((8,), 600)
    z_t, text, mask = clip.encode_text(captions)
    context = prior.encode_context(z_t=z_t, text=text, text_mask=mask)
    with torch.no_grad():
        kept = scheduler.alphas_cumprod[600]
        noise = torch.randn(50, 8, 12, generator=torch.Generator().manual_seed(0))
        error = torch.stack([(prior(kept.sqrt() * x0 + (1 - kept).sqrt() * n, t, context) - x0) ** 2 for n in noise])
    assert scheduler.config["x0_variance"][600] == pytest.approx(error.mean().item(), rel=0.5)

    generators = picture_generators(range(8), "prior")
    sampler = make_sampler(scheduler, "analytic")
    drawn = sample(guided(prior, context), sampler, starting_noise((12,), generators), 16, generators)
    assert F.cosine_similarity(prior.unstandardize(drawn), z_i).mean() > 0.9
    before = (folder / "scheduler_config.json").read_bytes()
    run(config)
    assert (folder / "scheduler_config.json").read_bytes() == before
    with pytest.raises(FileNotFoundError, match="no trained diffusion prior"):
        run(replace(config, train=replace(config.train, out=config.train.out + "-elsewhere")))


def test_statistics_of_nothing_are_refused(corpus: Path, clip: CLIP, tmp_path: Path):
    config = replace(config_of(corpus, tmp_path / "out", "unused"), statistics=0)
    with pytest.raises(ValueError, match="embeddings of 0 pictures are asked for"):
        embedding_statistics(RememberedCLIP(clip), ShardDataset(config.data), config)


def test_an_earlier_run_is_refused_before_any_work(corpus: Path, clip: CLIP, tmp_path: Path, monkeypatch):
    clip.save_pretrained(tmp_path / "clip")
    config = config_of(corpus, tmp_path / "out", str(tmp_path / "clip"))
    run(config)
    monkeypatch.setattr("prior.train.training_embeddings", lambda *_: pytest.fail("embedded all pictures first"))
    for kind in ("diffusion", "ar"):
        with pytest.raises(ValueError, match="earlier run"):
            run(replace(config, kind=kind))


def test_a_size_that_contradicts_the_clip_is_named(corpus: Path, clip: CLIP, tmp_path: Path):
    config = config_of(corpus, tmp_path)
    config.model["text_width"] = 31
    with pytest.raises(ValueError, match="text_width is 31, the CLIP's is 32"):
        make_prior(config, clip)


def ar_config(corpus: Path, out: Path, clip: str = "unused", steps: int = 1, **model) -> PriorConfig:
    config = config_of(corpus, out, clip, steps, kind="ar")
    config.model |= {"buckets": 16, "dot_buckets": 4, **model}
    return config


def test_components_are_as_many_as_the_error_needs(corpus: Path, clip: CLIP, tmp_path: Path):
    dataset, remembered = ShardDataset(DataConfig(str(corpus))), RememberedCLIP(clip)
    config = ar_config(corpus, tmp_path)
    z_i = clip.encode_image(torch.stack([dataset[i]["image"] for i in range(8)]).float() / 127.5 - 1)
    variance = (z_i - z_i.mean(0)).square().sum(-1).mean()
    counts = set()
    for error in (0.5, 0.01, 1e-9):
        prior = make_autoregressive_prior(replace(config, error=error), remembered, dataset)
        lost = (prior.pca.project(z_i, prior.components) - z_i).square().sum(-1).mean()
        assert lost <= error * variance + 1e-7
        counts.add(prior.components)
    assert len(counts) == 3
    assert max(counts) <= 8  # eight pictures span no more
    assert make_autoregressive_prior(ar_config(corpus, tmp_path, components=5), remembered, dataset).components == 5
    with pytest.raises(ValueError, match="has no noise"):
        make_autoregressive_prior(replace(config, weighting="min_snr"), remembered, dataset)


def test_the_autoregressive_loss_is_the_tokens_cross_entropy(corpus: Path, clip: CLIP, tmp_path: Path):
    """0 for a network that knows every token, its cosine that of the quantised z_i; ln n for one that guesses."""
    dataset, remembered = ShardDataset(DataConfig(str(corpus))), RememberedCLIP(clip)
    config = ar_config(corpus, tmp_path, buckets=1024)
    prior = make_autoregressive_prior(config, remembered, dataset)
    batch = {**collate([dataset[i] for i in range(8)]), "draws": Draws(0, 0, range(8))}
    z_i = clip.encode_image(batch["image"].float() / 127.5 - 1)
    asked: list[dict] = []
    sureness = 100.0

    def answer(y, **conditions):
        asked.append({"y": y, **conditions})
        return sureness * F.one_hot(y, 1024).float()

    prior.forward = answer  # pyright: ignore
    loss, metrics = autoregressive_loss(config, remembered)(prior, batch)
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert torch.equal(asked[0]["y"], prior.quantise(z_i))
    assert torch.allclose(asked[0]["dot"], (z_i * asked[0]["z_t"]).sum(-1), atol=1e-6)
    quantised = F.cosine_similarity(prior.dequantise(prior.quantise(z_i)), z_i).mean()
    assert metrics["cosine"].item() == pytest.approx(quantised.item(), abs=1e-5)
    assert quantised > 0.99 > metrics["cosine_shuffled"]
    sureness = 0.0
    loss, _ = autoregressive_loss(config, remembered)(prior, {**batch, "draws": Draws(0, 0, range(8))})
    assert loss.item() == pytest.approx(torch.tensor(1024.0).log().item())


def test_an_autoregressive_run_learns_to_draw_the_right_embedding(corpus: Path, clip: CLIP, tmp_path: Path):
    clip.save_pretrained(tmp_path / "clip")
    # A CLIP of random weights gives every picture a product of its own: where it told them apart, one drawn from the
    # top half would contradict the caption.
    config = ar_config(corpus, tmp_path / "out", str(tmp_path / "clip"), steps=200, dot_buckets=1)
    config.evaluate = ["train"]
    folder = run(config)
    figures = json.loads((tmp_path / "out/evaluation.json").read_text())["train"]
    assert figures["top1"] > 0.8
    assert figures["cosine"] > 0.9 > figures["cosine_shuffled"]
    assert not (tmp_path / "out/scheduler").exists()
    prior = AutoregressivePrior.from_pretrained(folder).eval()
    captions = ["a red square", "a blue square"]
    both = draw_embeddings(prior, clip, None, captions, [5, 6])
    assert torch.allclose(both[1:], draw_embeddings(prior, clip, None, captions[1:], [6]), atol=1e-5)
    assert torch.allclose(both.norm(dim=-1), torch.ones(2))


def test_recipes_fit_their_config(request):
    for recipe in ("emoji/prior.yaml", "emoji/prior_ar.yaml", "paper/prior.yaml", "paper/prior_ar.yaml"):
        config = parse(PriorConfig, ["--config", str(Path(request.config.rootpath) / "recipes" / recipe)])
        assert config.train.steps > 0
        assert isinstance(config.data, DataConfig)
