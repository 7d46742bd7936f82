"""`unclip evals clip`: the labels are the whole corpus's, and what a model knows is counted apart."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from unclip.cli import main
from unclip.clip.evaluate import evaluate as evaluate_split
from unclip.clip.model import CLIP
from unclip.core.data import DataConfig, ShardDataset
from unclip.evals.clip import evaluate

CONCEPTS = ["blue fish", "green pear", "red apple", "yellow star"]


def test_figures_are_of_all_concepts_and_of_the_known_ones_apart(
    copy_model: Callable[[], Path], sized_corpus: Path, tmp_path: Path
) -> None:
    folder, templates = copy_model(), ("{}", "a {}")
    (folder / "concepts.txt").write_text("red apple\nno such thing\n")
    found = evaluate(str(folder), sized_corpus, ["test-pair"], templates, tmp_path / "figures.json", "cpu")
    assert list(found) == ["test-pair", "test-pair, known"]
    assert [figures["count"] for figures in found.values()] == [4, 1]
    dataset = ShardDataset(DataConfig(str(sized_corpus), "test-pair"))
    expected = evaluate_split(CLIP.from_pretrained(folder), dataset, CONCEPTS, templates)
    assert found["test-pair"] == {name: round(value, 4) for name, value in expected.items()}
    assert json.loads((tmp_path / "figures.json").read_text()) == found


def test_the_command_takes_a_clip_alone(
    tiny_model: Path, sized_corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["evals", "clip", "--model", tiny_model / "clip", "--corpus", sized_corpus, "--split", "test-pair"]
    with pytest.raises(SystemExit) as caught:
        main([str(word) for word in (*words, "--device", "cpu")])
    out, err = capsys.readouterr()
    assert not caught.value.code, err
    assert json.loads(out) == evaluate(str(tiny_model), sized_corpus, ["test-pair"], device="cpu")


def test_the_embedded_model_goes_by_its_name(sized_corpus: Path) -> None:
    named, left_out = (evaluate(name, sized_corpus, ["test-pair"], device="cpu") for name in ("emoji", None))
    assert named == left_out


def test_a_template_without_a_place_is_one_sentence(tiny_model: Path, sized_corpus: Path) -> None:
    with pytest.raises(ValueError, match=r"the template 'a thing' has no \{\}, which stands for the concept"):
        evaluate(str(tiny_model), sized_corpus, templates=["a thing"])
