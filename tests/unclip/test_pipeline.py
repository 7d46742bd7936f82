"""The pipeline: pictures are functions of their seeds, bad input is refused before any work."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from unclip.arguments import Progress
from unclip.core.sampling import picture_generators, starting_noise
from unclip.pipeline import UnCLIP

PROMPTS = ["a red apple", "two yellow stars and a small purple house"]


def close(a, b) -> bool:
    """99.9 % of values within one level of 8 bits."""
    difference = np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int))
    return bool((difference <= 1).mean() >= 0.999)


def test_a_picture_of_a_batch_is_the_picture_of_its_seed(pipe: UnCLIP) -> None:
    together = pipe(PROMPTS, num_images=2, seed=5)
    assert together.seeds == [5, 6, 5, 6]
    assert [image.size for image in together.images] == [(256, 256)] * 4
    for i, (prompt, seed) in enumerate([(p, s) for p in PROMPTS for s in (5, 6)]):
        alone = pipe(prompt, seed=seed)
        assert torch.allclose(alone.image_embeds[0], together.image_embeds[i], atol=1e-4)
        for side in (16, 64, 256):
            assert close(alone.stages[side][0], together.stages[side][i])
    assert not close(together.images[0], together.images[1])
    assert not close(together.images[0], together.images[2])


def test_each_stage_alone_gives_each_row_of_the_batch(pipe: UnCLIP) -> None:
    seeds, settings = [3, 4, 9], pipe.settings()
    text = pipe.encode_text([*PROMPTS, PROMPTS[0]])
    z_i = pipe.sample_z_i(text, seeds, settings["prior"])
    small = pipe.decode(z_i, text, seeds, settings["decoder"])
    pipe.batch_size["upsampler_256"] = 2
    large = pipe.upsample(small, 64, seeds, settings["upsampler_256"])
    pipe.batch_size["upsampler_256"] = 1
    for i, seed in enumerate(seeds):
        row = type(text)(*(part[i : i + 1] for part in text))
        assert torch.allclose(pipe.sample_z_i(row, [seed], settings["prior"])[0], z_i[i], atol=1e-4)
        assert torch.allclose(pipe.decode(z_i[i : i + 1], row, [seed], settings["decoder"])[0], small[i], atol=1e-4)
        assert torch.allclose(pipe.upsample(small[i : i + 1], 64, [seed])[0], large[i], atol=1e-4)


def test_the_call_is_the_sum_of_its_stages(pipe: UnCLIP) -> None:
    out = pipe(PROMPTS, seed=7, output_type="pt")
    text = pipe.encode_text(PROMPTS)
    z_i = pipe.sample_z_i(text, [7, 7])
    x = pipe.decode(z_i, text, [7, 7])
    assert torch.equal(out.image_embeds, z_i)
    assert torch.equal(out.stages[16], x)
    x = pipe.upsample(x, 64, [7, 7])
    assert torch.equal(out.stages[64], x)
    assert torch.equal(out.images, pipe.upsample(x, 256, [7, 7]))


def test_two_calls_are_equal_and_given_embeddings_skip_the_prior(pipe: UnCLIP) -> None:
    first = pipe("a red apple", size=64, output_type="np")
    second = pipe("a red apple", size=64, output_type="np", z_i=first.image_embeds)
    assert first.images.shape == (1, 64, 64, 3)
    assert 0 <= first.images.min() <= first.images.max() <= 1
    assert np.array_equal(first.images, second.images)
    assert set(first.stages) == {16, 64}


def test_steps_of_one_stage_leave_the_noise_of_the_others(pipe: UnCLIP) -> None:
    noise = []

    def keep_first(module, arguments):
        seen.append(arguments[0])

    for steps in [(2, None), (7, None)]:
        seen: list[torch.Tensor] = []
        handle = pipe.decoder.register_forward_pre_hook(keep_first)
        out = pipe("a red apple", seed=3, size=16, steps=steps)
        handle.remove()
        noise.append((seen[0], out.image_embeds))
    assert torch.equal(noise[0][0], noise[1][0])
    assert not torch.allclose(noise[0][1], noise[1][1])
    expected = starting_noise((3, 16, 16), picture_generators([3], "decoder"))
    assert torch.equal(noise[0][0][:1], expected)


def test_the_prior_keeps_the_draw_nearer_to_the_text(pipe: UnCLIP) -> None:
    from dataclasses import replace

    settings = pipe.settings()["prior"]
    text = pipe.encode_text(["a red apple"] * 8)
    seeds = list(range(8))
    scores = []
    for draws in (1, 2, 5):
        z_i = pipe.sample_z_i(text, seeds, replace(settings, draws=draws))
        scores.append((z_i * text.z_t).sum(-1))
    assert (scores[1] >= scores[0] - 1e-5).all()
    assert (scores[2] >= scores[1] - 1e-5).all()
    assert (scores[2] > scores[0] + 1e-5).any()


def test_low_resolution_pictures_pass_at_eight_bits(pipe: UnCLIP) -> None:
    x = torch.rand(1, 3, 16, 16) * 2 - 1
    at_8_bits = ((x + 1) * 127.5).round() / 127.5 - 1
    assert torch.equal(pipe.upsample(x, 64, [0]), pipe.upsample(at_8_bits, 64, [0]))


def test_guidance_of_zero_forgets_the_caption_and_one_needs_no_null(pipe: UnCLIP) -> None:
    text = pipe.encode_text(PROMPTS)
    z_i = torch.randn(2, 16)
    unguided = pipe.decode(z_i, text, [1, 1], pipe.settings(guidance_scale=0.0)["decoder"])
    assert torch.allclose(unguided[0], unguided[1], atol=1e-5)
    pipe._null_contexts.clear()
    conditional = pipe.decode(z_i, text, [1, 1], pipe.settings(guidance_scale=1.0)["decoder"])
    assert not pipe._null_contexts
    nearly = pipe.decode(z_i, text, [1, 1], pipe.settings(guidance_scale=1 + 1e-6)["decoder"])
    assert torch.allclose(conditional, nearly, atol=1e-3)


def test_one_null_context_is_kept_for_prompts_of_all_lengths(tiny_model: Path) -> None:
    one = UnCLIP.from_pretrained(tiny_model)
    first = one.decode(torch.ones(1, 16), one.encode_text("a fish"), [0])
    one.decode(torch.ones(1, 16), one.encode_text("a red apple on a plate"), [0])
    assert list(one._null_contexts) == ["decoder"]
    assert torch.equal(first, one.decode(torch.ones(1, 16), one.encode_text("a fish"), [0]))


def test_a_path_is_a_picture(pipe: UnCLIP, tmp_path: Path) -> None:
    path = tmp_path / "photo.png"
    Image.new("RGB", (20, 30), "red").save(path)
    expected = pipe.encode_image(Image.open(path))
    for given in (path, str(path), [path]):
        assert torch.equal(pipe.encode_image(given), expected)
        assert torch.equal(pipe(image=given, size=16).image_embeds, expected)


def test_the_null_context_goes_when_weights_do(tiny_model: Path) -> None:
    one, other = UnCLIP.from_pretrained(tiny_model), UnCLIP.from_pretrained(tiny_model)
    text, z_i = one.encode_text(["a red apple"]), torch.ones(1, 16)
    before = one.decode(z_i, text, [0])
    kept = next(iter(one._null_contexts.values()))[1]
    one.decode(z_i, text, [1])
    assert next(iter(one._null_contexts.values()))[1] is kept
    state = {name: value + 0.05 for name, value in one.decoder.state_dict().items()}
    one.decoder.load_state_dict(state)
    other.decoder.load_state_dict(state)
    after = one.decode(z_i, text, [0])
    assert torch.equal(after, other.decode(z_i, text, [0]))
    assert not torch.allclose(before, after)
    one.to(torch.bfloat16)
    assert one.decode(z_i, text, [0]).isfinite().all()


def test_callback_counts_every_call(pipe: UnCLIP) -> None:
    seen: list[Progress] = []
    pipe("a red apple", num_images=2, size=64, callback=seen.append)
    for stage, total in {"prior": 8, "decoder": 4, "upsampler_256": 4}.items():
        steps = [(p.step, p.total) for p in seen if p.stage == stage]
        assert steps == [(i, total) for i in range(1, total + 1)]


def test_encode_image_of_files_and_tensors(pipe: UnCLIP) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    images = [Image.fromarray(p) for p in pixels]
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    z_i = pipe.encode_image(images)
    assert torch.allclose(z_i, pipe.encode_image(x), atol=1e-5)
    assert torch.allclose(z_i.norm(dim=-1), torch.ones(2), atol=1e-5)


def test_decode_without_text_and_from_given_noise(pipe: UnCLIP) -> None:
    z_i, x_T = torch.randn(2, 16), starting_noise((3, 16, 16), picture_generators([1, 2], "decoder"))
    drawn = pipe.decode(z_i, None, [1, 2])
    assert torch.equal(drawn, pipe.decode(z_i, None, [1, 2], x_T=x_T))
    assert not torch.allclose(drawn, pipe.decode(z_i, None, [1, 2], x_T=x_T.flip(0)))


def test_generator_draws_the_seed(pipe: UnCLIP) -> None:
    first = pipe("a red apple", size=16, generator=torch.Generator().manual_seed(1))
    again = pipe("a red apple", size=16, generator=torch.Generator().manual_seed(1))
    other = pipe("a red apple", size=16, generator=torch.Generator().manual_seed(2))
    assert first.seeds == again.seeds != other.seeds
    assert close(first.images[0], again.images[0])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"prompt": ""}, "prompt is empty"),
        ({"prompt": ["a red apple", "  "]}, "prompt is empty"),
        ({"prompt": []}, "prompt is empty"),
        ({"prompt": 3}, "of type int"),
        ({"prompt": [None]}, "of type NoneType"),
        ({"num_images": 0}, "num_images is 0"),
        ({"num_images": 1.5}, "num_images is 1.5"),
        ({"num_images": 10**9}, "num_images is"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**63}, "seed is"),
        ({"seed": "x"}, "seed is 'x'"),
        ({"size": 100}, "size 100 is not offered; this model draws 16, 64, 256"),
        ({"preset": "best"}, "preset 'best' is unknown; this model has fast, default, paper"),
        ({"guidance_scale": -1.0}, "guidance scale is -1"),
        ({"guidance_scale": float("nan")}, "guidance scale is nan"),
        ({"prior_guidance_scale": "much"}, "guidance scale is 'much'"),
        ({"steps": 5}, "up to four"),
        ({"steps": (1, 2, 3, 4, 5)}, "up to four"),
        ({"steps": (0,)}, "steps are 0"),
        ({"steps": (None, 1001)}, "1001"),
        ({"steps": (None, [5, 5])}, "repeat"),
        ({"output_type": "jpeg"}, "output_type 'jpeg'"),
        ({"z_i": torch.zeros(3, 16)}, "z_i is"),
        ({"prompt": None, "z_i": torch.zeros(1, 16), "num_images": 4}, r"z_i is \(1, 16\); give \(4, 16\)"),
        ({"prompt": "a red apple | a fish", "z_i": torch.zeros(1, 16)}, "has parts or a weight"),
        ({"prompt": "a red apple:1.5", "z_i": torch.zeros(1, 16)}, "has parts or a weight"),
    ],
)
def test_bad_arguments_are_refused_before_any_work(pipe: UnCLIP, arguments: dict, says: str) -> None:
    worked = []
    handle = pipe.clip.model.text_model.register_forward_pre_hook(lambda *_: worked.append(1))
    with pytest.raises((ValueError, TypeError), match=says) as caught:
        pipe(**{"prompt": "a red apple", **arguments})
    handle.remove()
    assert not worked
    assert "\n" not in str(caught.value)


def test_broken_weights_are_an_error_not_a_picture(tiny_model: Path) -> None:
    broken = UnCLIP.from_pretrained(tiny_model)
    with torch.no_grad():
        next(broken.decoder.parameters()).fill_(float("nan"))
    with pytest.raises(ValueError, match="decoder gave NaN"):
        broken("a red apple", size=16)


def test_a_long_prompt_is_cut_with_a_warning_that_names_the_rest(pipe: UnCLIP) -> None:
    with pytest.warns(UserWarning, match="zebra"):
        pipe("a red apple " * 20 + "zebra", size=16)


def test_wrong_rows_sizes_and_pictures(pipe: UnCLIP) -> None:
    with pytest.raises(ValueError, match="2 rows came with 1 seeds"):
        pipe.decode(torch.zeros(2, 16), None, [0])
    with pytest.raises(ValueError, match="no upsampler to 100"):
        pipe.upsample(torch.zeros(1, 3, 16, 16), 100, [0])
    with pytest.raises(ValueError, match=r"give \(b, 3, 16, 16\)"):
        pipe.upsample(torch.zeros(1, 3, 17, 16), 64, [0])
    with pytest.raises(ValueError, match="no pictures"):
        pipe.encode_image([])
