"""The judge of the shapes world: reads shape, colour, place and size off a picture's pixels, or refuses."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFilter
from torch import Tensor

from unclip.core.data import load_image, pil_from_pixels
from unclip.corpora.shapes import COLOURS, PLACES, SHAPES, SIZES, Scene, draw

SIDE = 128  # pictures are read at this size
CANON = 48  # masks are compared at this size
MIN_IOU = 0.78  # below, a blob is no shape
MIN_CONTRAST = 50.0  # of shape and background, of 255
MAX_COLOUR_DISTANCE = 90.0


class Reading(NamedTuple):
    """What a picture shows."""

    shape: str
    colour: str
    place: str
    size: str


class Blob(NamedTuple):
    """The one thing on a plain background: its mask (h, w), box (left, top, right, bottom) in pixels, and colour."""

    mask: np.ndarray
    box: tuple[int, int, int, int]
    colour: np.ndarray


def read(picture: Image.Image | Tensor) -> Reading | None:
    """Shape, colour, place and size of a square picture; None if it is blank, broken or shows no one shape clearly.

    picture: PIL, or a float tensor (3, h, w) or (1, 3, h, w) in [−1, 1]; 32 pixels or more a side.
    """
    if isinstance(picture, Tensor):
        picture = pil_from_pixels(picture if picture.ndim == 4 else picture[None])[0]
    image = load_image(picture)
    if image.width != image.height or image.width < 32:
        raise ValueError(f"The picture is {image.width}×{image.height}: a square one of 32 pixels or more is read.")
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    blob = find_blob(image)
    if blob is None:
        return None
    distances = {name: float(np.linalg.norm(blob.colour - rgb)) for name, rgb in COLOURS.items()}
    colour = min(distances, key=lambda name: distances[name])
    if distances[colour] > MAX_COLOUR_DISTANCE:
        return None
    canon = canonical(blob)
    scores = {shape: max(iou(canon, t) for t in templates()[shape]) for shape in SHAPES}
    shape = max(scores, key=lambda name: scores[name])
    if scores[shape] < MIN_IOU:
        return None
    return Reading(shape, colour, _place(blob), _size(blob, shape))


def find_blob(image: Image.Image) -> Blob | None:
    """The single blob that stands out from the border's colour; None if there is none, or not a single even one."""
    pixels = np.asarray(image.resize((SIDE, SIDE), _method(image.width)), dtype=np.float32)
    edge = np.concatenate([pixels[:3].reshape(-1, 3), pixels[-3:].reshape(-1, 3), pixels[:, :3].reshape(-1, 3),
                           pixels[:, -3:].reshape(-1, 3)])  # fmt: skip
    ground = np.median(edge, axis=0)
    if (np.abs(edge - ground).max(axis=1) < 40).mean() < 0.9:
        return None
    difference = np.abs(pixels - ground).max(axis=2)
    standing_out = difference[difference > MIN_CONTRAST]
    if standing_out.size < 0.005 * SIDE**2:
        return None
    peak = float(np.median(standing_out))
    mask = difference > peak / 2
    parts = components(mask)
    if not parts:
        return None
    area = len(parts[0])
    rest = sum(len(part) for part in parts[1:])
    if not 0.01 * SIDE**2 < area < 0.5 * SIDE**2 or rest > 0.1 * area:
        return None
    rows, columns = parts[0][:, 0], parts[0][:, 1]
    blob = np.zeros_like(mask)
    blob[rows, columns] = True
    inside = pixels[blob & (difference > 0.8 * peak)]
    if len(inside) < 8:
        return None
    colour = np.median(inside, axis=0)
    if (np.abs(inside - colour).max(axis=1) < 60).mean() < 0.75:
        return None
    box = (int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1)
    return Blob(blob, box, colour)


def _method(width: int) -> Image.Resampling:
    return Image.Resampling.BOX if width > SIDE else Image.Resampling.BILINEAR


def components(mask: np.ndarray) -> list[np.ndarray]:
    """The 8-connected parts of a mask (h, w), largest first, each as (n, 2) rows and columns."""
    left = {(int(r), int(c)) for r, c in np.argwhere(mask)}
    parts = []
    while left:
        stack, part = [left.pop()], []
        while stack:
            r, c = stack.pop()
            part.append((r, c))
            for near in ((r + i, c + j) for i in (-1, 0, 1) for j in (-1, 0, 1)):
                if near in left:
                    left.remove(near)
                    stack.append(near)
        parts.append(np.array(part))
    return sorted(parts, key=len, reverse=True)


def canonical(blob: Blob) -> np.ndarray:
    """The blob's mask scaled so that the longer side of its box fills CANON pixels, centred."""
    left, top, right, bottom = blob.box
    side = max(right - left, bottom - top)
    x, y = (left + right - side) / 2, (top + bottom - side) / 2
    mask = Image.fromarray((blob.mask * 255).astype(np.uint8))
    scaled = mask.transform(
        (CANON, CANON), Image.Transform.EXTENT, (x, y, x + side, y + side), Image.Resampling.BILINEAR
    )
    return np.asarray(scaled) > 127


def iou(a: np.ndarray, b: np.ndarray) -> float:
    """Area of the intersection over area of the union."""
    return float((a & b).sum() / max(1, (a | b).sum()))


@lru_cache(maxsize=1)
def templates() -> dict[str, list[np.ndarray]]:
    """Canonical masks of every shape at every size, sharp and slightly blurred, made by the reader's own steps."""
    found: dict[str, list[np.ndarray]] = {shape: [] for shape in SHAPES}
    for shape in SHAPES:
        for size in SIZES:
            for blur in (0.0, 1.0):
                image = draw(Scene(shape, "black", size, "middle"), 64).filter(ImageFilter.GaussianBlur(blur))
                blob = find_blob(image)
                assert blob is not None
                found[shape].append(canonical(blob))
    return found


def _place(blob: Blob) -> str:
    left, top, right, bottom = blob.box
    x, y = (left + right) / 2 / SIDE, (top + bottom) / 2 / SIDE
    return min(PLACES, key=lambda name: (PLACES[name][0] - x) ** 2 + (PLACES[name][1] - y) ** 2)


@lru_cache(maxsize=64)
def _side_of(shape: str, size: str) -> int:
    blob = find_blob(draw(Scene(shape, "black", size, "middle"), 64))
    assert blob is not None
    return max(blob.box[2] - blob.box[0], blob.box[3] - blob.box[1])


def _size(blob: Blob, shape: str) -> str:
    side = max(blob.box[2] - blob.box[0], blob.box[3] - blob.box[1])
    return min(SIZES, key=lambda name: abs(_side_of(shape, name) - side))
