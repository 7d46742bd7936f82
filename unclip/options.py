"""Options that commands share, and what they stand for. Loads no torch."""

import math
import sys
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from tqdm import tqdm

    from unclip.arguments import Progress
    from unclip.pipeline import UnCLIP
    from unclip.sources import Options


class Device(StrEnum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"
    mps = "mps"


class DType(StrEnum):
    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class Frame(StrEnum):
    crop = "crop"
    pad = "pad"


class PriorKind(StrEnum):
    diffusion = "diffusion"
    ar = "ar"


class Bars:
    """A progress bar per stage on stderr, made of the pipeline's callback."""

    def __init__(self) -> None:
        self.bar: tqdm[Any] | None = None
        self.stage = ""

    def __call__(self, progress: "Progress") -> None:
        from tqdm import tqdm

        if self.bar is None or progress.stage != self.stage:
            self.close()
            self.stage = progress.stage
            self.bar = tqdm(total=progress.total, desc=f"{progress.stage:15}", file=sys.stderr, leave=True)
        self.bar.update(progress.step - self.bar.n)
        if progress.step == progress.total:
            self.close()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def quiet_libraries() -> None:
    """Nothing but our own bars and sentences on stderr."""
    import transformers
    from diffusers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def numbers(text: str, option: str) -> list[float]:
    """Numbers between commas. Raises ValueError where one is none."""
    try:
        values = [float(part) for part in text.split(",")]
        if all(map(math.isfinite, values)):
            return values
        raise ValueError
    except ValueError:
        raise ValueError(f"{option} is {text!r}; give numbers with commas between them.") from None


def whole_numbers(text: str, option: str) -> list[int]:
    """Whole numbers between commas. Raises ValueError where one is none."""
    values = numbers(text, option)
    if any(value != int(value) for value in values):
        raise ValueError(f"{option} is {text!r}; give whole numbers with commas between them.")
    return [int(value) for value in values]


Out = Annotated[Path, typer.Option(help="Folder of the pictures.")]
Seed = Annotated[int, typer.Option(help="Seed of the first picture.")]
Size = Annotated[int | None, typer.Option(help="64, 256 or 1024; the largest the model has if left out.")]
Preset = Annotated[str, typer.Option(help="fast, default or paper, or one of the model's own.")]
Guidance = Annotated[float | None, typer.Option(help="The decoder's guidance scale, 1 for none.")]
PriorGuidance = Annotated[float | None, typer.Option(help="The prior's guidance scale, 1 for none.")]
Prior = Annotated[PriorKind | None, typer.Option(help="Which prior draws z_i; the preset's if left out.")]
Negative = Annotated[str | None, typer.Option(help="What guidance leads away from.")]
Devices = Annotated[Device, typer.Option()]
DTypes = Annotated[DType, typer.Option(help="auto: bf16 where the device computes in it natively.")]
Model = Annotated[str | None, typer.Option(help="Folder or hub name; the embedded model if left out.")]
Tile = Annotated[int | None, typer.Option(help="Upsample in overlapping tiles of this side: less memory.")]


@dataclass
class Common:
    """The options of every command on latents."""

    out: Out = Path("pictures")
    seed: Seed = 0
    size: Size = None
    preset: Preset = "default"
    steps: Annotated[
        int | None, typer.Option(help="The decoder's steps; left out: the preset's where a prompt is drawn, else 100.")
    ] = None
    guidance: Guidance = None
    prior_guidance: PriorGuidance = None
    prior: Prior = None
    negative: Negative = None
    frame: Annotated[Frame, typer.Option(help="A picture's centre, or all of it between margins.")] = Frame.crop
    device: Devices = Device.auto
    dtype: DTypes = DType.auto
    model: Model = None
    tile: Tile = None
    sheet: Annotated[bool, typer.Option("--sheet", help="Also write all pictures on one labelled sheet.")] = False

    def load(self) -> "UnCLIP":
        """The model. Raises ValueError where the pictures could not be written, before it loads."""
        from unclip.pictures import check_folder

        check_folder(self.out, "--out")
        from unclip.pipeline import UnCLIP

        quiet_libraries()
        pipe = UnCLIP.from_pretrained(self.model, self.dtype.value, self.device.value)
        pipe.use_tiles(self.tile)
        return pipe

    def options(self, bars: Bars) -> "Options":
        """What the pipeline's operations take."""
        return {
            "seed": self.seed,
            "size": self.size,
            "preset": self.preset,
            "steps": self.steps,
            "guidance_scale": self.guidance,
            "prior": None if self.prior is None else self.prior.value,
            "prior_guidance_scale": self.prior_guidance,
            "negative_prompt": self.negative,
            "frame": self.frame.value,
            "callback": bars,
        }

    def named(self) -> dict[str, Any]:
        """Those that decide what a picture is, as plain JSON types."""
        named = {name: value for name, value in vars(self).items() if name not in ("out", "sheet", "model")}
        return {name: value for name, value in named.items() if value is not None}
