"""The decoder's recipes: each makes a network, of the sizes of its CLIP, and one goes on from another."""

from pathlib import Path

import pytest
import torch
import yaml

from decoder.decoder import Decoder
from decoder.train import DecoderConfig, check_shares
from unclip.clip.train import CLIPConfig
from unclip.core.config import parse

ROOT = Path(__file__).parents[2] / "recipes"
MINILM_WIDTH = 384


@pytest.mark.parametrize("recipe", sorted(ROOT.glob("*/decoder*.yaml")), ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_recipes_fit_their_config_their_network_and_their_clip(recipe: Path):
    config = parse(DecoderConfig, ["--config", str(recipe)])
    check_shares(config)
    with torch.device("meta"):
        decoder = Decoder(**config.model)
    clip = parse(CLIPConfig, ["--config", str(recipe.with_name("clip.yaml"))]).model
    text_width = MINILM_WIDTH if clip.text == "minilm" else clip.text_width
    assert (decoder.config["z_i_width"], decoder.config["text_width"]) == (clip.dim, text_width)


@pytest.mark.parametrize("recipes", ["emoji", "own"])
def test_the_sketch_is_trained_as_part_of_the_network_that_starts_from_it(recipes: str):
    folder = ROOT / recipes
    alone, whole = (yaml.safe_load((folder / f"{name}.yaml").read_text()) for name in ("decoder_sketch", "decoder"))
    assert alone["sketch_alone"] and whole["start"] == alone["train"]["out"] != whole["train"]["out"]
    own = {"train", "start", "weighting", "gamma", "noisy_share", "noisy_from", "own_share", "edges"}
    assert all(alone[name] == whole[name] for name in whole.keys() - own)
