"""The upsamplers' crops, degradations by name, loss, grid of samples, and a whole small run."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unclip.core.config import TrainConfig, parse
from unclip.core.data import DataConfig, Draws, ShardDataset, collate, to_pixels
from unclip.core.diffusion import Diffusion, make_scheduler
from upsamplers.degradations import downsample, gaussian_blur
from upsamplers.train import UpsamplerConfig, degrade, random_crops, run, upsampler_loss, upsampler_samples
from upsamplers.upsampler import Upsampler

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*/upsampler_*.yaml"))
MODEL = {"sample_size": 32, "model_channels": 16, "channel_multipliers": (1, 2), "num_res_blocks": 1}
DEGRADATIONS = ("none", "blur", "bsr-light", "bsr-full")


def config_of(corpus: Path, out: Path | str = "unused", **more) -> UpsamplerConfig:
    settings = {"steps": 1, "batch_size": 8, "learning_rate": 5e-3, "warmup": 5, "ema": 0.9, "precision": "no"}
    train = {**settings, "tracker": "none", **more.pop("train", {})}
    options = {"crop": 8, "degradation": "blur", "prediction": "sample", **more}
    return UpsamplerConfig(MODEL, TrainConfig(str(out), **train), DataConfig(str(corpus)), **options)


@pytest.fixture(scope="module")
def rows(tiny_corpus: Path) -> dict[str, Any]:
    """A batch of all sixteen pictures, without draws."""
    dataset = ShardDataset(DataConfig(str(tiny_corpus)))
    return collate([dataset[i] for i in range(len(dataset))])


def drawn(rows: dict[str, Any], step: int = 0) -> dict[str, Any]:
    return {**rows, "draws": Draws(0, step, range(len(rows["image"])))}


def loss_of(config: UpsamplerConfig):
    return upsampler_loss(config, 4, Diffusion.from_scheduler(make_scheduler(config.schedule, config.prediction)))


def places(b: int, h: int, w: int) -> Tensor:
    """Pictures (b, 3, h, w) whose pixels say where they are: row, column, number of the picture."""
    y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    return torch.stack([torch.stack([y, x, torch.full_like(y, i)]) for i in range(b)]).float()


@pytest.mark.parametrize(("h", "w", "size"), [(8, 8, 3), (4, 9, 4), (9, 4, 2)])
def test_crops_are_windows_that_reach_every_corner_alike(h: int, w: int, size: int):
    crops = random_crops(places(2000, h, w), size, Draws(0, 0, range(2000)))
    corner = crops[:, :, :1, :1]
    assert torch.equal(crops - corner, places(1, size, size).expand_as(crops) - torch.zeros_like(corner))
    assert torch.equal(crops[:, 2, 0, 0], torch.arange(2000.0))
    tops, lefts = corner[:, 0].flatten().long(), corner[:, 1].flatten().long()
    counts = torch.bincount(tops * w + lefts, minlength=h * w).view(h, w)[: h - size + 1, : w - size + 1]
    expected = 2000 / counts.numel()
    assert counts.sum() == 2000
    assert ((counts - expected).abs() < 5 * expected**0.5).all()


def test_a_crop_is_its_draws_and_the_whole_where_it_fits_just():
    x0 = torch.rand(6, 3, 12, 16)
    whole = random_crops(x0, 5, Draws(3, 7, range(6)))
    assert torch.equal(whole[4:], random_crops(x0[4:], 5, Draws(3, 7, [4, 5])))
    assert not torch.equal(whole, random_crops(x0, 5, Draws(3, 8, range(6))))
    square = x0[..., :12]
    assert torch.equal(random_crops(square, 12, Draws(0, 0, range(6))), square)


def test_a_crop_that_does_not_fit_is_one_sentence(tiny_corpus: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="a crop of 9 px does not fit a 16×8 picture: lower `crop`"):
        random_crops(torch.zeros(1, 3, 8, 16), 9, Draws(0, 0, [0]))
    for crop, sentence in ((64, "a crop of 64 px does not fit a 32×32 picture"), (10, "divisible by 4")):
        out = tmp_path / str(crop)
        with pytest.raises(ValueError, match=sentence):
            run(config_of(tiny_corpus, out, crop=crop))
        assert not (out / "model").exists() and not (out / "checkpoints").exists()


@pytest.mark.parametrize("degradation", DEGRADATIONS)
@pytest.mark.parametrize(("h", "w", "factor"), [(16, 16, 4), (8, 24, 4), (24, 8, 2)])
def test_degradations_give_the_low_resolution_in_range(degradation, h: int, w: int, factor: int):
    x0 = torch.rand(3, 3, h, w, generator=torch.Generator().manual_seed(0)) * 2 - 1
    low = degrade(x0, factor, degradation, Draws(0, 0, range(3)))
    assert low.shape == (3, 3, h // factor, w // factor)
    assert low.isfinite().all() and low.abs().max() <= 1
    alone = degrade(x0[1:], factor, degradation, Draws(0, 0, [1, 2]))
    torch.testing.assert_close(alone, low[1:], atol=1e-4, rtol=0)


def test_degradations_by_name():
    x0 = F.interpolate(torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1, (32, 32))
    low = {name: degrade(x0, 4, name, Draws(0, 0, range(4))) for name in DEGRADATIONS}
    assert torch.equal(low["none"], downsample(x0, 4))
    assert torch.equal(low["blur"], gaussian_blur(downsample(x0, 4)))
    errors = [(low[name] - low["none"]).square().mean().item() for name in ("none", "bsr-light", "bsr-full")]
    assert 0 == errors[0] < errors[1] < errors[2]


@pytest.mark.parametrize("degradation", ["blur", "bsr-full"])
def test_a_share_of_the_pictures_is_degraded_and_the_rest_is_clean(degradation):
    x0 = torch.rand(200, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    low = {s: degrade(x0, 4, degradation, Draws(0, 0, range(200)), s) for s in (0.0, 0.25, 1.0)}
    clean = downsample(x0, 4)
    assert torch.equal(low[0.0], clean)
    assert torch.equal(low[1.0], degrade(x0, 4, degradation, Draws(0, 0, range(200))))
    is_clean = (low[0.25] == clean).flatten(1).all(1)
    assert torch.equal(low[0.25][~is_clean], low[1.0][~is_clean])
    assert abs(int(is_clean.sum()) - 150) < 30


def test_a_share_out_of_range_is_one_sentence(tiny_corpus: Path):
    with pytest.raises(ValueError, match=r"degraded_share is 1\.5; expected a part of the samples, 0 to 1"):
        run(config_of(tiny_corpus, degraded_share=1.5))


def test_loss_is_the_error_on_the_crop_that_low_shows(tiny_corpus: Path, rows):
    """Without degradation the picture asked for is known: what answers with it has no loss."""
    config = config_of(tiny_corpus, degradation="none")
    loss_fn, x0 = loss_of(config), to_pixels(rows["image"])
    asked: list[dict[str, Tensor]] = []

    class Answer(nn.Module):
        answer: Tensor

        def forward(self, x_t: Tensor, t: Tensor, low: Tensor) -> Tensor:
            asked.append({"x_t": x_t, "t": t, "low": low})
            return self.answer

    net, draws = Answer(), drawn(rows)["draws"]
    draws.uniform(), draws.uniform(), draws.integers(10)  # caption, background and its colour come first
    net.answer = random_crops(x0, 8, draws)
    assert loss_fn(net, drawn(rows))[0] == 0
    assert torch.equal(asked[0]["low"], downsample(net.answer, 4))
    expected = net.answer.square().mean().item()
    net.answer = torch.zeros_like(net.answer)
    assert loss_fn(net, drawn(rows))[0].item() == pytest.approx(expected)
    assert all(torch.equal(asked[0][name], asked[1][name]) for name in asked[0])
    loss_fn(net, drawn(rows, step=1))
    assert not any(torch.equal(asked[0][name], asked[2][name]) for name in asked[0])


@pytest.mark.parametrize("degradation", ["blur", "bsr-light"])
def test_overfits_one_batch(tiny_corpus: Path, degradation):
    config = config_of(tiny_corpus, degradation=degradation, crop=16)
    dataset = ShardDataset(config.data)
    batch = collate([dataset[i] for i in range(4)])
    torch.manual_seed(0)
    upsampler, loss_fn = Upsampler(**MODEL), loss_of(config)
    optimizer = torch.optim.Adam(upsampler.parameters(), 5e-3)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = loss_fn(upsampler, drawn(batch))[0]
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 5


def test_samples_for_the_grid(tiny_corpus: Path, rows):
    config = config_of(tiny_corpus, crop=16)
    sample_fn = upsampler_samples(config, 4, make_scheduler("cosine", "sample"), steps=2)
    torch.manual_seed(0)
    upsampler = Upsampler(**MODEL).eval()
    for parameter in upsampler.parameters():
        nn.init.normal_(parameter, std=0.1)
    with torch.no_grad():
        pictures = sample_fn(upsampler, drawn(rows))
        assert pictures.shape == (16, 3, 16, 16)
        assert pictures.abs().max() <= 1 + 1e-6
        assert torch.equal(pictures, sample_fn(upsampler, drawn(rows)))


def test_a_run_on_crops_draws_whole_pictures(tiny_corpus: Path, tmp_path: Path, rows):
    """Trained on crops of a quarter of the side, it errs no more at full size than on crops."""
    settings = {"steps": 60, "log_every": 10, "tracker": "tensorboard"}
    config = config_of(tiny_corpus, tmp_path, degradation="none", train=settings)
    config.validation = DataConfig(str(tiny_corpus), limit=8)
    folder = run(config)
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in log if "loss" in line]
    assert losses[-1] < losses[0] / 3
    assert log[-1]["validation/loss"] < losses[0] / 3
    scheduler = json.loads((tmp_path / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["prediction_type"] == "sample"

    upsampler, x0 = Upsampler.from_pretrained(folder).eval(), to_pixels(rows["image"])
    draws, errors = drawn(rows)["draws"], {}
    t, noise = draws.integers(1000), draws.normal(3, 32, 32)
    for size, pictures in ((8, random_crops(x0, 8, draws)), (32, x0)):
        x_t = Diffusion.from_scheduler(make_scheduler()).add_noise(pictures, noise[..., :size, :size], t)
        with torch.no_grad():
            errors[size] = (upsampler(x_t, t, low=downsample(pictures, 4)) - pictures).square().mean()
    assert errors[32] < 2 * errors[8] < x0.square().mean() / 2


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_recipes_train_on_crops_that_their_network_takes(recipe: Path):
    config = parse(UpsamplerConfig, ["--config", str(recipe)])
    with torch.device("meta"):
        upsampler = Upsampler(**config.model)
    arguments = upsampler.config
    multiple = arguments["patch_size"] * 2 ** (len(arguments["channel_multipliers"]) - 1)
    assert config.crop <= arguments["sample_size"]
    for size in (config.crop, arguments["sample_size"]):
        assert size % multiple == 0 and size % arguments["factor"] == 0
