import json
from pathlib import Path

import numpy as np
import pytest

from unclip.core.data import DataConfig, ShardDataset, pixels_from_pil
from unclip.corpora import shapes
from unclip.corpora.shapes import COLOURS, HELD_OUT, PLACES, SHAPES, SIZES, Scene, captions_of, draw

EVERY = len(COLOURS) * len(SHAPES) * len(SIZES) * len(PLACES)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("shapes") / "out"
    shapes.build(out, 32, seed=1, count=EVERY)
    return out


def test_the_world_is_large_enough():
    assert len(COLOURS) >= 8 and len(SHAPES) >= 6 and len(SIZES) >= 3 and len(PLACES) >= 9 and len(HELD_OUT) >= 8


def test_held_out_pairs_are_nowhere_in_training(corpus: Path):
    pairs = {
        split: {(m["colour"], m["shape"]) for m in ShardDataset(DataConfig(str(corpus), split)).meta}
        for split in ("train", "held-out")
    }
    assert pairs["held-out"] == HELD_OUT and not pairs["train"] & HELD_OUT
    assert len(pairs["train"]) == len(COLOURS) * len(SHAPES) - len(HELD_OUT)
    assert {c for c, _ in pairs["train"]} == set(COLOURS) and {s for _, s in pairs["train"]} == set(SHAPES)


def test_every_combination_once(corpus: Path):
    meta = [m for s in ("train", "held-out") for m in ShardDataset(DataConfig(str(corpus), s)).meta]
    assert len({(m["shape"], m["colour"], m["size"], m["place"]) for m in meta}) == EVERY == len(meta)
    summary = json.loads((corpus / "dataset.json").read_text())
    assert summary["count"] == EVERY and (corpus / "ATTRIBUTION.md").is_file()


def test_captions_say_what_is_drawn():
    for scene in shapes.scenes(EVERY, 2)[::50]:
        captions = captions_of(scene)
        assert len(captions) == len(set(captions)) >= 6
        assert all(scene.colour in c and scene.shape in c for c in captions)
        assert any(scene.size in c for c in captions) and any(scene.place in c for c in captions)
        assert any(c in (f"a {scene.colour} {scene.shape}", f"an {scene.colour} {scene.shape}") for c in captions)


def test_sizes_agree():
    for scene in shapes.scenes(EVERY, 3)[::100]:
        x64, x256 = (pixels_from_pil(draw(scene, size)) for size in (64, 256))
        halved = x256.reshape(1, 3, 64, 4, 64, 4).mean((3, 5))
        assert (halved - x64).abs().max() < 0.02


def test_shapes_stay_inside():
    for scene in [s for s in shapes.scenes(2 * EVERY, 4) if s.size == "large"]:
        r = SIZES["large"] * scene.scale * 1.03
        for c, d in zip(PLACES[scene.place], (scene.dx, scene.dy), strict=True):
            assert c + d - r > 0 and c + d + r < 1
    edge = np.asarray(draw(Scene("circle", "red", "large", "top left", "white", -0.015, -0.015, 1.04), 64))[[0, -1]]
    assert (edge == 255).all()


def test_seeds_repeat_and_differ():
    assert shapes.scenes(50, 0) == shapes.scenes(50, 0) != shapes.scenes(50, 1)


def test_bad_requests(tmp_path: Path):
    with pytest.raises(ValueError, match="count is 5"):
        shapes.build(tmp_path / "x", count=5)
    with pytest.raises(ValueError, match="size is 4"):
        shapes.build(tmp_path / "x", 4)
    with pytest.raises(ValueError, match="no shape 'blob'"):
        draw(Scene("blob", "red", "small", "left"))
    assert not list(tmp_path.iterdir())
