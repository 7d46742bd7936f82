"""What judges variations, interpolations and text diffs: on pictures whose answer is known, and on a tiny model."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import Tensor

from unclip.corpora.shapes import Scene, draw
from unclip.evals.concepts import Gallery
from unclip.evals.manipulations import (
    Edit,
    choose_edits,
    measure_edits,
    measure_interpolations,
    measure_variations,
    rank_correlation,
    score,
)
from unclip.evals.shapes import read
from unclip.pipeline import UnCLIP


@pytest.fixture(scope="module")
def pipe(tiny_model: Path) -> UnCLIP:
    return UnCLIP.from_pretrained(tiny_model)


def mean_colour(pictures: Tensor) -> Tensor:
    """A judge that sees the mean colour alone; uint8 (n, 3, h, w) → (n, 3)."""
    return pictures.float().mean(dim=(2, 3)) / 255


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1, 2, 3, 9], 1.0),
        ([4, 3, 2, 1], -1.0),
        ([0, 1, 0, 1], 0.447),
        ([1, 3, 2, 4], 0.8),
        ([0, 0, 1, 1], 0.894),
        ([5, 5, 5], 0.0),
    ],
)
def test_rank_correlation(values: list[float], expected: float) -> None:
    assert rank_correlation(values) == pytest.approx(expected, abs=1e-3)


class Painter:
    """In a pipeline's place: pictures of known colours, so that the figures are known."""

    def __init__(self, colours: list[tuple[float, float, float]]) -> None:
        self.colours = colours

    def drawn(self, rows: list[int]) -> SimpleNamespace:
        fields = [torch.tensor(self.colours[i]).view(3, 1, 1).expand(3, 64, 64) for i in rows]
        return SimpleNamespace(images=torch.stack(fields))

    def interpolate(self, a: int, b: int, n: int, **_: object) -> SimpleNamespace:
        return self.drawn(list(range(n)))

    def vary(self, picture: int, n: int, eta: float, **_: object) -> SimpleNamespace:
        return self.drawn([picture if eta == 0 else (picture + 1) % 2])


def test_an_even_way_has_correlation_1_and_one_that_turns_back_less() -> None:
    white = torch.zeros(3)
    even = Painter([(1 - t, -1.0, t) for t in torch.linspace(0, 1, 9).tolist()])
    back = Painter([(1 - t, -1.0, t) for t in (0.0, 0.4, 0.7, 0.5, 0.2, 0.0, 0.3, 0.6, 1.0)])
    pictures = [(Image.new("RGB", (8, 8)), Image.new("RGB", (8, 8)))]
    found = measure_interpolations(even, pictures, mean_colour, white)  # pyright: ignore[reportArgumentType]
    assert (found["mean"], found["at_least_0.9"]) == (1.0, 1.0)
    found = measure_interpolations(back, pictures, mean_colour, white)  # pyright: ignore[reportArgumentType]
    assert found["mean"] < 0.9
    assert found["at_least_0.9"] == 0.0


def test_what_variations_keep_is_counted_among_right_reconstructions() -> None:
    """Two concepts, red and blue; reconstructions are right, variations are the other one."""
    features = torch.tensor([[1.0, 0, 0], [0.9, 0, 0], [0, 0, 1.0], [0, 0, 0.9]])
    gallery = Gallery(features, ["red", "red", "blue", "blue"])
    painter = Painter([(1.0, -1, -1), (-1, -1, 1.0)])
    found = measure_variations(painter, [0, 1], [0, 2], gallery, mean_colour)  # pyright: ignore[reportArgumentType]
    assert found["top1"] == {"reconstructions": 1.0, "variations": 0.0, "kept": 0.0}
    assert found["top5"] == {"reconstructions": 1.0, "variations": 1.0, "kept": 1.0}
    same = measure_variations(painter, [0, 1], [0, 2], gallery, mean_colour, eta=0.0)  # pyright: ignore[reportArgumentType]
    assert same["top1"]["kept"] == 1.0


def test_text_diffs_are_scored_by_what_is_read() -> None:
    scene = Scene("circle", "red", "large", "middle")
    edits = [Edit(scene, "colour", "blue"), Edit(scene, "shape", "square")]
    assert edits[0].captions == ("a red circle", "a blue circle")
    assert edits[1].captions == ("a red circle", "a red square")
    unchanged = [read(draw(scene))] * 2
    done = [read(draw(scene._replace(colour="blue"))), read(draw(scene._replace(shape="square")))]
    spoilt = [read(draw(scene._replace(colour="blue", shape="star"))), None]
    assert score(edits, unchanged) == {"changed": 0.0, "kept": 1.0, "both": 0.0, "refused": 0.0}
    assert score(edits, done) == {"changed": 1.0, "kept": 1.0, "both": 1.0, "refused": 0.0}
    assert score(edits, spoilt) == {"changed": 0.5, "kept": 0.0, "both": 0.0, "refused": 0.5}


def test_edits_change_what_they_say_and_nothing_else() -> None:
    edits = choose_edits(60)
    assert [edit.part for edit in edits[:4]] == ["colour", "shape", "colour", "shape"]
    assert all(edit.target != getattr(edit.scene, edit.part) for edit in edits)
    assert all(edit.captions[0] != edit.captions[1] for edit in edits)
    assert choose_edits(60) == edits != choose_edits(60, seed=1)


def test_the_measures_run_on_a_model(pipe: UnCLIP) -> None:
    options = {"steps": 2, "size": 64, "seed": 0}
    found = measure_edits(pipe, choose_edits(2), (0.0, 0.5), **options)
    assert list(found["strengths"]) == ["0", "0.5"]
    assert found["best"] in found["strengths"]
    pictures = [draw(edit.scene) for edit in choose_edits(3)]
    gallery = Gallery(torch.rand(6, 3, generator=torch.Generator().manual_seed(0)), ["a", "a", "b", "b", "c", "c"])
    varied = measure_variations(pipe, pictures, [0, 2, 4], gallery, mean_colour, **options)
    assert varied["count"] == 3
    pairs = [(pictures[0], pictures[1]), (pictures[1], pictures[2])]
    ways = measure_interpolations(pipe, pairs, mean_colour, torch.zeros(3), 4, **options)
    assert -1 <= ways["least"] <= ways["mean"] <= 1
