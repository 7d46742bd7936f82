"""The figures of inpainting: on pictures whose seam and filling are known, and on a tiny model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from decoder.decoder import Decoder
from unclip.core.data import to_pixels
from unclip.evals.concepts import Gallery
from unclip.evals.corpus import load_corpus
from unclip.evals.inpainting import choose_mask, figures_of, look, measure, same_drawings, seam_steps
from unclip.pipeline import UnCLIP


def test_a_seam_is_the_step_across_it() -> None:
    keep = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    keep[..., :4] = True
    x = torch.rand(1, 3, 8, 1, generator=torch.Generator().manual_seed(0)).expand(-1, -1, -1, 8)
    assert seam_steps(x, keep).tolist() == [0] * 8
    assert seam_steps(torch.where(keep, x, x + 0.5), keep).tolist() == pytest.approx([0.5] * 8)
    turned = seam_steps((x * keep).transpose(2, 3), keep.transpose(2, 3))
    assert turned.mean() == pytest.approx(float(x[..., 3].mean()))


def dot(side: int, first: int, last: int) -> Tensor:
    """A black square on white, uint8 (3, side, side), over these rows and columns."""
    picture = torch.full((3, side, side), 255, dtype=torch.uint8)
    picture[:, first:last, first:last] = 0
    return picture


@pytest.mark.parametrize(("first", "last"), [(0, 64), (0, 6), (29, 35), (10, 50)])
def test_masks_keep_enough_and_hide_enough_of_the_drawing(first: int, last: int) -> None:
    picture = dot(64, first, last)
    masks = [choose_mask(picture, row) for row in range(30)]
    assert all(0.25 <= float(mask.float().mean()) <= 0.75 for mask in masks)
    hidden = [float((~mask[0, 0])[first:last, first:last].float().mean()) for mask in masks]
    assert min(hidden) >= 0.3
    assert torch.equal(masks[3], choose_mask(picture, 3))
    assert not torch.equal(masks[3], choose_mask(picture, 3, seed=1))
    assert choose_mask(torch.full((3, 64, 64), 255, dtype=torch.uint8), 0).shape == (1, 1, 64, 64)


def mean_colour(pictures: Tensor) -> Tensor:
    """A judge that sees the mean colour alone; uint8 (n, 3, h, w) → (n, 3)."""
    return pictures.float().mean(dim=(2, 3)) / 255


def field(*colour: float) -> Tensor:
    """A picture of one colour, (1, 3, 64, 64)."""
    return torch.tensor(colour).view(1, 3, 1, 1).expand(-1, -1, 64, 64)


def test_what_was_known_is_white_to_the_judge() -> None:
    """Half of the picture is known and red: only what fills the other half says what was drawn."""
    keep = torch.zeros(1, 1, 64, 64, dtype=torch.bool)
    keep[..., :32] = True
    red, blue = field(1.0, -1.0, -1.0), field(-1.0, -1.0, 1.0)
    white = torch.ones_like(red)
    features = mean_colour(torch.cat([look(x, red, keep).filled for x in (red, red, blue, blue)]))
    gallery = Gallery(features + torch.tensor([[0.01], [0], [0.01], [0]]), ["red", "red", "blue", "blue"])

    def judged(x: Tensor) -> dict[str, Any]:
        return figures_of([look(x, red, keep)], [0], gallery, mean_colour)

    assert judged(red)["filled"]["top1"] == 1
    wrong = judged(torch.where(keep, red, blue))
    assert (wrong["filled"]["top1"], wrong["known"]) == (0, 1)
    assert judged(torch.where(keep, blue, red))["filled"]["top1"] == 1  # what is known does not count, right or wrong
    assert judged(torch.where(keep, blue, red))["known"] == 0
    assert torch.equal(look(red, red, keep).filled, look(torch.where(keep, white, red), red, keep).filled)


def pictures_of(side: int, n: int = 3) -> Tensor:
    return torch.randint(0, 256, (n, 3, side, side), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


CAPTIONS = ["a red apple", "two yellow stars", "a blue fish, glossy 3D"]
WAYS = ["one walk", "4 walks"]


@pytest.fixture
def gallery() -> Gallery:
    features = torch.rand(6, 3, generator=torch.Generator().manual_seed(0))
    return Gallery(features, ["a", "a", "b", "b", "c", "c"])


def test_the_measure_runs_on_a_model(tiny_model: Path, gallery: Gallery) -> None:
    pipe, pictures = UnCLIP.from_pretrained(tiny_model), pictures_of(64)
    found = measure(pipe, pictures, CAPTIONS, [0, 2, 4], gallery, mean_colour)
    assert list(found) == ["count", "size", "drawings", "white", "pasted", *WAYS]  # of a model without tuned networks
    assert (found["count"], found["size"]) == (3, 64)
    assert all(set(found[name]) == {"seam", "known", "filled"} for name in list(found)[2:])
    assert [found[name]["known"] for name in list(found)[2:]] == [1.0] * 5
    assert found["drawings"]["seam"] == pytest.approx(2 / 3, abs=0.02)  # of independent values in [−1, 1]
    assert measure(pipe, pictures, CAPTIONS, [0, 2, 4], gallery, mean_colour) == found

    pipe.register_modules(decoder=Decoder(**{**pipe.decoder.config, "inpaint": True}).eval())
    found = measure(pipe, pictures[:1], CAPTIONS[:1], [0], gallery, mean_colour)
    assert list(found)[-3:] == [*WAYS, "tuned"]
    assert found["tuned"]["known"] == 1.0


@pytest.mark.parametrize("size", [16, 256])
def test_every_size_is_measured_at_that_size(tiny_model: Path, gallery: Gallery, size: int) -> None:
    """What is known comes back at full size, and a change of one pixel there is seen."""
    pipe, pictures = UnCLIP.from_pretrained(tiny_model), pictures_of(size, 1)
    found = measure(pipe, pictures, CAPTIONS[:1], [0], gallery, mean_colour)
    assert found["size"] == size
    assert [found[name]["known"] for name in ("pasted", *WAYS)] == [1.0] * 3
    assert found["drawings"]["seam"] == pytest.approx(2 / 3, abs=0.15 if size == 16 else 0.03)
    given = to_pixels(pictures)
    keep = torch.ones(1, 1, size, size, dtype=torch.bool)
    keep[..., : size // 2] = False
    changed = given.clone()
    changed[..., -1, -1] = -changed[..., -1, -1]
    same = look(changed, given, keep).known
    assert (len(same), int((~same).sum())) == (size * size // 2, 1)


def test_drawings_are_taken_from_another_corpus_by_their_keys(sized_corpus: Path, tiny_corpus: Path) -> None:
    some = [d for d in load_corpus(sized_corpus, ("test-pair",)).drawings if d.concept != "red apple"]
    large = load_corpus(sized_corpus.with_name("tiny-256"), side=256)
    rows = [next(d.index for d in large.drawings if d.key == drawing.key) for drawing in some]
    assert torch.equal(same_drawings(large.folder, some, 256), large.pictures(rows))
    assert same_drawings(sized_corpus, some, 256).shape == (3, 3, 256, 256)
    others = load_corpus(sized_corpus, ("train",)).drawings[:2]
    with pytest.raises(ValueError, match=f"plain has no drawing '{others[0].key}'"):
        same_drawings(tiny_corpus, others, 64)
