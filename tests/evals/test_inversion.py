"""The table of inversions: figures whose values are known, and what the controls control."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from unclip.core.data import pil_from_pixels
from unclip.evals.inversion import choose, evaluate, measure, noise_statistics, psnr, summary
from unclip.pipeline import UnCLIP


def test_psnr_of_a_known_error() -> None:
    x = torch.zeros(3, 3, 8, 8)
    y = torch.stack([torch.full((3, 8, 8), error) for error in (2.0, 0.2, 0.02)])
    assert psnr(x, y).tolist() == pytest.approx([0, 20, 40], abs=1e-4)
    assert math.isinf(float(psnr(x, x)[0]))


def test_statistics_of_a_normal_of_a_shift_and_of_a_gradient() -> None:
    noise = torch.randn(64, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    found = noise_statistics(noise)
    assert found["mean"] == pytest.approx(1 / math.sqrt(3 * 64 * 64), rel=0.3)
    assert found["variance"] == pytest.approx(1, abs=0.01)
    assert found["neighbours"] == pytest.approx(0, abs=0.01)
    shifted = noise_statistics(2 * noise + 0.5)
    assert shifted["mean"] == pytest.approx(0.5, abs=0.01)
    assert shifted["variance"] == pytest.approx(4, abs=0.05)
    smooth = torch.nn.functional.avg_pool2d(noise, (1, 2), stride=1)  # halves of neighbours are shared along one axis
    assert noise_statistics(smooth)["neighbours"] == pytest.approx(0.25, abs=0.02)


@pytest.fixture(scope="module")
def pipe(tiny_model: Path) -> UnCLIP:
    return UnCLIP.from_pretrained(tiny_model)


def test_pictures_come_back_by_their_own_halves_alone(pipe: UnCLIP) -> None:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(4, 3, 4, 4, generator=generator) * 1.6 - 0.8
    pictures = pil_from_pixels(torch.nn.functional.interpolate(coarse, (16, 16), mode="bilinear"))
    table, drawn = measure(pipe, pictures, steps=(10, 40))
    assert table["40"]["reconstruction"]["mean"] > table["10"]["reconstruction"]["mean"]
    for control in ("another_z_i", "random_x_T"):
        assert table["40"]["reconstruction"]["mean"] > table["40"][control]["mean"]
    assert table["normal"]["variance"] == pytest.approx(1, abs=0.1)
    assert list(drawn) == ["picture", "10 steps", "40 steps", "another_z_i", "random_x_T"]
    assert all(x.shape == (4, 3, 16, 16) for x in drawn.values())


def test_the_command_measures_held_out_drawings(tiny_model: Path, tiny_corpus: Path, tmp_path: Path) -> None:
    json_path, sheet = tmp_path / "figures.json", tmp_path / "sheet.png"
    figures = evaluate(str(tiny_model), tiny_corpus, "train", 3, (2, 4), json_path=json_path, sheet=sheet)
    assert json.loads(json_path.read_text()) == figures
    assert {"2", "4", "normal", "another_picture", "model"} <= figures.keys()
    assert sheet.stat().st_size > 0
    again = evaluate(str(tiny_model), tiny_corpus, "train", 3, (2, 4))
    assert again == figures
    for count in (1, 17):
        with pytest.raises(ValueError, match="the split has 16"):
            evaluate(str(tiny_model), tiny_corpus, "train", count)


def test_drawings_of_any_concept_are_inverted_and_both_groups_reported(
    copy_model: Callable[[], Path], tiny_corpus: Path
) -> None:
    model = copy_model()
    (model / "concepts.txt").write_text("red half\nred corner\nblue half\n")
    figures = evaluate(str(model), tiny_corpus, "train", 16, (2,))
    assert (figures["count"], figures["drawings_of_trained_concepts"], figures["dtype"]) == (16, 3, "fp32")
    row = figures["2"]
    mean = (3 * row["of_trained_concepts"]["mean"] + 13 * row["of_other_concepts"]["mean"]) / 16
    assert mean == pytest.approx(row["reconstruction"]["mean"], abs=0.02)
    least = min(row["of_trained_concepts"]["least"], row["of_other_concepts"]["least"])
    assert least == row["reconstruction"]["least"]
    (model / "concepts.txt").write_text("a thing of nowhere\n")
    figures = evaluate(str(model), tiny_corpus, "train", 2, (2,))
    assert figures["drawings_of_trained_concepts"] == 0
    assert "of_trained_concepts" not in figures["2"]
    assert figures["2"]["of_other_concepts"] == figures["2"]["reconstruction"]
    (model / "concepts.txt").unlink()
    figures = evaluate(str(model), tiny_corpus, "train", 2, (2,))
    assert figures["drawings_of_trained_concepts"] is None
    assert "of_other_concepts" not in figures["2"]


def test_one_value_has_no_spread() -> None:
    assert summary(torch.tensor([20.0])) == {"mean": 20.0, "std": 0.0, "least": 20.0}
    assert summary(torch.tensor([20.0, 30.0])) == {"mean": 25.0, "std": 7.07, "least": 20.0}


def test_the_choice_is_fixed_by_its_seed(tiny_corpus: Path) -> None:
    from unclip.evals.corpus import load_corpus

    corpus = load_corpus(tiny_corpus, ("train",))
    drawings = corpus.drawings
    assert choose(drawings, 5) == choose(drawings, 16)[:5]
    assert choose(drawings, 16) != choose(drawings, 16, seed=1)
    trained = {"red half", "red corner", "blue half"}
    assert {drawings[i].concept for i in choose(drawings, 3, trained)} == trained
