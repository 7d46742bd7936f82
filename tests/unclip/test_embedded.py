"""The embedded model: picture i of a batch is the picture of its seed alone, and a command gives the same bytes."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from unclip.clip.model import TextFeatures
from unclip.folder import INDEX, WEIGHTS
from unclip.pipeline import UnCLIP

pytestmark = pytest.mark.skipif(not (WEIGHTS / "emoji" / INDEX).is_file(), reason="this copy holds no embedded model")
PROMPTS = ["a red apple, glossy 3D", "a lion, cartoon on a green background", "an owl"]
SEEDS = [3, 8, 21]


@pytest.fixture(scope="module")
def emoji() -> UnCLIP:
    return UnCLIP.from_pretrained(dtype="fp32", device="cpu")


@pytest.fixture(scope="module")
def text(emoji: UnCLIP) -> TextFeatures:
    return emoji.encode_text(PROMPTS)


def row(text: TextFeatures, i: int) -> TextFeatures:
    return TextFeatures(*(part[i : i + 1] for part in text))


def same(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


def test_a_text_of_a_batch_is_the_text_alone(emoji: UnCLIP, text: TextFeatures) -> None:
    for i, prompt in enumerate(PROMPTS):
        alone = emoji.encode_text(prompt)
        same(text.z_t[i], alone.z_t[0])
        same(text.states[i][text.mask[i]], alone.states[0])


def test_a_z_i_of_a_batch_is_that_of_its_seed_alone(emoji: UnCLIP, text: TextFeatures) -> None:
    z_i = emoji.sample_z_i(text, SEEDS)
    for i, seed in enumerate(SEEDS):
        same(emoji.sample_z_i(row(text, i), [seed])[0], z_i[i])


def test_a_drawing_of_a_batch_is_that_of_its_seed_alone(emoji: UnCLIP, text: TextFeatures) -> None:
    settings = emoji.settings("fast")["decoder"]
    drawn = emoji.decode(text.z_t, text, SEEDS, settings)
    assert not torch.allclose(drawn[0], drawn[1], atol=0.1)
    for i, seed in enumerate(SEEDS):
        same(emoji.decode(text.z_t[i : i + 1], row(text, i), [seed], settings)[0], drawn[i])


@pytest.mark.parametrize("size", [256, pytest.param(1024, marks=pytest.mark.slow)])
def test_an_upsampled_picture_of_a_batch_is_that_of_its_seed_alone(emoji: UnCLIP, size: int, monkeypatch) -> None:
    monkeypatch.setitem(emoji.batch_size, emoji.networks[size], len(SEEDS))  # the default takes one at a time
    coarse = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    low = torch.nn.functional.interpolate(coarse, size // 4, mode="bicubic").clamp(-1, 1)
    large = emoji.upsample(low, size, SEEDS)
    for i, seed in enumerate(SEEDS):
        same(emoji.upsample(low[i : i + 1], size, [seed])[0], large[i])


@pytest.mark.parametrize(("size", "preset"), [(256, "fast"), pytest.param(1024, "default", marks=pytest.mark.slow)])
def test_a_picture_of_a_batch_is_the_picture_of_its_seed(emoji: UnCLIP, size: int, preset: str) -> None:
    together = emoji(PROMPTS, seed=5, size=size, preset=preset, output_type="pt")
    for i, prompt in enumerate(PROMPTS):
        alone = emoji(prompt, seed=5, size=size, preset=preset, output_type="pt")
        for side, pictures in together.stages.items():
            levels = (alone.stages[side][0] - pictures[i]).abs() * 127.5
            assert (levels <= 1).float().mean() >= 0.999, f"{side} px of {prompt!r}"


def test_two_runs_of_a_command_give_the_same_bytes(tmp_path: Path) -> None:
    written = []
    for name in ("one", "two"):
        command = ["-m", "unclip.cli", "sample", *PROMPTS, "--num-images", "2", "--size", "64", "--preset", "fast"]
        done = subprocess.run([sys.executable, *command, "--out", name], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        written.append({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()})
    assert len(written[0]) == 6
    assert written[0] == written[1]
