"""The decoder's loss, what it drops and how often, its grid of samples, and a whole small run."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from decoder.decoder import Decoder
from decoder.train import (
    DecoderConfig,
    blur_z_i,
    captions_by_concept,
    decoder_loss,
    decoder_samples,
    embedding_spread,
    freeze_all_but_sketch,
    run,
    swap_captions,
)
from unclip.clip.model import CLIP
from unclip.clip.remember import RememberedCLIP
from unclip.core.config import TrainConfig, main
from unclip.core.data import DataConfig, Draws, ShardDataset, collate, to_pixels
from unclip.core.diffusion import Diffusion, make_scheduler

MODEL = {
    "sample_size": 32,
    "patch_size": 2,
    "model_channels": 16,
    "channel_multipliers": (1, 2),
    "num_res_blocks": 1,
    "attention_resolutions": (8,),
    "head_channels": 8,
    "learned_variance": False,
    "z_i_width": 12,
    "z_i_scale": 3.0,
    "z_i_tokens": 2,
    "text_width": 16,
    "context_width": 16,
}


def config_of(corpus: Path, out: Path | str = "unused", clip: Path | str = "unused", **more) -> DecoderConfig:
    settings = {"steps": 1, "batch_size": 8, "learning_rate": 3e-3, "warmup": 5, "ema": 0.9, "precision": "no"}
    train = {**settings, "tracker": "none", **more.pop("train", {})}
    model = {**MODEL, **more.pop("model", {})}
    return DecoderConfig(model, TrainConfig(str(out), **train), DataConfig(str(corpus)), str(clip), **more)


@pytest.fixture(scope="module")
def clip(tiny_clip: Path) -> RememberedCLIP:
    return RememberedCLIP(CLIP.from_pretrained(tiny_clip))


@pytest.fixture(scope="module")
def rows(tiny_corpus: Path) -> dict[str, Any]:
    """A batch of all sixteen pictures, without draws."""
    dataset = ShardDataset(DataConfig(str(tiny_corpus)))
    return collate([dataset[i] for i in range(len(dataset))])


def drawn(rows: dict[str, Any], step: int = 0) -> dict[str, Any]:
    return {**rows, "draws": Draws(0, step, range(len(rows["image"])))}


def test_noise_on_z_i_varies_as_the_embeddings_do(tiny_corpus: Path, clip: RememberedCLIP, rows, answering):
    config = config_of(tiny_corpus, drop_z_i=0.0, drop_text=0.0, z_i_noise=0.5)
    z_i = clip.encode_image(to_pixels(rows["image"]))
    spread = embedding_spread(clip, ShardDataset(config.data), config)
    covariance = torch.cov(z_i.T)
    assert torch.allclose(spread @ spread.T, covariance, atol=1e-5 * float(covariance.diagonal().mean()))
    assert torch.allclose(blur_z_i(z_i, spread, Draws(0, 0, range(16)), 0.0), z_i, atol=1e-6)
    unit = torch.ones(1000, 1) * F.normalize(z_i.mean(0), dim=0)
    blurred = blur_z_i(unit, spread, Draws(0, 0, range(1000)), 0.1)
    assert torch.allclose(blurred.norm(dim=-1), torch.tensor(1.0), atol=1e-5)
    # of noise of up to m deviations, m uniform, the mean variance is a third of m²; the norm's direction loses its own
    across = torch.eye(len(covariance)) - torch.outer(unit[0], unit[0])
    found = torch.cov(blurred.T)
    expected = across @ covariance @ across * 0.1**2 / 3
    assert torch.allclose(found, expected, atol=0.15 * float(expected.diagonal().max()))
    net = answering(torch.zeros(16, 3, 32, 32))
    for noise in (spread, None):
        loss_of(config, clip, noise)(net, drawn(rows))
    noisy, plain = (asked["z_i"] for asked in net.asked)
    assert torch.allclose(plain, z_i, atol=1e-6)
    assert not torch.isclose(noisy, plain, atol=1e-4).all(dim=1).any()


def test_swapped_captions_are_of_the_concept_and_evenly_drawn(tiny_corpus: Path, rows):
    captions = captions_by_concept(ShardDataset(DataConfig(str(tiny_corpus))))
    own = rows["captions"]
    assert swap_captions(rows, captions, Draws(0, 0, range(len(own))), 0.0)["captions"] == own
    concept = max(captions, key=lambda name: len(captions[name]))
    drawings = [["red", "crimson"], ["blue"], ["green"]]
    batch = {"concept": [concept] * 3000 + ["never seen"], "captions": [["own"]] * 3001}
    swapped = swap_captions(batch, {concept: drawings}, Draws(0, 0, range(3001)), 0.6)["captions"]
    assert swapped[-1] == ["own"]
    shares = [swapped.count(found) / 3000 for found in [["own"], *drawings]]
    assert torch.tensor(shares).sub(torch.tensor([0.4, 0.2, 0.2, 0.2])).abs().max() < 0.035  # four standard errors
    assert batch["captions"] == [["own"]] * 3001


def test_captions_are_not_swapped_where_no_sample_names_a_concept(unnamed: Path, tiny_clip: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="swap_captions goes by concepts, and no sample"):
        run(config_of(unnamed, tmp_path / "out", tiny_clip, swap_captions=0.5))
    assert not (tmp_path / "out").exists()


def test_the_loss_sees_swapped_captions(tiny_corpus: Path, clip: RememberedCLIP, rows, answering):
    config = config_of(tiny_corpus, drop_z_i=0.0, drop_text=0.0, swap_captions=1.0)
    scheduler = make_scheduler(config.schedule, config.prediction, False)
    net = answering(torch.zeros(16, 3, 32, 32))
    told = {concept: [["another"]] for concept in rows["concept"]}
    decoder_loss(config, clip, Diffusion.from_scheduler(scheduler), None, told)(net, drawn(rows))
    expected = clip.encode_text(["another"]).states.float()
    assert torch.allclose(net.asked[0]["text"], expected.expand(16, -1, -1), atol=1e-5)


class ZeroNetwork(nn.Module):
    def forward(self, x_t: Tensor, t: Tensor, **conditions) -> Tensor:
        return torch.zeros_like(x_t)


def test_a_sketch_is_trained_to_be_the_small_picture(tiny_corpus: Path, clip: RememberedCLIP, rows):
    config = config_of(tiny_corpus, drop_z_i=0.0, drop_text=0.0, model={"sketch_side": 8})
    torch.manual_seed(0)
    decoder = Decoder(**config.model)
    decoder.unet.requires_grad_(False)  # its output starts at zero and so stays
    optimizer = torch.optim.Adam([p for p in decoder.parameters() if p.requires_grad], 1e-2)
    loss_fn = loss_of(config, clip)
    errors = []
    for _ in range(60):
        loss, metrics = loss_fn(decoder, drawn(rows))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        errors.append(float(metrics["sketch"]))
    small = F.interpolate(to_pixels(rows["image"][:, :3]), (8, 8), mode="area")
    assert errors[0] > 0.5 * small.square().mean()
    assert errors[-1] < 0.2 * errors[0]
    with torch.no_grad():  # what is no sketch's error is the loss of a network that predicts zero
        plain = loss_of(config_of(tiny_corpus, drop_z_i=0.0, drop_text=0.0), clip)(ZeroNetwork(), drawn(rows))[0]
        loss, metrics = loss_fn(decoder, drawn(rows))
    assert torch.isclose(loss - metrics["sketch"], plain, atol=1e-5)


@pytest.mark.parametrize("z_t_width", [None, 12])
def test_a_sketch_alone_is_trained_as_beside_the_rest(tiny_corpus: Path, clip: RememberedCLIP, rows, z_t_width):
    model = {"sketch_side": 8, "z_t_width": z_t_width}
    options: dict[str, Any] = {"drop_z_i": 0.0, "drop_text": 0.0, "model": model}
    beside, alone = (config_of(tiny_corpus, **options, sketch_alone=flag) for flag in (False, True))
    torch.manual_seed(0)
    decoder = Decoder(**alone.model)  # the U-Net's output starts at zero, and so does what its error says of conditions
    gradients = []
    for config in (beside, alone):
        loss, metrics = loss_of(config, clip)(decoder, drawn(rows))
        decoder.zero_grad()
        loss.backward()
        gradients.append({name: p.grad.clone() for name, p in decoder.named_parameters() if p.grad is not None})
    assert loss == metrics["sketch"]
    heard = "time_text.weight" if z_t_width is None else "time_z_t.weight"
    assert {"sketch.layers.1.weight", "time_z_i.weight", heard} <= gradients[1].keys()
    freeze_all_but_sketch(decoder)
    assert {name for name, p in decoder.named_parameters() if p.requires_grad} == {
        name for name, gradient in gradients[1].items() if name.partition(".")[0] != "context_z_i"
    }
    for name, gradient in gradients[1].items():
        torch.testing.assert_close(gradient, gradients[0][name])


def loss_of(config: DecoderConfig, clip: RememberedCLIP, spread: Tensor | None = None):
    scheduler = make_scheduler(config.schedule, config.prediction, config.model["learned_variance"])
    return decoder_loss(config, clip, Diffusion.from_scheduler(scheduler), spread)


def randomised(**changes) -> Decoder:
    torch.manual_seed(0)
    decoder = Decoder(**{**MODEL, **changes})
    for parameter in decoder.parameters():
        nn.init.normal_(parameter, std=0.1)
    return decoder


def test_loss_is_the_error_and_a_function_of_the_draws(tiny_corpus: Path, clip: RememberedCLIP, rows, answering):
    loss_fn = loss_of(config_of(tiny_corpus, prediction="sample"), clip)
    x0 = to_pixels(rows["image"])
    net = answering(x0)
    assert loss_fn(net, drawn(rows))[0] == 0
    net.answer = torch.zeros_like(x0)
    assert loss_fn(net, drawn(rows))[0].item() == pytest.approx(x0.square().mean().item())
    loss_fn(net, drawn(rows, step=1))
    first, again, other = net.asked
    assert torch.equal(first["x_t"], again["x_t"]) and torch.equal(first["t"], again["t"])
    assert not torch.equal(first["x_t"], other["x_t"]) and not torch.equal(first["t"], other["t"])
    assert torch.allclose(first["z_i"], clip.clip.encode_image(x0), atol=1e-6)


def test_rows_do_not_depend_on_their_batch(tiny_corpus: Path, clip: RememberedCLIP, rows):
    """The mean of the losses of two halves is the loss of the whole: what accumulation and processes rest on."""
    loss_fn, net = loss_of(config_of(tiny_corpus), clip), randomised()
    dataset = ShardDataset(DataConfig(str(tiny_corpus)))
    halves = []
    for half in (range(8), range(8, 16)):
        batch = {**collate([dataset[i] for i in half]), "draws": Draws(0, 0, half)}
        halves.append(loss_fn(net, batch)[0].item())
    assert sum(halves) / 2 == pytest.approx(loss_fn(net, drawn(rows))[0].item(), rel=1e-5)


def test_dropped_z_i_has_no_gradient_at_all(tiny_corpus: Path, clip: RememberedCLIP, rows):
    """A `z_i` stored with the data is taken as it is, so that it can be asked for its gradient."""
    for probability, dropped in ((1.0, True), (0.0, False)):
        z_i = clip.encode_image(to_pixels(rows["image"])).clone().requires_grad_()
        config = config_of(tiny_corpus, drop_z_i=probability, drop_text=0.0)
        loss_of(config, clip)(randomised(), {**drawn(rows), "z_i": z_i})[0].backward()
        assert z_i.grad is not None
        assert bool((z_i.grad == 0).all()) == dropped
        assert bool(z_i.grad.any(dim=1).all()) != dropped


@pytest.mark.parametrize("z_t_width", [None, 12])
def test_dropped_text_changes_nothing(tiny_corpus: Path, clip: RememberedCLIP, rows, z_t_width: int | None):
    others = {**rows, "captions": [["a word", "another"]] * 16}
    for probability, dropped in ((1.0, True), (0.0, False)):
        model = {"z_t_width": z_t_width}
        loss_fn = loss_of(config_of(tiny_corpus, drop_z_i=0.0, drop_text=probability, model=model), clip)
        losses = [loss_fn(randomised(**model), drawn(batch))[0].item() for batch in (rows, others)]
        assert (losses[0] == pytest.approx(losses[1], abs=1e-6)) == dropped


def test_conditions_are_dropped_as_often_as_asked_and_independently(
    tiny_corpus: Path, clip: RememberedCLIP, rows, answering
):
    config = config_of(tiny_corpus)
    assert (config.drop_z_i, config.drop_text) == (0.1, 0.5)  # §2.1
    net, loss_fn = answering(torch.zeros(16, 3, 32, 32)), loss_of(config, clip)
    for step in range(60):
        loss_fn(net, drawn(rows, step))
    z_i, text = (torch.cat([asked[name] for asked in net.asked]).float() for name in ("drop_z_i", "drop_text"))
    assert z_i.mean().item() == pytest.approx(0.1, abs=0.03)
    assert text.mean().item() == pytest.approx(0.5, abs=0.05)
    assert (z_i * text).mean().item() == pytest.approx(0.05, abs=0.02)


@pytest.mark.parametrize(
    "changes",
    [
        {"prediction": "sample"},
        {"prediction": "epsilon", "weighting": "min_snr"},
        {"prediction": "sample", "model": {"text_width": None}},
        {"prediction": "sample", "model": {"z_t_width": 12, "null_z_i": "zeros"}},
    ],
)
def test_overfits_one_batch(tiny_corpus: Path, clip: RememberedCLIP, changes: dict):
    config = config_of(tiny_corpus, drop_z_i=0.0, drop_text=0.0, **changes)
    dataset = ShardDataset(config.data)
    batch = collate([dataset[i] for i in range(4)])
    torch.manual_seed(0)
    decoder, loss_fn = Decoder(**config.model), loss_of(config, clip)
    optimizer = torch.optim.Adam(decoder.parameters(), 5e-3)
    losses = []
    for _ in range(50):
        optimizer.zero_grad()
        loss = loss_fn(decoder, drawn(batch))[0]
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 3


@pytest.mark.parametrize("changes", [{}, {"text_width": None}, {"z_t_width": 12}])
def test_samples_for_the_grid(tiny_corpus: Path, clip: RememberedCLIP, rows, changes: dict):
    sample_fn = decoder_samples(clip, make_scheduler("cosine", "v_prediction"), steps=3)
    with torch.no_grad():
        pictures = sample_fn(randomised(**changes).eval(), drawn(rows))
        assert pictures.shape == (16, 3, 32, 32)
        assert pictures.abs().max() <= 1 + 1e-6
        assert torch.equal(pictures, sample_fn(randomised(**changes).eval(), drawn(rows)))
    assert not torch.allclose(pictures[0], pictures[8], atol=1e-2)


def test_a_run_learns_and_leaves_a_folder_that_loads(tiny_corpus: Path, tiny_clip: Path, tmp_path: Path):
    """With the tracker that most use, which is handed pictures."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = {"steps": 40, "log_every": 5, "tracker": "tensorboard"}
    config = config_of(tiny_corpus, tmp_path, tiny_clip, prediction="sample", train=settings)
    config.validation = DataConfig(str(tiny_corpus), limit=8)
    folder = run(config)
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in log if "loss" in line]
    assert losses[-1] < losses[0] / 2
    assert log[-1]["validation/loss"] < losses[0]
    assert {k: Decoder.from_pretrained(folder).config[k] for k in MODEL} == {
        k: list(v) if isinstance(v, tuple) else v for k, v in MODEL.items()
    }
    scheduler = json.loads((tmp_path / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["prediction_type"] == "sample"
    events = EventAccumulator(str(next((tmp_path / "logs").rglob("events*")).parent))
    events.Reload()
    assert {"loss", "validation/loss", "images_per_second"} <= set(events.Tags()["scalars"])
    images = [events.Images(tag) for tag in events.Tags()["images"]]
    assert images and (images[0][0].width, images[0][0].height) == (32 * 8, 32)
    assert not [p for p in tmp_path.rglob("*") if p.name.endswith((".partial", ".old"))]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"clip": "no/such/folder"}, "no CLIP folder no/such/folder"),
        ({"data": "nowhere"}, "no corpus folder nowhere"),
        ({"model": {"z_i_width": 13}}, r"z_i has shape \(8, 12\); this decoder expects \(b, 13\)"),
        ({"model": {"text_width": 20}}, r"text has shape .*20"),
        ({"model": {"colours": 3}}, "colours"),
        ({"model": {"attention_resolutions": (7,)}}, r"attention_resolutions name \[7\]"),
        ({"swap_captions": 1.5}, r"swap_captions is 1.5; expected a part of the samples"),
        ({"noisy_share": -0.1}, r"noisy_share is -0.1; expected a part of the samples"),
        ({"noisy_from": 1000}, "noisy_from is 1000; expected a step, 0 to 999"),
        ({"own_share": 0.5}, "own_share needs the prediction sample, and it is epsilon"),
        ({"edges": 1.0}, "edges needs the prediction sample, and it is epsilon"),
        ({"edges": -1.0}, "edges is -1.0; expected a weight"),
        ({"own_share": 0.5, "prediction": "sample", "model": {"learned_variance": True}}, "L_vlb knows nothing"),
        ({"sketch_alone": True}, "sketch_alone trains a sketch, and the model has none"),
        ({"sketch_alone": True, "model": {"sketch_side": 8}, "noisy_share": 0.1}, "noisy_share does nothing"),
        ({"z_i_noise": -1.0}, r"z_i_noise is -1.0; expected deviations"),
        ({"weighting": "snr_plus_one"}, "snr_plus_one has no bound for the prediction epsilon"),
    ],
)
def test_what_does_not_fit_is_one_sentence(tiny_corpus: Path, tiny_clip: Path, tmp_path: Path, changes, sentence: str):
    changes = {"clip": str(tiny_clip), "data": str(tiny_corpus), **changes}
    config = config_of(Path(changes.pop("data")), tmp_path / "out", **changes)
    with pytest.raises((ValueError, TypeError, OSError), match=sentence) as caught:
        run(config)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out" / "model").exists() and not (tmp_path / "out" / "checkpoints").exists()


def test_an_earlier_run_is_left_as_it_is(tiny_corpus: Path, tiny_clip: Path, tmp_path: Path):
    run(config_of(tiny_corpus, tmp_path, tiny_clip))
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(ValueError, match="add --resume"):
        run(config_of(tiny_corpus, tmp_path, tiny_clip, prediction="sample", schedule="linear"))
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_a_run_goes_on_only_as_it_began(tiny_corpus: Path, tiny_clip: Path, tmp_path: Path):
    run(config_of(tiny_corpus, tmp_path, tiny_clip))
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    more = {"steps": 2, "resume": True}
    for changes, sentence in (
        ({"prediction": "sample"}, "prediction_type is 'epsilon', the config says 'sample'"),
        ({"schedule": "linear"}, "beta_schedule is 'squaredcos_cap_v2', the config says 'linear'"),
        ({"model": {"learned_variance": True}}, "learned_variance is False, the config says True"),
        ({"model": {"head_channels": 16}}, "head_channels is 8, the config says 16"),  # no weight's shape shows it
    ):
        with pytest.raises(ValueError, match=sentence):
            run(config_of(tiny_corpus, tmp_path, tiny_clip, train=more, **changes))
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    run(config_of(tiny_corpus, tmp_path, tiny_clip, train=more, model={"dropout": 0.1}))
    assert (tmp_path / "checkpoints" / "step-00000002").is_dir()


def test_the_command_says_in_one_line_what_was_wrong(tiny_corpus: Path, tmp_path: Path):
    recipe = tmp_path / "decoder.yaml"
    train = "{out: o, steps: 1, batch_size: 1}"
    recipe.write_text(f"model: {{}}\nclip: no/such/folder\ndata: {{path: {tiny_corpus}}}\ntrain: {train}\n")
    with pytest.raises(SystemExit, match=r"error: .*no/such/folder"):
        main(DecoderConfig, run, ["--config", str(recipe)])
