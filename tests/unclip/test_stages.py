"""What a run keeps belongs to that run: prompts, threads, dtypes and weights do not see each other."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from prior.diffusion_prior import best_of
from unclip.core.sampling import guided, picture_generators, sample, starting_noise
from unclip.pipeline import UnCLIP
from unclip.presets import StageSettings, read_presets, write_presets
from unclip.stages import encode_rows

PROMPTS = ["a red apple", "two yellow stars and a small purple house"]


@pytest.fixture
def fresh(tiny_model: Path) -> UnCLIP:
    return UnCLIP.from_pretrained(tiny_model)


def draw(pipe: UnCLIP, prompt: str, seed: int = 0) -> Tensor:
    return torch.cat([x.flatten() for x in pipe(prompt, seed=seed, size=64, output_type="pt").stages.values()])


def test_two_prompts_in_two_threads_are_each_the_prompt_alone(fresh: UnCLIP) -> None:
    alone = {prompt: draw(fresh, prompt) for prompt in PROMPTS}
    fresh._null_contexts.clear()
    with ThreadPoolExecutor(2) as pool:
        together = [pool.submit(draw, fresh, prompt) for prompt in PROMPTS * 3]
        for prompt, picture in zip(PROMPTS * 3, together, strict=True):
            assert torch.equal(picture.result(), alone[prompt])


def test_prompts_in_turn_leave_nothing_behind(fresh: UnCLIP) -> None:
    first = [draw(fresh, prompt) for prompt in PROMPTS]
    assert torch.equal(draw(fresh, PROMPTS[0]), first[0])
    assert torch.equal(draw(fresh, PROMPTS[1]), first[1])
    assert not torch.allclose(first[0], first[1])


def test_what_is_kept_goes_with_the_dtype(fresh: UnCLIP, tiny_model: Path) -> None:
    before = draw(fresh, PROMPTS[0])
    fresh.to(torch.bfloat16)
    coarse = draw(fresh, PROMPTS[0])
    other = UnCLIP.from_pretrained(tiny_model)
    for name, component in fresh.components.items():
        if isinstance(component, torch.nn.Module):
            component.float()
            component.load_state_dict(other.components[name].state_dict())
    # means, as the 8 bits between stages may round a value the other way, which then is a level off
    assert float((draw(fresh, PROMPTS[0]) - before).abs().mean()) < 1e-4
    assert float((coarse - before).abs().mean()) > 1e-3


@torch.no_grad()
def test_what_pictures_of_a_prompt_share_is_computed_once(fresh: UnCLIP) -> None:
    text = fresh.encode_text([PROMPTS[0]] * 3 + [PROMPTS[1]] + [PROMPTS[0]])
    condition, seen = {"z_t": text.z_t, "text": text.states, "text_mask": text.mask}, []
    whole, encode = fresh.prior.encode_context(**condition), fresh.prior.encode_context

    def counted(**rows: Tensor):
        seen.append(len(rows["z_t"]))
        return encode(**rows)

    fresh.prior.encode_context = counted
    context = encode_rows(fresh.prior, condition)
    assert seen == [3]
    torch.testing.assert_close(context.prefix[0].k, whole.prefix[0].k, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(context.prefix[1].v, whole.prefix[1].v, atol=1e-5, rtol=1e-4)
    assert torch.equal(context.mask, whole.mask)


@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize("streams", [False, True])
@torch.no_grad()
def test_all_draws_of_a_prompt_have_one_prefix_and_noise_of_their_own(
    fresh: UnCLIP, streams: bool, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows are as if each draw were a run of its own; streams: generators in place of seeds, which run on."""
    net, seeds = fresh.prior, list(range(12))
    settings = replace(fresh.settings()["prior"], draws=3, guidance_scale=scale)
    text = fresh.encode_text([prompt for prompt in PROMPTS for _ in range(6)])
    condition = {"z_t": text.z_t, "text": text.states, "text_mask": text.mask}
    null = net.encode_context(**condition, drop_text=torch.ones(12, dtype=torch.bool))
    denoise = guided(net, net.encode_context(**condition), null, scale)
    own, drawn = [torch.Generator().manual_seed(seed) for seed in seeds], []
    for name in ("prior", "prior-2", "prior-3"):
        generators = own if streams else picture_generators(seeds, name)
        x_T = starting_noise((16,), generators)
        drawn.append(sample(denoise, fresh.sampler("prior", settings), x_T, settings.steps, generators))
    z_i = torch.nn.functional.normalize(net.unstandardize(torch.stack(drawn)), dim=-1)
    expected = best_of(z_i, text.z_t)
    assert len({int(i) for i in (z_i * text.z_t).sum(-1).argmax(0)}) > 1  # by chance all the same in one of 3^11 models

    encode, encoded = net.encode_context, []
    net.encode_context = lambda **rows: encoded.append(len(rows["z_t"])) or encode(**rows)
    monkeypatch.setitem(fresh.batch_size, "prior", 6)
    fresh._null_contexts.clear()
    got = fresh.sample_z_i(text, [torch.Generator().manual_seed(s) for s in seeds] if streams else seeds, settings)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
    assert encoded == ([1, 1] if scale == 1 else [1, 1, 1])  # a prompt of each of two batches; no prompt


def test_guidance_within_an_interval(fresh: UnCLIP) -> None:
    text, z_i = fresh.encode_text(PROMPTS), torch.randn(2, 16)
    guided = fresh.settings(guidance_scale=3.0)["decoder"]
    rows = []
    handle = fresh.decoder.register_forward_pre_hook(lambda _, a: rows.append((int(a[1][0]), len(a[0]))))

    def drawn(settings: StageSettings) -> Tensor:
        rows.clear()
        return fresh.decode(z_i, text, [0, 1], settings)

    everywhere = drawn(guided)
    assert [n for _, n in rows] == [4] * 4
    assert torch.equal(drawn(replace(guided, guidance_interval=(0, 999))), everywhere)
    nowhere = drawn(replace(guided, guidance_interval=(1, 2)))
    assert [n for _, n in rows] == [2] * 4
    assert torch.equal(nowhere, drawn(replace(guided, guidance_scale=1.0)))
    steps = sorted(t for t, _ in rows)
    between = drawn(replace(guided, guidance_interval=(steps[1], steps[2])))
    assert [n for t, n in rows] == [2, 4, 4, 2]
    assert not torch.allclose(between, everywhere) and not torch.allclose(between, nowhere)
    handle.remove()


@pytest.mark.parametrize("interval", [3, "ab", [1], [5, 4], [1, 2, 3], [0.5, 3], [True, 4]])
def test_no_interval_is_refused(interval) -> None:
    with pytest.raises(ValueError, match="guidance interval is"):
        StageSettings(guidance_interval=interval)


def test_a_presets_interval_is_stored_and_read() -> None:
    presets = read_presets({"fast": {"decoder": {"guidance_interval": [100, 900]}}})
    assert presets["fast"]["decoder"].guidance_interval == (100, 900)
    assert read_presets(write_presets(presets)) == presets


def test_tiles_bound_what_an_upsampler_sees(fresh: UnCLIP) -> None:
    whole, sides = fresh(PROMPTS[0], output_type="pt"), []
    for net in (fresh.upsampler_256, fresh.upsampler_1024):
        net.register_forward_pre_hook(lambda _, a: sides.append(a[0].shape[-1]))
    fresh.use_tiles(64)
    tiled = fresh(PROMPTS[0], output_type="pt")
    assert max(sides) == 64 and sides.count(64) > 2
    assert torch.equal(tiled.stages[64], whole.stages[64])  # no larger than a tile
    assert tiled.stages[256].shape == whole.stages[256].shape
    fresh.use_tiles(None)
    assert torch.equal(fresh(PROMPTS[0], output_type="pt").stages[256], whole.stages[256])
    with pytest.raises(ValueError, match="a tile of 60 pixels does not fit this upsampler"):
        fresh.use_tiles(60)
