import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from unclip.corpora.shapes import COLOURS, HELD_OUT, PLACES, SHAPES, Scene, captions_of, scenes
from unclip.corpora.shapes import draw as draw_scene
from unclip.evals.corpus import Corpus, Drawing
from unclip.evals.shapes import read
from unclip.evals.shapes_report import asked, chance, choose, enlarge, measure, report, score, unreadable


def picture(scene):
    return (
        torch.frombuffer(bytearray(draw_scene(scene, 64).tobytes()), dtype=torch.uint8)
        .reshape(64, 64, 3)
        .permute(2, 0, 1)
    )


@pytest.fixture(scope="module")
def world():
    """160 scenes with their pictures; the held-out pairs in the split that the corpus gives them."""
    found = [Scene(*s) for s in scenes(160, seed=3)]
    rows = [
        Drawing(i, f"shape-{i}", captions_of(s)[0], f"{s.colour} {s.shape}", "shapes", "shapes",
                "held-out" if (s.colour, s.shape) in HELD_OUT else "train")
        for i, s in enumerate(found)
    ]  # fmt: skip
    pictures = torch.stack([picture(s) for s in found])
    return Corpus(Path(), rows, pictures.__getitem__, [captions_of(s) for s in found])


def perfect(world):
    return lambda captions, draws: world.pictures([draw.drawing.index for draw in draws])


def test_a_caption_asks_for_what_it_names():
    for shape in SHAPES:
        for place in PLACES:
            scene = Scene(shape, "orange", "small", place, "grey")
            named = [asked(caption, f"orange {shape}") for caption in captions_of(scene)]
            assert all(n["shape"] == shape and n["colour"] == "orange" for n in named)
            assert {n.get("place") for n in named} == {place, None}
            assert {n.get("size") for n in named} == {"small", None}


def test_halves_are_of_their_splits_and_fixed(world):
    halves = choose(world, 20)
    assert [draw.drawing.split for draw in halves["seen"]] == ["train"] * 10
    assert [draw.drawing.split for draw in halves["held_out"]] == ["held-out"] * 10
    assert halves == choose(world, 20)
    draws = [*halves["seen"], *halves["held_out"]]
    assert [draw.seed for draw in draws] == list(range(20))
    assert all(draw.drawing.caption in world.captions[draw.drawing.index] for draw in draws)
    assert choose(world, 20, seed=1) != halves


def test_the_world_itself_is_right(world):
    figures, _, _, readings = measure(perfect(world), world, count=40)
    for part in ("seen", "held_out", "real"):
        assert figures[part]["shape_and_colour"] == figures[part]["place"] == figures[part]["size"] == 1
    assert figures["reached"] == {"seen": True, "held_out": True, "real": True}
    assert figures["refused"] == {"blank": 40, "broken": 40, "of_each": 40, "generated": 0}
    assert figures["real"]["counts"] == {"place": 40, "size": 40}
    assert len(readings) == 40


def test_wrong_colour_costs_colour_only(world):
    names = list(COLOURS)

    def recoloured(captions, draws):
        shown = []
        for draw in draws:
            colour, shape = draw.drawing.concept.split()
            shown.append(picture(Scene(shape, names[(names.index(colour) + 3) % len(names)], "large", "middle")))
        return torch.stack(shown)

    figures, *_ = measure(recoloured, world, count=20)
    assert figures["seen"]["shape"] == figures["held_out"]["shape"] == 1
    assert figures["seen"]["colour"] == figures["seen"]["shape_and_colour"] == 0
    assert figures["real"]["shape_and_colour"] == 1


def test_a_refused_picture_is_wrong(world):
    blank = lambda captions, draws: torch.full((len(draws), 3, 64, 64), 255, dtype=torch.uint8)  # noqa: E731
    figures, *_ = measure(blank, world, count=20)
    assert figures["seen"]["shape_and_colour"] == 0
    assert figures["refused"]["generated"] == 20
    assert figures["reached"] == {"seen": False, "held_out": False, "real": True}


def test_place_and_size_count_where_named():
    reading = read(draw_scene(Scene("star", "blue", "small", "top left"), 64))
    wanted = [{"shape": "star", "colour": "blue"}, {"shape": "star", "colour": "blue", "place": "bottom"}]
    result = score([reading, reading], wanted)
    assert (result["shape_and_colour"], result["place"], result["size"]) == (1, 0, None)
    assert result["counts"] == {"place": 1, "size": 0}


def test_chance_is_one_over_the_choices():
    given = chance()
    assert given["shape_and_colour"] == pytest.approx(given["shape"] * given["colour"], abs=1e-4)
    assert "6 shapes × 8 colours" in given["formula"]


def test_unreadable_pictures_are_no_scene():
    kinds = unreadable(8)
    assert set(kinds) == {"blank", "broken"}
    assert all(len(image.getcolors()) == 1 for image in kinds["blank"])
    assert all(read(image) is None for images in kinds.values() for image in images)


def test_bad_counts_are_named(world):
    with pytest.raises(ValueError, match="count=7"):
        choose(world, 7)
    with pytest.raises(ValueError, match="500 scenes of split 'train'"):
        choose(world, 1000)


def test_the_report_holds_all_its_parts(tiny_model, tmp_path):
    from unclip.corpora.shapes import build

    build(tmp_path / "shapes", count=1296)
    figures = report(str(tiny_model), tmp_path / "shapes", tmp_path / "out", count=4, minutes={"clip": 1.5})
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == figures
    assert {"seen", "held_out", "real", "chance", "refused", "minutes"} <= set(figures)
    assert (figures["minutes"], figures["dtype"]) == ({"clip": 1.5}, "fp32")
    assert figures["real"]["shape_and_colour"] == 1
    assert Image.open(tmp_path / "out" / "sheet.png").width > 0


def test_pictures_go_on_to_full_size(world, tiny_model, tmp_path):
    from decoder.decoder import Decoder
    from unclip.pipeline import UnCLIP
    from upsamplers.upsampler import Upsampler

    parts = UnCLIP.from_pretrained(tiny_model).components
    parts["decoder"] = Decoder.from_config(
        {**parts["decoder"].config, "sample_size": 64, "attention_resolutions": (32,)}
    )
    parts["upsampler_256"] = Upsampler.from_config({**parts["upsampler_256"].config, "sample_size": 256})
    parts |= {"upsampler_1024": None, "upsampler_1024_scheduler": None}
    pipe = UnCLIP(**parts)
    draws = choose(world, 4)["seen"]
    rows = enlarge(pipe, draws, world.pictures([draw.drawing.index for draw in draws]), "fast", tmp_path)
    assert [row["caption"] for row in rows] == [draw.drawing.caption for draw in draws]
    assert [Image.open(tmp_path / row["file"]).size for row in rows] == [(256, 256)] * 2
    assert (tmp_path / "sheet-sizes.png").is_file()
