"""Karlo's real weights against diffusers' own pipelines. Not collected by itself; it takes 30 GB of memory.

    KARLO=DIR KARLO_VARIATIONS=DIR python -m pytest tests/karlo_real.py -m slow

DIR: a folder or hub name; the hub's own if left out. KARLO_STEPS ("5,4,3" if left out) are the steps of the stages.
"""

import os
import warnings
from pathlib import Path

import pytest
import torch
from PIL import Image

pytestmark = pytest.mark.slow
# At t = 999 x0 is (x − σ·ε)/√ᾱ with √ᾱ = 5e-5: rounding of a trained network's ε, theirs and ours, becomes about 1e-2
# in x0 there, and what the later steps leave of it in the pictures. The prior predicts x0 itself.
LIMITS = {"prior": 1e-4, "decoder": 2e-2, "upsampler_256": 2e-2, "images": 2e-2}
STEPS = tuple(int(count) for count in os.environ.get("KARLO_STEPS", "5,4,3").split(","))
PROMPTS = ["a red apple on a wooden table", "a high-resolution photograph of a big red frog on a green leaf."]


def reference(folder: Path, pipeline):
    """diffusers' pipeline out of its components: its own `from_pretrained` no longer loads these folders."""
    from diffusers import PriorTransformer, UnCLIPScheduler, UNet2DConditionModel, UNet2DModel
    from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel
    from transformers import (
        CLIPImageProcessorPil,
        CLIPTextModelWithProjection,
        CLIPTokenizer,
        CLIPVisionModelWithProjection,
    )

    classes = {
        "prior": PriorTransformer,
        "decoder": UNet2DConditionModel,
        "text_proj": UnCLIPTextProjModel,
        "super_res_first": UNet2DModel,
        "super_res_last": UNet2DModel,
        "text_encoder": CLIPTextModelWithProjection,
        "image_encoder": CLIPVisionModelWithProjection,
        "tokenizer": CLIPTokenizer,
        "feature_extractor": CLIPImageProcessorPil,
        **{f"{name}_scheduler": UnCLIPScheduler for name in ("prior", "decoder", "super_res")},
    }
    present = {name: cls.from_pretrained(folder / name) for name, cls in classes.items() if (folder / name).is_dir()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return pipeline(**present)


@pytest.mark.parametrize("seeds", [[0], [1, 2]])
def test_captions(seeds, karlo_difference):
    from diffusers import UnCLIPPipeline

    from unclip.folder import find_model
    from unclip.pipeline import UnCLIP

    folder = find_model(os.environ.get("KARLO", "kakaobrain/karlo-v1-alpha"))[0]
    prompts = {"prompt": PROMPTS[: len(seeds)]}
    theirs = reference(folder, UnCLIPPipeline)
    difference = karlo_difference(UnCLIP.from_pretrained(folder), theirs, STEPS, seeds, prompts, prompts)
    print(difference)
    assert all(value < LIMITS[stage] for stage, value in difference.items()), difference


def test_variations(karlo_difference):
    from diffusers import UnCLIPImageVariationPipeline

    from unclip.folder import find_model
    from unclip.pipeline import UnCLIP

    name = os.environ.get("KARLO_VARIATIONS", "kakaobrain/karlo-v1-alpha-image-variations")
    folder = find_model(name)[0]
    pixels = torch.randint(0, 256, (300, 400, 3), generator=torch.Generator().manual_seed(0)).byte()
    image = {"image": [Image.fromarray(pixels.numpy())]}
    theirs = reference(folder, UnCLIPImageVariationPipeline)
    difference = karlo_difference(UnCLIP.from_pretrained(folder), theirs, STEPS, [0], image, image)
    print(difference)
    assert all(value < LIMITS[stage] for stage, value in difference.items()), difference
