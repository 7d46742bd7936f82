"""The table of where quality is lost: planted pictures whose figures are known, and a tiny model."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from unclip.evals.concepts import choose
from unclip.evals.corpus import Corpus, load_corpus
from unclip.evals.table import Judges, evaluate, markdown, measure_level, real_pictures, reference_of, upsampled
from unclip.pipeline import UnCLIP


def thumbnail(pictures: Tensor) -> Tensor:
    """A judge that sees 4×4 pixels; uint8 (n, 3, h, w) → (n, 48)."""
    return torch.nn.functional.adaptive_avg_pool2d(pictures.float() / 255, 4).flatten(1)


JUDGES = Judges(thumbnail, thumbnail)


@pytest.fixture(scope="module")
def corpus(sized_corpus: Path) -> Corpus:
    return load_corpus(sized_corpus, side=16)


def test_what_is_asked_for_is_no_reference(corpus: Corpus) -> None:
    asked = {draw.drawing.key for draw in choose(corpus.drawings, "train", 5)}
    rows = reference_of(corpus, asked)
    assert len(rows) == 32 - 5
    assert not asked & {corpus.drawings[i].key for i in rows}
    some = reference_of(corpus, asked, {"red apple", "blue fish"})
    assert {corpus.drawings[i].concept for i in some} == {"red apple", "blue fish"}
    assert some == [i for i in rows if i in some]  # the order does not depend on what else there is


def test_a_copy_scores_as_the_real_pictures_and_noise_does_not(corpus: Corpus) -> None:
    noise = torch.Generator().manual_seed(0)
    rows = {
        "real": real_pictures(corpus),
        "copy": lambda captions, draws: real_pictures(corpus)(captions, draws),
        "noise": lambda captions, draws: torch.randint(0, 256, (len(draws), 3, 16, 16), generator=noise).byte(),
        "same": lambda captions, draws: corpus.pictures([0]).expand(len(draws), -1, -1, -1),
    }
    table, drawn = measure_level(rows, corpus, JUDGES, "train", 8)
    assert table["copy"] == table["real"]
    assert table["real"]["generated"] == table["real"]["ceiling"]
    assert table["real"]["generated"]["top1"] == 1
    assert table["noise"]["frechet"] > table["real"]["frechet"]
    assert table["noise"]["kernel"] > table["real"]["kernel"]
    assert table["noise"]["precision"] == 0 < table["real"]["precision"]
    assert table["same"]["recall"] < table["real"]["recall"]
    assert all(pictures.shape == (8, 3, 16, 16) for pictures in drawn.values())
    assert measure_level(rows, corpus, JUDGES, "train", 8)[0]["copy"] == table["copy"]  # from stored features now


def test_each_picture_is_enlarged_by_its_own_seed(corpus: Corpus, tiny_model: Path) -> None:
    pipe = UnCLIP.from_pretrained(tiny_model)
    draws = choose(corpus.drawings, "train", 4, seed=7)
    lower = {"real": corpus.pictures([draw.drawing.index for draw in draws])}
    generate = upsampled(pipe, 64, lower, 7, pipe.settings()["upsampler_256"], None)["real, upsampled"]
    together = generate([], draws)
    assert together.shape == (4, 3, 64, 64)
    difference = (generate([], draws[2:]).int() - together[2:].int()).abs()
    assert (difference <= 1).float().mean() > 0.99
    assert not torch.equal(together[0], together[1])


def test_the_report_has_every_row_and_is_a_file_and_a_table(
    sized_corpus: Path, tiny_model: Path, tmp_path: Path
) -> None:
    path = tmp_path / "table.json"
    report = evaluate(str(tiny_model), "train", 6, None, path, sized_corpus, judges=JUDGES)
    assert json.loads(path.read_text()) == report
    assert report["dtype"] == "fp32"
    decoded = ["real", "true z_i", "prior", "z_t in z_i's place", "caption alone"]
    assert list(report["rows"]["16"]) == decoded
    for side in ("64", "256"):
        assert list(report["rows"][side]) == ["real", "real, upsampled", "prior, upsampled"]
        assert len({json.dumps(row) for row in report["rows"][side].values()}) == 3
    assert len({json.dumps(row) for row in report["rows"]["16"].values()}) == 5
    assert report["clip"]["count"] == report["prior"]["count"] == 28
    lines = markdown(report).splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 2 + 5 + 3 + 3
    assert len({line.count("|") for line in table}) == 1


def test_bad_input_is_named(sized_corpus: Path, tiny_model: Path, tmp_path: Path) -> None:
    model = str(tiny_model)
    with pytest.raises(FileNotFoundError, match="tiny-64-64 with real pictures of 64 px"):
        evaluate(model, "train", 6, 256, None, sized_corpus.with_name("tiny-64"), judges=JUDGES)
    with pytest.raises(ValueError, match="size 32"):
        evaluate(model, "train", 6, 32, None, sized_corpus, judges=JUDGES)
    with pytest.raises(ValueError, match="count=4"):
        evaluate(model, "train", 4, None, None, sized_corpus, judges=JUDGES)
    with pytest.raises(ValueError, match="split='test'"):
        evaluate(model, "test", 6, None, None, sized_corpus, judges=JUDGES)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        evaluate(str(tmp_path / "nowhere"), "train", 6, None, None, sized_corpus, judges=JUDGES)
