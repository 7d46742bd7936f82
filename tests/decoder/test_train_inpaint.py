"""A decoder tuned to inpaint: it starts as the trained one, is shown what random masks keep, and learns to use it."""

from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from decoder.decoder import Decoder
from decoder.train import DecoderConfig, decoder_loss, run
from unclip.clip.model import CLIP
from unclip.clip.remember import RememberedCLIP
from unclip.core.checkpoint import start_from
from unclip.core.config import TrainConfig
from unclip.core.data import DataConfig, Draws, to_pixels
from unclip.core.diffusion import Diffusion, make_scheduler
from unclip.core.masks import known_channels

EMOJI = Path(__file__).parents[2] / "recipes" / "emoji"
MODEL = {
    "sample_size": 32,
    "model_channels": 16,
    "channel_multipliers": (1, 2),
    "num_res_blocks": 1,
    "attention_resolutions": (16,),
    "head_channels": 8,
    "learned_variance": False,
    "z_i_width": 12,
    "z_i_scale": 3.0,
    "z_i_tokens": 2,
    "text_width": 16,
    "context_width": 16,
}


def config_of(corpus: Path, clip: Path, out: Path | str = "unused", inpaint: bool = True, **more) -> DecoderConfig:
    settings = {"steps": 1, "batch_size": 8, "learning_rate": 3e-3, "warmup": 5, "ema": 0.9, "precision": "no"}
    train = TrainConfig(str(out), **settings, tracker="none")
    model = {**MODEL, "patch_size": 2, "inpaint": inpaint}
    return DecoderConfig(model, train, DataConfig(str(corpus)), str(clip), prediction="sample", **more)


def loss_of(config: DecoderConfig):
    scheduler = make_scheduler(config.schedule, config.prediction)
    return decoder_loss(config, RememberedCLIP(CLIP.from_pretrained(config.clip)), Diffusion.from_scheduler(scheduler))


def randomised(**model) -> Decoder:
    torch.manual_seed(0)
    decoder = Decoder(**{**MODEL, **model})
    for parameter in decoder.parameters():
        nn.init.normal_(parameter, std=0.1)
    return decoder.eval()


def inputs(b: int = 3):
    generator = torch.Generator().manual_seed(1)
    conditions = {
        "z_i": torch.randn(b, 12, generator=generator),
        "text": torch.randn(b, 5, 16, generator=generator),
        "text_mask": torch.arange(5) < torch.tensor([5, 3, 1])[:b, None],
    }
    return torch.randn(b, 3, 32, 32, generator=generator), torch.arange(b) * 300 + 5, conditions


@pytest.mark.parametrize("patch_size", [1, 2])
@pytest.mark.parametrize("sketch_side", [None, 8])
@pytest.mark.parametrize(("mix_input", "mixed"), [(False, False), (True, True), (False, True)])
def test_it_starts_as_the_trained_decoder_whatever_is_known(
    tmp_path: Path, patch_size: int, sketch_side: int | None, mix_input: bool, mixed: bool, shown
):
    """mix_input, mixed: whether the trained one and the tuned one add their input to the output."""
    sizes = {"patch_size": patch_size, "sketch_side": sketch_side, "mix_input": mix_input}
    plain, tuned = randomised(**sizes), randomised(**sizes | {"mix_input": mixed}, inpaint=True)
    plain.save_pretrained(tmp_path)
    start_from(tuned, str(tmp_path))
    x_t, t, conditions = inputs()
    with torch.no_grad():
        expected = plain(x_t, t, **conditions)
        for known in (None, shown(3)):
            error = (tuned(x_t, t, **conditions, known=known) - expected).abs().max()
            assert error <= (1e-6 if mix_input else 0)  # a longer sum of the same and zeros rounds otherwise
    count = plain.unet.input.weight.shape[1]
    assert tuned.unet.input.weight.shape[1] == count + 4 * patch_size**2
    output, _ = tuned(x_t, t, return_sketch=True, **conditions, known=shown(3))
    output.square().mean().backward()
    gradient = tuned.unet.input.weight.grad
    assert gradient is not None
    assert bool(gradient[:, count:].flatten(2).any(dim=2).any(dim=0).all())  # of every new channel
    start_from(randomised(**sizes), str(tmp_path))  # and a decoder without them loads as ever


def test_without_known_pixels_it_is_shown_zeros(shown):
    tuned = randomised(inpaint=True)
    x_t, t, conditions = inputs()
    with torch.no_grad():
        free = tuned(x_t, t, **conditions)
        assert torch.equal(tuned(x_t, t, **conditions, known=torch.zeros(3, 4, 32, 32)), free)
        seen = tuned(x_t, t, **conditions, known=shown(3))
        assert not torch.allclose(seen, free, atol=1e-2)
        context = tuned.encode_context(**conditions, known=shown(3))
        assert torch.equal(tuned(x_t, t, context), seen)
        alone = [tuned(x_t, t, z_i=conditions["z_i"], known=known) for known in (None, shown(3))]
        assert not torch.allclose(*alone, atol=1e-2)  # of a decoder that is given no text, too
    with pytest.raises(ValueError, match="built without inpaint"):
        randomised()(x_t, t, **conditions, known=shown(3))
    with pytest.raises(ValueError, match=r"known has shape \(3, 4, 16, 16\); expected \(3, 4, 32, 32\)"):
        tuned(x_t, t, **conditions, known=shown(3, side=16))
    with pytest.raises(ValueError, match=r"x_t has shape .*; expected \(b, 3, h, w\)"):
        tuned(x_t[:, :2], t, **conditions)


def test_it_is_shown_what_random_masks_keep_of_the_picture(tiny_corpus: Path, tiny_clip: Path, batch_of, answering):
    whole = batch_of(tiny_corpus, range(16))
    x0 = to_pixels(whole["image"])
    net, plain = answering(x0), answering(x0)
    loss_fn = loss_of(config_of(tiny_corpus, tiny_clip))
    for step in range(5):
        assert loss_fn(net, batch_of(tiny_corpus, range(16), step))[0] == 0
    kept = torch.cat([asked["known"][:, 3:] for asked in net.asked])
    assert torch.equal(net.asked[0]["known"], known_channels(x0, net.asked[0]["known"][:, 3:] == 1))
    assert 0.1 < float((kept.flatten(1).sum(1) == 0).float().mean()) < 0.5  # sometimes nothing: it still draws freely
    assert not torch.equal(net.asked[0]["known"], net.asked[1]["known"])
    net.answer = x0[8:]  # a row's mask is its own, whatever its batch
    loss_fn(net, batch_of(tiny_corpus, range(8, 16)))
    assert torch.equal(net.asked[-1]["known"], net.asked[0]["known"][8:])
    loss_of(config_of(tiny_corpus, tiny_clip, inpaint=False))(plain, whole)  # and no other draw depends on masks
    assert "known" not in plain.asked[0]
    assert all(torch.equal(value, net.asked[0][name]) for name, value in plain.asked[0].items())


def test_overfits_one_batch_from_what_it_is_shown(tiny_corpus: Path, tiny_clip: Path, batch_of):
    """At steps of all but noise, and without conditions, only known pixels say which of four pictures is asked for."""
    config = config_of(tiny_corpus, tiny_clip, drop_z_i=1.0, drop_text=1.0, noisy_share=1.0, noisy_from=990)
    torch.manual_seed(0)
    loss_fn, decoder, batch = loss_of(config), Decoder(**config.model), batch_of(tiny_corpus, range(4))
    optimizer = torch.optim.Adam(decoder.parameters(), 5e-3)
    for step in range(80):
        optimizer.zero_grad()
        loss_fn(decoder, {**batch, "draws": Draws(0, step, range(4))})[0].backward()
        optimizer.step()
    x0 = to_pixels(batch["image"])
    keep = torch.zeros(4, 1, 32, 32, dtype=torch.bool)
    keep[..., :24] = True
    conditions = {"z_i": torch.zeros(4, 12), "drop_z_i": torch.ones(4, dtype=torch.bool)}
    t, noise = torch.full((4,), 995), torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        free, seen = (
            (decoder(noise, t, **conditions, known=known) - x0).square().mean()
            for known in (None, known_channels(x0, keep))
        )
    assert seen < free / 2


def test_a_tuning_goes_on_from_a_training(tiny_corpus: Path, tiny_clip: Path, tmp_path: Path, shown):
    plain = run(config_of(tiny_corpus, tiny_clip, tmp_path / "plain", inpaint=False))
    config = config_of(tiny_corpus, tiny_clip, tmp_path / "tuned", start=str(tmp_path / "plain"))
    config.train.learning_rate = 0.0
    before, after = Decoder.from_pretrained(plain).eval(), Decoder.from_pretrained(run(config)).eval()
    x_t, t, conditions = inputs()
    with torch.no_grad():
        assert torch.equal(after(x_t, t, **conditions, known=shown(3)), before(x_t, t, **conditions))
    assert after.config["inpaint"] and not before.config["inpaint"]
    config.start = str(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="holds no trained network"):
        run(config)


def test_the_recipe_tunes_the_network_of_the_recipe_it_starts_from():
    plain, tuned = (yaml.safe_load((EMOJI / f"{name}.yaml").read_text()) for name in ("decoder", "decoder_inpaint"))
    assert tuned["model"] == {**plain["model"], "inpaint": True}
    assert tuned["start"] == plain["train"]["out"] != tuned["train"]["out"]
    assert all(tuned[name] == plain[name] for name in plain.keys() - {"model", "train", "start"})
