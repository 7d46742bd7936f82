"""Can a reader name what is drawn? Each picture with ten captions, the right one among nine drawn at random.

A folder holds a numbered sheet for each picture, `answers.txt` to be filled in, and `key.json`, which a reader does not
open. Guessing names one in ten.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from unclip.core.data import pil_from_pixels
from unclip.core.files import whole_folder, write_json
from unclip.evals.concepts import dtype_of, wilson
from unclip.evals.sheets import CAPTIONS, INK, PAPER, fit, read_captions, wrap

if TYPE_CHECKING:
    from unclip.arguments import Callback, DTypeName

OPTIONS = 10
KEY, ANSWERS = "key.json", "answers.txt"


class Question(NamedTuple):
    """Ten captions, of which the one at `right` (from 1) is the picture's."""

    options: tuple[str, ...]
    right: int

    @property
    def caption(self) -> str:
        return self.options[self.right - 1]


def questions(captions: Sequence[str], seed: int = 0) -> list[Question]:
    """One for each caption, the other nine drawn from the rest. Raises ValueError for fewer than ten captions."""
    if len(set(captions)) != len(captions) or len(captions) < OPTIONS:
        raise ValueError(
            f"{len(set(captions))} different captions came of {len(captions)}; give ten or more, no twins."
        )
    rng, found = random.Random(seed), []
    for caption in captions:
        options = [caption, *rng.sample([other for other in captions if other != caption], OPTIONS - 1)]
        rng.shuffle(options)
        found.append(Question(tuple(options), options.index(caption) + 1))
    return found


def question_sheet(picture: Image.Image, title: str, options: Sequence[str], side: int = 256) -> Image.Image:
    """The picture over its title and the numbered captions."""
    font = ImageFont.load_default(size=14)
    gap, line, width = 12, 18, max(side, 360)
    lines = [title] + [part for i, o in enumerate(options, 1) for part in wrap(f"{i}. {o}", font, width)]
    sheet = Image.new("RGB", (width + 2 * gap, side + line * len(lines) + 3 * gap), PAPER)
    sheet.paste(fit(picture, side), (gap, gap))
    draw = ImageDraw.Draw(sheet)
    for i, text in enumerate(lines):
        draw.text((gap, side + 2 * gap + i * line), text, INK, font)
    return sheet


def evaluate(
    model: str | None,
    out: str | Path,
    captions: str | Path | None = None,
    seed: int = 0,
    size: int = 256,
    preset: str = "default",
    device: str | None = None,
    dtype: DTypeName | None = None,
    callback: Callback | None = None,
) -> Path:
    """`unclip evals quiz`: writes the folder, whole or not at all, and returns it.

    captions: a text file, a caption a line; None takes the 48 that come with the package. Each picture is what
    `unclip sample CAPTION --seed SEED --size SIZE` draws. Raises ValueError, FileNotFoundError, FileExistsError.
    """
    from unclip.pipeline import UnCLIP

    prompts, out = read_captions(captions or CAPTIONS), Path(out)
    asked = questions(prompts, seed)
    if out.exists() and (out.is_file() or any(out.iterdir())):
        raise FileExistsError(f"{out} exists, and a reader's answers may be in it; give a new folder.")
    pipe = UnCLIP.from_pretrained(model, dtype, device)
    drawn = pipe(prompts, seed=seed, size=size, preset=preset, output_type="pt", callback=callback)
    key = {"model": pipe.model_name, "dtype": dtype_of(pipe), "seed": seed, "size": size, "preset": preset}
    with whole_folder(out) as partial:
        for i, (picture, question) in enumerate(
            zip(pil_from_pixels(cast(Tensor, drawn.images)), asked, strict=True), 1
        ):
            question_sheet(picture, f"Picture {i} of {len(asked)}", question.options).save(partial / f"{i:02d}.png")
        blank = "".join(f"{i}:\n" for i in range(1, len(asked) + 1))
        (partial / ANSWERS).write_text(f"# after each picture's number the number of its caption\n{blank}", "utf-8")
        write_json({**key, "questions": [question._asdict() for question in asked]}, partial / KEY)
    return out


def read_answers(path: str | Path, count: int) -> list[int | None]:
    """A reader's answers, a line `picture: caption` for each, both by number; None where nothing is said.

    Raises FileNotFoundError, and ValueError for a line that is none, or a picture named twice.
    """
    found: dict[int, int | None] = {}
    for line in read_captions(path):
        if line.startswith("#"):
            continue
        picture, _, answer = (part.strip() for part in line.partition(":"))
        fits = picture.isdecimal() and 1 <= int(picture) <= count and (not answer or answer.isdecimal())
        if not fits or int(picture) in found or (answer and not 1 <= int(answer) <= OPTIONS):
            raise ValueError(
                f"{path} has the line {line!r}; write each picture's number, 1 to {count}, once, a colon, and a "
                f"caption's number, 1 to {OPTIONS}."
            )
        found[int(picture)] = int(answer) if answer else None
    return [found.get(i) for i in range(1, count + 1)]


def score(folder: str | Path, answers: str | Path) -> dict[str, Any]:
    """How many pictures of a quiz's folder a reader named; pictures without an answer are wrong.

    `wrong`: by picture, what was answered and what is right. Raises FileNotFoundError, ValueError.
    """
    path = Path(folder) / KEY
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no quiz; write one by `unclip evals quiz --out {folder}`.")
    key = json.loads(path.read_text(encoding="utf-8"))
    asked = [Question(**question) for question in key["questions"]]
    given = read_answers(answers, len(asked))
    right = [answer == question.right for answer, question in zip(given, asked, strict=True)]
    wrong = {
        str(i): {"said": None if answer is None else question.options[answer - 1], "is": question.caption}
        for i, (answer, question) in enumerate(zip(given, asked, strict=True), 1)
        if answer != question.right
    }
    return {
        **{name: key[name] for name in ("model", "dtype", "seed", "size", "preset")},
        "right": sum(right),
        "count": len(right),
        "answered": sum(answer is not None for answer in given),
        "interval": wilson(sum(right) / len(right), len(right)),
        "wrong": wrong,
    }
