"""The same pictures as diffusers' own pipelines draw of the same weights: every state of every stage, whole arrays."""

import copy
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from unclip.convert.karlo import load_prior
from unclip.core.sampling import starting_noise
from unclip.pipeline import UnCLIP

STATES, CALLS = 1e-4, 2e-5  # of the array's scale: a stage after many calls, and one call
PROMPTS = ["a red apple", "two yellow stars, and a small purple house.", "x"]
STEPS = (5, 4, 3)


@pytest.fixture(scope="module")
def pipe(text2img: Path) -> UnCLIP:
    return UnCLIP.from_pretrained(text2img)


def off(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max() / theirs.abs().max())


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


T = torch.tensor([0, 500, 999])


@pytest.fixture(scope="module")
@torch.no_grad()
def texts(parts) -> dict[str, Tensor]:
    """Three prompts as diffusers' pipeline encodes them, padded to 77."""
    ids = parts["tokenizer"](PROMPTS, padding="max_length", max_length=77, return_tensors="pt")
    out = parts["text_encoder"](ids.input_ids)
    return {"z_t": out.text_embeds, "text": out.last_hidden_state, "text_mask": ids.attention_mask.bool()}


def test_prompts_are_encoded_alike(pipe: UnCLIP, texts):
    z_t, states, mask = pipe.encode_text(PROMPTS)
    n = mask.shape[1]
    assert n < 77 and torch.equal(mask, texts["text_mask"][:, :n]) and not texts["text_mask"][:, n:].any()
    assert off(z_t, texts["z_t"]) < CALLS
    assert off(states[mask], texts["text"][:, :n][mask]) < CALLS


@pytest.mark.parametrize("kandinsky", [False, True])
@torch.no_grad()
def test_one_call_of_the_prior(pipe: UnCLIP, parts, texts, kandinsky, tmp_path: Path):
    theirs, prior = parts["prior"], pipe.prior
    if kandinsky:  # the same network in another folder
        theirs.save_pretrained(tmp_path / "prior")
        parts["prior_scheduler"].save_pretrained(tmp_path / "scheduler")
        (tmp_path / "model_index.json").write_text('{"_class_name": "KandinskyV22PriorPipeline"}')
        prior, scheduler = load_prior(tmp_path)
        assert scheduler.config["clip_sample_range"] == 5.0
    x = normal(3, 24)
    expected = theirs(x, T, texts["z_t"], texts["text"], texts["text_mask"]).predicted_image_embedding
    assert off(prior(x, T, **texts), expected) < CALLS
    assert off(prior.unstandardize(x), theirs.post_process_latents(x)) < CALLS


@torch.no_grad()
def test_one_call_of_the_decoder(pipe: UnCLIP, parts, texts):
    """Both halves of guidance: z_i, and the learned embedding in its place."""
    x, z_i = normal(3, 3, 8, 8), normal(3, 24, seed=1)
    twice = {name: torch.cat([tensor, tensor]) for name, tensor in texts.items()}
    tokens, addend = parts["text_proj"](
        image_embeddings=z_i,
        prompt_embeds=twice["z_t"],
        text_encoder_hidden_states=twice["text"],
        do_classifier_free_guidance=True,
    )
    mask = torch.nn.functional.pad(twice["text_mask"], (4, 0), value=True)
    expected = parts["decoder"](torch.cat([x, x]), torch.cat([T, T]), tokens, addend, attention_mask=mask).sample
    drop = torch.tensor([True] * 3 + [False] * 3)
    conditions = {**twice, "z_i": torch.cat([z_i, z_i]), "drop_z_i": drop}
    assert off(pipe.decoder(torch.cat([x, x]), torch.cat([T, T]), **conditions), expected) < CALLS


@pytest.mark.parametrize(
    ("ours", "theirs"), [("upsampler_256", "super_res_first"), ("upsampler_256_last", "super_res_last")]
)
@torch.no_grad()
def test_one_call_of_super_resolution(pipe: UnCLIP, parts, ours, theirs):
    x, low = normal(3, 3, 32, 32), normal(3, 3, 8, 8, seed=1)
    large = torch.nn.functional.interpolate(low, size=[32, 32], mode="bicubic", antialias=True)
    expected = parts[theirs](torch.cat([x, large], dim=1), T).sample
    assert off(getattr(pipe, ours)(x, T, low=low), expected) < CALLS


@pytest.mark.parametrize(
    ("seeds", "decoder", "prior"),
    [([0], 8.0, 4.0), ([1, 2, 3], 8.0, 4.0), ([4, 5, 6], 1.0, 1.0), ([7], 1.0, 4.0), ([8, 9, 10], 3.0, 1.0)],
)
def test_captions_become_the_same_pictures(pipe, reference, karlo_difference, seeds, decoder, prior):
    prompts = PROMPTS[: len(seeds)]
    ours = {"prompt": prompts, "guidance_scale": decoder, "prior_guidance_scale": prior}
    theirs = {"prompt": prompts, "decoder_guidance_scale": decoder, "prior_guidance_scale": prior}
    difference = karlo_difference(pipe, reference["text2img"], STEPS, seeds, ours, theirs)
    assert set(difference) == {"prior", "decoder", "upsampler_256", "images"}
    assert max(difference.values()) < STATES, difference


def test_several_pictures_of_each_prompt(pipe, reference, karlo_difference):
    ours, theirs = {"prompt": PROMPTS[:2], "num_images": 2}, {"prompt": PROMPTS[:2], "num_images_per_prompt": 2}
    difference = karlo_difference(pipe, reference["text2img"], (2, 2, 2), [0, 1, 2, 3], ours, theirs)
    assert max(difference.values()) < STATES, difference


# At t = 999 a rounding error in ε is divided by a_t = 5e-5. The clamp hides that, but for a pixel of random networks
# whose x_t − σ_t·ε is below 5e-5 itself: one in some 10 000. These seeds have none, nor have those above. That both
# sides compute the same does not rest on them: in float64, below, seeds are taken as they come.
@pytest.mark.parametrize(("seeds", "scale"), [([0], 8.0), ([14, 15, 16], 8.0), ([4, 5, 6], 1.0)])
def test_pictures_become_the_same_variations(variations, reference, karlo_difference, pictures, seeds, scale):
    pipe, images = UnCLIP.from_pretrained(variations), pictures[: len(seeds)]
    ours, theirs = {"image": images, "guidance_scale": scale}, {"image": images, "decoder_guidance_scale": scale}
    difference = karlo_difference(pipe, reference["variations"], STEPS, seeds, ours, theirs)
    assert set(difference) == {"decoder", "upsampler_256", "images"}
    assert max(difference.values()) < STATES, difference


@pytest.fixture
def in_double(monkeypatch: pytest.MonkeyPatch) -> None:
    """What either side computes in float32 it computes in float64, from the same draws."""
    randn = torch.randn
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    monkeypatch.setattr(torch, "randn", lambda *shape, dtype=None, **options: randn(*shape, **options).double())
    monkeypatch.setattr("unclip.stages.starting_noise", partial(starting_noise, dtype=torch.float64))


@pytest.mark.parametrize(("layout", "given"), [("text2img", "prompt"), ("variations", "image")])
def test_in_float64_any_seeds_become_the_same(in_double, layout, given, request, reference, karlo_difference, pictures):
    """Seeds 0 to 5, batch 3, guided and not."""
    pipe = UnCLIP.from_pretrained(request.getfixturevalue(layout)).to(torch.float64)
    diffusers = copy.deepcopy(reference[layout]).to(torch.float64)
    both = {given: PROMPTS if given == "prompt" else pictures}
    for first, scale, prior in ((0, 8.0, 4.0), (3, 1.0, 1.0)):
        ours = {**both, "guidance_scale": scale, "prior_guidance_scale": prior}
        theirs = {**both, "decoder_guidance_scale": scale}
        theirs |= {"prior_guidance_scale": prior} if given == "prompt" else {}
        difference = karlo_difference(pipe, diffusers, STEPS, [first, first + 1, first + 2], ours, theirs)
        assert max(difference.values()) < 1e-8, (first, difference)


def test_the_last_step_is_the_second_networks(pipe: UnCLIP):
    called = []
    handles = [
        getattr(pipe, name).register_forward_pre_hook(lambda _, a, name=name: called.append((name, int(a[1][0]))))
        for name in ("upsampler_256", "upsampler_256_last")
    ]
    pipe(PROMPTS[0], preset="karlo", steps=(1, 1, 3))
    for handle in handles:
        handle.remove()
    assert called == [("upsampler_256", 999), ("upsampler_256", 500), ("upsampler_256_last", 0)]
