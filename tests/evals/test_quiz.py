"""The quiz: fair questions, sheets that hold the pictures, and scores of known answers."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unclip.evals.quiz import evaluate, question_sheet, questions, read_answers, score
from unclip.evals.sheets import CAPTIONS, read_captions

WORDS = [f"a thing number {i}" for i in range(12)]


def test_the_right_caption_is_among_ten_at_any_place() -> None:
    captions = read_captions(CAPTIONS)
    asked = questions(captions)
    assert len(asked) == len(captions) == 48
    assert [question.caption for question in asked] == captions
    assert all(len(set(question.options)) == 10 for question in asked)
    assert set(Counter(question.right for question in asked)) == set(range(1, 11))
    others = Counter(option for question in asked for option in question.options)
    assert min(others.values()) > 1  # each is a wrong answer too, so that a caption seen once more says nothing
    assert questions(captions) == asked != questions(captions, seed=1)


def test_a_sheet_shows_the_picture_as_it_is() -> None:
    picture = Image.effect_noise((64, 64), 80).convert("RGB")
    sheet = np.array(question_sheet(picture, "1 of 12", WORDS[:10], side=64))
    assert (sheet[12:76, 12:76] == np.array(picture)).all()
    assert (sheet[80:] < 128).any()  # words below
    longer = question_sheet(picture, "1 of 12", ["a very long caption " * 9, *WORDS[:9]], side=64)
    assert longer.height > sheet.shape[0]
    assert longer.width == sheet.shape[1]


@pytest.fixture(scope="module")
def folder(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("quiz")
    (root / "captions.txt").write_text("\n".join(WORDS), encoding="utf-8")
    return evaluate(str(tiny_model), root / "asked", root / "captions.txt", seed=3, size=16)


def test_a_folder_has_a_sheet_for_each_picture_and_tells_nothing(folder: Path) -> None:
    sheets = sorted(path.name for path in folder.glob("*.png"))
    assert sheets == [f"{i:02d}.png" for i in range(1, 13)]
    assert sorted(path.name for path in folder.iterdir() if path.suffix != ".png") == ["answers.txt", "key.json"]
    assert read_answers(folder / "answers.txt", 12) == [None] * 12


def test_answers_are_scored(folder: Path, tmp_path: Path) -> None:
    truth = [question["right"] for question in json.loads((folder / "key.json").read_text())["questions"]]
    path = tmp_path / "answers.txt"
    path.write_text("# mine\n" + "".join(f"{i} : {right}\n" for i, right in enumerate(truth, 1)))
    found = score(folder, path)
    assert (found["right"], found["count"], found["answered"], found["wrong"]) == (12, 12, 12, {})
    said = truth[0] % 10 + 1
    path.write_text(f"1: {said}\n3:\n" + "".join(f"{i}: {truth[i - 1]}\n" for i in range(4, 13)))
    found = score(folder, path)
    assert (found["right"], found["answered"]) == (9, 10)
    assert found["wrong"]["1"]["is"] == WORDS[0] != found["wrong"]["1"]["said"]
    assert found["wrong"]["2"] == {"said": None, "is": WORDS[1]}
    assert score(folder, folder / "answers.txt")["right"] == 0


def test_bad_input_is_named_and_loses_nothing(folder: Path, tiny_model: Path, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(FileExistsError, match="answers may be in it"):
        evaluate(str(tiny_model), folder, None, size=16)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    with pytest.raises(ValueError, match="9 different captions"):
        questions(WORDS[:9])
    with pytest.raises(ValueError, match="no twins"):
        questions([*WORDS, WORDS[0]])
    path = tmp_path / "answers.txt"
    for wrong in ("13: 1", "1: 11", "1: 0", "one: 1", "1: a red apple", "2: 1\n2: 3"):
        path.write_text(f"{wrong}\n")
        with pytest.raises(ValueError, match="has the line"):
            score(folder, path)
    with pytest.raises(FileNotFoundError, match="holds no quiz"):
        score(tmp_path, path)
