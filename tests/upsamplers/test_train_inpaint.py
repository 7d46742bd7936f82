"""An upsampler tuned to inpaint: it starts as the trained one, is shown what masks keep, and learns to use it."""

from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor, nn

from unclip.core.checkpoint import start_from
from unclip.core.config import TrainConfig
from unclip.core.data import DataConfig
from unclip.core.diffusion import Diffusion, make_scheduler
from unclip.core.masks import known_channels
from upsamplers.tiles import Tiled
from upsamplers.train import UpsamplerConfig, run, upsampler_loss
from upsamplers.upsampler import Upsampler, UpsamplerContext

EMOJI = Path(__file__).parents[2] / "recipes" / "emoji"
MODEL = {"sample_size": 32, "model_channels": 16, "channel_multipliers": (1, 2), "num_res_blocks": 1}


def config_of(corpus: Path, out: Path | str = "unused", inpaint: bool = True, **more) -> UpsamplerConfig:
    settings = {"steps": 1, "batch_size": 8, "learning_rate": 5e-3, "warmup": 5, "ema": 0.9, "precision": "no"}
    train = TrainConfig(str(out), **settings, tracker="none")
    options = {"crop": 16, "degradation": "blur", "prediction": "sample", **more}
    return UpsamplerConfig({**MODEL, "inpaint": inpaint}, train, DataConfig(str(corpus)), **options)


def loss_of(config: UpsamplerConfig):
    return upsampler_loss(config, 4, Diffusion.from_scheduler(make_scheduler(config.schedule, config.prediction)))


def randomised(**model) -> Upsampler:
    torch.manual_seed(0)
    upsampler = Upsampler(**{**MODEL, **model})
    for parameter in upsampler.parameters():
        nn.init.normal_(parameter, std=0.1)
    return upsampler.eval()


def inputs(b: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    low = torch.rand(b, 3, 8, 8, generator=generator) * 2 - 1
    return torch.randn(b, 3, 32, 32, generator=generator), torch.arange(b) * 300 + 5, low


@pytest.mark.parametrize("patch_size", [1, 2, 4])
def test_it_starts_as_the_trained_upsampler_whatever_is_known(tmp_path: Path, patch_size: int, shown):
    plain, tuned = randomised(patch_size=patch_size), randomised(patch_size=patch_size, inpaint=True)
    plain.save_pretrained(tmp_path)
    start_from(tuned, str(tmp_path))
    x_t, t, low = inputs()
    with torch.no_grad():
        expected = plain(x_t, t, low=low)
        for known in (None, shown(2)):
            assert torch.equal(tuned(x_t, t, low=low, known=known), expected)
    tuned(x_t, t, low=low, known=shown(2)).square().mean().backward()
    gradient = tuned.unet.input.weight.grad
    assert gradient is not None and gradient.shape[1] == 10 * patch_size**2
    assert bool(gradient[:, 6 * patch_size**2 :].flatten(2).any(dim=2).any(dim=0).all())  # of every new channel


def test_without_known_pixels_it_is_shown_zeros(shown):
    tuned = randomised(inpaint=True)
    x_t, t, low = inputs()
    with torch.no_grad():
        free = tuned(x_t, t, low=low)
        assert torch.equal(tuned(x_t, t, low=low, known=torch.zeros(2, 4, 32, 32)), free)
        seen = tuned(x_t, t, low=low, known=shown(2))
        assert not torch.allclose(seen, free, atol=1e-2)
        assert torch.equal(tuned(x_t, t, tuned.encode_context(low, shown(2))), seen)
    with pytest.raises(ValueError, match="built without inpaint"):
        randomised()(x_t, t, low=low, known=shown(2))
    with pytest.raises(ValueError, match=r"known has shape \(2, 4, 16, 16\); expected \(2, 4, 32, 32\)"):
        tuned(x_t, t, low=low, known=shown(2, side=16))


class Pointwise(Upsampler):
    """What it predicts of a pixel depends on this pixel alone."""

    def forward(self, x_t, t, context, **conditions):
        return x_t * 2 + context.low + context.known[:, :3] - context.known[:, 3:]


def test_a_tile_sees_what_is_known_of_it(shown):
    net, (x_t, t, _) = Pointwise(**MODEL, inpaint=True), inputs()
    context = UpsamplerContext(torch.randn(2, 3, 32, 32), known=shown(2))
    torch.testing.assert_close(Tiled(net, 16)(x_t, t, context), net(x_t, t, context))


def test_it_is_shown_what_random_masks_keep_of_the_crop(tiny_corpus: Path, batch_of, answering):
    net, plain = answering(torch.zeros(16, 3, 16, 16)), answering(torch.zeros(16, 3, 16, 16))
    loss_fn = loss_of(config_of(tiny_corpus))
    for step in range(5):
        loss_fn(net, batch_of(tiny_corpus, range(16), step))
    kept = torch.cat([asked["known"][:, 3:] for asked in net.asked])
    assert 0.1 < float((kept.flatten(1).sum(1) == 0).float().mean()) < 0.5  # sometimes nothing: it still draws freely
    assert not torch.equal(net.asked[0]["known"], net.asked[1]["known"])
    half = answering(torch.zeros(8, 3, 16, 16))  # a row's mask is its own, whatever its batch
    loss_fn(half, batch_of(tiny_corpus, range(8, 16)))
    assert torch.equal(half.asked[0]["known"], net.asked[0]["known"][8:])
    loss_of(config_of(tiny_corpus, inpaint=False))(plain, batch_of(tiny_corpus, range(16)))
    assert "known" not in plain.asked[0]  # and no other draw depends on masks
    assert all(torch.equal(value, net.asked[0][name]) for name, value in plain.asked[0].items())


def test_overfits_one_batch_from_what_it_is_shown(tiny_corpus: Path):
    """Given an even grey as the low-resolution picture, only known pixels say what is asked for."""
    torch.manual_seed(0)
    upsampler, x0 = Upsampler(**MODEL, inpaint=True), torch.rand(4, 3, 16, 16).round() * 2 - 1
    low, t, keep = torch.zeros(4, 3, 4, 4), torch.full((4,), 999), torch.rand(4, 1, 16, 16) < 0.5
    optimizer, known = torch.optim.Adam(upsampler.parameters(), 5e-3), known_channels(x0, keep)
    for _ in range(60):
        optimizer.zero_grad()
        error = (upsampler(torch.randn(4, 3, 16, 16), t, low=low, known=known) - x0).square()
        error.mean().backward()
        optimizer.step()
    assert error.masked_select(keep.expand_as(error)).mean() < 0.1
    with torch.no_grad():
        free = (upsampler(torch.randn(4, 3, 16, 16), t, low=low) - x0).square()
    assert free.mean() > 0.5


def test_a_tuning_goes_on_from_a_training(tiny_corpus: Path, tmp_path: Path, shown):
    plain = run(config_of(tiny_corpus, tmp_path / "plain", inpaint=False))
    config = config_of(tiny_corpus, tmp_path / "tuned", start=str(tmp_path / "plain"))
    config.train.learning_rate = 0.0
    before, after = Upsampler.from_pretrained(plain).eval(), Upsampler.from_pretrained(run(config)).eval()
    x_t, t, low = inputs()
    with torch.no_grad():
        assert torch.equal(after(x_t, t, low=low, known=shown(2)), before(x_t, t, low=low))
    assert after.config["inpaint"] and not before.config["inpaint"]


def test_the_recipe_tunes_the_network_of_the_recipe_it_starts_from():
    names = ("upsampler_256", "upsampler_256_inpaint")
    plain, tuned = (yaml.safe_load((EMOJI / f"{name}.yaml").read_text()) for name in names)
    assert tuned["model"] == {**plain["model"], "inpaint": True}
    assert tuned["start"] == plain["train"]["out"] != tuned["train"]["out"]
    assert all(tuned[name] == plain[name] for name in ("prediction", "schedule", "crop", "degradation", "data"))
