"""Prompts of several parts, negative prompts, the best of several: what changes nothing, and what does what it says."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from unclip.core.data import pil_from_pixels
from unclip.latents import slerp
from unclip.pipeline import UnCLIP
from unclip.prompts import best_rows, parse


@pytest.mark.parametrize(
    ("prompt", "parts"),
    [
        ("a cat", [("a cat", 1.0)]),
        ("a cat:1.5", [("a cat", 1.5)]),
        ("  a cat :.5 ", [("a cat", 0.5)]),
        ("a cat:1.5 | a dog|an owl:0.25", [("a cat", 1.5), ("a dog", 1.0), ("an owl", 0.25)]),
        ("a cat:2|a dog:0", [("a cat", 1.0)]),
        ("a cat:0", [("a cat", 0.0)]),
        ("a clock at 10:30", [("a clock at 10:30", 1.0)]),
        ("chapter: 3", [("chapter: 3", 1.0)]),
        ("title: the cat", [("title: the cat", 1.0)]),
        ("one: two: three:1.25", [("one: two: three", 1.25)]),
        ("猫:1.5", [("猫", 1.5)]),
        ("two\nlines:2", [("two\nlines", 2.0)]),
    ],
)
def test_parts_and_weights(prompt: str, parts: list[tuple[str, float]]) -> None:
    assert parse(prompt) == parts


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        ("a cat|", "empty part"),
        ("|", "empty part"),
        ("a cat | | a dog", "empty part"),
        ("a cat:-1", "negative prompt"),
        ("a cat:3", "up to 2"),
        ("a cat:11 | a dog", "up to 10"),
        ("a cat:0 | a dog:0", "weight 0"),
    ],
)
def test_prompts_that_mean_nothing(prompt: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        parse(prompt)


def test_the_best_of_each_group_by_direction_alone() -> None:
    z_t = torch.eye(2).repeat_interleave(3, 0)
    z_i = torch.tensor([[1.0, 1], [9, 1], [0, 1], [1, 0], [5, 4], [0.1, 0.3]])
    assert best_rows(z_i, z_t, 3) == [1, 5]
    assert best_rows(z_i, z_t, 1) == list(range(6))


# --- as the pipeline draws them


CAPTION, OTHER = "a red apple", "two yellow stars"


@pytest.fixture(scope="module")
def pipe(tiny_model: Path) -> UnCLIP:
    """One picture a batch: then a picture's bits do not depend on how many others are drawn with it."""
    pipe = UnCLIP.from_pretrained(tiny_model)
    pipe.batch_size = dict.fromkeys(pipe.batch_size, 1)
    return pipe


def same(a: Image.Image, b: Image.Image) -> bool:
    return a.mode == b.mode and a.tobytes() == b.tobytes()


def close(a: Image.Image, b: Image.Image) -> bool:
    """99.9 % of values within one level of 8 bits: what is promised of a picture in batches of other sizes."""
    difference = np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int))
    return bool((difference <= 1).mean() >= 0.999)


def test_a_weight_of_one_is_no_weight(pipe: UnCLIP) -> None:
    plain = pipe(CAPTION, 2, size=16, output_type="pt")
    for prompt in (f"{CAPTION}:1.0", f"{CAPTION}:1", f" {CAPTION} :1.00", f"{CAPTION}:2 | {OTHER}:0"):
        assert torch.equal(pipe(prompt, 2, size=16, output_type="pt").images, plain.images)


def test_parts_are_mixed_by_their_weights(pipe: UnCLIP) -> None:
    a, b = (pipe(text, 2, seed=6, size=16).image_embeds for text in (CAPTION, OTHER))
    mixed = pipe([f"{CAPTION}:3|{OTHER}", OTHER], 2, seed=6, size=16)
    assert torch.allclose(mixed.image_embeds[:2], slerp(a, b, 0.25), atol=1e-5)
    assert torch.allclose(mixed.image_embeds[2:], b, atol=1e-5)
    turned = pipe(f"{OTHER}:0.5|{CAPTION}:1.5", 2, seed=6, size=16)
    assert torch.allclose(turned.image_embeds, mixed.image_embeds[:2], atol=1e-5)
    alone = pipe.decode(mixed.image_embeds[:1], None, [6], output := pipe.settings()["decoder"])
    assert output.guidance_scale != 1
    assert same(pil_from_pixels(alone)[0], mixed.images[0])


def test_a_lone_weight_is_measured_from_the_average_picture(tiny_model: Path) -> None:
    pipe = UnCLIP.from_pretrained(tiny_model)
    average = torch.nn.functional.normalize(torch.linspace(-1, 2, 16), dim=0)
    pipe.prior.set_statistics(0.3 * average, torch.ones(16))
    embeds = [pipe(f"{CAPTION}:{weight}", size=16).image_embeds for weight in (0, 0.5, 1, 1.5)]
    assert torch.allclose(embeds[0], average[None], atol=1e-5)
    angles = [float(torch.acos((z @ average).clamp(-1, 1))) for z in embeds]
    assert angles[1] == pytest.approx(0.5 * angles[2], abs=1e-3)
    assert angles[3] == pytest.approx(min(1.5 * angles[2], 2 * np.pi - 1.5 * angles[2]), abs=1e-3)
    assert torch.allclose(embeds[2], pipe(CAPTION, size=16).image_embeds)


def test_an_empty_negative_prompt_changes_nothing_and_another_something(pipe: UnCLIP) -> None:
    options = {"num_images": 2, "size": 16, "output_type": "pt", "guidance_scale": 3.0, "prior_guidance_scale": 2.0}
    plain = pipe(CAPTION, **options)
    for nothing in ("", "  ", None):
        assert torch.equal(pipe(CAPTION, negative_prompt=nothing, **options).images, plain.images)
    long = "two yellow stars and a small purple house on a plate"
    for negative in ("stars", long):
        away = pipe(CAPTION, negative_prompt=negative, **options)
        assert not torch.allclose(away.image_embeds, plain.image_embeds)
    # away from itself: nothing is left of the guidance but the condition
    options |= {"prior_guidance_scale": 5.0}
    itself = pipe(CAPTION, negative_prompt=CAPTION, **options)
    unguided = pipe(CAPTION, **{**options, "prior_guidance_scale": 1.0})
    assert torch.allclose(itself.image_embeds, unguided.image_embeds, atol=1e-4)
    with pytest.raises(ValueError, match="guidance scale above 1"):
        pipe(CAPTION, negative_prompt="stars", guidance_scale=1.0, prior_guidance_scale=1.0)
    with pytest.raises(TypeError, match="of type int"):
        pipe(CAPTION, negative_prompt=3)  # pyright: ignore[reportArgumentType]


def test_a_negative_prompt_is_heard_where_there_is_no_caption(pipe: UnCLIP) -> None:
    """Of several parts, and of a picture alone: the decoder gets no caption, but what to lead away from."""
    options = {"size": 16, "output_type": "pt", "guidance_scale": 3.0, "prior_guidance_scale": 1.0}
    picture = Image.radial_gradient("L").convert("RGB")
    for given in ({"prompt": f"{CAPTION}:1.5 | {OTHER}"}, {"image": picture}):
        plain, away = (pipe(**given, **options, negative_prompt=negative) for negative in (None, "a small house"))
        assert torch.equal(away.image_embeds, plain.image_embeds)
        assert not torch.allclose(away.images, plain.images, atol=1e-2)
    with pytest.raises(ValueError, match="guidance scale above 1"):  # the prior, which is guided, is not asked
        pipe(image=picture, negative_prompt="stars", guidance_scale=1.0, prior_guidance_scale=2.0)


def test_its_halves_are_the_embedding_alone_and_the_negative_prompt_alone(pipe: UnCLIP) -> None:
    z_i, text = torch.nn.functional.normalize(torch.linspace(-1, 2, 16), dim=0)[None], pipe.encode_text([OTHER])

    def drawn(scale: float, negative: str | None = None, z=z_i, text=None) -> torch.Tensor:
        return pipe.decode(z, text, [6], pipe.settings(guidance_scale=scale)["decoder"], negative=negative)

    assert torch.allclose(drawn(0.0, OTHER), drawn(1.0, z=None, text=text), atol=1e-4)
    assert torch.allclose(drawn(1 + 1e-6, OTHER), drawn(1.0), atol=1e-3)
    assert not torch.allclose(drawn(0.0, OTHER), drawn(0.0), atol=1e-2)


def test_the_best_of_one_is_the_one_and_the_best_of_more_is_drawn_by_its_seed(pipe: UnCLIP) -> None:
    plain = pipe(CAPTION, 2, seed=3, size=16)
    one = pipe(CAPTION, 2, seed=3, size=16, best_of=1)
    assert one.seeds == plain.seeds
    assert all(same(a, b) for a, b in zip(one.images, plain.images, strict=True))
    best = pipe([CAPTION, OTHER], 2, seed=3, size=64, best_of=3)
    every = {text: pipe(text, 6, seed=3, size=64, output_type="pt") for text in (CAPTION, OTHER)}
    for i, seed in enumerate(best.seeds):
        text = (CAPTION, OTHER)[i // 2]
        z_t = pipe.encode_text(text).z_t
        scores = (pipe.encode_image(every[text].stages[16]) @ z_t[0]).tolist()  # pyright: ignore
        group = range(3 * (i % 2), 3 * (i % 2) + 3)
        assert seed - 3 == max(group, key=scores.__getitem__)
        assert close(best.images[i], pipe(text, seed=seed, size=64).images[0])


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda p: p(CAPTION, best_of=0), "best_of is 0"),
        (lambda p: p(CAPTION, best_of=1.5), "best_of is 1.5"),
        (lambda p: p(CAPTION, 2000, best_of=50), "2000 pictures, each the best of 50, came; draw at most"),
        (lambda p: p(z_i=torch.zeros(1, 16), best_of=2), "without a prompt"),
        (lambda p: p("a|b:0|"), "empty part"),
    ],
)
def test_bad_arguments_of_the_call_are_one_sentence(pipe: UnCLIP, call, says: str) -> None:
    with pytest.raises((ValueError, TypeError), match=says) as caught:
        call(pipe)
    assert "\n" not in str(caught.value)
