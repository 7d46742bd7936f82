"""What an operation on latents starts from, in any form, and the grid and the noise that it walks from."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from unclip.latents import Latent
from unclip.pipeline import UnCLIP
from unclip.presets import StageSettings
from unclip.sources import ddim_settings, draw_noise, draw_x_T, low_grid, make_plan

CAPTION = "a red apple"
FEW = {"steps": 4, "size": 16}


def picture() -> Image.Image:
    image = Image.new("RGB", (40, 30), "white")
    ImageDraw.Draw(image).ellipse((8, 4, 30, 26), fill="red")
    return image


def test_the_grid_is_even_and_as_far_from_the_top_as_its_steps_are() -> None:
    assert low_grid(100)[0] == 990
    for count in (1, 2, 7, 25, 100, 920):
        steps = low_grid(count)
        assert len(steps) == count
        assert steps[-1] == 80
        gaps = {a - b for a, b in zip((1000, *steps), steps, strict=False)}
        assert max(gaps) - min(gaps) <= 1
    for count in (0, 921):
        with pytest.raises(ValueError, match="give 1 to 920"):
            low_grid(count)


def test_noise_is_of_the_last_step_and_comes_down_to_the_grid_by_one_of_ddim(pipe: UnCLIP) -> None:
    """So decoding over the grid what is drawn for it goes on as DDIM over the grid and that step does."""
    z_i, seeds = torch.nn.functional.normalize(torch.randn(3, 16), dim=-1), [4, 5, 6]
    grid, options = (770, 400, 80), {"clip_sample": False}
    x_T = draw_x_T(pipe, z_i, seeds, StageSettings("ddim", grid))
    assert torch.equal(draw_x_T(pipe, z_i, seeds, StageSettings("ddim", (999, *grid))), draw_noise(pipe, seeds))
    guided = StageSettings("ddim", (999, *grid))  # clamped, as x_T is
    whole = pipe.decode(z_i, None, seeds, guided, x_T=draw_noise(pipe, seeds))
    assert torch.allclose(pipe.decode(z_i, None, seeds, StageSettings("ddim", grid), x_T=x_T), whole, atol=1e-5)
    for source in (z_i[:1], CAPTION):  # and so is what no picture gave
        drawn = pipe.vary(source, 1, 0.0, seed=4, size=16, steps=list(grid), output_type="pt")
        start = draw_x_T(pipe, drawn.image_embeds, [4], ddim_settings(pipe, grid))
        expected = pipe.decode(drawn.image_embeds, None, [4], StageSettings("ddim", grid, options=options), x_T=start)
        assert torch.equal(torch.as_tensor(drawn.images), expected)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "1", "P", "CMYK", "YCbCr", "I", "I;16", "F"])
@pytest.mark.parametrize("size", [(1, 1), (3, 200), (16, 16), (90, 40)])
def test_any_mode_and_size_is_a_picture(pipe: UnCLIP, mode: str, size: tuple[int, int]) -> None:
    image = Image.new("L", size, 200).convert("I").convert("I;16") if mode == "I;16" else Image.new("L", size, 200)
    image = image if mode == "I;16" else image.convert("RGB").convert(mode) if mode != "F" else image.convert("F")
    for frame in ("crop", "pad"):
        latent = pipe.invert(image, 1, frame=frame)
        assert latent.x_T.isfinite().all()
        if mode == "I":  # eight bits in 32
            assert torch.equal(latent.z_i, pipe.invert(image.convert("L"), 1, frame=frame).z_i)


def test_pictures_are_upright_on_white_and_framed_as_asked(pipe: UnCLIP, tmp_path: Path) -> None:
    image = picture()
    upright = pipe.invert(image, 2)
    exif = Image.Exif()
    exif[274] = 6  # to be turned by a quarter to be seen upright
    image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    for source in (tmp_path / "turned.png", str(tmp_path / "turned.png")):
        assert torch.equal(pipe.invert(source, 2).x_T, upright.x_T)
    pixels = np.asarray(image.convert("RGBA")).copy()
    pixels[(pixels[..., :3] == 255).all(-1)] = (9, 9, 9, 0)
    transparent = Image.fromarray(pixels)
    assert torch.allclose(pipe.invert(transparent, 2).z_i, upright.z_i, atol=0.05)
    cropped = image.crop((5, 0, 35, 30))
    assert torch.equal(pipe.invert(cropped, 2).x_T, upright.x_T)
    small = Image.new("RGB", (40, 30), "white")  # nothing near its edges, where scaling sees what is beyond
    ImageDraw.Draw(small).ellipse((14, 10, 26, 20), fill="red")
    padded = Image.new("RGB", (40, 40), "white")
    padded.paste(small, (0, 5))
    assert torch.allclose(pipe.invert(padded, 2).z_i, pipe.invert(small, 2, frame="pad").z_i, atol=1e-3)
    assert not torch.allclose(pipe.invert(padded, 2).z_i, pipe.invert(small, 2).z_i, atol=1e-3)


def test_the_steps_of_an_inversion_bound_nothing_else(pipe: UnCLIP) -> None:
    plan = make_plan(pipe, {"steps": 950})
    assert plan.settings["decoder"].steps == 950
    with pytest.raises(ValueError, match="give 1 to 920"):
        make_plan(pipe, {"steps": 950}, hears=())


def test_all_sources_are_read_before_any_is_inverted(pipe: UnCLIP, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("a network ran")

    monkeypatch.setattr(UnCLIP, "decode", never)
    monkeypatch.setattr(UnCLIP, "encode_image", never)
    latent = Latent(torch.ones(1, 5), torch.zeros(1, 3, 16, 16))
    for source, error in (("typo.png", FileNotFoundError), ("a fox|", ValueError), (latent, ValueError)):
        with pytest.raises(error):
            pipe.interpolate(picture(), source, 2, **FEW)
        with pytest.raises(error):
            pipe.mix([picture(), source], **FEW)
    with pytest.raises(ValueError, match="2 sources came with 1 weights"):
        pipe.mix([picture(), CAPTION], [1.0], **FEW)
    with pytest.raises(ValueError, match="parts or a weight"):
        pipe.edit(picture(), "a green apple:1.5 | a leaf", **FEW)
    with pytest.raises(TypeError):
        pipe.probe(picture(), [1, 2], **FEW)  # pyright: ignore[reportArgumentType]
