"""The command lines of `unclip evals`: what they measure in, and that figures are the file's."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from unclip.cli import main


@pytest.fixture
def measure(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command of `unclip evals` on the tiny model; gives what it says."""

    def run(*words: object) -> str:
        with pytest.raises(SystemExit) as caught:
            main([str(word) for word in ("evals", *words, "--model", tiny_model, "--device", "cpu")])
        out, err = capsys.readouterr()
        assert not caught.value.code, err
        return out

    return run


@pytest.mark.parametrize(
    "command",
    [
        ("inversion", "--count", "4", "--steps", "2"),
        ("variations", "--count", "2", "--steps", "2", "--seeds", "3"),
        ("inpainting", "--count", "2", "--size", "256", "--given"),
        ("edits", "--count", "2", "--steps", "2", "--strengths", "0,0.5"),
    ],
)
def test_latents_are_measured_in_fp32_and_the_figures_say_so(
    command: tuple[str, ...], measure: Callable[..., str], sized_corpus: Path, tmp_path: Path
) -> None:
    corpus = () if command[0] == "edits" else ("--corpus", sized_corpus)
    large = (sized_corpus.with_name("tiny-256"),) if command[-1] == "--given" else ()
    figures = json.loads(measure(*command, *large, *corpus, "--json", tmp_path / "figures.json"))
    assert figures["dtype"] == "fp32"
    assert json.loads((tmp_path / "figures.json").read_text()) == figures
    if command[0] == "variations":
        assert figures["variations"]["seeds"] == 3
        assert figures["interpolations"]["pairs"] == 2
    if command[0] == "inpainting":
        assert (figures["given"], figures["size"], figures["one walk"]["known"]) == ("tiny-256", 256, 1.0)


@pytest.mark.parametrize(
    "command",
    [
        ("table", "--count", "6", "--size", "16", "--seed", "3"),
        ("synonyms", "--seed", "3", "--words"),
        ("upsamplers", "--count", "4", "--size", "64", "--strength", "0.5"),
        ("priors", "--count", "0", "--steps", "2", "--split", "train", "--limit", "6"),
        ("quiz", "--size", "16", "--seed", "3", "--out"),
    ],
)
def test_what_a_command_is_told_reaches_its_measure(
    command: tuple[str, ...], measure: Callable[..., str], sized_corpus: Path, tmp_path: Path
) -> None:
    (tmp_path / "words.txt").write_text("sole: blue fish\nquince: green pear\n", encoding="utf-8")
    path = {"--words": (tmp_path / "words.txt",), "--out": (tmp_path / "quiz",)}.get(command[-1], ())
    corpora = shutil.copytree(sized_corpus.parent, tmp_path / "corpora")  # which features are stored in
    corpus = ("--corpus", corpora / sized_corpus.name, "--json", tmp_path / "figures.json")
    more = () if command[0] == "quiz" else corpus
    out = measure(*command, *path, *more)
    if command[0] == "quiz":
        assert len(list((tmp_path / "quiz").glob("*.png"))) == 48
        return
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["model"] == "tiny" and out
    given = dict(zip(command[1::2], command[2::2], strict=False))
    told = {option.removeprefix("--"): value for option, value in given.items() if option[2:] in figures}
    if command[0] == "priors":
        assert {name.split(", ")[-1] for name in figures["rows"]} >= {"2 steps"}
        assert [splits["train"]["count"] for splits in figures["rows"].values()] == [6] * len(figures["rows"])
    else:
        assert told and (command[0] != "table" or list(figures["rows"]) == ["16"])
    assert {name: str(figures[name]) for name in told} == told
