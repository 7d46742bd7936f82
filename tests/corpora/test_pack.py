import json
import logging
from pathlib import Path

import pytest
from PIL import Image

from unclip.core.data import DataConfig, ShardDataset
from unclip.corpora.pack import pack


def put(folder: Path, name: str, caption: str | None, colour: str = "red", size: tuple[int, int] = (12, 8)) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(folder / name)
    if caption is not None:
        (folder / name).with_suffix(".txt").write_text(caption)


def test_text_files(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    source = tmp_path / "in"
    put(source, "a.png", "a red field\n\nred\na red field\n")
    put(source, "deep/b.jpg", "blue", "blue")
    put(source, "empty.png", " \n")
    put(source, "none.png", None)
    (source / "broken.png").write_bytes(b"not a picture")
    (source / "broken.txt").write_text("broken")
    with caplog.at_level(logging.WARNING):
        summary = pack(source, tmp_path / "out", 16)
    assert summary["count"] == 2 and summary["skipped"] == ["broken.png", "empty.png", "none.png"]
    for name in ("broken.png", "empty.png", "none.png"):
        assert name in caplog.text
    data = ShardDataset(DataConfig(str(tmp_path / "out")))
    assert [item["captions"] for item in (data[0], data[1])] == [["a red field", "red"], ["blue"]]
    assert data[0]["image"].shape == (3, 16, 16)
    assert data[0]["image"][:, 8, 8].tolist() == [255, 0, 0] and data[0]["image"][:, 0, 0].tolist() == [255] * 3


def test_metadata(tmp_path: Path):
    source = tmp_path / "in"
    put(source, "a.png", None)
    put(source, "b.png", None)
    lines = [
        {"file_name": "b.png", "text": "second", "concept": "b", "license": "CC0", "split": "valid"},
        {"file_name": "a.png", "captions": ["first", "one"], "keywords": ["k"]},
        {"file_name": "gone.png", "text": "gone"},
    ]
    (source / "metadata.jsonl").write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    summary = pack(source, tmp_path / "out")
    assert summary["splits"] == {"valid": 1, "train": 1} and summary["skipped"] == ["gone.png"]
    item = ShardDataset(DataConfig(str(tmp_path / "out"), "valid"))[0]
    assert item["captions"] == ["second"] and item["concept"] == "b" and item["image"].shape == (3, 8, 12)
    assert ShardDataset(DataConfig(str(tmp_path / "out")))[0]["keywords"] == ["k"]


def test_a_bad_picture_may_have_an_absolute_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    put(Path("in"), "a.png", None)
    (tmp_path / "in" / "b.png").write_bytes(b"not a picture")
    lines = [{"file_name": str(tmp_path / "in" / name), "text": "a field"} for name in ("a.png", "b.png")]
    Path("in/metadata.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    summary = pack("in", "out")
    assert (summary["count"], summary["skipped"]) == (1, ["b.png"])


@pytest.mark.parametrize("line", ["{", '{"text": "x"}', "[]", '{"file_name": "../secret.png", "text": "x"}'])
def test_bad_metadata_is_one_sentence(tmp_path: Path, line: str):
    source = tmp_path / "in"
    put(source, "a.png", None)
    (source / "metadata.jsonl").write_text(line)
    with pytest.raises(ValueError, match="Line 1 of"):
        pack(source, tmp_path / "out")


def test_captions_that_are_no_text_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    source = tmp_path / "in"
    captions: list[object] = ["a field", 5, {"en": "a field"}, [None], ["a", "b"]]
    for i in range(len(captions)):
        put(source, f"{i}.png", None)
    lines = [json.dumps({"file_name": f"{i}.png", "captions": given}) for i, given in enumerate(captions)]
    (source / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8-sig")
    with caplog.at_level(logging.WARNING):
        summary = pack(source, tmp_path / "out")
    assert (summary["count"], summary["skipped"]) == (2, ["1.png", "2.png", "3.png"])
    assert "2.png has the captions {'en': 'a field'}: expected a text, or a list of texts" in caplog.text


def test_text_that_is_not_utf_8_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    source = tmp_path / "in"
    put(source, "a.png", "\ufeffa field")  # with the byte order mark that some editors write
    put(source, "b.png", None)
    (source / "b.txt").write_bytes("grün".encode("latin-1"))
    with caplog.at_level(logging.WARNING):
        assert pack(source, tmp_path / "out")["skipped"] == ["b.png"]
    assert "b.txt is not UTF-8 text" in caplog.text
    assert ShardDataset(DataConfig(str(tmp_path / "out")))[0]["captions"] == ["a field"]
    (source / "metadata.jsonl").write_bytes('{"file_name": "a.png", "text": "grün"}'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"metadata\.jsonl is not UTF-8 text"):
        pack(source, tmp_path / "again")
    assert not list(tmp_path.glob("again*"))


def test_a_line_separator_in_a_caption_and_a_split_that_is_no_name(tmp_path: Path):
    source = tmp_path / "in"
    put(source, "a.png", None)
    row = {"file_name": "a.png", "text": "one\u2028two"}
    (source / "metadata.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\r\n", encoding="utf-8")
    assert pack(source, tmp_path / "out")["count"] == 1
    (source / "metadata.jsonl").write_text(json.dumps({**row, "split": "held out"}))
    with pytest.raises(ValueError, match=r"a\.png names the split 'held out'"):
        pack(source, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_nothing_to_pack_leaves_nothing(tmp_path: Path):
    source = tmp_path / "in"
    with pytest.raises(FileNotFoundError, match="no folder"):
        pack(source, tmp_path / "out")
    source.mkdir()
    with pytest.raises(ValueError, match="holds no pictures"):
        pack(source, tmp_path / "out")
    put(source, "a.png", None)
    with pytest.raises(ValueError, match="None of the 1 pictures"):
        pack(source, tmp_path / "new" / "folders" / "out")
    with pytest.raises(ValueError, match="size is 0"):
        pack(source, tmp_path / "out", 0)
    with pytest.raises(ValueError, match="not a plain word"):
        pack(source, tmp_path / "out", split="../x")
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_overwriting_replaces_nothing_but_a_corpus(tmp_path: Path):
    put(tmp_path / "in", "a.png", "red")
    with pytest.raises(FileExistsError, match=r"holds no dataset\.json"):
        pack(tmp_path / "in", tmp_path / "in", overwrite=True)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a.png", "a.txt", "in"]
