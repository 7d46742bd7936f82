"""Assembling: five trainings' outputs become one folder, or one sentence."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from unclip.assemble import assemble
from unclip.cli import main
from unclip.pipeline import UnCLIP


def listing(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def test_an_assembled_model_draws_what_its_stages_drew(tiny_stages: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "card.md").write_text("# Tiny\n")
    (tmp_path / "concepts.txt").write_text("red apple\n")
    presets = {"default": {"decoder": {"steps": 3}, "prior": {"steps": 2}}, "one": {"decoder": {"steps": 1}}}
    (tmp_path / "presets.json").write_text(json.dumps(presets))
    out = assemble(
        tmp_path / "model",
        **tiny_stages,
        dtype="fp32",
        card=tmp_path / "card.md",
        presets=tmp_path / "presets.json",
        files=[tmp_path / "concepts.txt"],
    )
    assert (out / "README.md").read_text() == "# Tiny\n"
    assert (out / "concepts.txt").read_text() == "red apple\n"
    pipe = UnCLIP.from_pretrained(out)
    assert pipe.sizes == [16, 64, 256]
    assert pipe.settings()["decoder"].steps == 3
    assert pipe.settings("one")["decoder"].steps == 1
    assert pipe.config["license"] == "apache-2.0"
    from decoder.decoder import Decoder

    decoder = Decoder.from_pretrained(tiny_stages["decoder"] / "model")
    for name, value in decoder.state_dict().items():
        assert torch.equal(value, pipe.decoder.state_dict()[name])
    assert pipe("a red apple", size=64).images[0].size == (64, 64)


def test_the_command_stores_fp16_in_small_files(tiny_stages: dict[str, Path], tmp_path: Path, capsys) -> None:
    options = [f"--{name.replace('_', '-')}={folder}" for name, folder in tiny_stages.items()]
    with pytest.raises(SystemExit) as caught:
        main(["assemble", *options, f"--out={tmp_path / 'model'}", "--max-shard-size=20KB"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "model")
    weights = list((tmp_path / "model").rglob("*.safetensors"))
    assert max(path.stat().st_size for path in weights) < 40_000
    from unclip.folder import read_header

    types = {tensor["dtype"] for path in weights for tensor in read_header(path).values()}
    assert types == {"F16"}
    assert UnCLIP.from_pretrained(tmp_path / "model").dtype == torch.float32


def test_either_prior_will_do(tiny_stages: dict[str, Path], tmp_path: Path, capsys) -> None:
    from prior.autoregressive_prior import AutoregressivePrior

    small = {"width": 16, "depth": 1, "heads": 2, "components": 4, "buckets": 8, "dot_buckets": 4}
    prior = AutoregressivePrior(embedding_dim=16, text_width=24, context_length=24, **small)
    prior.save_pretrained(tmp_path / "ar" / "model")
    options = [f"--{name}={tiny_stages[name]}" for name in ("clip", "decoder")]
    with pytest.raises(SystemExit) as caught:
        main(["assemble", *options, f"--prior-ar={tmp_path / 'ar'}", f"--out={tmp_path / 'model'}"])
    assert caught.value.code == 0, capsys.readouterr().err
    pipe = UnCLIP.from_pretrained(tmp_path / "model")
    assert pipe.prior is None
    assert pipe("a red apple", steps=[None, 2]).images[0].size == (16, 16)
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main(["assemble", *options, f"--out={tmp_path / 'none'}"])
    assert caught.value.code == 2 and "neither prior nor prior_ar came" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_a_model_replaces_a_model_whole(tiny_stages: dict[str, Path], tmp_path: Path) -> None:
    first = {name: tiny_stages[name] for name in ("clip", "prior", "decoder")}
    out = assemble(tmp_path / "model", **tiny_stages)
    assemble(out, **first)
    assert UnCLIP.from_pretrained(out).sizes == [16]
    assert not any("upsampler" in name for name in listing(out))
    assert listing(tmp_path)[0] == "model"
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


def lose_model(stages: dict[str, Path]) -> None:
    shutil.rmtree(stages["prior"] / "model")


def lose_scheduler(stages: dict[str, Path]) -> None:
    shutil.rmtree(stages["decoder"] / "scheduler")


def swap(stages: dict[str, Path]) -> None:
    stages["upsampler_256"], stages["upsampler_1024"] = stages["upsampler_1024"], stages["upsampler_256"]


def mix(stages: dict[str, Path]) -> None:
    stages["prior"] = stages["decoder"]


def other_width(stages: dict[str, Path]) -> None:
    from prior.diffusion_prior import DiffusionPrior

    prior = DiffusionPrior(embedding_dim=20, text_width=24, width=32, depth=1, heads=2, context_length=24)
    shutil.rmtree(stages["prior"] / "model")
    prior.save_pretrained(stages["prior"] / "model")


def infinite(stages: dict[str, Path]) -> None:
    from decoder.decoder import Decoder

    decoder = Decoder.from_pretrained(stages["decoder"] / "model")
    with torch.no_grad():
        next(decoder.parameters()).fill_(1e6)
    decoder.save_pretrained(stages["decoder"] / "model")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lose_model, "prior/model is not there"),
        (lose_scheduler, "scheduler_config.json is not there"),
        (swap, "256 but what the stages before give 64"),
        (mix, "lacks the weights|does not load as DiffusionPrior"),
        (other_width, "embedding width is 20 but CLIP's is 16"),
        (infinite, "does not fit torch.float16"),
    ],
)
def test_stages_that_do_not_join_leave_nothing(damage, says: str, tiny_stages: dict[str, Path], tmp_path: Path) -> None:
    stages = {name: Path(shutil.copytree(folder, tmp_path / name)) for name, folder in tiny_stages.items()}
    damage(stages)
    before = listing(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=says) as caught:
        assemble(tmp_path / "out", **stages)
    assert "\n" not in str(caught.value)
    assert listing(tmp_path) == before


def test_bad_presets_and_cards_are_one_sentence(tiny_stages: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "presets.json").write_text("[1]")
    with pytest.raises(ValueError, match="holds list"):
        assemble(tmp_path / "out", **tiny_stages, presets=tmp_path / "presets.json")
    with pytest.raises(FileNotFoundError, match=r"card.md is not there"):
        assemble(tmp_path / "out", **tiny_stages, card=tmp_path / "card.md")
    assert not (tmp_path / "out").exists()
