"""What judges variations, interpolations and text diffs: on pictures whose answer is known, and on a tiny model."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from unclip.core.data import pixels_from_pil
from unclip.corpora.shapes import Scene, draw
from unclip.evals.concepts import Gallery, wilson
from unclip.evals.corpus import to_bytes
from unclip.evals.manipulations import (
    Edit,
    choose_edits,
    evaluate,
    measure_edits,
    measure_interpolations,
    measure_scenes,
    measure_variations,
    rank_correlation,
    reconstructions,
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
        rows = list(range(n))
        return self.drawn(rows if a < b else rows[::-1])

    def vary(self, picture: int, n: int, eta: float, seed: int, **_: object) -> SimpleNamespace:
        """Of its concept at even seeds, and where η is 0; of the next one at odd seeds."""
        return self.drawn([picture if eta == 0 else (picture + number) % 2 for number in range(seed, seed + n)])


def ways(painter: Painter) -> dict[str, Any]:
    """The figures of the ways from the first colour to the last and back; real pictures are red and blue."""
    again, real = painter.drawn([0, -1]).images, torch.tensor([[1.0, 0, 0], [0, 0, 1.0]])
    centre = torch.full((3,), 0.3)
    return measure_interpolations(painter, [0, 1], again, real, mean_colour, centre)  # pyright: ignore[reportArgumentType]


def reds(steps: Sequence[float]) -> Painter:
    """From red to blue by these parts of the way, between the values of black and full."""
    return Painter([(1 - 2 * t, -1.0, 2 * t - 1) for t in steps])


def test_an_even_way_has_correlation_1_and_one_that_turns_back_less() -> None:
    found = ways(reds(torch.linspace(0, 1, 9).tolist()))
    assert (found["pairs"], found["frames"], found["ends_error"]) == (2, 9, 0.0)
    even = {"mean": 1.0, "least": 1.0, "at_least_0.9": 1.0}
    assert (found["difference"], found["end"], found["start"]) == (even, even, even)
    found = ways(reds((0.0, 0.4, 0.7, 0.5, 0.2, 0.1, 0.3, 0.6, 1.0)))
    for name in ("difference", "end", "start"):
        assert found[name]["mean"] < 0.9
        assert found[name]["at_least_0.9"] == 0.0


def test_ends_are_compared_with_the_real_pictures_and_not_with_themselves() -> None:
    """A way that begins and ends halfway, beyond its middle frames: by its own ends it would look like an even one."""
    steps = (0.6, 0.1, 0.2, 0.3, 0.5, 0.7, 0.8, 0.9, 0.4)
    painter = reds(steps)
    found = ways(painter)
    expected = rank_correlation(steps)
    assert expected < 0.6
    for name in ("difference", "end", "start"):
        assert found[name]["mean"] == found[name]["least"] == pytest.approx(expected, abs=1e-4)
    f = torch.nn.functional.normalize(mean_colour(to_bytes(painter.drawn(list(range(9))).images)) - 0.3, dim=-1)
    assert rank_correlation((f @ f[-1] - f @ f[0]).tolist()) != pytest.approx(expected, abs=0.1)


def test_the_difference_may_rise_where_nearness_to_one_end_does_not() -> None:
    """Green frames that grow red, between blue, which they are all far from, and red."""
    painter = Painter([(2 * t - 1, 1.0, -1.0) for t in torch.linspace(0, 1, 9).tolist()])
    again, real = painter.drawn([0, -1]).images, torch.tensor([[0.3, 0.3, 1.0], [1.0, 0.3, 0.3]])
    centre = torch.full((3,), 0.3)
    found = measure_interpolations(painter, [0, 1], again, real, mean_colour, centre)  # pyright: ignore[reportArgumentType]
    assert found["difference"]["at_least_0.9"] == 1.0
    assert found["end"]["mean"] < 0.5


def test_ends_that_are_not_the_reconstructions_are_seen() -> None:
    painter = reds(torch.linspace(0, 1, 9).tolist())
    again = painter.drawn([0, -1]).images
    again[1, 0, 3, 3] += 0.25
    real = torch.tensor([[1.0, 0, 0], [0, 0, 1.0]])
    found = measure_interpolations(painter, [0, 1], again, real, mean_colour, torch.zeros(3))  # pyright: ignore[reportArgumentType]
    assert found["ends_error"] == pytest.approx(0.25)


RED_BLUE = torch.tensor([[1.0, 0, 0], [0.9, 0, 0], [0, 0, 1.0], [0, 0, 0.9]])


def test_what_variations_keep_is_counted_among_right_reconstructions() -> None:
    """Two concepts, red and blue; variations are the other one at odd seeds."""
    gallery = Gallery(RED_BLUE, ["red", "red", "blue", "blue"])
    painter = Painter([(1.0, -1, -1), (-1, -1, 1.0)])
    right = painter.drawn([0, 1]).images

    def measured(again: Tensor, **options: Any) -> dict[str, Any]:
        return measure_variations(painter, [0, 1], again, [0, 2], gallery, mean_colour, **options)  # pyright: ignore[reportArgumentType]

    found = measured(right, seeds=3)
    assert (found["count"], found["seeds"]) == (2, 3)
    assert found["top1"] == {  # seeds 0, 1, 2 of the first, 3, 4, 5 of the second
        "reconstructions": 1.0,
        "variations": 0.5,
        "kept": 0.5,
        "kept_interval": wilson(0.5, 2),
        "of": 6,
        "drawings": 2,
    }
    assert (found["top5"]["kept"], found["top5"]["of"]) == (1.0, 6)
    found = measured(painter.drawn([0, 0]).images, seeds=3)["top1"]  # the second is drawn as the first
    assert (found["reconstructions"], found["kept"], found["of"], found["drawings"]) == (0.5, 0.6667, 3, 1)
    assert found["kept_interval"] == wilson(2 / 3, 1)
    found = measured(painter.drawn([1, 0]).images)["top1"]
    assert (found["kept"], found["kept_interval"], found["of"]) == (None, None, 0)
    assert measured(right, eta=0.0)["top1"]["kept"] == 1.0


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


class Scribe:
    """Redraws a scene's picture as it is, and at η = 1 and odd seeds as another scene's."""

    def __init__(self, other: Scene) -> None:
        self.other = pixels_from_pil([draw(other, 64)])

    def vary(self, picture: Any, n: int, eta: float, seed: int = 0, **_: Any) -> Any:
        again = pixels_from_pil([picture])
        return SimpleNamespace(images=torch.cat([self.other if eta and (seed + i) % 2 else again for i in range(n)]))


def test_variations_of_scenes_are_counted_by_what_is_read() -> None:
    scene = Scene("circle", "red", "large", "middle")
    scribe: Any = Scribe(scene._replace(colour="blue"))
    scenes = [scene, scene._replace(shape="star")]
    found = measure_scenes(scribe, scenes, [draw(s, 64) for s in scenes], seeds=3, seed=0)
    assert (found["reconstructions"], found["variations"], found["of"]) == (1.0, 0.5, 6)  # seeds 0, 1, 2 and 3, 4, 5
    assert found["kept"] == 0.5
    blue = scene._replace(colour="blue")
    found = measure_scenes(scribe, [blue], [draw(blue, 64)], seeds=3)
    assert found["kept"] == 1.0


def test_edits_change_what_they_say_and_nothing_else() -> None:
    edits = choose_edits(60)
    assert [edit.part for edit in edits[:4]] == ["colour", "shape", "colour", "shape"]
    assert all(edit.target != getattr(edit.scene, edit.part) for edit in edits)
    assert all(edit.captions[0] != edit.captions[1] for edit in edits)
    assert choose_edits(60) == edits != choose_edits(60, seed=1)


def test_the_measures_run_on_a_model(pipe: UnCLIP) -> None:
    options = {"steps": 2, "size": 16, "seed": 0}  # of larger ones the first is rounded to bytes, by chance up or down
    edits = choose_edits(2)
    sources = [draw(edit.scene, 64) for edit in edits]
    found = measure_edits(pipe, edits, sources, (0.0, 0.5), **options | {"size": 64})
    assert list(found["strengths"]) == ["0", "0.5"]
    assert found["best"] in found["strengths"]
    pictures = [draw(edit.scene) for edit in choose_edits(3)]
    gallery = Gallery(torch.rand(6, 3, generator=torch.Generator().manual_seed(0)), ["a", "a", "b", "b", "c", "c"])
    again = reconstructions(pipe, pictures, **options)
    assert again.shape == (3, 3, 16, 16)
    varied = measure_variations(pipe, pictures, again, [0, 2, 4], gallery, mean_colour, **options)
    assert (varied["count"], varied["seeds"]) == (3, 2)
    real = mean_colour(to_bytes(pixels_from_pil(pictures)))
    found = measure_interpolations(pipe, pictures, again, real, mean_colour, torch.zeros(3), 4, **options)
    assert found["pairs"] == 3
    assert found["ends_error"] < 1e-4
    for name in ("difference", "end", "start"):
        assert -1 <= found[name]["least"] <= found[name]["mean"] <= 1


def test_a_latent_is_measured_as_its_picture_is(pipe: UnCLIP) -> None:
    options = {"steps": 2, "size": 16, "seed": 0}
    pictures = [draw(edit.scene) for edit in choose_edits(2)]
    latents = pipe.invert(pictures, 2)
    whole = reconstructions(pipe, pictures, **options)
    parted = reconstructions(pipe, [latents.row(0), latents.row(1)], **options)
    torch.testing.assert_close(whole, parted, atol=1e-4, rtol=0)


def test_no_variations_are_refused_before_a_model_loads() -> None:
    with pytest.raises(ValueError, match="seeds=0 came"):
        evaluate("nowhere", seeds=0)
