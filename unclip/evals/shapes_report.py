"""How often a model draws what a caption of the shapes world says, read off its pictures by a program.

Half of the captions name colour–shape pairs that every stage was trained on, half name pairs that none has seen. One
draw for each caption, none picked. Shape and colour count always, place and size where the caption names them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from unclip.core.data import pil_from_pixels, to_pixels
from unclip.core.files import write_json
from unclip.corpora.shapes import COLOURS, PLACES, SHAPES, SIZES, Scene, draw
from unclip.evals.concepts import Draw, Generate, dtype_of, generator_of, run, wilson
from unclip.evals.corpus import SIDE, Corpus, by_digest, digest, load_corpus
from unclip.evals.shapes import Reading, read
from unclip.evals.sheets import contact_sheet, save_sheet, to_images
from unclip.pictures import slug, write_png

if TYPE_CHECKING:
    from unclip.arguments import Callback, DTypeName
    from unclip.pipeline import UnCLIP

SPLITS = {"seen": "train", "held_out": "held-out"}
GOALS = {"seen": 0.85, "held_out": 0.60, "real": 0.98}
ENLARGED = 4
UNREADABLE = 40
PARTS = Reading._fields
_PLACE = re.compile(rf"\b(?:at|in) the ({'|'.join(sorted(PLACES, key=len, reverse=True))})\b")
_SIZE = re.compile(rf"\b({'|'.join(SIZES)})\b")


def asked(caption: str, concept: str) -> dict[str, str]:
    """What a caption asks for: shape and colour (of the concept, "red circle"), place and size where it names them."""
    colour, shape = concept.split()
    found = {"shape": shape, "colour": colour}
    for part, pattern in (("place", _PLACE), ("size", _SIZE)):
        match = pattern.search(caption)
        if match:
            found[part] = match[1]
    return found


def choose(corpus: Corpus, count: int, seed: int = 0) -> dict[str, list[Draw]]:
    """`count` captions, half of each split, by hash of (seed, key): {"seen": …, "held_out": …}.

    The wording is one of the scene's captions, chosen by the same hash. Raises ValueError for an odd count, or where
    a split has too few scenes.
    """
    if count < 2 or count % 2:
        raise ValueError(f"count={count} came; give an even number, half for seen and half for held-out pairs.")
    draws: dict[str, list[Draw]] = {}
    for i, (name, split) in enumerate(SPLITS.items()):
        scenes = [drawing for drawing in corpus.drawings if drawing.split == split]
        if len(scenes) < count // 2:
            raise ValueError(
                f"{count // 2} scenes of split {split!r} were expected, {len(scenes)} are there; ask for fewer."
            )
        draws[name] = []
        for j, scene in enumerate(by_digest(scenes, seed)[: count // 2]):
            wordings = corpus.captions[scene.index]
            caption = wordings[int.from_bytes(digest(scene, seed)[-4:], "big") % len(wordings)]
            draws[name].append(Draw(replace(scene, caption=caption), seed + i * (count // 2) + j))
    return draws


def score(readings: Sequence[Reading | None], wanted: Sequence[dict[str, str]]) -> dict[str, Any]:
    """Rates right of shape and colour together, of each, and of place and size over those that name them; refusals."""
    rows = list(zip(readings, wanted, strict=True))
    hits = {part: [r is not None and getattr(r, part) == w[part] for r, w in rows if part in w] for part in PARTS}
    both = [shape and colour for shape, colour in zip(hits["shape"], hits["colour"], strict=True)]
    result: dict[str, Any] = {"count": len(readings)}
    for name, right in (("shape_and_colour", both), *hits.items()):
        result[name] = round(float(np.mean(right)), 4) if right else None
    result["shape_and_colour_interval"] = wilson(float(np.mean(both)), len(both))
    result["counts"] = {"place": len(hits["place"]), "size": len(hits["size"])}
    result["refused"] = sum(r is None for r in readings)
    return result


def chance() -> dict[str, Any]:
    """What guessing gives: one over the number of choices."""
    n = {"shape": len(SHAPES), "colour": len(COLOURS), "place": len(PLACES), "size": len(SIZES)}
    formula = f"1 / choices: {n['shape']} shapes × {n['colour']} colours, {n['place']} places, {n['size']} sizes"
    return {
        "shape_and_colour": round(1 / (n["shape"] * n["colour"]), 4),
        **{part: round(1 / choices, 4) for part, choices in n.items()},
        "formula": formula,
    }


def unreadable(count: int = UNREADABLE, seed: int = 0) -> dict[str, list[Image.Image]]:
    """Pictures that show no one shape: "blank" (one colour), "broken" (noise, stripes, two things, shuffled tiles)."""
    rng = np.random.default_rng(seed)
    blank = [Image.new("RGB", (SIDE, SIDE), tuple(int(v) for v in rng.integers(0, 256, 3))) for _ in range(count)]
    broken = []
    for i in range(count):
        scene = Scene(SHAPES[i % len(SHAPES)], list(COLOURS)[i % len(COLOURS)], "medium", "left")
        pixels = np.array(draw(scene, SIDE))
        if i % 4 == 0:
            pixels = rng.integers(0, 256, pixels.shape)
        elif i % 4 == 1:
            pixels[:, i % 5 :: 8] = pixels[:, i % 5 + 1 :: 8] = 0
        elif i % 4 == 2:
            pixels = np.minimum(pixels, pixels[:, ::-1])
        else:
            tiles = pixels.reshape(4, 16, 4, 16, 3).swapaxes(1, 2).reshape(16, 16, 16, 3)[rng.permutation(16)]
            pixels = tiles.reshape(4, 4, 16, 16, 3).swapaxes(1, 2).reshape(SIDE, SIDE, 3)
        broken.append(Image.fromarray(pixels.astype(np.uint8)))
    return {"blank": blank, "broken": broken}


def measure(
    generate: Generate, corpus: Corpus, count: int = 400, seed: int = 0, batch_size: int = 50
) -> tuple[dict[str, Any], list[Draw], Tensor, list[Reading | None]]:
    """Figures of any generator of 64×64 pictures, with the draws (seen, then held out), their pictures and readings."""
    halves = choose(corpus, count, seed)
    draws = [*halves["seen"], *halves["held_out"]]
    pictures = torch.cat([run(generate, draws[i : i + batch_size]) for i in range(0, count, batch_size)])
    readings = [read(image) for image in to_images(pictures)]
    real = [read(image) for image in to_images(corpus.pictures([draw.drawing.index for draw in draws]))]
    wanted = [asked(draw.drawing.caption, draw.drawing.concept) for draw in draws]
    fullest = [max(corpus.captions[draw.drawing.index], key=len) for draw in draws]
    full = [asked(caption, draw.drawing.concept) for caption, draw in zip(fullest, draws, strict=True)]
    half = count // 2
    refused = {kind: sum(read(image) is None for image in images) for kind, images in unreadable().items()}
    figures = {
        "count": count,
        "seed": seed,
        "seen": score(readings[:half], wanted[:half]),
        "held_out": score(readings[half:], wanted[half:]),
        "real": score(real, full),
        "chance": chance(),
        "refused": {**refused, "of_each": UNREADABLE, "generated": sum(reading is None for reading in readings)},
    }
    figures["goals"] = GOALS
    figures["reached"] = {name: figures[name]["shape_and_colour"] >= goal for name, goal in GOALS.items()}
    return figures, draws, pictures, readings


def label(draw: Draw, reading: Reading | None) -> str:
    """A caption, and behind it what was read where that is something else, or that nothing could be read."""
    wanted = asked(draw.drawing.caption, draw.drawing.concept)
    if reading is None:
        return f"{draw.drawing.caption} [refused]"
    wrong = [getattr(reading, part) for part, value in wanted.items() if getattr(reading, part) != value]
    return f"{draw.drawing.caption} [read: {', '.join(wrong)}]" if wrong else draw.drawing.caption


def enlarge(pipe: UnCLIP, draws: Sequence[Draw], pictures: Tensor, preset: str, out: Path) -> list[dict[str, Any]]:
    """Take pictures on through the upsamplers; write each at full size, and a sheet of all sizes side by side."""
    settings = pipe.settings(preset)
    x = {SIDE: to_pixels(pictures)}
    for side in pipe.sizes[1:]:
        seeds = [draw.seed for draw in draws]
        x[side] = pipe.upsample(x[max(x)], side, seeds, settings[pipe.networks[side]]).cpu()
    images = {side: pil_from_pixels(pixels) for side, pixels in x.items()}
    rows = []
    for i, wanted in enumerate(draws):
        path = out / f"{slug(wanted.drawing.caption)}-{wanted.seed}.png"
        write_png(images[max(x)][i], path, {"prompt": wanted.drawing.caption, "seed": str(wanted.seed)})
        reading = read(images[max(x)][i])
        rows.append(
            {"file": path.name, "caption": wanted.drawing.caption, "read": reading._asdict() if reading else None}
        )
    cells = [[images[side][i] for side in x] for i in range(len(draws))]
    title = " to ".join(f"{side} px" for side in x)
    sheet = contact_sheet(cells, [draw.drawing.caption for draw in draws], columns=1, side=256, title=title)
    save_sheet(sheet, out / "sheet-sizes.png")
    return rows


def report(
    model: str | None,
    corpus: str | Path,
    out: str | Path,
    count: int = 400,
    seed: int = 0,
    preset: str = "default",
    minutes: dict[str, float] | float | None = None,
    device: str | None = None,
    dtype: DTypeName | None = None,
    callback: Callback | None = None,
) -> dict[str, Any]:
    """`unclip evals shapes`: `out/report.json`, `out/sheet.png`, and four pictures at full size beside.

    minutes: what training took, stated in the report as it comes. Raises ValueError, FileNotFoundError.
    """
    from unclip.pipeline import UnCLIP

    world, out = load_corpus(corpus, tuple(SPLITS.values())), Path(out)
    choose(world, count, seed)  # bad arguments are named before the networks load
    pipe = UnCLIP.from_pretrained(model, dtype, device)
    generate = generator_of(pipe, world, "prior", preset, callback=callback)
    figures, draws, pictures, readings = measure(generate, world, count, seed)
    out.mkdir(parents=True, exist_ok=True)
    half = min(ENLARGED, count) // 2
    few = [*range(half), *range(count // 2, count // 2 + half)]
    if len(pipe.sizes) > 1 and pipe.sizes[0] == SIDE:
        figures["enlarged"] = enlarge(pipe, [draws[i] for i in few], pictures[few], preset, out)
    labels = [label(draw, reading) for draw, reading in zip(draws, readings, strict=True)]
    title = f"{count} captions, one draw each: the first half pairs seen in training, the second half held out"
    sheet = contact_sheet([[image] for image in to_images(pictures)], labels, columns=20, side=96, title=title)
    save_sheet(sheet, out / "sheet.png")
    named = {"model": pipe.model_name, "dtype": dtype_of(pipe), "preset": preset}
    figures = {**named, **figures, "minutes": minutes}
    write_json(figures, out / "report.json")
    return figures
