"""`unclip …`: one subcommand per function; what a subcommand needs is imported when it runs."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from unclip import __version__, cli_latents
from unclip.convert.commands import convert
from unclip.core.files import read_lines
from unclip.core.memory import keep_memory
from unclip.evals.commands import evals
from unclip.options import (
    Bars,
    Device,
    Devices,
    DType,
    DTypes,
    Guidance,
    Model,
    Negative,
    Preset,
    Prior,
    PriorGuidance,
    Size,
    Tile,
    quiet_libraries,
)

# What torch calls it on CUDA and MPS, and on the CPU of Linux and macOS, and of Windows
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


class Commands(TyperGroup):
    """Bad input is one sentence and status 2, want of memory status 1, Ctrl-C status 130, none of them a traceback."""

    def invoke(self, ctx: Any) -> Any:
        """Runs the command of `ctx`; raises typer.Exit with the status in place of what the class names."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            print("unclip: interrupted; what was finished is kept.", file=sys.stderr)
            raise typer.Exit(130) from None
        except BrokenPipeError:
            raise
        except (ValueError, TypeError, OSError, ImportError) as error:
            print(f"unclip: {' '.join(str(error).split())}", file=sys.stderr)
            raise typer.Exit(2) from error
        except (MemoryError, RuntimeError) as error:
            if not isinstance(error, MemoryError) and not any(words in str(error).lower() for words in OUT_OF_MEMORY):
                raise
            print("unclip: memory ran out; ask for a smaller --size, or close other programs.", file=sys.stderr)
            raise typer.Exit(1) from error


app = typer.Typer(
    name="unclip",
    cls=Commands,
    help="Text to image by CLIP latents: caption → z_i → 64 → 256 → 1024 px.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
corpus = typer.Typer(help="Build training corpora.", no_args_is_help=True)
pca = typer.Typer(help="Principal components of pictures' embeddings.", no_args_is_help=True)
app.add_typer(corpus, name="corpus")
app.add_typer(evals, name="evals")
app.add_typer(pca, name="pca")
cli_latents.add_commands(app)
app.add_typer(convert, name="convert")

LONGEST_WARNING = 400


def print_version(asked: bool) -> None:
    """Prints the version and raises typer.Exit, where it was asked for."""
    if asked:
        typer.echo(f"unclip {__version__}")
        raise typer.Exit()


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Text to image by CLIP latents: caption → z_i → 64 → 256 → 1024 px."""


@app.command()
def sample(
    prompts: Annotated[
        list[str] | None, typer.Argument(metavar="PROMPT…", help="What to draw.", show_default=False)
    ] = None,
    from_file: Annotated[Path | None, typer.Option(help="Further prompts, one a line.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the pictures.")] = Path("pictures"),
    num_images: Annotated[int, typer.Option(help="Pictures of each prompt, with seeds SEED, SEED + 1, …")] = 1,
    seed: Annotated[int, typer.Option(help="Seed of a prompt's first picture.")] = 0,
    size: Size = None,
    preset: Preset = "default",
    guidance: Guidance = None,
    prior_guidance: PriorGuidance = None,
    prior: Prior = None,
    negative: Negative = None,
    best_of: Annotated[int, typer.Option(help="Of how many drawings each picture is the one CLIP likes best.")] = 1,
    device: Devices = Device.auto,
    dtype: DTypes = DType.auto,
    model: Model = None,
    tile: Tile = None,
    compile: Annotated[bool, typer.Option("--compile", help="Compile the networks: for many pictures.")] = False,
    grid: Annotated[bool, typer.Option("--grid", help="Also write all pictures on one sheet.")] = False,
) -> None:
    """Draw pictures of prompts; the last line of output is the path of the last picture, or of the sheet."""
    texts = read_prompts(prompts or [], from_file)
    from unclip.pictures import check_folder, draw

    check_folder(out, "--out")
    from unclip.arguments import check_seeds

    check_seeds(seed, num_images)
    from unclip.pipeline import UnCLIP

    quiet_libraries()
    pipe = UnCLIP.from_pretrained(model, dtype.value, device.value)
    pipe.use_tiles(tile)
    if compile:
        pipe.compile()
    with closing(Bars()) as bars:
        for path in draw(
            pipe, texts, num_images, seed, out, grid, bars,
            size=size, preset=preset, guidance_scale=guidance, prior_guidance_scale=prior_guidance,
            prior=None if prior is None else prior.value, negative_prompt=negative, best_of=best_of,
        ):  # fmt: skip
            typer.echo(path)


def read_prompts(prompts: list[str], from_file: Path | None) -> list[str]:
    """Prompts given, then those of a file, one a line, empty lines left out.

    Raises ValueError for none or an empty one; `check_prompts` would too, but loads torch.
    """
    if from_file is not None:
        if not from_file.is_file():
            raise FileNotFoundError(f"--from-file {from_file} is no file; give a text file with a prompt on each line.")
        prompts = [*prompts, *read_lines(from_file)]
    if not prompts:
        raise ValueError("no prompt came; say what to draw, or name a file of prompts by --from-file.")
    if not all(prompt.strip() for prompt in prompts):
        raise ValueError("a prompt is empty; say what to draw.")
    return prompts


@app.command()
def assemble(
    clip: Annotated[Path, typer.Option(help="Output folder of CLIP's training.")],
    decoder: Annotated[Path, typer.Option(help="Output folder of the decoder's training.")],
    out: Annotated[Path, typer.Option(help="The model folder to write.")],
    prior: Annotated[Path | None, typer.Option(help="Output folder of the diffusion prior's training.")] = None,
    prior_ar: Annotated[Path | None, typer.Option(help="Of the autoregressive prior's, beside it or instead.")] = None,
    upsampler_256: Annotated[Path | None, typer.Option("--upsampler-256")] = None,
    upsampler_1024: Annotated[Path | None, typer.Option("--upsampler-1024")] = None,
    dtype: Annotated[DType, typer.Option(help="Of the stored weights.")] = DType.fp16,
    max_shard_size: Annotated[str, typer.Option(help="Largest weights file.")] = "15MB",
    card: Annotated[Path | None, typer.Option(help="Markdown file that becomes the model card.")] = None,
    presets: Annotated[Path | None, typer.Option(help="JSON file of presets, over the defaults.")] = None,
    file: Annotated[list[Path] | None, typer.Option(help="A text file to go along; may be repeated.")] = None,
    license: Annotated[str, typer.Option(help="Licence named in the index.")] = "apache-2.0",
) -> None:
    """Join trained stages into one model folder."""
    if dtype is DType.auto:
        raise ValueError("--dtype auto says nothing about storage; give fp16, bf16 or fp32.")
    from unclip.assemble import assemble as join

    quiet_libraries()
    stages = (clip, prior, decoder, upsampler_256, upsampler_1024)
    folder = join(out, *stages, dtype.value, max_shard_size, card, presets, file or [], license, prior_ar)
    typer.echo(folder)


@pca.callback()
def components() -> None:
    """Principal components of pictures' embeddings."""


@pca.command()
def fit(
    model: Annotated[Path, typer.Option(help="The model folder that gets them.")],
    corpus: Annotated[Path, typer.Option(help="Folder of the corpus.")] = Path("corpora/emoji-64"),
    split: Annotated[str, typer.Option()] = "train",
    limit: Annotated[int | None, typer.Option(help="Of the pictures the first so many.")] = None,
    device: Devices = Device.auto,
) -> None:
    """Fit the basis that `unclip reconstruct` takes pictures apart by, and store it with a model."""
    from unclip.assemble import fit_basis

    quiet_libraries()
    typer.echo(fit_basis(model, corpus, split, limit, device.value))


@app.command()
def pack(
    path: Annotated[Path, typer.Argument(help="Folder of pictures with .txt files or metadata.jsonl.")],
    out: Annotated[Path, typer.Argument(help="Folder of the shards.")],
    size: Annotated[
        int | None, typer.Option(help="Side that pictures are fitted into; as they are if left out.")
    ] = None,
    split: Annotated[str, typer.Option(help="Of pictures that name none.")] = "train",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a corpus of that name.")] = False,
) -> None:
    """Turn a folder of captioned pictures into shards."""
    from unclip.corpora.pack import pack as pack_folder

    pack_folder(path, out, size, split, overwrite, progress=_bar)
    typer.echo(out)


@corpus.command()
def emoji(
    out: Annotated[Path, typer.Option(help="Folder of the shards.")],
    size: Annotated[int, typer.Option(help="Side of the drawings in pixels.")] = 64,
    packages: Annotated[Path | None, typer.Option(help="Folder of the .tgz packages; else npm (Node.js).")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a corpus of that name.")] = False,
    workers: Annotated[int, typer.Option(help="Processes that draw.")] = 1,
) -> None:
    """Render the six permissively licensed colour emoji sets into shards."""
    from unclip.corpora.emoji import build

    build(out, size, packages, overwrite=overwrite, workers=workers, progress=_bar)
    typer.echo(out)


@corpus.command()
def shapes(
    out: Annotated[Path, typer.Option(help="Folder of the shards.")],
    size: Annotated[int, typer.Option(help="Side of the pictures in pixels.")] = 64,
    seed: Annotated[int, typer.Option()] = 0,
    count: Annotated[int, typer.Option(help="How many pictures.")] = 5184,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a corpus of that name.")] = False,
) -> None:
    """Draw one coloured shape a picture: a world in which a program can tell whether a picture is right."""
    from unclip.corpora.shapes import build

    build(out, size, seed, count, overwrite, progress=_bar)
    typer.echo(out)


def _bar(items: Iterable[Any], total: int, unit: str) -> Iterable[Any]:
    from tqdm import tqdm

    return tqdm(items, total=total, unit=f" {unit}", file=sys.stderr)


def _warn(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    if issubclass(category, UserWarning):
        text = " ".join(str(message).split())
        text = text if len(text) <= LONGEST_WARNING else f"{text[: LONGEST_WARNING - 1]}…"
        print(f"warning: {text}", file=sys.stderr)


def main(arguments: list[str] | None = None) -> None:
    """Runs a command line and exits: 0, or after one sentence 2 for bad input, 1 out of memory, 130 by Ctrl-C."""
    warnings.showwarning = _warn
    keep_memory()
    app(arguments)


if __name__ == "__main__":
    main()
