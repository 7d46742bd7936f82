"""Operations on (z_i, x_T): their ends are reconstructions, their neutral settings change nothing, on a tiny model."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from prior.pca import PCA
from unclip.core.data import pil_from_pixels, pixels_from_pil
from unclip.core.sampling import resolve_timesteps
from unclip.latents import Latent, slerp
from unclip.manipulations import _steps_below, component_counts
from unclip.pipeline import UnCLIP
from unclip.sources import square

CAPTION, OTHER = "a red apple", "two yellow stars"
FEW = {"steps": 4, "size": 16}


@pytest.fixture(scope="module")
def pipe(tiny_model: Path) -> UnCLIP:
    """One picture a batch: then a picture's bits do not depend on how many others are drawn with it."""
    pipe = UnCLIP.from_pretrained(tiny_model)
    pipe.batch_size = dict.fromkeys(pipe.batch_size, 1)
    return pipe


def picture(colour: str = "red", size: tuple[int, int] = (40, 30)) -> Image.Image:
    image = Image.new("RGB", size, "white")
    ImageDraw.Draw(image).ellipse((8, 4, 30, 26), fill=colour)
    return image


def same(a: Image.Image, b: Image.Image) -> bool:
    return a.mode == b.mode and a.tobytes() == b.tobytes()


# --- inversion


def test_a_picture_comes_back_the_closer_the_more_steps(pipe: UnCLIP) -> None:
    pictures = [picture(), picture("blue", (16, 16)), picture("green", (64, 100))]
    x0 = torch.cat([pixels_from_pil(square(p, 16)) for p in pictures])
    errors = []
    for steps in (10, 20, 40, 80):
        latent = pipe.invert(pictures, steps)
        assert latent.z_i.shape == (3, 16)
        assert latent.x_T.shape == (3, 3, 16, 16)
        drawn = [pipe.vary(latent.row(i), 1, 0.0, steps=steps, size=16, output_type="pt").images for i in range(3)]
        errors.append(float((torch.cat(drawn) - x0).square().mean()))  # pyright: ignore
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.25 * errors[0]


def test_inversion_and_decoding_take_one_list_of_steps(pipe: UnCLIP) -> None:
    by_count, by_list = (pipe.invert(picture(), steps) for steps in (4, [770, 540, 310, 80]))
    assert torch.equal(by_count.x_T, by_list.x_T)
    a, b = (pipe.vary(by_list, 1, 0.0, steps=steps, size=16).images[0] for steps in (4, [770, 540, 310, 80]))
    assert same(a, b)


def test_what_is_inverted_is_neither_clamped_nor_guided(pipe: UnCLIP) -> None:
    latent = pipe.invert(picture(), 4)
    assert float(latent.x_T.abs().max()) > 1
    assert not torch.allclose(latent.x_T, pipe.invert(picture(), 4, guidance_scale=3.0).x_T)


# --- variations, interpolation, text diffs


def test_variations_are_functions_of_their_seeds(pipe: UnCLIP) -> None:
    latent = pipe.invert(picture(), 4)
    three = pipe.vary(picture(), 3, seed=5, **FEW)
    assert three.seeds == [5, 6, 7]
    assert torch.equal(three.image_embeds, latent.z_i.expand(3, -1))
    for i, seed in enumerate(three.seeds):
        alone = pipe.vary(latent, 1, seed=seed, **FEW)
        assert same(alone.images[0], three.images[i])
    assert not same(three.images[0], three.images[1])
    plain = pipe.vary(latent, 2, 0.0, **FEW)
    assert same(plain.images[0], plain.images[1])
    assert not same(plain.images[0], three.images[0])


@pytest.mark.parametrize("size", [16, 64])
def test_an_interpolation_ends_in_both_reconstructions(pipe: UnCLIP, size: int) -> None:
    a, b = picture("red"), picture("blue", (20, 20))
    options = {**FEW, "size": size, "seed": 3}
    way = pipe.interpolate(a, b, 4, **options)
    assert [image.size for image in way.images] == [(size, size)] * 4
    assert same(way.images[0], pipe.vary(a, 1, 0.0, **options).images[0])
    assert same(way.images[-1], pipe.vary(b, 1, 0.0, **options).images[0])
    back = pipe.interpolate(b, a, 4, **options)
    assert torch.allclose(way.image_embeds, back.image_embeds.flip(0), atol=1e-6)


def test_an_interpolation_goes_between_captions_and_pictures(pipe: UnCLIP) -> None:
    way = pipe.interpolate(CAPTION, picture(), 3, seed=2, **FEW)
    assert torch.allclose(way.image_embeds[:1], pipe(CAPTION, seed=2, size=16).image_embeds)
    assert torch.equal(way.image_embeds[-1:], pipe.invert(picture(), 4).z_i)
    assert same(way.images[0], pipe.vary(CAPTION, 1, 0.0, seed=2, **FEW).images[0])
    fixed = pipe.interpolate(CAPTION, OTHER, 3, "fixed", seed=2, **FEW)
    assert same(fixed.images[0], way.images[0])
    turned = pipe.interpolate(OTHER, CAPTION, 3, "fixed", seed=2, **FEW)
    assert torch.allclose(turned.image_embeds.flip(0), fixed.image_embeds, atol=1e-6)
    assert same(turned.images[2], fixed.images[0])


def test_an_edit_of_strength_0_reconstructs_and_turns_to_the_caption(pipe: UnCLIP) -> None:
    options = {**FEW, "seed": 1}
    edited = pipe.edit(picture(), CAPTION, strengths=[0, 0.25, 0.5, 1], **options)
    assert same(edited.images[0], pipe.vary(picture(), 1, 0.0, **options).images[0])
    z_t, z_t0 = (pipe.encode_text(text).z_t for text in (CAPTION, ""))
    nearness = edited.image_embeds @ torch.nn.functional.normalize(z_t - z_t0, dim=-1)[0]
    assert nearness.tolist() == sorted(nearness.tolist())
    assert float(nearness[-1]) == pytest.approx(1, abs=1e-5)
    assert torch.allclose(edited.image_embeds.norm(dim=-1), torch.ones(4))
    other = pipe.edit(picture(), CAPTION, OTHER, strengths=[0.5], **options)
    assert not torch.allclose(other.image_embeds[0], edited.image_embeds[2])
    with pytest.raises(ValueError, match="the same embedding"):
        pipe.edit(picture(), CAPTION, CAPTION, **options)


def test_a_latent_stands_for_its_picture(pipe: UnCLIP) -> None:
    latent = pipe.invert(picture(), 4)
    assert same(pipe.vary(latent, 1, **FEW).images[0], pipe.vary(picture(), 1, **FEW).images[0])
    a, b = (pipe.edit(source, CAPTION, strengths=[0.3], **FEW).images[0] for source in (latent, picture()))
    assert same(a, b)
    with pytest.raises(ValueError, match="give one row"):
        pipe.vary(Latent(latent.z_i.expand(2, -1), latent.x_T.expand(2, -1, -1, -1)), 1, **FEW)


def test_a_mixture_is_a_weighted_mean_and_can_be_drawn(pipe: UnCLIP) -> None:
    one = pipe.mix([picture()])
    assert torch.equal(one, pipe.invert(picture(), 1).z_i)
    caption = pipe.mix([CAPTION])
    assert torch.allclose(pipe.mix([picture(), CAPTION], [3, 1]), slerp(one, caption, 0.25))
    three = pipe.mix([picture(), CAPTION, OTHER], [1, 2, 3])
    assert torch.allclose(three, pipe.mix([OTHER, picture(), CAPTION], [0.3, 0.1, 0.2]), atol=1e-6)
    drawn = pipe.vary(three, 2, 0.0, **FEW)
    assert torch.equal(drawn.image_embeds, three.expand(2, -1))
    assert not same(drawn.images[0], drawn.images[1])
    for wrong in ([], CAPTION, picture()):
        with pytest.raises(ValueError, match="give a list"):
            pipe.mix(wrong)  # pyright: ignore[reportArgumentType]


@pytest.fixture(scope="module")
def with_basis(pipe: UnCLIP) -> UnCLIP:
    z_i = torch.nn.functional.normalize(torch.randn(40, 16, generator=torch.Generator().manual_seed(0)), dim=-1)
    parts = {name: part for name, part in pipe.components.items() if part is not None}
    basis = UnCLIP(**parts, pca=PCA.fit(z_i), presets={"default": {"decoder": {"steps": 4}}})
    basis.batch_size = dict.fromkeys(basis.batch_size, 1)
    return basis


def test_a_reconstruction_from_all_components_is_that_from_the_embedding(with_basis: UnCLIP) -> None:
    z_i = with_basis.encode_image(square(picture(), 16))
    made = with_basis.reconstruct(picture(), [1, 4, 16], seed=5, **FEW)
    assert made.seeds == [5, 5, 5]
    assert torch.allclose(made.image_embeds[2:], z_i, atol=1e-5)
    assert torch.allclose(made.image_embeds.norm(dim=-1), torch.ones(3), atol=1e-5)
    nearness = (made.image_embeds @ z_i[0]).tolist()
    assert nearness == sorted(nearness)
    plain = with_basis.vary(made.image_embeds[1:2], 1, 0.0, seed=5, **FEW)
    assert same(made.images[1], plain.images[0])
    again = with_basis.reconstruct(Latent(made.image_embeds[2:], torch.zeros(1, 3, 16, 16)), [1, 4, 16], seed=5, **FEW)
    assert torch.allclose(again.image_embeds, made.image_embeds, atol=1e-5)


def test_component_counts_are_the_papers_as_far_as_the_basis_goes(pipe: UnCLIP, with_basis: UnCLIP) -> None:
    assert component_counts(with_basis) == [16]
    assert component_counts(SimpleNamespace(pca=PCA(100))) == [20, 30, 40, 80, 100]  # pyright: ignore[reportArgumentType]
    for wrong in ([], [0], [17], [4.0], [True], 4):
        with pytest.raises(ValueError, match="this model has 16"):
            with_basis.reconstruct(picture(), wrong)
    with pytest.raises(ValueError, match="unclip pca fit"):
        pipe.reconstruct(picture(), [1])


# --- study, probe, img2img, alpha


def test_strengths_may_be_an_array(pipe: UnCLIP) -> None:
    by_list, by_array, by_tensor = (
        pipe.edit(picture(), CAPTION, strengths=strengths, **FEW).images  # pyright: ignore[reportArgumentType]
        for strengths in ([0.0, 0.5], np.array([0.0, 0.5]), torch.tensor([0.0, 0.5]))
    )
    assert all(same(a, b) and same(a, c) for a, b, c in zip(by_list, by_array, by_tensor, strict=True))


def test_a_negative_prompt_is_that_of_a_prompt(pipe: UnCLIP) -> None:
    """From noise alone img2img draws what the prompt does, but for a trace of the picture at the last noise level."""
    options = {"negative_prompt": OTHER, "guidance_scale": 3.0, "prior_guidance_scale": 2.0, "size": 16}
    (drawn,) = pipe(CAPTION, **options).images
    errors = [
        (pixels_from_pil(pipe.img2img(picture(), CAPTION, 1.0, **given).images) - pixels_from_pil(drawn)).abs().mean()
        for given in (options, {**options, "negative_prompt": None})
    ]
    assert errors[0] < 0.2 * errors[1]
    assert same(pipe.study(CAPTION, 1, **options)["prior"].images[0], drawn)
    mask = Image.new("L", (16, 16), 0)
    mask.paste(255, (0, 0, 8, 16))
    with_it, without = (
        pipe.inpaint(picture(size=(16, 16)), mask, CAPTION, **{**options, "negative_prompt": negative}).images[0]
        for negative in (OTHER, None)
    )
    assert not same(with_it, without)


def test_a_negative_prompt_that_nothing_hears_is_refused(pipe: UnCLIP) -> None:
    """Where a picture or a latent is decoded without its caption no guidance leads away from anything."""
    given: dict[str, Any] = {"negative_prompt": OTHER, "guidance_scale": 3.0, **FEW}
    for call in (
        lambda: pipe.vary(picture(), 1, **given),
        lambda: pipe.vary(pipe.mix([picture()], **FEW), 1, **given),
        lambda: pipe.interpolate(picture(), picture(), 2, **given),
        lambda: pipe.edit(picture(), CAPTION, strengths=[0.5], **given),
        lambda: pipe.probe(picture(), ["red", "blue"], 1, **given),
        lambda: pipe.mix([picture()], **given),
    ):
        with pytest.raises(ValueError, match="nothing is drawn from a prompt"):
            call()
    with pytest.raises(ValueError, match="the prior a guidance scale above 1"):
        pipe.vary(CAPTION, 1, prior_guidance_scale=1.0, **given)
    guided = {**given, "prior_guidance_scale": 2.0}  # then the prior hears it, of a caption's z_i
    without = pipe.vary(CAPTION, 1, **{**guided, "negative_prompt": None}).image_embeds
    assert not torch.equal(pipe.vary(CAPTION, 1, **guided).image_embeds, without)
    with pytest.raises(ValueError, match="parts or a weight"):
        pipe(CAPTION, size=16, guidance_scale=3.0, negative_prompt="a leaf | a twig")


def test_the_study_gives_one_decoder_three_conditions(pipe: UnCLIP) -> None:
    rows = pipe.study(CAPTION, 2, seed=4, size=16)
    assert list(rows) == ["caption", "text embedding", "prior"]
    drawn = pipe(CAPTION, 2, seed=4, size=16)
    assert all(same(a, b) for a, b in zip(rows["prior"].images, drawn.images, strict=True))
    z_t = pipe.encode_text(CAPTION).z_t.expand(2, -1)
    by_text = pipe(CAPTION, 2, seed=4, size=16, z_i=z_t)
    assert all(same(a, b) for a, b in zip(rows["text embedding"].images, by_text.images, strict=True))
    text = pipe.encode_text(CAPTION)
    dropped = {"drop_z_i": torch.ones(1, dtype=torch.bool), "text": text.states, "text_mask": text.mask}
    contexts = [pipe.decoder.encode_context(z_i=z, **dropped) for z in (torch.zeros(1, 16), torch.ones(1, 16))]
    assert torch.equal(contexts[0].time, contexts[1].time)
    assert not same(rows["caption"].images[0], rows["prior"].images[0])


def test_a_probe_gives_probabilities_of_the_picture_and_of_its_variations(pipe: UnCLIP) -> None:
    found = pipe.probe(picture(), ["red", "blue", "green"], 2, **FEW)
    assert found.probabilities.shape == (3, 3)
    assert torch.allclose(found.probabilities.sum(1), torch.ones(3))
    drawn = pipe.vary(picture(), 2, **FEW)
    assert all(same(a, b) for a, b in zip(found.output.images, drawn.images, strict=True))
    own = pipe.clip.zero_shot(pixels_from_pil(square(picture(), 16)), ["red", "blue", "green"])
    assert torch.allclose(found.probabilities[:1], own)


@pytest.mark.parametrize("steps", [1, 2, 25])
@pytest.mark.parametrize(("strength", "first"), [(1.0, 999), (0.85, 849), (0.55, 549), (0.3, 299), (0.001, 0)])
def test_img2img_starts_where_its_strength_says_however_few_the_steps(pipe: UnCLIP, steps, strength, first) -> None:
    settings = pipe.settings(steps=[None, steps])["decoder"]
    run = _steps_below(pipe, settings, strength)
    assert run[0] == first
    assert list(run) == sorted(set(run), reverse=True)
    assert set(run[1:]) <= set(resolve_timesteps(pipe.sampler("decoder", settings), steps))


def test_img2img_goes_from_the_picture_to_the_prompts_own(pipe: UnCLIP) -> None:
    start = pixels_from_pil(square(picture(), 16))
    untouched = pipe.img2img(picture(), CAPTION, 0.0, 2, size=16)
    assert all(same(image, pil_from_pixels(start)[0]) for image in untouched.images)
    whole = pipe.img2img(picture(), CAPTION, 1.0, 2, seed=3, size=16)
    drawn = pipe(CAPTION, 2, seed=3, size=16)
    for a, b in zip(whole.images, drawn.images, strict=True):
        assert np.abs(np.asarray(a, int) - np.asarray(b, int)).max() <= 2  # at the last step 5e-5 of x0 is left
    distances = [
        float(
            (pipe.img2img(picture(), CAPTION, s, 1, steps=50, size=16, output_type="pt").images - start).square().mean()
        )
        for s in (0.0, 0.1, 0.9)
    ]
    assert distances[0] == 0 < distances[1] < distances[2]


def test_alpha_is_kept_where_asked(pipe: UnCLIP) -> None:
    clear = picture().convert("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize(clear.size))
    for result in (
        pipe.vary(clear, 1, keep_alpha=True, steps=2, size=64),
        pipe.edit(clear, CAPTION, strengths=[0.2], keep_alpha=True, steps=2, size=64),
        pipe.img2img(clear, CAPTION, 0.5, keep_alpha=True, size=64),
    ):
        assert same(result.images[0].getchannel("A"), square(clear, 64).getchannel("A"))
        assert same(result.stages[16][0].getchannel("A"), square(clear, 16).getchannel("A"))
    assert pipe.vary(clear, 1, **FEW).images[0].mode == "RGB"
    assert pipe.vary(picture(), 1, keep_alpha=True, **FEW).images[0].mode == "RGB"
    for source, output_type in ((CAPTION, "pil"), (clear, "pt"), (pipe.invert(clear, 2), "pil")):
        with pytest.raises(ValueError, match="keep_alpha"):
            pipe.vary(source, 1, keep_alpha=True, output_type=output_type, **FEW)


# --- bad input


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda p: p.vary(picture(), 0), "num_images is 0"),
        (lambda p: p.vary(picture(), eta=1.5), "eta is 1.5"),
        (lambda p: p.vary(picture(), steps=0), "steps"),
        (lambda p: p.vary(picture(), steps=1001), "1001"),
        (lambda p: p.vary(picture(), size=17), "size 17 is not offered"),
        (lambda p: p.vary(picture(), preset="best"), "preset 'best' is unknown"),
        (lambda p: p.vary(picture(), frame="stretch"), "frame is 'stretch'"),
        (lambda p: p.vary(picture(), speed=3), "no option 'speed'"),
        (lambda p: p.vary(picture(), output_type="jpeg"), "output_type 'jpeg'"),
        (lambda p: p.vary("nowhere.png"), "nowhere.png"),
        (lambda p: p.vary(""), "prompt is empty"),
        (lambda p: p.vary(3), "not int"),
        (lambda p: p.invert([]), "no pictures"),
        (lambda p: p.invert("no picture at all"), "no picture at all"),
        (lambda p: p.interpolate(CAPTION, OTHER, 1), "n is 1"),
        (lambda p: p.interpolate(CAPTION, OTHER, x_T="linear"), "x_T is 'linear'"),
        (lambda p: p.edit(picture(), ""), "prompt is empty"),
        (lambda p: p.edit(picture(), CAPTION, strengths=[]), "strength came as"),
        (lambda p: p.edit(picture(), CAPTION, strengths=0.3), "strength came as 0.3"),
        (lambda p: p.vary(torch.zeros(2, 16)), r"z_i is \(2, 16\)"),
        (lambda p: p.edit(picture(), CAPTION, strengths=[0.1, 2]), "strength is 2"),
        (lambda p: p.img2img(picture(), CAPTION, -0.1), "strength is -0.1"),
        (lambda p: p.img2img(picture(), "a|", 0.5), "empty part"),
        (lambda p: p.mix([CAPTION, OTHER], [1]), "came with 1 weights"),
        (lambda p: p.probe(picture(), []), "labels are"),
        (lambda p: p.probe(picture(), ["a cat"]), "labels are"),
        (lambda p: p.probe(picture(), ["a cat", ""]), "labels are"),
        (lambda p: p.probe(picture(), ["a cat", "a cat"]), "labels are"),
        (lambda p: p.study("a fox:1.5"), "has parts or a weight"),
        (lambda p: p.vary("a fox | :2"), "empty part"),
        (lambda p: p.vary(CAPTION, negative_prompt=3), "negative_prompt is of type int"),
        (lambda p: p.edit(picture(), CAPTION, 3), "of type int"),
        (lambda p: p.invert(picture(), 2.5), "steps are 2.5"),
        (lambda p: p.vary(Latent(torch.ones(1, 16), torch.ones(1, 3, 8, 8))), "this model's are"),
        (lambda p: p.interpolate(Latent(torch.ones(1, 7), torch.ones(1, 3, 16, 16)), CAPTION), "this model's are"),
        (lambda p: p.vary(str(Path(__file__).parent)), "is no picture|not a readable picture|There is no picture"),
        (lambda p: p.vary("holiday.heic"), "holiday.heic"),
        (lambda p: p.invert(Image.new("RGB", (0, 5))), "no pixels"),
    ],
)
def test_bad_arguments_are_one_sentence(pipe: UnCLIP, call, says: str) -> None:
    worked: list[int] = []
    handle = pipe.decoder.register_forward_pre_hook(lambda *_: worked.append(1))
    with pytest.raises((ValueError, TypeError, FileNotFoundError), match=says) as caught:
        call(pipe)
    handle.remove()
    assert "\n" not in str(caught.value)
    assert not worked
