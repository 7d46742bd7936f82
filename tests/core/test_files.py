"""What is written is whole or not there, whatever happens on the way, and what it replaces stays until then."""

import json
import os
from pathlib import Path

import pytest

from unclip.core.files import whole_file, whole_folder, write_json


def test_a_folder_takes_its_name_when_it_is_whole(tmp_path: Path):
    folder = tmp_path / "a" / "model"
    for text in ("first", "second"):
        with whole_folder(folder) as partial:
            (partial / text).write_text(text)
            assert not (folder / text).exists()
        assert [path.name for path in folder.iterdir()] == [text]
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_interrupted_folder_leaves_the_old_one(tmp_path: Path, error: type[BaseException]):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "old").write_text("mine")
    (tmp_path / "model.partial").mkdir()  # what a killed process left
    (tmp_path / "model.partial" / "stale").write_text("")
    with pytest.raises(error), whole_folder(tmp_path / "model") as partial:
        assert not list(partial.iterdir())
        raise error
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["model", "old"]


def test_a_folder_that_someone_called_old_stays(tmp_path: Path):
    for name in ("model", "model.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").write_text("")
    with whole_folder(tmp_path / "model") as partial:
        (partial / "new").write_text("")
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == [
        "model", "model.old", "model.old/mine", "model/new"]  # fmt: skip


def test_what_a_process_killed_amid_replacing_left_goes_with_the_next(tmp_path: Path):
    left = [tmp_path / f".model.{pid}.old" for pid in (123, os.getpid())]  # in a container, pids come again
    (tmp_path / ".model.2024 mine.old").mkdir()
    for _ in range(2):  # where no folder has the name, and where one has
        for folder in left:
            folder.mkdir()
            (folder / "weights").write_text("")
        with whole_folder(tmp_path / "model") as partial:
            (partial / "new").write_text("")
        assert sorted(path.name for path in tmp_path.iterdir()) == [".model.2024 mine.old", "model"]


def test_only_what_is_marked_may_be_replaced(tmp_path: Path):
    for name in ("empty", "marked", "foreign"):
        (tmp_path / name).mkdir()
    (tmp_path / "marked" / "index.json").write_text("{}")
    (tmp_path / "foreign" / "letter.txt").write_text("dear")
    for path in (tmp_path / "foreign", tmp_path / "foreign" / "letter.txt"):
        with pytest.raises(FileExistsError, match="stays"), whole_folder(path, "index.json"):
            pytest.fail("this is not ours to replace")
    for name in ("absent", "empty", "marked"):
        with whole_folder(tmp_path / name, "index.json") as partial:
            (partial / "new").write_text("")
        assert [path.name for path in (tmp_path / name).iterdir()] == ["new"]
    assert (tmp_path / "foreign" / "letter.txt").read_text() == "dear"


def test_where_a_link_is_replaced_what_it_led_to_stays(tmp_path: Path):
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "old").write_text("mine")
    for _ in range(2):
        (tmp_path / "model").symlink_to(tmp_path / "far")
        with whole_folder(tmp_path / "model") as partial:
            (partial / "new").write_text("")
        assert sorted(path.name for path in tmp_path.rglob("*")) == ["far", "model", "new", "old"]
        (tmp_path / "model" / "new").unlink()
        (tmp_path / "model").rmdir()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_interrupted_file_leaves_the_old_one(tmp_path: Path, error: type[BaseException]):
    path = tmp_path / "new" / "report.json"
    write_json({"grün": [1, 2]}, path)
    before = path.read_bytes()
    assert json.loads(before) == {"grün": [1, 2]}
    with pytest.raises(error), whole_file(path) as aside:
        aside.write_text("{")
        raise error
    with pytest.raises(TypeError):
        write_json({"a": object()}, path)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["report.json"]


@pytest.mark.parametrize("write", [whole_folder, whole_file])
def test_a_failure_leaves_no_parents_that_it_made(tmp_path: Path, write):
    (tmp_path / "there").mkdir()
    with pytest.raises(ValueError), write(tmp_path / "there" / "a" / "b" / "c"):
        raise ValueError
    assert [path.name for path in tmp_path.rglob("*")] == ["there"]
    with pytest.raises(ValueError), write(tmp_path / "there" / "a" / "b" / "c"):
        (tmp_path / "there" / "a" / "other").write_text("mine")
        raise ValueError
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "other", "there"]
