"""A stage's command line."""

from dataclasses import dataclass

import pytest

from unclip.core.config import TrainConfig, parse


@dataclass
class Config:
    """Trains nothing."""

    model: dict[str, str]
    train: TrainConfig
    estimate_variance: int = 0


NEEDED = ["--model.text", "half-way", "--train.out", "runs/a-b", "--train.steps", "3"]


@pytest.mark.parametrize("dash", ["-", "_"])
@pytest.mark.parametrize("equals", [False, True])
def test_a_dash_in_an_option_is_as_good_as_an_underscore(dash: str, equals: bool) -> None:
    given = [("--estimate-variance", "256"), ("--train.batch-size", "8"), ("--model.kind", "one-two=three-four")]
    words = []
    for name, value in given:
        name = name[:2] + name[2:].replace("-", dash)
        words += [f"{name}={value}"] if equals else [name, value]
    config = parse(Config, [*NEEDED, *words])
    assert (config.estimate_variance, config.train.batch_size) == (256, 8)
    assert config.model == {"text": "half-way", "kind": "one-two=three-four"}
    assert config.train.out == "runs/a-b"


def test_the_words_of_the_process_are_read_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["prior.train", *NEEDED, "--train.batch-size", "8", "--estimate-variance", "7"])
    assert parse(Config).estimate_variance == 7


def test_config_from_file_with_overrides(tmp_path):
    from decoder.train import DecoderConfig

    file = tmp_path / "decoder.yaml"
    file.write_text("model: {patch_size: 2}\nclip: a\ntrain: {out: b, steps: 5, batch_size: 2}\ndata: {path: c}\n")
    options = ["--train.steps", "7", "--drop_text", "0.2", "--model.patch_size", "4", "--resume"]
    config = parse(DecoderConfig, ["--config", str(file), *options])
    assert (config.train.steps, config.train.batch_size, config.drop_text, config.train.resume) == (7, 2, 0.2, True)
    assert config.model == {"patch_size": 4}
    assert config.data.path == "c"
