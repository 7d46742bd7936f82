"""The tiny model, loaded."""

from pathlib import Path

import pytest

from unclip.pipeline import UnCLIP


@pytest.fixture(scope="module")
def pipe(tiny_model: Path) -> UnCLIP:
    return UnCLIP.from_pretrained(tiny_model)
