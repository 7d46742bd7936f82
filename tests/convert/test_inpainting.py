"""Inpainting by weights that were never trained for it: Karlo's."""

from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from unclip.pipeline import UnCLIP


@pytest.mark.parametrize("preset", ["karlo", "default"])
def test_known_pixels_come_back(text2img: Path, pictures: list[Image.Image], preset: str) -> None:
    pipe = UnCLIP.from_pretrained(text2img)
    image = pictures[2].resize((pipe.sizes[-1], pipe.sizes[-1]))
    side, mask = image.width, Image.new("L", image.size)
    ImageDraw.Draw(mask).rectangle((0, 0, side // 2 - 1, side), fill="white")
    options = {"preset": preset, "steps": 4, "prior_guidance_scale": 1.0, "seed": 3}
    made = pipe.inpaint(image, mask, "a red apple", 2, resamples=2, **options)
    right = (side // 2, 0, side, side)
    for drawn in made.images:
        assert isinstance(drawn, Image.Image)
        assert drawn.crop(right).tobytes() == image.crop(right).tobytes()
        assert drawn.tobytes() != image.tobytes()
