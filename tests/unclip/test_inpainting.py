"""Inpainting: known pixels come back to the last bit, a mask that keeps nothing changes nothing, white is drawn."""

from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from torch import Tensor

from unclip.core.data import pixels_from_pil
from unclip.core.diffusion import PREDICTION_TYPES, Diffusion, make_scheduler
from unclip.core.masks import known_channels
from unclip.core.sampling import SOLVERS, make_sampler, picture_generators, resolve_timesteps, sample, starting_noise
from unclip.inpainting import Method, filled, read_known, resampled
from unclip.pipeline import UnCLIP
from unclip.stages import Known, keeping

CAPTION = "a red apple"
INPUT = "unet.input.weight"


@pytest.fixture(scope="module")
def pipe(tiny_model: Path) -> UnCLIP:
    """One picture a batch: then a picture's bits do not depend on how many others are drawn with it."""
    pipe = UnCLIP.from_pretrained(tiny_model)
    pipe.batch_size = dict.fromkeys(pipe.batch_size, 1)
    return pipe


@pytest.fixture(scope="module")
def tuned(tiny_model: Path) -> UnCLIP:
    """The same model with a decoder and a first upsampler that see known pixels, by random weights."""
    pipe, torch_seed = UnCLIP.from_pretrained(tiny_model), torch.Generator().manual_seed(7)
    for name in ("decoder", "upsampler_256"):
        trained = getattr(pipe, name)
        net = type(trained)(**{**trained.config, "inpaint": True}).eval()
        weights = trained.state_dict()
        lacking = net.unet.input.weight.shape[1] - weights[INPUT].shape[1]
        new = torch.randn(len(weights[INPUT]), lacking, 3, 3, generator=torch_seed)
        net.load_state_dict({**weights, INPUT: torch.cat([weights[INPUT], new], dim=1)})
        pipe.register_modules(**{name: net.to(memory_format=torch.channels_last)})
    pipe.batch_size = dict.fromkeys(pipe.batch_size, 1)
    return pipe


def noise_picture(width: int, height: int | None = None) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (height or width, width, 3), np.uint8)
    return Image.fromarray(values)


def mask_of(width: int, height: int, box: tuple[int, int, int, int]) -> Image.Image:
    """Black, white within a box."""
    mask = Image.new("L", (width, height))
    ImageDraw.Draw(mask).rectangle(box, fill=255)
    return mask


# --- the list of steps


@settings(deadline=None)
@given(st.lists(st.integers(0, 999), min_size=1, max_size=40, unique=True), st.integers(1, 5), st.integers(1, 12))
def test_each_stretch_is_walked_so_often_and_then_the_next(found: list[int], times: int, stretch: int) -> None:
    steps = sorted(found, reverse=True)
    walked = resampled(steps, times, stretch)
    assert walked[0] == steps[0]
    assert set(walked) == set(steps)
    assert resolve_timesteps(make_sampler(make_scheduler("cosine", "sample"), "ddim"), walked) == list(walked)
    falls = [a for a, b in zip(walked, (*walked[1:], -1), strict=True) if b < a]  # where the network is called
    assert sorted(falls, reverse=True) == [s for s in steps[:-1] for _ in range(times)] + steps[-1:]
    if times == 1:
        assert list(walked) == steps


def test_the_list_goes_back_up() -> None:
    assert resampled([9, 8, 7, 6, 5], 2, stretch=2) == (9, 8, 7, 9, 8, 7, 6, 5, 7, 6, 5)


# --- known pixels at every noise level


@pytest.mark.parametrize("prediction", PREDICTION_TYPES)
@pytest.mark.parametrize("solver", [name for name in SOLVERS if name != "analytic"])
def test_every_solver_leads_known_pixels_to_what_they_are(solver: str, prediction: str) -> None:
    """By a network that knows nothing: what it says of known pixels has no effect, and it alone decides the others."""
    if solver == "unclip" and prediction == "v_prediction":
        pytest.skip("UnCLIPScheduler cannot sample v")
    scheduler = make_scheduler("cosine", prediction)  # pyright: ignore[reportArgumentType]
    sampler, diffusion = make_sampler(scheduler, solver), Diffusion.from_scheduler(scheduler)  # pyright: ignore
    x0 = pixels_from_pil(noise_picture(8))
    keep = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    keep[..., :4] = True
    steps = resampled(resolve_timesteps(sampler, 8), 2, 3)
    results = []
    for said in (0.0, 0.9):

        def denoise(x_t: Tensor, t: Tensor, said: float = said) -> Tensor:
            says = torch.where(keep, torch.full_like(x_t, said), torch.full_like(x_t, -0.5))
            return diffusion.from_x0(x_t, says, t)

        generators = picture_generators([0, 1], "decoder")
        x_T = starting_noise((3, 8, 8), generators)
        results.append(sample(keeping(denoise, diffusion, Known(x0, keep)), sampler, x_T, steps, generators))
    left = torch.where(keep, results[0] - x0, torch.zeros(()))
    assert float(left.abs().max()) < 0.05  # the last step of ancestral samplers and rounding
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-4)
    assert float((results[0] + 0.5).masked_select(~keep).abs().max()) < 0.05


def test_known_pixels_are_as_noisy_as_the_step_is() -> None:
    scheduler = make_scheduler("cosine", "v_prediction")
    sampler, diffusion = make_sampler(scheduler, "ddim", clip_sample=False), Diffusion.from_scheduler(scheduler)
    x0, generators = pixels_from_pil(noise_picture(8)), picture_generators([0], "decoder")
    x_T, states = starting_noise((3, 8, 8), generators), []
    known = Known(x0, torch.ones(1, 1, 8, 8, dtype=torch.bool))
    steps = [999, 700, 400, 100]
    denoise = keeping(lambda x_t, t: torch.zeros_like(x_t), diffusion, known)
    sample(denoise, sampler, x_T, steps, generators, lambda i, t, x_t: states.append(x_t))
    for step, x_t in zip(steps[1:], states, strict=False):
        expected = diffusion.add_noise(x0, x_T, torch.tensor([step]))
        torch.testing.assert_close(x_t, expected, rtol=0, atol=2e-3)  # x_T has x0's share of 5e-5 in place


# --- masks


def test_a_pixel_is_known_where_all_it_is_made_of_is() -> None:
    keep = torch.ones(1, 1, 8, 8, dtype=torch.bool)
    keep[0, 0, 5, 2] = False
    small = Known(torch.arange(64.0).view(1, 1, 8, 8).expand(1, 3, 8, 8), keep).at(2)
    assert small.keep[0, 0].tolist() == [[True, True], [False, True]]
    assert small.x0[0, 0, 0, 0] == pytest.approx((0 + 1 + 2 + 3) / 4 + 12)
    known = Known(small.x0, small.keep)
    assert all(torch.equal(a, b) for a, b in zip(known.at(2)[:2], known[:2], strict=True))


def test_white_is_drawn_and_black_is_kept() -> None:
    known = read_known(noise_picture(16), mask_of(16, 16, (0, 0, 7, 15)), 16)
    assert not known.keep[..., :8].any()
    assert known.keep[..., 8:].all()
    assert torch.equal(known.x0[..., 8:], pixels_from_pil(noise_picture(16))[..., 8:])


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
def test_a_mask_of_any_mode(mode: str) -> None:
    mask = mask_of(16, 16, (0, 0, 7, 15))
    mask = mask.convert("I").point(lambda v: v * 257).convert("I;16") if mode == "I;16" else mask.convert(mode)  # pyright: ignore
    plain = read_known(noise_picture(16), mask_of(16, 16, (0, 0, 7, 15)), 16)
    assert torch.equal(read_known(noise_picture(16), mask, 16).keep, plain.keep)


def test_strokes_on_a_clear_mask_are_what_is_drawn() -> None:
    mask = Image.new("RGBA", (16, 16), (255, 255, 255, 0))
    ImageDraw.Draw(mask).rectangle((0, 0, 7, 15), fill="white")
    assert torch.equal(
        read_known(noise_picture(16), mask, 16).keep,
        read_known(noise_picture(16), mask_of(16, 16, (0, 0, 7, 15)), 16).keep,
    )


def test_without_a_mask_what_is_clear_is_drawn_and_so_are_margins() -> None:
    image = noise_picture(16).convert("RGBA")
    image.putalpha(mask_of(16, 16, (8, 0, 15, 15)))
    assert not read_known(image, None, 16).keep[..., :8].any()
    wide = read_known(noise_picture(16), None, 32, margin=0.5)
    assert wide.keep.sum() == 16 * 16
    assert wide.keep[..., 8:24, 8:24].all()
    assert torch.equal(wide.x0[..., 8:24, 8:24], pixels_from_pil(noise_picture(16)))
    padded = read_known(noise_picture(16, 8), None, 16, "pad")
    assert padded.keep[..., 4:12, :].all()
    assert padded.keep.sum() == 16 * 8


@pytest.mark.parametrize("length", [100, 1500])  # the second is made smaller before it is worked on
def test_no_colour_of_what_is_to_be_drawn_gets_into_what_is_known(length: int) -> None:
    image, box = Image.new("RGB", (length, length), "red"), (0, 0, length * 2 // 5, length)
    ImageDraw.Draw(image).rectangle(box, fill=(0, 255, 0))
    for side in (16, 64, 256):
        known = read_known(image, mask_of(length, length, box), side)
        assert 0.4 < known.keep.float().mean() < 0.6
        assert bool((known.x0[:, 1:2][known.keep] == -1).all())
        assert bool((known.x0[:, :1][known.keep] == 1).all())


@pytest.mark.parametrize("size", [(1, 1), (2, 1), (7, 5), (64, 64)])
def test_clear_pixels_take_the_colours_around_them(size: tuple[int, int]) -> None:
    image = Image.new("RGBA", size, (0, 0, 255, 0))
    image.putpixel((0, 0), (200, 100, 50, 255))
    assert filled(image).getcolors() == [(size[0] * size[1], (200, 100, 50))]
    opaque = noise_picture(*size)
    assert filled(opaque.convert("RGBA")).tobytes() == opaque.tobytes()


# --- pictures


@pytest.mark.parametrize("size", [16, 64, 256])
def test_known_pixels_come_back_at_every_size(pipe: UnCLIP, size: int) -> None:
    image, mask = noise_picture(size), mask_of(size, size, (0, 0, size // 2 - 1, size - 1))
    made = pipe.inpaint(image, mask, CAPTION, 2, resamples=2, size=size, seed=1)
    right = (size // 2, 0, size, size)
    for drawn in made.images:
        assert drawn.crop(right).tobytes() == image.crop(right).tobytes()  # pyright: ignore
    assert made.images[0].tobytes() != made.images[1].tobytes()  # pyright: ignore
    known = read_known(image, mask, size)
    for side in made.stages:
        small, drawn = known.at(side), pixels_from_pil(made.stages[side])  # pyright: ignore
        off = torch.where(small.keep, drawn - small.x0, torch.zeros(()))
        assert float(off.abs().max()) <= 1 / 255 + 1e-6  # of rounding to 8 bits
        assert small.keep.any()


def test_a_mask_that_keeps_nothing_draws_the_prompt(pipe: UnCLIP) -> None:
    white = Image.new("L", (64, 64), "white")
    made = pipe.inpaint(noise_picture(64), white, CAPTION, 2, resamples=1, size=64, seed=3, output_type="pt")
    drawn = pipe(CAPTION, 2, seed=3, size=64, output_type="pt")
    assert torch.equal(made.images, drawn.images)  # pyright: ignore
    assert torch.equal(made.image_embeds, drawn.image_embeds)
    again = pipe.inpaint(noise_picture(64), white, CAPTION, 2, resamples=3, size=64, seed=3, output_type="pt")
    assert not torch.equal(again.images, drawn.images)  # pyright: ignore


def test_what_is_known_decides_what_is_drawn_beside_it(pipe: UnCLIP) -> None:
    mask = mask_of(16, 16, (0, 0, 7, 15))
    left = (0, 0, 8, 16)
    dark, light = (
        pipe.inpaint(Image.new("RGB", (16, 16), colour), mask, CAPTION, size=16).images[0].crop(left)  # pyright: ignore
        for colour in ("black", "white")
    )
    assert dark.tobytes() != light.tobytes()


# --- networks tuned to see what is known


@pytest.mark.parametrize("size", [16, 64, 256])
@pytest.mark.parametrize("method", ["auto", "tuned", "replace"])
def test_known_pixels_come_back_from_tuned_networks_too(tuned: UnCLIP, size: int, method: Method) -> None:
    image, mask = noise_picture(size), mask_of(size, size, (0, 0, size // 2 - 1, size - 1))
    drawn = tuned.inpaint(image, mask, CAPTION, method=method, resamples=1, size=size, seed=1).images[0]
    right = (size // 2, 0, size, size)
    assert drawn.crop(right).tobytes() == image.crop(right).tobytes()  # pyright: ignore


def test_tuned_networks_are_shown_what_is_known_at_their_own_size(tuned: UnCLIP) -> None:
    """Both halves of guidance are, at every step; none is by the method that replaces."""
    image, mask = noise_picture(64), mask_of(64, 64, (0, 0, 31, 63))
    known, seen = read_known(image, mask, 64), []
    with ExitStack() as stack:
        for net in (tuned.decoder, tuned.upsampler_256):
            assert net is not None
            handle = net.register_forward_pre_hook(lambda _, given: seen.append((given[0].shape, given[2].known)))
            stack.callback(handle.remove)
        tuned.inpaint(image, mask, CAPTION, size=64)
        for (rows, _, side, _), given in seen:
            here = known.at(side)
            assert torch.equal(given, known_channels(here.x0, here.keep).expand(rows, -1, -1, -1))
        assert {shape for shape, _ in seen} == {(2, 3, 16, 16), (1, 3, 64, 64)}
        walked, shown = len(seen), seen.copy()
        seen.clear()
        tuned.inpaint(image, mask, CAPTION, method="replace", resamples=1, size=64)
        assert [shape for shape, _ in seen] == [shape for shape, _ in shown]
        assert all(given is None for _, given in seen)
        seen.clear()
        tuned.inpaint(image, mask, CAPTION, method="replace", size=64)
        assert len(seen) > walked  # it walks stretches again, unless told otherwise


def test_replacing_is_what_an_untuned_model_does(tuned: UnCLIP, pipe: UnCLIP) -> None:
    image, mask = noise_picture(64), mask_of(64, 64, (0, 0, 31, 63))
    replaced = tuned.inpaint(image, mask, CAPTION, method="replace", size=64, output_type="pt").images
    assert torch.equal(replaced, pipe.inpaint(image, mask, CAPTION, size=64, output_type="pt").images)  # pyright: ignore
    seen = tuned.inpaint(image, mask, CAPTION, size=64, output_type="pt").images
    assert not torch.equal(seen, replaced)  # pyright: ignore
    assert torch.equal(
        seen,  # pyright: ignore
        tuned.inpaint(image, mask, CAPTION, resamples=1, method="tuned", size=64, output_type="pt").images,  # pyright: ignore
    )


def test_tuned_networks_that_are_shown_nothing_draw_the_prompt(tuned: UnCLIP) -> None:
    white, common = Image.new("L", (64, 64), "white"), {"seed": 3, "size": 64, "output_type": "pt"}
    drawn = tuned(CAPTION, 2, **common).images
    made = tuned.inpaint(noise_picture(64), white, CAPTION, 2, **common).images
    assert torch.equal(made, drawn)  # pyright: ignore


def test_progress_ends_where_it_says(pipe: UnCLIP) -> None:
    seen = []
    pipe.inpaint(
        noise_picture(16), mask_of(16, 16, (0, 0, 7, 15)), CAPTION, 2, resamples=3, size=64, callback=seen.append
    )
    for stage in ("decoder", "upsampler_256"):
        of_stage = [(p.step, p.total) for p in seen if p.stage == stage]
        assert [step for step, _ in of_stage] == list(range(1, of_stage[0][1] + 1))


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda p: p.inpaint(noise_picture(16), mask_of(8, 8, (0, 0, 3, 3)), CAPTION), "mask is 8×8"),
        (lambda p: p.inpaint(noise_picture(16), Image.new("L", (16, 16)), CAPTION), "nothing is to be drawn"),
        (lambda p: p.inpaint(noise_picture(16), None, CAPTION), "nothing is to be drawn"),
        (
            lambda p: p.inpaint(Image.new("RGB", (40, 16)), mask_of(40, 16, (0, 0, 7, 15)), CAPTION),
            "outside the centre square",
        ),
        (
            lambda p: p.inpaint(Image.new("RGB", (1, 8000)), None, CAPTION, margin=1.0, frame="pad"),
            "with its margins is 24000×24000",
        ),
        (lambda p: p.inpaint(noise_picture(16), "nowhere.png", CAPTION), "nowhere.png"),
        (lambda p: p.inpaint(noise_picture(16), None, CAPTION, margin=-1), "margin is -1"),
        (lambda p: p.inpaint(noise_picture(16), None, CAPTION, margin=2), "margin is 2"),
        (lambda p: p.inpaint(noise_picture(16), None, "", margin=0.5), "prompt is empty"),
        (lambda p: p.inpaint(noise_picture(16), None, CAPTION, margin=0.5, resamples=0), "resamples is 0"),
        (lambda p: p.inpaint(noise_picture(16), None, CAPTION, margin=0.5, resamples=1.5), "resamples is 1.5"),
        (lambda p: p.inpaint(noise_picture(16), None, CAPTION, margin=0.5, method="best"), "method is 'best'"),
        (lambda p: p.inpaint(noise_picture(16), None, CAPTION, margin=0.5, method="tuned"), "was not tuned to inpaint"),
    ],
)
def test_bad_arguments_are_one_sentence_before_any_work(pipe: UnCLIP, call, says: str) -> None:
    worked: list[int] = []
    handle = pipe.decoder.register_forward_pre_hook(lambda *_: worked.append(1))
    with pytest.raises((ValueError, TypeError, FileNotFoundError), match=says) as caught:
        call(pipe)
    handle.remove()
    assert "\n" not in str(caught.value)
    assert not worked
