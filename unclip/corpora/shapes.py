"""The shapes corpus: one coloured shape on a plain background, a world in which a program can tell what is right.

Every colour and every shape is in `train`, but eight of their pairs are in `held-out` only.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from unclip.core.files import write_json
from unclip.corpora.shards import ShardWriter, encode_webp, new_folder

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 30, 40),
    "orange": (250, 140, 20),
    "yellow": (250, 220, 30),
    "green": (30, 160, 60),
    "cyan": (30, 200, 220),
    "blue": (35, 70, 220),
    "purple": (140, 40, 180),
    "black": (15, 15, 15),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {"white": (255, 255, 255), "grey": (205, 205, 205)}
SIZES: dict[str, float] = {"small": 0.13, "medium": 0.18, "large": 0.24}  # radius, of the picture's side
NEAR, MIDDLE, FAR = 0.29, 0.5, 0.71
PLACES: dict[str, tuple[float, float]] = {  # centre, x to the right and y down, of the picture's side
    "top left": (NEAR, NEAR), "top": (MIDDLE, NEAR), "top right": (FAR, NEAR),
    "left": (NEAR, MIDDLE), "middle": (MIDDLE, MIDDLE), "right": (FAR, MIDDLE),
    "bottom left": (NEAR, FAR), "bottom": (MIDDLE, FAR), "bottom right": (FAR, FAR),
}  # fmt: skip
HELD_OUT = frozenset((colour, SHAPES[i % len(SHAPES)]) for i, colour in enumerate(COLOURS))
JITTER = 0.015  # of the centre, of the picture's side; the radius varies by 4 %


class Scene(NamedTuple):
    """What a picture shows; dx, dy and scale are small deviations from the place's centre and the size's radius."""

    shape: str
    colour: str
    size: str
    place: str
    background: str = "white"
    dx: float = 0.0
    dy: float = 0.0
    scale: float = 1.0


def outline(shape: str) -> list[tuple[float, float]]:
    """Corners of a shape of radius about 1 around the origin; a circle and a ring have many."""
    if shape in ("circle", "ring"):
        return [(math.cos(a), math.sin(a)) for a in np.linspace(0, 2 * math.pi, 180, endpoint=False)]
    if shape == "square":
        return [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)]
    if shape == "triangle":
        return [(0.0, -0.9), (1.0, 0.9), (-1.0, 0.9)]
    if shape == "star":
        return [
            ((1.1 if i % 2 == 0 else 0.45) * math.sin(i * math.pi / 5),
             0.1 - (1.1 if i % 2 == 0 else 0.45) * math.cos(i * math.pi / 5))
            for i in range(10)
        ]  # fmt: skip
    if shape == "cross":
        a = 0.33
        return [
            (-a, -1),
            (a, -1),
            (a, -a),
            (1, -a),
            (1, a),
            (a, a),
            (a, 1),
            (-a, 1),
            (-a, a),
            (-1, a),
            (-1, -a),
            (-a, -a),
        ]
    raise ValueError(f"There is no shape {shape!r}: choose among {', '.join(SHAPES)}.")


def draw(scene: Scene, size: int = 64) -> Image.Image:
    """The picture of a scene, RGB, antialiased; the same geometry at every size."""
    fine = max(1024, 2 * size)
    x, y = (fine * (c + d) for c, d in zip(PLACES[scene.place], (scene.dx, scene.dy), strict=True))
    radius = fine * SIZES[scene.size] * scene.scale
    mask = Image.new("L", (fine, fine))
    pen = ImageDraw.Draw(mask)
    pen.polygon([(x + radius * u, y + radius * v) for u, v in outline(scene.shape)], fill=255)
    if scene.shape == "ring":
        hole = 0.55 * radius
        pen.ellipse((x - hole, y - hole, x + hole, y + hole), fill=0)
    mask = mask.resize((size, size), Image.Resampling.BOX)
    picture = Image.new("RGB", (size, size), BACKGROUNDS[scene.background])
    picture.paste(COLOURS[scene.colour], mask=mask)
    return picture


def captions_of(scene: Scene) -> list[str]:
    """Wordings from the barest, which leaves size, place and background open, to the fullest."""
    thing = f"{scene.colour} {scene.shape}"
    a = "an" if scene.colour == "orange" else "a"
    where = "in the middle" if scene.place == "middle" else f"at the {scene.place}"
    ground = f"on a {scene.background} background"
    return [
        f"{a} {thing}",
        thing,
        f"{a} {thing} {where}",
        f"a {scene.size} {thing}",
        f"a {scene.size} {thing} {where}",
        f"{a} {thing} {ground}",
        f"a {scene.size} {thing} {where} {ground}",
        f"a picture of {a} {thing}",
    ]


def scenes(count: int, seed: int = 0) -> list[Scene]:
    """`count` scenes, every combination once before any comes again; order, backgrounds and jitter by seed."""
    rng = np.random.default_rng(seed)
    combinations = list(product(SHAPES, COLOURS, SIZES, PLACES))
    grounds = list(BACKGROUNDS)
    found: list[Scene] = []
    while len(found) < count:
        for i in rng.permutation(len(combinations)):
            shape, colour, size, place = combinations[i]
            ground = grounds[rng.integers(len(grounds))]
            dx, dy, scale = rng.uniform(-1, 1, 3) * (JITTER, JITTER, 0.04)
            found.append(Scene(shape, colour, size, place, ground, float(dx), float(dy), 1 + float(scale)))
    return found[:count]


def build(
    out: str | Path,
    size: int = 64,
    seed: int = 0,
    count: int = 5184,
    overwrite: bool = False,
    progress: Callable[[Iterable[Any], int, str], Iterable[Any]] | None = None,
) -> dict[str, Any]:
    """Build the shapes corpus in the folder `out` and return its dataset.json; the same scenes at every size.

    progress: wraps an iterable given its length and a word, as a progress bar does.
    Raises ValueError, FileExistsError.
    """
    least = len(SHAPES) * len(COLOURS) * len(SIZES) * len(PLACES)
    if count < least:
        raise ValueError(f"count is {count}, but {least} pictures are needed to show every combination once.")
    if not 16 <= size <= 2048:
        raise ValueError(f"size is {size}, but shapes are drawn at 16 to 2048 pixels.")
    all_scenes = scenes(count, seed)
    with new_folder(out, overwrite) as folder:
        with ShardWriter(folder) as writer:
            items = progress(all_scenes, count, "draw") if progress else all_scenes
            for i, scene in enumerate(items):
                writer.add(f"shape-{i:06d}", encode_webp(draw(scene, size), effort=2), meta_of(scene))
        summary = {
            "name": "shapes",
            "size": size,
            "seed": seed,
            "count": count,
            "splits": dict(Counter(writer.counts)),
            "concepts": [f"{c} {s}" for c in COLOURS for s in SHAPES],
            "held-out": sorted(f"{c} {s}" for c, s in HELD_OUT),
            "styles": {"shapes": {"license": "CC0-1.0"}},
        }
        (folder / "ATTRIBUTION.md").write_text(
            "# Attribution\n\nDrawn by a program; no rights are claimed (CC0-1.0).\n"
        )
        write_json(summary, folder / "dataset.json")
    return summary


def meta_of(scene: Scene) -> dict[str, Any]:
    """key.json of a scene."""
    return {
        "captions": captions_of(scene),
        "concept": f"{scene.colour} {scene.shape}",
        "style": "shapes",
        "group": "shapes",
        "split": "held-out" if (scene.colour, scene.shape) in HELD_OUT else "train",
        "license": "CC0-1.0",
        "keywords": [],
        "shape": scene.shape,
        "colour": scene.colour,
        "size": scene.size,
        "place": scene.place,
        "background": scene.background,
    }
