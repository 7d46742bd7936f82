"""README and docs/ say what is so: commands parse and the cheap ones run, code runs, links lead somewhere."""

import ast
import importlib
import json
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer.main
from PIL import Image

from unclip.cli import app, main
from unclip.clip.train import CLIPConfig
from unclip.core.config import parse
from unclip.folder import INDEX, WEIGHTS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
LANGUAGES = {"bash", "console", "python", "json", "bibtex"}
CONFIGS = {
    "unclip.clip.train": "CLIPConfig",
    "prior.train": "PriorConfig",
    "decoder.train": "DecoderConfig",
    "upsamplers.train": "UpsamplerConfig",
}
STORED = ("recipes/", "docs/", "notebooks/", "tests/", "unclip/", "constraints.txt", "pyproject.toml")
KINDS = ("generated", "ceiling", "floor")
MADE = ("docs/results/",)  # what a command writes, though its folder is stored


class Block(NamedTuple):
    page: str
    line: int
    language: str
    text: str


def blocks(*languages: str) -> list[Any]:
    """The fenced blocks of all pages in these languages, as parameters named by page and line."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in re.finditer(r"^```(\S*)\n(.*?)^```$", text, re.M | re.S):
            name, line = str(page.relative_to(ROOT)), text[: match.start()].count("\n") + 1
            block = Block(name, line, match[1], match[2])
            if not languages or block.language in languages:
                found.append(pytest.param(block, id=f"{name}:{line}"))
    return found


def commands() -> Iterator[Any]:
    """Every command of a shell block, its words, with continued lines joined and prompts and comments taken off."""
    for parameter in blocks("bash", "console"):
        block: Block = parameter.values[0]
        for line in block.text.replace("\\\n", " ").splitlines():
            if block.language == "bash" or line.startswith("$ "):
                words = shlex.split(line.removeprefix("$ "), comments=True)
                if words:
                    yield pytest.param(words, id=f"{block.page}:{block.line}: {' '.join(words)[:60]}")


COMMANDS = list(commands())


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))


# ------------------------------------------------------------------------------------------------ each kind of command


def check_make(words: list[str]) -> None:
    assert set(words) <= make_targets(), f"the Makefile has {sorted(make_targets())}"


def check_unclip(words: list[str]) -> None:
    command: Any = typer.main.get_command(app)
    names = ["unclip"]
    while hasattr(command, "commands"):
        assert words[0] in command.commands, f"{' '.join(names)} has no command {words[0]}"
        names.append(words[0])
        command, words = command.commands[words[0]], words[1:]
    try:
        command.make_context(" ".join(names), list(words))
    except Exception as error:
        raise AssertionError(f"{' '.join(names)} does not take {words}: {error}") from error


def check_module(module: str, words: list[str]) -> None:
    if module in CONFIGS:
        config = getattr(importlib.import_module(module), CONFIGS[module])
        if {"--help", "--print_config"} & set(words):
            with pytest.raises(SystemExit) as caught:
                parse(config, words)
            assert caught.value.code == 0
        else:
            parse(config, words)
    else:
        assert module == "pytest" or importlib.util.find_spec(module), f"there is no module {module}"


def check_accelerate(words: list[str]) -> None:
    from accelerate.commands.launch import launch_command_parser

    if words == ["config"]:
        return
    assert words[0] == "launch"
    arguments = launch_command_parser().parse_args(words[1:])
    assert arguments.module
    check_module(arguments.training_script, arguments.training_script_args)


def check_pip(words: list[str]) -> None:
    assert words[0] == "install"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for extras in re.findall(r"\[(.*?)\]", " ".join(words)):
        assert set(extras.split(",")) <= project["optional-dependencies"].keys()


def check(words: list[str]) -> None:
    """Raises where the program, an option or a stored file that a command names does not exist."""
    program, rest = words[0].rpartition("/")[2], words[1:]
    for word in rest:
        if word.startswith(STORED) and not word.startswith(MADE):
            assert (ROOT / word).exists(), f"{word} is not there"
    if program in ("python", "python3"):
        assert rest[0] == "-m"
        check_module(rest[1], rest[2:])
    elif program in ("tensorboard", "."):
        assert rest[0] in ("--logdir", ".venv/bin/activate")
    else:
        checks = {"make": check_make, "unclip": check_unclip, "accelerate": check_accelerate, "pip": check_pip}
        assert program in checks, f"this test knows no program {program}; teach it, or leave the command out"
        checks[program](rest)


# ------------------------------------------------------------------------------------------------ tests


@pytest.mark.parametrize("words", COMMANDS)
def test_commands_are_real(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    check(words)


@pytest.mark.parametrize(
    "command",
    [
        "unclip sample x --sizes 64",
        "unclip draw x",
        "make everything",
        "pip install '.[nothing]'",
        "python -m prior.train --config recipes/own/prior.yaml --train.speed 3",
        "python -m prior.train --config recipes/own/no.yaml",
        "accelerate launch -m decoder.train --config recipes/own/decoder.yaml --modle.sample_size 3",
        "wget x",
    ],
)
def test_a_wrong_command_would_be_noticed(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises((AssertionError, SystemExit)):
        check(shlex.split(command))


@pytest.fixture
def desk(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the pages take for granted: pictures of the reader's, the clone's folders, a model."""
    (tmp_path / "my-pictures").mkdir()
    for name, colour in (("a", "red"), ("b", "green")):
        Image.new("RGB", (40, 30), colour).save(tmp_path / "my-pictures" / f"{name}.png")
        (tmp_path / "my-pictures" / f"{name}.txt").write_text(f"a {colour} field")
    Image.new("RGB", (50, 40), "blue").save(tmp_path / "photo.png")
    Image.linear_gradient("L").resize((50, 40)).save(tmp_path / "mask.png")
    for name in ("recipes", "unclip"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "my-model").symlink_to(tiny_model)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def cheap(words: list[str]) -> bool:
    """Commands that take a second with a tiny model, which has the sizes 16, 64 and 256."""
    return words[:2] in (["unclip", "sample"], ["unclip", "pack"])


@pytest.mark.parametrize("words", [c for c in COMMANDS if cheap(c.values[0])])
def test_cheap_commands_run(words: list[str], desk: Path, tiny_model: Path, capsys: pytest.CaptureFixture) -> None:
    if words[1] == "sample":
        words = [*words, "--device", "cpu", "--dtype", "fp32"]
        words += [] if "--model" in words else ["--model", str(tiny_model)]
        words += [] if "--size" in words else ["--size", "16"]
    with pytest.raises(SystemExit) as caught:
        main(words[1:])
    assert not caught.value.code, capsys.readouterr().err
    assert Path(capsys.readouterr().out.splitlines()[-1]).exists()


# Its code needs Karlo's folders: `tests/convert` runs it
ELSEWHERE = ("docs/karlo.md",)


@pytest.mark.parametrize("block", [b for b in blocks("python") if b.values[0].page not in ELSEWHERE])
def test_code_runs(block: Block, desk: Path, tiny_model: Path) -> None:
    """As it stands, on a tiny model in the embedded one's place."""
    code = block.text.replace("from_pretrained(", f"from_pretrained({str(tiny_model)!r}, ")
    assert block.text.count("UnCLIP.from_pretrained(") == 1
    exec(compile(code, f"{block.page}:{block.line}", "exec"), {})


@pytest.mark.skipif(not (WEIGHTS / "emoji" / INDEX).is_file(), reason="this copy holds no embedded model")
def test_the_embedded_model_is_what_the_readme_says() -> None:
    from unclip import UnCLIP

    pipe = UnCLIP.from_pretrained()
    assert (pipe.model_name, pipe.sizes) == ("emoji", [64, 256, 1024])
    result = pipe("a red apple, glossy 3D", num_images=2, seed=0, size=64)
    assert [image.size for image in result.images] == [(64, 64)] * 2
    assert result.images == result.stages[64]
    assert result.image_embeds.shape == (2, pipe.clip.dim)
    weights = list((WEIGHTS / "emoji").rglob("*.safetensors"))
    assert max(path.stat().st_size for path in weights) <= 16 * 2**20
    assert sum(path.stat().st_size for path in weights) <= 64 * 2**20


@pytest.mark.parametrize("block", blocks())
def test_blocks_say_their_language(block: Block) -> None:
    assert block.language in LANGUAGES
    if block.language == "json":
        json.loads(block.text)
    if block.language == "python":
        ast.parse(block.text)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    local = [link.partition("#")[0] for link in links if not re.match(r"https?:|#", link)]
    assert [link for link in local if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", [*PAGES, ROOT / "recipes/emoji/card.md"], ids=lambda page: page.name)
def test_prose_is_plain(page: Path) -> None:
    """No emoji characters in it."""
    text = page.read_text(encoding="utf-8")
    assert not re.search("[\U0001f000-\U0001faff\u2600-\u27bf\ufe0f]", text)


def test_every_option_of_sample_is_in_the_readme() -> None:
    command: Any = typer.main.get_command(app)
    options = {name for p in command.commands["sample"].params for name in p.opts if name.startswith("--")}
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert {name for name in options - {"--help"} if f"`{name}" not in text} == set()


@pytest.mark.parametrize("module", CONFIGS)
def test_every_dial_is_in_the_training_page(module: str) -> None:
    from dataclasses import fields

    from unclip.core.config import TrainConfig
    from unclip.core.data import DataConfig

    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    config = getattr(importlib.import_module(module), CONFIGS[module])
    names = {f.name for cls in (config, TrainConfig, DataConfig) for f in fields(cls)} - {"train", "data", "resume"}
    assert {name for name in names if f"`{name}`" not in text} == set()


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes" / "own").glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_for_own_pictures_make_fitting_networks(recipe: Path) -> None:
    """Their networks exist, and widths and sizes fit each other."""
    import torch

    from decoder.decoder import Decoder
    from prior.diffusion_prior import DiffusionPrior
    from upsamplers.upsampler import Upsampler

    stage = recipe.stem.partition("_")[0]
    module = {"clip": "unclip.clip.train", "upsampler": "upsamplers.train"}.get(stage, f"{stage}.train")
    config = parse(getattr(importlib.import_module(module), CONFIGS[module]), ["--config", str(recipe)])
    clip = parse(CLIPConfig, ["--config", str(recipe.with_name("clip.yaml"))])
    assert config.train.out == f"runs/own/{recipe.stem}"
    if stage == "clip":
        return
    with torch.device("meta"):
        network: Any = {"prior": DiffusionPrior, "decoder": Decoder, "upsampler": Upsampler}[stage](**config.model)
    if stage == "decoder":
        assert network.config["z_i_width"] == clip.model.dim
        assert network.config["text_width"] == 384
    if stage == "upsampler":
        assert f"upsampler_{network.config['sample_size']}" == recipe.stem
        assert config.data.path == f"corpora/own-{network.config['sample_size']}"
        assert config.crop * 4 == network.config["sample_size"]


DECODER = (
    "--model.z_i_width 16 --model.text_width 16 --model.context_width 16 --model.model_channels 8 "
    "--model.head_channels 8 --model.sketch_width 16"
)
TINY = {
    "clip": "--model.text bpe --model.dim 16 --model.image_width 16 --model.image_depth 1 --model.image_heads 2 "
    "--model.text_width 16 --model.text_depth 1 --model.text_heads 2 --model.vocab_size 300 --train.lr_scales {}",
    "prior": "--model.width 32 --model.depth 1 --model.heads 2",
    "decoder_sketch": DECODER,
    "decoder": DECODER,
    "upsampler_256": "--model.model_channels 8",
    "upsampler_1024": "--model.model_channels 8",
}


def test_from_pictures_to_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """The commands of docs/training.md in their order, with tiny networks and two steps each."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    (tmp_path / "my-pictures").mkdir()
    for i, colour in enumerate(("red", "green", "blue", "black")):
        Image.new("RGB", (40 + i, 30), colour).save(tmp_path / "my-pictures" / f"{i}.png")
        (tmp_path / "my-pictures" / f"{i}.txt").write_text(f"a {colour} field\na plain picture in {colour}")
    page = [words for words in (c.values[0] for c in COMMANDS if c.id.startswith("docs/training.md"))]
    end = next(i for i, words in enumerate(page) if words[:2] == ["unclip", "sample"]) + 1
    small = shlex.split("--train.steps 2 --train.batch_size 2 --train.precision no --train.tracker none")
    trained = []
    for words in page[:end]:
        if words[0] == "unclip":
            extra = ["--size", "64", "--preset", "fast"] if words[1] == "sample" else []
            with pytest.raises(SystemExit) as caught:
                main([*words[1:], *extra])
            assert not caught.value.code, capsys.readouterr().err
        elif words[0] == "accelerate":
            module, arguments = words[words.index("-m") + 1], words[words.index("-m") + 2 :]
            trained.append(Path(arguments[1]).stem)
            config = parse(getattr(importlib.import_module(module), CONFIGS[module]),
                           [*arguments, *shlex.split(TINY[trained[-1]]), *small])  # fmt: skip
            importlib.import_module(module).run(config)
    assert list(dict.fromkeys(trained)) == list(TINY)  # one recipe may train two networks
    path = Path(capsys.readouterr().out.splitlines()[-1])
    assert path.name == "what-your-captions-say-0.png"
    with Image.open(path) as image:
        assert image.size == (64, 64)


@pytest.mark.parametrize("split", ["train", "test-pair"])
def test_readme_and_card_have_the_figures_of_the_file(split: str) -> None:
    """Of the command whose `--json` was stored as docs/results/concepts-SPLIT.json."""
    found = json.loads((ROOT / "docs" / "results" / f"concepts-{split}.json").read_text(encoding="utf-8"))
    generated, ceiling, floor = ([f"{found[of][k]:.1%}".replace("%", " %") for k in ("top1", "top5")] for of in KINDS)
    over = f"{found['generated']['top5'] / found['ceiling']['top5']:.3f}"
    pages = {"README.md": [ceiling[1]], "recipes/emoji/card.md": ceiling}
    for page, shown in pages.items():
        row = " | ".join([f"| `{split}`", *generated, *shown, floor[1], f"{over} |"])
        assert row in (ROOT / page).read_text(encoding="utf-8"), row
    assert found["count"] == 500 and found["best_of"] == 1 and found["preset"] == "default"
