"""The commands on latents: `unclip vary | interpolate | edit | img2img | inpaint | reconstruct | study`."""

import hashlib
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from unclip.options import Bars, Common, numbers, whole_numbers

if TYPE_CHECKING:
    from PIL.Image import Image

    from unclip.pipeline import UnCLIP
    from unclip.stages import UnCLIPOutput

FRAME_MS = 120
SHEET_SIDE = 256
MIN_CELL = 128  # narrower, labels do not fit

SourceArgument = Annotated[str, typer.Argument(metavar="SOURCE", help="Path of a picture, or a caption.")]
NumImages = Annotated[int, typer.Option(help="How many, with seeds SEED, SEED + 1, …")]
PictureArgument = Annotated[str, typer.Argument(metavar="PICTURE", help="Path of a picture.")]
KeepAlpha = Annotated[bool, typer.Option("--keep-alpha", help="Give results the picture's transparency.")]
Gif = Annotated[bool, typer.Option("--gif", help="Also write an animation, there and back.")]


class XT(StrEnum):
    slerp = "slerp"
    fixed = "fixed"


class Method(StrEnum):
    auto = "auto"
    tuned = "tuned"
    replaced = "replace"  # `replace` is a method of every string


class Shown(NamedTuple):
    """A picture that a command made, and what it says under it on a sheet."""

    image: "Image"
    label: str
    seed: int


class Given(NamedTuple):
    """A picture that a command was given, for its sheet."""

    image: "Image"
    label: str


def add_commands(app: typer.Typer) -> None:
    """Registers the commands; each has the options of `Common` beside its own."""
    for command in (vary, interpolate, edit, img2img, inpaint, reconstruct, study):
        app.command()(with_common(command))


def with_common(command: Callable[..., None]) -> Callable[..., None]:
    """A command whose first argument is a `Common` as a function of that one's fields by name, after its own."""
    own, common = inspect.signature(command).parameters, inspect.signature(Common).parameters
    parameters = [*list(own.values())[1:], *common.values()]

    def call(**given: Any) -> None:
        command(Common(**{name: given.pop(name) for name in common}), **given)

    call.__name__, call.__doc__ = command.__name__, command.__doc__
    call.__annotations__ = {p.name: p.annotation for p in parameters}
    by_name = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters]
    call.__signature__ = inspect.Signature(by_name)  # pyright: ignore[reportFunctionMemberAccess]
    return call


# ------------------------------------------------------------------------------------------------ commands


def vary(
    common: Common,
    source: SourceArgument,
    num_images: NumImages = 4,
    eta: Annotated[float, typer.Option(help="0 reconstructs it; 1 draws anew all that CLIP did not see.")] = 1.0,
    labels: Annotated[str | None, typer.Option(help="Labels, between commas, for CLIP to choose from.")] = None,
    keep_alpha: KeepAlpha = False,
) -> None:
    """Pictures with the same content as one picture, or as a caption's picture."""
    pipe = common.load()
    given = given_pictures(common, source)
    with closing(Bars()) as bars:
        if labels is None:
            result = pipe.vary(source, num_images, eta, keep_alpha, **common.options(bars))
            texts = [f"seed {seed}" for seed in result.seeds]
        else:
            names = [name.strip() for name in labels.split(",")]
            found = pipe.probe(source, names, num_images, eta, keep_alpha, **common.options(bars))
            result = found.output
            likely = [likeliest(names, row.tolist()) for row in found.probabilities]
            given = [Given(given[0].image, f"{given[0].label}: {likely[0]}")]
            texts = [f"seed {seed}: {text}" for seed, text in zip(result.seeds, likely[1:], strict=True)]
            for text in [f"{given[0].label}", *texts]:
                typer.echo(text, err=True)
    title = f"variations of {name_of(source)}, eta = {eta:g}"
    made = shown(result, texts)
    chunks = {"source": source, "eta": eta, "keep_alpha": keep_alpha}
    write(common, pipe, f"{name_of(source)} varied", title, made, chunks, given)


def interpolate(
    common: Common,
    a: Annotated[str, typer.Argument(metavar="A", help="Path of a picture, or a caption.")],
    b: Annotated[str, typer.Argument(metavar="B", help="Path of a picture, or a caption.")],
    frames: Annotated[int, typer.Option(help="How many pictures, both ends included.")] = 8,
    x_t: Annotated[XT, typer.Option("--x-t", help="slerp goes from a's noise to b's; fixed is one drawn.")] = XT.slerp,
    gif: Gif = False,
) -> None:
    """Pictures on the way from one picture or caption to another."""
    pipe = common.load()
    before, after = given_pictures(common, a), given_pictures(common, b)
    with closing(Bars()) as bars:
        result = pipe.interpolate(a, b, frames, x_t.value, **common.options(bars))
    made = shown(result, [f"{i / (frames - 1):.2f}" for i in range(frames)])
    title = f"from {name_of(a)} to {name_of(b)}, x_T {x_t.value}"
    chunks = {"source": a, "to": b, "frames": frames, "x_T": x_t.value}
    write(common, pipe, f"{name_of(a)} to {name_of(b)}", title, made, chunks, before, gif, after=after)


def edit(
    common: Common,
    source: SourceArgument,
    caption: Annotated[str, typer.Argument(metavar="CAPTION", help="What the picture shall show.")],
    from_caption: Annotated[str | None, typer.Option("--from", help="What it shows now.")] = None,
    strengths: Annotated[str, typer.Option(help="How far, between commas; 0 reconstructs.")] = "0,0.1,0.2,0.3,0.4,0.5",
    keep_alpha: KeepAlpha = False,
    gif: Gif = False,
) -> None:
    """A picture turned towards a caption."""
    values = numbers(strengths, "--strengths")
    pipe = common.load()
    given = given_pictures(common, source)
    with closing(Bars()) as bars:
        result = pipe.edit(source, caption, from_caption, values, keep_alpha, **common.options(bars))
    made = shown(result, [f"strength {value:g}" for value in values])
    start = f" from “{from_caption}”" if from_caption else ""
    way = {"strengths": strengths, "keep_alpha": keep_alpha}
    chunks = {"source": source, "prompt": caption, "from": from_caption or "", **way}
    title = f"{name_of(source)}{start} to “{caption}”"
    write(common, pipe, f"{name_of(source)} to {caption}", title, made, chunks, given, gif)


def img2img(
    common: Common,
    picture: PictureArgument,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What to draw.")],
    strength: Annotated[float, typer.Option(help="0 leaves the picture, 1 draws from noise.")] = 0.5,
    num_images: NumImages = 1,
    keep_alpha: KeepAlpha = False,
) -> None:
    """Pictures of a prompt that start from a picture instead of from noise."""
    pipe = common.load()
    given = given_pictures(common, picture)
    with closing(Bars()) as bars:
        result = pipe.img2img(picture, prompt, strength, num_images, keep_alpha, **common.options(bars))
    made = shown(result, [f"seed {seed}" for seed in result.seeds])
    chunks = {"source": picture, "prompt": prompt, "strength": strength, "keep_alpha": keep_alpha}
    title = f"{name_of(picture)} as “{prompt}”, strength {strength:g}"
    write(common, pipe, f"{name_of(picture)} as {prompt}", title, made, chunks, given)


def inpaint(
    common: Common,
    picture: PictureArgument,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What to draw.")],
    mask: Annotated[
        str | None, typer.Option(help="Picture: white is drawn anew, black stays. Left out: what is clear is drawn.")
    ] = None,
    margin: Annotated[float, typer.Option(help="Space to draw around the picture, a part of its sides.")] = 0.0,
    resamples: Annotated[
        int | None, typer.Option(help="How often each stretch of steps is walked. Left out: 1 if tuned, else 4.")
    ] = None,
    method: Annotated[
        Method, typer.Option(help="Show known pixels to tuned networks, ask for a tuned decoder, or replace them only.")
    ] = Method.auto,
    num_images: NumImages = 1,
) -> None:
    """Pictures of a prompt that keep a part of a picture; --margin draws what is around it."""
    pipe = common.load()
    given = given_pictures(common, picture)
    with closing(Bars()) as bars:
        result = pipe.inpaint(
            picture, mask, prompt, num_images, margin, resamples, method.value, **common.options(bars)
        )
    made = shown(result, [f"seed {seed}" for seed in result.seeds])
    way = {"resamples": resamples, "method": method.value}
    chunks = {"source": picture, "prompt": prompt, "mask": mask, "margin": margin, **way}
    title = f"{name_of(picture)} with “{prompt}”"
    write(common, pipe, f"{name_of(picture)} with {prompt}", title, made, chunks, given)


def reconstruct(
    common: Common,
    picture: PictureArgument,
    components: Annotated[str | None, typer.Option(help="How many, between commas; the paper's if left out.")] = None,
    keep_alpha: KeepAlpha = False,
) -> None:
    """A picture drawn from the first principal components of its embedding."""
    counts = None if components is None else whole_numbers(components, "--components")
    pipe = common.load()
    from unclip.manipulations import component_counts

    given, counts = given_pictures(common, picture), component_counts(pipe, counts)
    with closing(Bars()) as bars:
        result = pipe.reconstruct(Path(picture), counts, keep_alpha, **common.options(bars))
    made = shown(result, [f"{count} component{'s' * (count > 1)}" for count in counts])
    title = f"{name_of(picture)} from its first components"
    chunks = {"source": picture, "keep_alpha": keep_alpha}
    write(common, pipe, f"{name_of(picture)} components", title, made, chunks, given)


def study(
    common: Common,
    caption: Annotated[str, typer.Argument(metavar="CAPTION", help="What to draw.")],
    num_images: NumImages = 4,
) -> None:
    """What the prior is for: one decoder given the caption, its text embedding as z_i, and the prior's z_i."""
    pipe = common.load()
    with closing(Bars()) as bars:
        results = pipe.study(caption, num_images, **common.options(bars))
    made = [s for name, result in results.items() for s in shown(result, [f"{name}, seed {i}" for i in result.seeds])]
    title = f"“{caption}” by caption, by text embedding, by prior"
    write(common, pipe, f"{caption} study", title, made, {"prompt": caption}, columns=num_images)


# ------------------------------------------------------------------------------------------------ inside


def name_of(source: str) -> str:
    """What a picture or a caption is called: the file's name without its ending, or the caption."""
    from unclip.sources import is_path

    return Path(source).stem if is_path(source) else source


def given_pictures(common: Common, source: str) -> list[Given]:
    """The source, square and on white, where it is a picture; else none."""
    from unclip.core.data import pil_from_pixels
    from unclip.sources import is_path, on_white, square

    if not is_path(source):
        return []
    picture = square(source, SHEET_SIDE, common.frame.value)
    return [Given(pil_from_pixels(on_white(picture))[0], name_of(source))]


def digest_of(source: object) -> str | None:
    """Of a file that a source names, so that another picture of its name is another; None for a caption."""
    from unclip.sources import is_path

    if not isinstance(source, str) or not is_path(source):
        return None
    return hashlib.sha256(Path(source).read_bytes()).hexdigest()[:16]


def shown(result: "UnCLIPOutput", labels: Sequence[str]) -> list[Shown]:
    """The pictures of a result with their labels and seeds."""
    return [Shown(*row) for row in zip(result.images, labels, result.seeds, strict=True)]  # pyright: ignore[reportArgumentType]


def likeliest(labels: Sequence[str], probabilities: Sequence[float]) -> str:
    """The labels with their probabilities, likeliest first, at most three."""
    best = sorted(zip(probabilities, labels, strict=True), reverse=True)[:3]
    return ", ".join(f"{label} {probability:.0%}" for probability, label in best)


def write(
    common: Common,
    pipe: "UnCLIP",
    name: str,
    title: str,
    made: Sequence[Shown],
    operation: Mapping[str, object],
    given: Sequence[Given] = (),
    gif: bool = False,
    columns: int = 8,
    after: Sequence[Given] = (),
) -> None:
    """Writes the pictures, then the animation and the sheet where asked, and prints their paths."""
    from unclip.pictures import computed_with, made_by, picture_path, slug, write_gif, write_png

    files = {name: digest_of(operation[name]) for name in ("source", "to", "mask") if name in operation}
    said = {**operation, **{f"{name}_sha256": digest for name, digest in files.items() if digest}}
    settings = common.named() | computed_with(pipe)
    fixed = {**made_by(pipe), "operation": json.dumps(said), "settings": json.dumps(settings)}
    taken: set[Path] = set()

    def path_for(ending: str, chunks: dict[str, str]) -> Path:
        """Of a picture with these chunks: one that neither an earlier picture of this call nor another's has."""
        path = picture_path(common.out, f"{slug(name)}{ending}", common.seed, chunks, taken)
        taken.add(path)
        return path

    for i, one in enumerate(made):
        chunks = {"label": one.label, "seed": str(one.seed), **fixed}
        path = path_for(f"-{i:02d}", chunks)
        write_png(one.image, path, chunks)
        typer.echo(path)
    if gif:
        digest = hashlib.sha256(repr(sorted(fixed.items())).encode()).hexdigest()[:8]
        path = common.out / f"{slug(name)}-{digest}-{common.seed}.gif"
        write_gif([one.image for one in made], path, FRAME_MS)
        typer.echo(path)
    if common.sheet:
        from unclip.evals.sheets import contact_sheet

        cells = [*given, *made, *after]
        side = min(SHEET_SIDE, max(MIN_CELL, made[0].image.width))
        labels = [cell.label for cell in cells]
        page = contact_sheet([[cell.image] for cell in cells], labels, columns, side, title)
        chunks = {"cells": json.dumps(labels), **fixed}
        path = path_for("-sheet", chunks)
        write_png(page, path, chunks)
        typer.echo(path)
