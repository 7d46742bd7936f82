import numpy as np
import pytest
from PIL import Image, ImageFilter

from unclip.core.data import pixels_from_pil
from unclip.corpora.shapes import SHAPES, Scene, draw, scenes
from unclip.evals.shapes import Reading, components, read

SAMPLE = scenes(1296, 11)[::12]


def noisy(image: Image.Image, sigma: float, seed: int = 0) -> Image.Image:
    pixels = np.asarray(image) + np.random.default_rng(seed).normal(0, sigma, (*image.size, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def share_right(change) -> float:
    said = [(read(change(draw(s, 64))), Reading(s.shape, s.colour, s.place, s.size)) for s in SAMPLE]
    return float(np.mean([a == b for a, b in said]))


def test_real_pictures_are_read():
    assert share_right(lambda image: image) >= 0.99


def test_blur_and_noise_are_read_through():
    assert share_right(lambda image: image.filter(ImageFilter.GaussianBlur(0.8))) >= 0.98
    assert share_right(lambda image: noisy(image, 15)) >= 0.98


@pytest.mark.parametrize("size", [256, 1024])
def test_large_pictures_are_read(size: int):
    for s in SAMPLE[::9]:
        assert read(draw(s, size)) == Reading(s.shape, s.colour, s.place, s.size)


def test_tensors_and_alpha_are_read_like_pictures():
    image = draw(SAMPLE[0], 64)
    x = pixels_from_pil(image)
    assert read(x) == read(x[0]) == read(image) == read(image.convert("RGBA")) is not None
    clear = image.convert("RGBA")
    clear.putalpha(0)
    assert read(clear) is None


def paste(a: Scene, b: Scene) -> Image.Image:
    first, second = np.asarray(draw(a)).copy(), np.asarray(draw(b))
    drawn = (second != 255).any(-1)
    first[drawn] = second[drawn]
    return Image.fromarray(first)


def test_blank_and_broken_pictures_are_refused():
    rng = np.random.default_rng(0)
    assert read(Image.new("RGB", (64, 64), "white")) is None
    assert read(Image.new("RGB", (64, 64), (120, 30, 30))) is None
    assert read(noisy(Image.new("RGB", (64, 64), "white"), 10)) is None
    assert read(Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8))) is None
    assert read(paste(Scene("circle", "red", "medium", "left"), Scene("circle", "red", "medium", "right"))) is None
    assert read(paste(Scene("circle", "red", "medium", "left"), Scene("star", "blue", "small", "right"))) is None
    ramp = np.broadcast_to(np.linspace(0, 255, 64)[:, None, None], (64, 64, 3)).astype(np.uint8)
    assert read(Image.fromarray(ramp)) is None


def test_shapes_of_the_wrong_form_or_colour_are_refused():
    bar = np.full((64, 64, 3), 255, np.uint8)
    bar[30:36, 10:54] = (220, 30, 40)
    assert read(Image.fromarray(bar)) is None
    half = np.asarray(draw(Scene("circle", "red", "large", "middle"))).copy()
    half[(half != 255).any(-1) & (np.arange(64) < 32)[None]] = (35, 70, 220)
    assert read(Image.fromarray(half)) is None
    shuffled = np.asarray(draw(Scene("square", "red", "large", "middle"))).copy()
    inner = shuffled[16:48, 16:48].copy().reshape(-1, 3)
    inner[np.random.default_rng(0).random(len(inner)) < 0.5] = 255
    shuffled[16:48, 16:48] = inner.reshape(32, 32, 3)
    assert read(Image.fromarray(shuffled)) is None


def test_turned_shapes_do_not_pass_for_others():
    for shape in SHAPES:
        turned = draw(Scene(shape, "blue", "large", "middle"), 256).rotate(180, fillcolor="white").resize((64, 64))
        reading = read(turned)
        assert reading is None or reading.shape == shape


def test_only_square_pictures():
    with pytest.raises(ValueError, match="64×32"):
        read(Image.new("RGB", (64, 32)))


def test_components_are_connected_and_complete():
    mask = np.array([[1, 0, 0, 1], [0, 1, 0, 1], [0, 0, 0, 0], [1, 0, 0, 0]], bool)
    parts = components(mask)
    assert sorted(len(p) for p in parts) == [1, 2, 2] and len(parts[0]) == 2
    assert sum(len(p) for p in parts) == mask.sum()
