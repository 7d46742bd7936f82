"""Tiny fixtures that several folders of tests share."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

CAPTIONS = [
    "a red apple",
    "a green pear on a plate",
    "a blue fish, glossy 3D",
    "two yellow stars",
    "a small purple house",
]

CONCEPTS = ("red apple", "green pear", "blue fish", "yellow star")
STYLES = ("flat", "shaded", "blob", "simple", "cartoon", "glossy", "plain", "old")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-goldens", action="store_true", help="store the losses of this machine's run as goldens")


@torch.no_grad()
def randomise(module: nn.Module, seed: int = 0, scale: float = 0.1) -> nn.Module:
    """Moves every weight off where it started: a zero-initialised branch would hide what runs through it."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter += scale * torch.randn(parameter.shape, generator=generator)
    return module.eval()


def write_corpus(folder: Path) -> Path:
    """Sixteen 32×32 pictures in eight colours, of halves and of corners, by integer arithmetic alone."""
    from unclip.core.data import COLOURS
    from unclip.corpora.shards import ShardWriter, encode_webp

    folder.mkdir(parents=True)
    y, x = np.mgrid[:32, :32]
    with ShardWriter(folder) as writer:
        for i, (name, colour) in enumerate(list(COLOURS.items())[:8] * 2):
            shape, inside = ("half", x < 16) if i < 8 else ("corner", x + y < 32)
            picture = np.where(inside[..., None], np.array(colour), 255).astype(np.uint8)
            captions = [f"a {name} {shape}", f"{name} {shape}"]
            meta = {"captions": captions, "concept": captions[1], "style": shape, "group": "plain", "split": "train"}
            writer.add(f"{i:02d}", encode_webp(Image.fromarray(picture)), meta)
    return folder


def write_clip(folder: Path) -> Path:
    """A tiny CLIP for pictures of 32×32 with random weights; its vocabulary is the bytes."""
    from unclip.clip.model import CLIP, CLIPArguments

    torch.manual_seed(0)
    image = {"image_size": 32, "patch_size": 16, "image_width": 16, "image_depth": 1, "image_heads": 2}
    text = {"text_width": 16, "text_depth": 1, "text_heads": 2, "vocab_size": 259, "context_length": 24}
    clip = CLIP.build(CLIPArguments(dim=12, **image, **text), CAPTIONS)
    randomise(clip).save_pretrained(folder)  # pyright: ignore[reportCallIssue]
    return folder


def write_stages(root: Path) -> dict[str, Path]:
    """All five networks, tiny and random, as trainings leave them: `root/<stage>/model`, `root/<stage>/scheduler`."""
    from decoder.decoder import Decoder
    from prior.diffusion_prior import DiffusionPrior
    from unclip.clip.model import CLIP, CLIPArguments
    from unclip.core.diffusion import make_scheduler
    from upsamplers.upsampler import Upsampler

    torch.manual_seed(0)  # the same networks in every run
    tower = {"dim": 16, "image_size": 16, "patch_size": 8, "vocab_size": 300, "context_length": 24}
    image = {"image_width": 16, "image_depth": 1, "image_heads": 2}
    text = {"text_width": 24, "text_depth": 1, "text_heads": 2}
    small = {"model_channels": 8, "channel_multipliers": (1, 2), "num_res_blocks": 1}
    networks: dict[str, nn.Module] = {
        "clip": CLIP.build(CLIPArguments(**tower, **image, **text), CAPTIONS),
        "prior": DiffusionPrior(embedding_dim=16, text_width=24, width=32, depth=2, heads=2, context_length=24),
        "decoder": Decoder(
            **small,
            sample_size=16,
            attention_resolutions=(8,),
            head_channels=8,
            z_i_width=16,
            text_width=24,
            context_width=16,
            z_i_tokens=2,
            learned_variance=True,
        ),
        "upsampler_256": Upsampler(**small, sample_size=64),
        "upsampler_1024": Upsampler(**small, sample_size=256, patch_size=2),
    }
    schedulers = {
        "prior": make_scheduler("cosine", "sample", clip_sample=False),
        # v: at the cosine schedule's end x0 of a predicted ε is divided by 5e-5, and rounding errors with it
        "decoder": make_scheduler("cosine", "v_prediction", learned_variance=True),
        "upsampler_256": make_scheduler("cosine", "v_prediction"),
        "upsampler_1024": make_scheduler("linear", "v_prediction"),
    }
    for i, (name, network) in enumerate(networks.items()):
        randomise(network, seed=i).save_pretrained(root / name / "model")  # pyright: ignore[reportCallIssue]
        if name in schedulers:
            schedulers[name].save_pretrained(root / name / "scheduler")
    return {name: root / name for name in networks}


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of shards, to be read only: sixteen pictures of 32×32 with captions, split `train`."""
    return write_corpus(tmp_path_factory.mktemp("corpus") / "plain")


@pytest.fixture(scope="session")
def unnamed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of four pictures whose concept nobody says."""
    from unclip.corpora.shards import ShardWriter, encode_webp

    folder = tmp_path_factory.mktemp("unnamed")
    with ShardWriter(folder) as writer:
        for i in range(4):
            picture = encode_webp(Image.new("RGB", (16, 16)))
            writer.add(str(i), picture, {"captions": [f"a square {i}"], "split": "train"})
    return folder


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP's folder: z_i (12,), token states (n, 16), pictures of 32×32."""
    return write_clip(tmp_path_factory.mktemp("clip") / "model")


@pytest.fixture(scope="session")
def tiny_stages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The outputs of five trainings, by stage."""
    return write_stages(tmp_path_factory.mktemp("stages"))


@pytest.fixture(scope="session")
def tiny_model(tiny_stages: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder of sizes 16, 64 and 256 with short presets, built from the networks directly."""
    from unclip.assemble import load_stage
    from unclip.pipeline import UnCLIP

    short = {
        "prior": {"solver": "ddpm", "steps": 4, "guidance_scale": 2.0, "draws": 2},
        "decoder": {"solver": "dpm++", "steps": 4, "guidance_scale": 2.0},
        "upsampler_256": {"solver": "ddim", "steps": 2},
        "upsampler_1024": {"solver": "ddim", "steps": 1},
    }
    parts = {}
    for name, folder in tiny_stages.items():
        parts |= load_stage(name, folder)
    pipe = UnCLIP(**parts, presets={"default": short, "fast": short}, license="apache-2.0")
    return pipe.save_pretrained(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def sized_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty-two drawings, each concept of its own colour, at 16, 64 and 256 pixels; returns the smallest ones.

    Concepts have a style each in the split test-pair.
    """
    from unclip.corpora.shards import ShardWriter, encode_webp

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


@pytest.fixture
def copy_model(tiny_model: Path, tmp_path: Path) -> Iterator[Callable[[], Path]]:
    """Makes a copy of the tiny model that a test may damage."""
    import shutil

    yield lambda: Path(shutil.copytree(tiny_model, tmp_path / "copy"))


@contextmanager
def spied(scheduler) -> Iterator[list[torch.Tensor]]:
    """Every x_t that a diffusers scheduler steps to, in order."""
    states, step = [], scheduler.step

    def record(*arguments, **options):
        output = step(*arguments, **options)
        states.append(output.prev_sample.cpu())
        return output

    scheduler.step = record
    try:
        yield states
    finally:
        del scheduler.step


def karlo_difference(pipe, reference, steps: tuple[int, ...], seeds: list[int], ours: dict, theirs: dict) -> dict:
    """Runs a pipeline of ours and one of diffusers' with the same generators, and compares every state of every stage.

    Returns by stage the largest difference of any x_t, as a part of the largest value there; "images" are the pictures
    themselves. ours, theirs: further arguments of the two calls.
    """
    stages = {"prior": "prior", "decoder": "decoder", "super_res": "upsampler_256"}
    counts = {name: count for name, count in zip(stages, steps, strict=True) if hasattr(reference, f"{name}_scheduler")}
    with ExitStack() as stack:
        expected = {
            stages[name]: stack.enter_context(spied(getattr(reference, f"{name}_scheduler"))) for name in counts
        }
        theirs = {**theirs, **{f"{name}_num_inference_steps": count for name, count in counts.items()}}
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        images = reference(**theirs, generator=generators, output_type="np").images
    got: dict[str, list[torch.Tensor]] = {}
    pipe.batch_size = dict.fromkeys(pipe.batch_size, len(seeds))
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    output = pipe(
        **ours,
        preset="karlo",
        steps=steps,
        generator=generators,
        output_type="np",
        callback=lambda progress: got.setdefault(progress.stage, []).append(progress.x_t.float().cpu()),
    )
    assert {stage: len(states) for stage, states in got.items()} == {s: len(states) for s, states in expected.items()}
    pairs = {stage: (torch.stack(got[stage]), torch.stack(states)) for stage, states in expected.items()}
    pairs["images"] = (torch.from_numpy(output.images), torch.from_numpy(images))
    assert all(a.shape == b.shape for a, b in pairs.values())
    return {stage: float((a - b).abs().max() / b.abs().max()) for stage, (a, b) in pairs.items()}


@pytest.fixture(scope="session", name="karlo_difference")
def karlo_difference_fixture() -> Callable[..., dict[str, float]]:
    """`karlo_difference`, for tests of several folders."""
    return karlo_difference


class Answer(nn.Module):
    """A network that answers what it is told, and keeps what it was asked."""

    def __init__(self, answer: torch.Tensor):
        super().__init__()
        self.answer, self.asked = answer, []

    def forward(self, x_t: torch.Tensor, t: torch.Tensor, **conditions: torch.Tensor) -> torch.Tensor:
        self.asked.append({"x_t": x_t, "t": t, **conditions})
        return self.answer


@pytest.fixture(scope="session")
def answering() -> type[Answer]:
    return Answer


@pytest.fixture(scope="session")
def batch_of() -> Callable[..., dict[str, Any]]:
    """Of a corpus, rows and a step: the batch that training would see."""
    from unclip.core.data import DataConfig, Draws, ShardDataset, collate

    def make(corpus: Path, rows: range, step: int = 0) -> dict[str, Any]:
        dataset = ShardDataset(DataConfig(str(corpus)))
        return {**collate([dataset[i] for i in rows]), "draws": Draws(0, step, rows)}

    return make


@pytest.fixture(scope="session")
def shown() -> Callable[..., torch.Tensor]:
    """The channels of b random pictures of which half of the pixels are known, (b, 4, side, side)."""
    from unclip.core.masks import known_channels

    def make(b: int, side: int = 32) -> torch.Tensor:
        generator = torch.Generator().manual_seed(2)
        x0 = torch.rand(b, 3, side, side, generator=generator) * 2 - 1
        return known_channels(x0, torch.rand(b, 1, side, side, generator=generator) < 0.5)

    return make
