"""The training loop: what it must leave unchanged (processes, interruption, accumulation), and what it must refuse."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import Dataset

from unclip.core import checkpoint
from unclip.core.config import TrainConfig, main, parse
from unclip.core.data import DataConfig
from unclip.core.optimizer import learning_rate, optimizer_of
from unclip.core.train import Batch, _order, datasets_of, rows_of, train


class Pictures(Dataset):
    """Ten 4×4 pictures, each of one grey."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> dict:
        return {"image": torch.full((3, 4, 4), 20 * index, dtype=torch.uint8), "captions": [str(index)], "index": index}


class Affine(ModelMixin, ConfigMixin):
    @register_to_config
    def __init__(self, width: int = 48, dropout: float = 0.0):
        super().__init__()
        self.layer, self.drop = nn.Linear(width, width), nn.Dropout(dropout)
        nn.init.eye_(self.layer.weight)
        nn.init.zeros_(self.layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.layer(x))


def loss_fn(model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    x0 = batch["image"].flatten(1).float() / 255
    noise = batch["draws"].normal(48)
    loss = (model(x0 + noise) - x0).square().mean()
    return loss, {"mean": x0.mean()}


def config_of(out: Path, **kwargs) -> TrainConfig:
    defaults = {"steps": 6, "batch_size": 4, "learning_rate": 1e-2, "warmup": 2, "precision": "no", "tracker": "none"}
    return TrainConfig(out=str(out), **{**defaults, "log_every": 1, "save_every": 100, **kwargs})


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "diffusion_pytorch_model.safetensors")


def losses(out: Path, name: str = "loss") -> list[float]:
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


def test_resuming_gives_the_uninterrupted_run(tmp_path):
    """Dropout, too, whose randomness is torch's own."""
    whole = train(config_of(tmp_path / "whole", ema=0.5), Affine(dropout=0.5), loss_fn, Pictures())

    def stopping(model, batch):
        if batch["draws"].step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return loss_fn(model, batch)

    config = config_of(tmp_path / "parts", ema=0.5)
    with pytest.raises(KeyboardInterrupt, match="stopped after step 3 of 6; go on with --resume"):
        train(config, Affine(dropout=0.5), stopping, Pictures())
    assert [p.name for p in checkpoint.states(tmp_path / "parts")] == ["step-00000003"]
    parts = train(replace(config, resume=True), Affine(dropout=0.5), loss_fn, Pictures())
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(parts)[name])


def test_accumulation_changes_nothing(tmp_path):
    once = train(config_of(tmp_path / "once"), Affine(), loss_fn, Pictures())
    twice = train(config_of(tmp_path / "twice", accumulation=2), Affine(), loss_fn, Pictures())
    assert losses(tmp_path / "once") == pytest.approx(losses(tmp_path / "twice"), rel=1e-5)
    for name, tensor in weights(once).items():
        assert torch.allclose(tensor, weights(twice)[name], atol=1e-6)


def test_a_network_that_was_loaded_trains_in_training_mode(tmp_path):
    modes = []

    def watching(model, batch):
        modes.append(model.training)
        return loss_fn(model, batch)

    train(config_of(tmp_path, steps=2, validate_every=1), Affine().eval(), watching, Pictures(), Pictures())
    assert modes[0] and modes[-1] is False and True in modes[1:]  # validation in evaluation mode, then back


@pytest.mark.parametrize(("native", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_auto_precision_is_bf16_where_that_is_native(tmp_path, monkeypatch, native, dtype):
    monkeypatch.setattr("unclip.core.train.computes_bf16", lambda device: native)
    monkeypatch.setattr("accelerate.state.AcceleratorState._shared_state", {})  # else a process has one precision
    model, seen = Affine(), set()
    model.layer.register_forward_hook(lambda layer, inputs, output: seen.add(output.dtype))
    train(config_of(tmp_path, steps=1, precision="auto"), model, loss_fn, Pictures())
    assert seen == {dtype}


CONTEXT = {"z_i_width": 12, "z_i_tokens": 2, "text_width": 16, "context_width": 16, "learned_variance": False}
ATTENTION = {"sample_size": 32, "patch_size": 4, "attention_resolutions": [4], "head_channels": 8}
UNET = {"model_channels": 8, "channel_multipliers": [1, 2], "num_res_blocks": 1, **ATTENTION, **CONTEXT}
IMAGE = {"image_size": 32, "patch_size": 16, "image_width": 16, "image_depth": 1, "image_heads": 2}
TEXT = {"text_width": 16, "text_depth": 1, "text_heads": 2, "vocab_size": 259, "context_length": 24}


@pytest.mark.parametrize("stage", ["decoder", "sketch", "clip"])
def test_two_processes_equal_one(tmp_path, tiny_corpus, tiny_clip, stage):
    """A stage's own command under `accelerate launch`, on CPUs, with validation at the end."""
    if stage in ("decoder", "sketch"):
        from decoder.train import DecoderConfig as StageConfig
        from decoder.train import run

        module, own = "decoder.train", {"model": UNET, "clip": str(tiny_clip)}
        own |= {"model": {**UNET, "sketch_side": 8}, "sketch_alone": True} if stage == "sketch" else {}
    else:
        from unclip.clip.train import CLIPConfig as StageConfig
        from unclip.clip.train import run

        module, own = "unclip.clip.train", {"model": {"dim": 12, **IMAGE, **TEXT}, "shift": 0.1}
    one, two, recipe = tmp_path / "one", tmp_path / "two", tmp_path / "recipe.yaml"
    data = {"data": {"path": str(tiny_corpus)}, "validation": {"path": str(tiny_corpus), "limit": 6}}
    recipe.write_text(json.dumps({**own, **data, "train": asdict(config_of(one, steps=3))}))
    run(parse(StageConfig, ["--config", str(recipe)]))
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    defaults = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    command = [*launch, *defaults, "-m", module, "--config", str(recipe), "--train.out", str(two)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    assert len(list(checkpoint.newest(two).glob("random_states_*"))) == 2
    for name in ("loss", "grad_norm", "validation/loss"):
        assert len(losses(one, name)) == (1 if name == "validation/loss" else 3)
        assert losses(one, name) == pytest.approx(losses(two, name), rel=1e-5), name


def test_exports_the_averaged_weights(tmp_path):
    folder = train(config_of(tmp_path, ema=0.9), Affine(), loss_fn, Pictures())
    state = checkpoint.states(tmp_path)[-1]
    averaged, raw = load_file(state / checkpoint.EMA_FILE), load_file(state / "model.safetensors")
    exported = Affine.from_pretrained(folder).state_dict()
    for name, tensor in exported.items():
        assert torch.equal(tensor, averaged[name])
        assert not torch.equal(tensor, raw[name])


def test_a_loss_that_is_not_finite_stops_and_saves_nothing(tmp_path):
    def broken(model, batch):
        loss, metrics = loss_fn(model, batch)
        return (loss * float("nan") if batch["draws"].step == 3 else loss), metrics

    with pytest.raises(FloatingPointError, match=r"no longer finite near step 4"):
        train(config_of(tmp_path, save_every=2), Affine(), broken, Pictures())
    assert [p.name for p in checkpoint.states(tmp_path)] == ["step-00000002"]


def test_no_half_written_folder_is_left(tmp_path):
    train(config_of(tmp_path, save_every=2, keep=1), Affine(), loss_fn, Pictures())
    assert [p.name for p in checkpoint.states(tmp_path)] == ["step-00000006"]
    assert not [p for p in tmp_path.rglob("*") if p.name.endswith((".partial", ".old"))]


def test_each_epoch_sees_each_sample_once():
    config = config_of(Path("unused"))
    seen = [index for step in range(5) for _, index in rows_of(step, config, 10)]
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert seen[:10] != seen[10:]


def test_an_epoch_is_drawn_once_and_as_ever():
    config = config_of(Path("unused"), seed=3)
    expected = []
    for epoch in range(4):
        expected += torch.randperm(10, generator=torch.Generator().manual_seed(3 * 1_000_003 + epoch)).tolist()
    _order.cache_clear()
    for step in range(10):
        rows = [(i, expected[4 * step + i]) for i in range(4)]
        assert rows_of(step, config, 10) == rows_of(step, config, 10) == rows
    assert _order.cache_info().misses == 4


def test_processes_share_out_the_whole_batch():
    config = config_of(Path("unused"))
    halves = rows_of(3, config, 10, 0, 2) + rows_of(3, config, 10, 1, 2)
    assert halves == rows_of(3, config, 10)


def test_learning_rate_warms_up_and_decays():
    config = config_of(Path("unused"), steps=10, warmup=4, decay=5, learning_rate=1.0)
    rates = [learning_rate(config, step) for step in range(10)]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 0.8, 0.6, 0.4, 0.2])


def test_decay_spares_vectors_and_rates_scale_by_name():
    groups = optimizer_of(
        Affine(), config_of(Path("unused"), weight_decay=0.1, lr_scales={"layer.w": 0.5})
    ).param_groups
    assert [(g["weight_decay"], g["scale"], g["params"][0].ndim) for g in groups] == [(0.1, 0.5, 2), (0.0, 1.0, 1)]


def test_a_rate_for_parameters_that_are_not_there_is_refused():
    with pytest.raises(ValueError, match=r"lr_scales names layers\., .* such as layer\.weight"):
        optimizer_of(Affine(), config_of(Path("unused"), lr_scales={"layer.b": 0.5, "layers.": 0.5}))


def test_a_background_of_validation_alone_is_refused(tiny_corpus):
    data = DataConfig(str(tiny_corpus), background=0.2)
    for background in (0.0, 0.2):
        assert datasets_of(data, replace(data, background=background))[1] is not None
    with pytest.raises(ValueError, match=r"validation.background is 0.5, .* data.background says, 0.2"):
        datasets_of(data, replace(data, background=0.5))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"gradient_checkpointing": True}, "Affine has no gradient checkpointing"),
        ({"batch_size": 5, "accumulation": 2}, "batch_size 5 cannot be split"),
        ({"steps": 0}, r"train\.steps is 0"),
        ({"log_every": 0}, r"train\.log_every is 0"),
        ({"keep": 0}, r"train\.keep is 0"),
        ({"clip_grad": 0.0}, r"train\.clip_grad is 0"),
        ({"clip_grad": -1.0}, r"train\.clip_grad is -1"),
        ({"ema": 1.0}, r"train\.ema is 1"),
        ({"resume": True}, "no training state under"),
    ],
)
def test_refuses_what_cannot_run(tmp_path, change, sentence):
    with pytest.raises((ValueError, FileNotFoundError), match=sentence):
        train(config_of(tmp_path, **change), Affine(), loss_fn, Pictures())


def test_refuses_to_write_over_an_earlier_run(tmp_path):
    train(config_of(tmp_path), Affine(), loss_fn, Pictures())
    with pytest.raises(ValueError, match="earlier run: add --resume"):
        train(config_of(tmp_path), Affine(), loss_fn, Pictures())


def test_refuses_the_state_of_another_network(tmp_path):
    config = config_of(tmp_path)
    train(config, Affine(), loss_fn, Pictures())
    resumed = replace(config, resume=True, steps=8)
    with pytest.raises(ValueError, match="width is 48, the config says 12"):
        train(resumed, Affine(width=12), loss_fn, Pictures())
    shutil.rmtree(tmp_path / "model")  # as where a run was killed before it wrote one
    with pytest.raises(ValueError, match=r"does not fit this network \(layer.bias is \(48,\) there and \(12,\) here"):
        train(resumed, Affine(width=12), loss_fn, Pictures())


@pytest.mark.parametrize("file", ["ema.safetensors", "model.safetensors", "optimizer.bin"])
def test_a_truncated_state_is_one_sentence_that_helps(tmp_path, file):
    config = config_of(tmp_path, save_every=2)
    whole = weights(train(config, Affine(), loss_fn, Pictures()))
    newest = checkpoint.states(tmp_path)[-1]
    os.truncate(newest / file, (newest / file).stat().st_size // 2)
    config = replace(config, resume=True)
    with pytest.raises(ValueError, match="remove it and --resume goes on from step-00000004") as caught:
        train(config, Affine(), loss_fn, Pictures())
    assert "\n" not in str(caught.value)
    shutil.rmtree(newest)
    for name, tensor in weights(train(config, Affine(), loss_fn, Pictures())).items():
        assert torch.equal(tensor, whole[name])


def test_what_a_killed_run_leaves_is_no_state_and_goes(tmp_path):
    config = config_of(tmp_path)
    train(config, Affine(), loss_fn, Pictures())
    (whole,) = checkpoint.states(tmp_path)
    for name in (".step-00000006.1.old", "step-00000009.partial", ".step-00000009.1.old"):
        shutil.copytree(whole, whole.with_name(name))
    (whole.parent / "step-00000006-best").mkdir()
    (whole.parent / "step-00000006.tar").touch()
    assert checkpoint.states(tmp_path) == [whole]
    train(replace(config, resume=True, steps=8), Affine(), loss_fn, Pictures())
    kept = ["step-00000006", "step-00000006-best", "step-00000006.tar", "step-00000008"]
    assert sorted(path.name for path in whole.parent.iterdir()) == kept


def test_resuming_a_finished_run_exports_its_network(tmp_path):
    """A run killed between the two parts of saving leaves a network older than its state."""
    config = config_of(tmp_path, ema=0.5)
    folder = train(config, Affine(), loss_fn, Pictures())
    expected = weights(folder)
    Affine().save_pretrained(folder)
    train(replace(config, resume=True), Affine(), loss_fn, Pictures())
    for name, tensor in expected.items():
        assert torch.equal(tensor, weights(folder)[name])
    assert len(losses(tmp_path)) == 6


class Convolution(ModelMixin, ConfigMixin):
    @register_to_config
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.Conv2d(5, 3, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.unflatten(1, (3, 4, 4))).flatten(1)


@pytest.mark.parametrize("first", [False, True])
def test_the_order_in_memory_may_change_between_runs(tmp_path, first):
    """The moments of a state have the order of the run that saved them."""
    whole = train(config_of(tmp_path / "whole"), Convolution(), loss_fn, Pictures())
    config = config_of(tmp_path / "parts", steps=4, channels_last=first)
    train(config, Convolution(), loss_fn, Pictures())
    config = replace(config, steps=6, channels_last=not first, resume=True)
    parts = train(config, Convolution(), loss_fn, Pictures())
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)
    for name, tensor in weights(whole).items():
        assert torch.allclose(tensor, weights(parts)[name], atol=1e-6)


def test_a_resumed_run_follows_its_config(tmp_path):
    """The optimiser's state brings the settings of the run before along."""
    config = config_of(tmp_path)
    train(config, Affine(), loss_fn, Pictures())
    before = load_file(checkpoint.states(tmp_path)[-1] / "model.safetensors")
    train(replace(config, resume=True, steps=8, lr_scales={"layer": 0.0}), Affine(), loss_fn, Pictures())
    after = load_file(checkpoint.states(tmp_path)[-1] / "model.safetensors")
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name])
    with pytest.raises(ValueError, match=r"does not fit this optimiser .*train.lr_scales"):
        frozen = Affine()
        frozen.layer.bias.requires_grad_(False)
        train(replace(config, resume=True, steps=9), frozen, loss_fn, Pictures())


def test_a_command_ends_in_one_line(tmp_path, capsys):
    from decoder.train import DecoderConfig

    recipe = tmp_path / "decoder.yaml"
    recipe.write_text("model: {}\nclip: a\ntrain: {out: b, steps: 5, batch_size: 2}\ndata: {path: c}\n")

    def ending(error: BaseException):
        def run(_: object) -> None:
            raise error

        with pytest.raises(SystemExit) as caught:
            main(DecoderConfig, run, ["--config", str(recipe)])
        return caught.value.code

    assert ending(ValueError("this came:\n  that was expected")) == "error: this came: that was expected"
    assert ending(KeyboardInterrupt()) == 130
    assert capsys.readouterr().err == "interrupted; what was saved is kept.\n"


@pytest.mark.parametrize("room", [4_000, 12_000])  # for no file of weights; for those, but not for the moments
def test_a_full_disk_is_one_sentence_and_leaves_no_half_state(tmp_path, room: int):
    resource = pytest.importorskip("resource")
    from decoder.train import DecoderConfig

    config, recipe = config_of(tmp_path / "run", save_every=2), tmp_path / "decoder.yaml"
    recipe.write_text("model: {}\nclip: a\ntrain: {out: b, steps: 5, batch_size: 2}\ndata: {path: c}\n")
    before, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, most))  # a longer file cannot be written
    try:
        with pytest.raises(SystemExit) as caught:
            main(DecoderConfig, lambda _: train(config, Affine(), loss_fn, Pictures()), ["--config", str(recipe)])
        if room < 10_000:
            with pytest.raises(OSError, match="other could not be written"):
                checkpoint.export(Affine(), tmp_path / "new" / "other")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before, most))
    assert f"error: {config.out}/checkpoints/step-00000002 could not be written (" in str(caught.value.code)
    assert "make room" in str(caught.value.code) and "\n" not in str(caught.value.code)
    assert not list((tmp_path / "run" / "checkpoints").iterdir())
    assert not (tmp_path / "new").exists()


def test_the_launcher_says_no_more_than_the_command(tmp_path):
    root = Path(__file__).parents[2]
    options = ["--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command = ["-m", "unclip.clip.train", "--config", "recipes/own/clip.yaml", "--data.path", str(tmp_path / "nowhere")]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "-q", "--cpu", *options, *command]
    result = subprocess.run(launch, cwd=root, capture_output=True, text=True, timeout=240)
    assert result.returncode == 1
    assert f"error: There is no corpus folder {tmp_path / 'nowhere'}" in result.stderr
    assert "Traceback" not in result.stderr + result.stdout
