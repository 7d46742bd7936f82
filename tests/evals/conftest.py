"""A corpus at the sizes of the tiny model, for the measures that need real pictures of each."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unclip.corpora.shards import ShardWriter, encode_webp

CONCEPTS = ("red apple", "green pear", "blue fish", "yellow star")
STYLES = ("flat", "shaded", "blob", "simple", "cartoon", "glossy", "plain", "old")


@pytest.fixture(scope="session")
def sized_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty-two drawings, each concept of its own colour, at 16, 64 and 256 pixels; returns the smallest ones.

    Concepts have a style each in the split test-pair.
    """
    root = tmp_path_factory.mktemp("corpora")
    noise, pictures = np.random.default_rng(0), {}
    for i, concept in enumerate(CONCEPTS):
        for style in STYLES:
            pixels = noise.integers(0, 60, (16, 16, 3))
            pixels[..., i % 3] += 190 if i < 3 else 0
            pictures[concept, style] = Image.fromarray(pixels.astype(np.uint8))
    for side in (16, 64, 256):
        (root / f"tiny-{side}").mkdir()
        with ShardWriter(root / f"tiny-{side}") as writer:
            for (concept, style), picture in pictures.items():
                split = "test-pair" if style == "simple" else "train"
                meta = {"captions": [f"a {concept}, {style}"], "concept": concept, "style": style, "split": split}
                drawn = picture.resize((side, side), Image.Resampling.NEAREST)
                writer.add(f"{style}-{concept.replace(' ', '-')}", encode_webp(drawn), {**meta, "group": "things"})
    return root / "tiny-16"
