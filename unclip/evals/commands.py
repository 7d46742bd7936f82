"""`unclip evals …`: one subcommand per measure; what a subcommand needs is imported when it runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from unclip.options import (
    Bars,
    Device,
    Devices,
    DType,
    DTypes,
    Guidance,
    Model,
    Preset,
    numbers,
    quiet_libraries,
    whole_numbers,
)

CORPUS = Path("corpora/emoji-64")
EmojiCorpus = Annotated[Path, typer.Option(help="Folder of the emoji corpus.")]
BothWays = Annotated[float, typer.Option("--guidance", help="The decoder's guidance scale, both ways.")]
Json = Annotated[Path | None, typer.Option("--json", help="Where the figures go too.")]

evals = typer.Typer(help="Measure a model.", no_args_is_help=True)

T = TypeVar("T")


def measured(measure: Callable[..., T], device: Device, dtype: DType, **given: Any) -> T:
    """What a measure makes of these arguments, with bars as it goes; by name, as no two have them in one order."""
    quiet_libraries()
    with closing(Bars()) as bars:
        return measure(**given, device=device.value, dtype=dtype.value, callback=bars)


@evals.command()
def concepts(
    model: Model = None,
    split: Annotated[str, typer.Option(help="train or test-pair.")] = "train",
    count: Annotated[int, typer.Option(help="How many captions.")] = 300,
    json_file: Json = None,
    corpus: EmojiCorpus = CORPUS,
    seed: Annotated[int, typer.Option()] = 0,
    preset: Annotated[str, typer.Option()] = "default",
    guidance: Guidance = None,
    condition: Annotated[str, typer.Option(help="prior, ar, true_z_i, text (z_t) or caption (no z_i).")] = "prior",
    sheet: Annotated[Path | None, typer.Option(help="PNG of each picture beside its nearest drawing.")] = None,
    best_of: Annotated[int, typer.Option(help="Of how many drawings each picture is the one CLIP likes best.")] = 1,
    device: Devices = Device.auto,
    dtype: DTypes = DType.auto,
) -> None:
    """Nearest-concept accuracy of a model's pictures, with its ceiling and floor."""
    from unclip.pictures import check_file

    check_file(json_file, "--json")
    check_file(sheet, "--sheet")
    from unclip.evals.concepts import evaluate

    given = {"model": model, "corpus": corpus, "split": split, "count": count, "seed": seed, "preset": preset}
    more = {"guidance_scale": guidance, "condition": condition, "best_of": best_of, "sheet": sheet}
    figures = measured(evaluate, device, dtype, **given, **more, json_path=json_file)
    typer.echo(json.dumps(figures, indent=1))


@evals.command()
def clip(
    model: Annotated[str | None, typer.Option(help="Model folder, CLIP folder or hub name; else the embedded.")] = None,
    corpus: EmojiCorpus = CORPUS,
    split: Annotated[list[str] | None, typer.Option(help="May be repeated; test-pair, test-concept if none.")] = None,
    template: Annotated[list[str] | None, typer.Option(help="Prompt, {} the concept; may be repeated.")] = None,
    json_file: Json = None,
    device: Devices = Device.auto,
) -> None:
    """Zero-shot accuracy of CLIP among all concepts of the corpus, and its retrieval both ways."""
    from unclip.pictures import check_file

    check_file(json_file, "--json")
    from unclip.evals.clip import SPLITS, evaluate

    quiet_libraries()
    figures = evaluate(model, corpus, split or SPLITS, template or ["{}"], json_file, device.value)
    typer.echo(json.dumps(figures, indent=1))


@evals.command("shapes")
def shapes_report(
    model: Annotated[str, typer.Option(help="Folder of a model of the shapes world.")] = "runs/shapes/model",
    corpus: Annotated[Path, typer.Option(help="Folder of the shapes corpus.")] = Path("runs/shapes/corpus-64"),
    out: Annotated[Path, typer.Option(help="Folder of report.json and the sheet.")] = Path("runs/shapes/judged"),
    count: Annotated[int, typer.Option(help="How many captions, half seen in training.")] = 400,
    seed: Annotated[int, typer.Option()] = 0,
    preset: Annotated[str, typer.Option()] = "default",
    device: Devices = Device.auto,
    dtype: DTypes = DType.auto,
) -> None:
    """How often a model of the shapes world draws what its caption says, read by a program."""
    from unclip.pictures import check_folder

    check_folder(out, "--out")
    from unclip.evals.shapes_report import report

    given = {"model": model, "corpus": corpus, "out": out, "count": count, "seed": seed, "preset": preset}
    figures = measured(report, device, dtype, **given)
    typer.echo(json.dumps(figures, indent=1))


@evals.command()
def sheet(
    out: Annotated[Path, typer.Option(help="The PNG or WebP to write.")],
    model: Model = None,
    captions: Annotated[Path | None, typer.Option(help="Captions, one a line; 48 fixed ones if left out.")] = None,
    seed: Annotated[int, typer.Option()] = 0,
    size: Annotated[int, typer.Option()] = 256,
    preset: Annotated[str, typer.Option()] = "default",
    columns: Annotated[int, typer.Option()] = 8,
    device: Devices = Device.auto,
    dtype: DTypes = DType.auto,
) -> None:
    """One picture of each of a file's captions, unpicked, on a labelled sheet."""
    from unclip.pictures import check_file

    check_file(out, "--out")
    from unclip.evals.sheets import caption_sheet

    given = {"model": model, "out": out, "captions": captions, "seed": seed, "size": size, "preset": preset}
    typer.echo(measured(caption_sheet, device, dtype, **given, columns=columns))


@evals.command()
def inversion(
    model: Model = None,
    corpus: EmojiCorpus = CORPUS,
    split: Annotated[str, typer.Option(help="Of the corpus; held out, if it is to say anything.")] = "test-pair",
    count: Annotated[int, typer.Option(help="How many drawings.")] = 100,
    steps: Annotated[str, typer.Option(help="Numbers of steps, between commas.")] = "25,50,100",
    guidance: BothWays = 1.0,
    seed: Annotated[int, typer.Option()] = 0,
    json_file: Json = None,
    sheet: Annotated[Path | None, typer.Option(help="PNG of pictures beside their reconstructions.")] = None,
    device: Devices = Device.auto,
    dtype: DTypes = DType.fp32,
) -> None:
    """How well pictures come back from (z_i, x_T), by the number of steps, and what either half alone gives."""
    from unclip.pictures import check_file

    check_file(json_file, "--json")
    check_file(sheet, "--sheet")
    counts = whole_numbers(steps, "--steps")
    from unclip.evals.inversion import evaluate

    given = {"model": model, "corpus": corpus, "split": split, "count": count, "steps": counts, "seed": seed}
    figures = measured(evaluate, device, dtype, **given, guidance_scale=guidance, sheet=sheet, json_path=json_file)
    typer.echo(json.dumps(figures, indent=1))


@evals.command()
def variations(
    model: Model = None,
    corpus: EmojiCorpus = CORPUS,
    split: Annotated[str, typer.Option(help="Of the corpus; held out, if it is to say anything.")] = "test-pair",
    count: Annotated[int, typer.Option(help="How many drawings, and pairs of them.")] = 50,
    seeds: Annotated[int, typer.Option(help="How many variations of each drawing.")] = 2,
    steps: Annotated[int, typer.Option(help="The decoder's.")] = 100,
    guidance: BothWays = 1.0,
    seed: Annotated[int, typer.Option()] = 0,
    json_file: Json = None,
    device: Devices = Device.auto,
    dtype: DTypes = DType.fp32,
) -> None:
    """How often variations keep the concept, and how evenly interpolations go, judged by EfficientNet's features."""
    from unclip.pictures import check_file

    check_file(json_file, "--json")
    from unclip.evals.manipulations import evaluate

    given = {"model": model, "corpus": corpus, "split": split, "count": count, "seeds": seeds, "steps": steps}
    figures = measured(evaluate, device, dtype, **given, guidance_scale=guidance, seed=seed, json_path=json_file)
    typer.echo(json.dumps(figures, indent=1))


@evals.command()
def inpainting(
    model: Model = None,
    corpus: EmojiCorpus = CORPUS,
    split: Annotated[str, typer.Option(help="Of the corpus; held out, if it is to say anything.")] = "test-pair",
    count: Annotated[int, typer.Option(help="How many drawings.")] = 50,
    size: Annotated[int, typer.Option(help="Side of the pictures.")] = 64,
    given: Annotated[Path | None, typer.Option(help="The corpus at that size; else its drawings are scaled.")] = None,
    preset: Preset = "default",
    seed: Annotated[int, typer.Option()] = 0,
    json_file: Json = None,
    device: Devices = Device.auto,
    dtype: DTypes = DType.fp32,
) -> None:
    """What inpainting keeps, how steep its seam is and what it draws, beside pasting."""
    from unclip.pictures import check_file

    check_file(json_file, "--json")
    from unclip.evals.inpainting import evaluate

    of = {"model": model, "corpus": corpus, "split": split, "count": count, "size": size, "given": given}
    figures = measured(evaluate, device, dtype, **of, preset=preset, seed=seed, json_path=json_file)
    typer.echo(json.dumps(figures, indent=1))


@evals.command()
def edits(
    model: Annotated[str, typer.Option(help="Folder of a model of the shapes world.")] = "runs/shapes/model",
    count: Annotated[int, typer.Option(help="How many text diffs, half of colours and half of shapes.")] = 100,
    strengths: Annotated[str, typer.Option(help="Between commas.")] = "0,0.1,0.2,0.3,0.4,0.5,0.6",
    seeds: Annotated[int, typer.Option(help="How many variations of each scene, too.")] = 2,
    steps: Annotated[int, typer.Option(help="The decoder's.")] = 100,
    guidance: BothWays = 1.0,
    seed: Annotated[int, typer.Option()] = 0,
    json_file: Json = None,
    device: Devices = Device.auto,
    dtype: DTypes = DType.fp32,
) -> None:
    """How often a text diff changes what it names and leaves the rest, and how often variations leave all; read by a
    program in the shapes world."""
    from unclip.pictures import check_file

    check_file(json_file, "--json")
    values = numbers(strengths, "--strengths")
    from unclip.evals.manipulations import evaluate_edits

    given = {"model": model, "count": count, "strengths": values, "seeds": seeds, "steps": steps, "seed": seed}
    figures = measured(evaluate_edits, device, dtype, **given, guidance_scale=guidance, json_path=json_file)
    typer.echo(json.dumps(figures, indent=1))


@evals.command()
def priors(
    model: Model = None,
    corpus: EmojiCorpus = CORPUS,
    split: Annotated[list[str] | None, typer.Option(help="May be repeated; train and test-pair if left out.")] = None,
    steps: Annotated[list[int] | None, typer.Option(help="May be repeated; 16, 32 and 64 if left out.")] = None,
    guidance: Annotated[float | None, typer.Option(help="The priors' guidance scale, 1 for none.")] = None,
    limit: Annotated[int | None, typer.Option(help="Of each split the first so many pictures.")] = None,
    count: Annotated[int, typer.Option(help="Of each split so many captions are decoded and judged too, or 0.")] = 300,
    json_file: Json = None,
    device: Devices = Device.auto,
    dtype: DTypes = DType.fp32,
) -> None:
    """Priors and their samplers in one table: nearness to the pictures' embeddings, spread, concepts, time."""
    from unclip.pictures import check_file

    check_file(json_file, "--json")
    from unclip.evals.priors import SPLITS, STEPS, evaluate, table

    given = {"model": model, "corpus": corpus, "splits": split or SPLITS, "steps": steps or STEPS, "limit": limit}
    report = measured(evaluate, device, dtype, **given, guidance_scale=guidance, count=count, json_path=json_file)
    typer.echo(table(report))


@evals.command("table")
def where_it_is_lost(
    model: Model = None,
    split: Annotated[str, typer.Option(help="train or test-pair.")] = "train",
    count: Annotated[int, typer.Option(help="How many captions.")] = 500,
    size: Annotated[int | None, typer.Option(help="Up to which size; the model's largest if left out.")] = None,
    corpus: EmojiCorpus = CORPUS,
    seed: Annotated[int, typer.Option()] = 0,
    preset: Annotated[str, typer.Option()] = "default",
    guidance: Guidance = None,
    json_file: Json = None,
    device: Devices = Device.auto,
    dtype: DTypes = DType.auto,
) -> None:
    """Where quality is lost: real pictures, then each stage given the truth or what the stage before it makes."""
    from unclip.pictures import check_file

    check_file(json_file, "--json")
    from unclip.evals.table import evaluate, markdown

    given = {"model": model, "corpus": corpus, "split": split, "count": count, "size": size, "seed": seed}
    report = measured(evaluate, device, dtype, **given, preset=preset, guidance_scale=guidance, json_path=json_file)
    typer.echo(markdown(report))


@evals.command()
def synonyms(
    model: Model = None,
    corpus: EmojiCorpus = CORPUS,
    words: Annotated[Path | None, typer.Option(help="Lines `word: concept, concept`; 100 if left out.")] = None,
    template: Annotated[str, typer.Option(help="The prompt; {} stands for the word.")] = "{}",
    preset: Annotated[str, typer.Option()] = "default",
    seed: Annotated[int, typer.Option()] = 0,
    json_file: Json = None,
    device: Devices = Device.auto,
    dtype: DTypes = DType.auto,
) -> None:
    """How many words that no caption held lead to their concept: by CLIP, by the prior, in the picture."""
    from unclip.pictures import check_file

    check_file(json_file, "--json")
    from unclip.evals.synonyms import SYNONYMS, evaluate

    given = {"model": model, "corpus": corpus, "synonyms": words or SYNONYMS, "template": template, "seed": seed}
    figures = measured(evaluate, device, dtype, **given, preset=preset, json_path=json_file)
    typer.echo(json.dumps(figures, indent=1))


@evals.command()
def upsamplers(
    model: Model = None,
    corpus: EmojiCorpus = CORPUS,
    split: Annotated[str, typer.Option(help="Of the corpus; held out, if it is to say anything.")] = "test-pair",
    count: Annotated[int, typer.Option(help="How many drawings.")] = 100,
    size: Annotated[int | None, typer.Option(help="Up to which size; the model's largest if left out.")] = None,
    strength: Annotated[float, typer.Option(help="How much noise the decoder redraws drawings from.")] = 0.3,
    preset: Annotated[str, typer.Option()] = "default",
    seed: Annotated[int, typer.Option()] = 0,
    json_file: Json = None,
    device: Devices = Device.auto,
    dtype: DTypes = DType.auto,
) -> None:
    """The upsamplers beside bicubic and Lanczos on held-out drawings, from real pictures and redrawn ones."""
    from unclip.pictures import check_file

    check_file(json_file, "--json")
    from unclip.evals.upsamplers import evaluate

    given = {"model": model, "corpus": corpus, "split": split, "count": count, "size": size, "seed": seed}
    report = measured(evaluate, device, dtype, **given, strength=strength, preset=preset, json_path=json_file)
    typer.echo(json.dumps(report, indent=1))


@evals.command()
def quiz(
    out: Annotated[Path, typer.Option(help="The quiz's folder, which must be new, or the one to score.")],
    answers: Annotated[Path | None, typer.Option(help="A reader's answers: score them, draw nothing.")] = None,
    model: Model = None,
    captions: Annotated[Path | None, typer.Option(help="Captions, one a line; 48 fixed ones if left out.")] = None,
    seed: Annotated[int, typer.Option()] = 0,
    size: Annotated[int, typer.Option()] = 256,
    preset: Annotated[str, typer.Option()] = "default",
    device: Devices = Device.auto,
    dtype: DTypes = DType.auto,
) -> None:
    """Each picture with ten captions, the right one among nine drawn at random: how many does a reader name?"""
    from unclip.evals.quiz import evaluate, score

    if answers is not None:
        typer.echo(json.dumps(score(out, answers), indent=1, ensure_ascii=False))
        return
    from unclip.pictures import check_folder

    check_folder(out, "--out")
    given = {"model": model, "out": out, "captions": captions, "seed": seed, "size": size, "preset": preset}
    typer.echo(measured(evaluate, device, dtype, **given))
