"""The prior's loss, its statistics, and a whole small run that learns which picture a caption asks for."""

import json
import tarfile
from io import BytesIO
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from prior.diffusion_prior import DiffusionPrior
from prior.evaluate import draw_embeddings
from prior.train import PriorConfig, embedding_statistics, make_prior, prior_loss, run
from unclip.clip.model import CLIP, CLIPArguments
from unclip.clip.remember import RememberedCLIP
from unclip.core.data import COLOURS, DataConfig, Draws, ShardDataset, collate
from unclip.core.diffusion import Diffusion, make_scheduler
from unclip.core.train import TrainConfig, parse

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


def test_a_size_that_contradicts_the_clip_is_named(corpus: Path, clip: CLIP, tmp_path: Path):
    config = config_of(corpus, tmp_path)
    config.model["text_width"] = 31
    with pytest.raises(ValueError, match="text_width is 31, the CLIP's is 32"):
        make_prior(config, clip)


def test_recipes_fit_their_config(request):
    for recipe in ("emoji/prior.yaml", "paper/prior.yaml"):
        config = parse(PriorConfig, ["--config", str(Path(request.config.rootpath) / "recipes" / recipe)])
        assert config.train.steps > 0
        assert isinstance(config.data, DataConfig)
