"""What a training run leaves on disk: resumable states, and a folder that `from_pretrained` loads.

Everything is written under a name that ends in `.partial` and then renamed, so that a final name holds
a whole thing, always.
"""

import contextlib
import json
import pickle
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from unclip.core.files import replace_folder, whole_folder

EMA_FILE = "ema.safetensors"
# Weights of a U-Net that start at zero where a trained one has fewer input channels, and the dimension these stand in.
INPUTS = {"unet.input.weight": 1, "unet.input_mix.weight": 0, "unet.input_mix.bias": 0}


def export(model: Any, folder: Path) -> None:
    """Writes a network's or scheduler's own folder (its `save_pretrained`) to `folder`, whole or not at all.

    Raises OSError where it cannot be written.
    """
    with _writing(folder), whole_folder(folder) as partial:
        model.save_pretrained(partial)


def named_ema(model: nn.Module, ema: EMAModel) -> dict[str, torch.Tensor]:
    """The averaged weights under their parameters' names."""
    names = [name for name, _ in model.named_parameters()]
    return dict(zip(names, ema.shadow_params, strict=True))


def states(out: Path) -> list[Path]:
    """The whole training states under `out`, oldest first."""
    return sorted(path for path in (out / "checkpoints").glob("step-*") if re.fullmatch(r"step-\d+", path.name))


def newest(out: Path) -> Path:
    """The newest whole training state under `out`. Raises FileNotFoundError where there is none."""
    found = states(out)
    if not found:
        raise FileNotFoundError(f"no training state under {out / 'checkpoints'}: start without --resume.")
    return found[-1]


def check_same(file: Path, config: Mapping[str, Any], names: Iterable[str]) -> None:
    """Raises ValueError where the JSON in `file` gives one of `names` another value than `config`.

    Names that one of the two lacks are passed over, and so is a file that is not there.
    """
    if not file.is_file():
        return
    stored, ours = json.loads(file.read_text()), json.loads(json.dumps(dict(config)))  # where tuples are lists
    for name in names:
        if name in stored and name in ours and stored[name] != ours[name]:
            raise ValueError(
                f"{file} says {name} is {stored[name]!r}, the config says {ours[name]!r}: resume with the config that "
                "the run began with, or choose another train.out."
            )


def start_from(model: Any, folder: str | None) -> None:
    """Gives a network the weights of a trained one of its kind; input channels and a mix that it lacks start at zero.

    folder: a training's output, or the network's own folder; None changes nothing. Raises FileNotFoundError where there
    is none, ValueError where another network is.
    """
    if folder is None:
        return
    path = next((path for path in (Path(folder) / "model", Path(folder)) if (path / "config.json").is_file()), None)
    if path is None:
        raise FileNotFoundError(f"{folder} holds no trained network; give as start the output folder of a training.")
    trained, ours = type(model).from_pretrained(path).state_dict(), model.state_dict()
    for name, dim in INPUTS.items():
        if name in ours:
            have = trained.get(name, ours[name].narrow(dim, 0, 0))
            lacking = max(0, ours[name].shape[dim] - have.shape[dim])
            trained[name] = torch.cat([have, torch.zeros_like(ours[name]).narrow(dim, 0, lacking)], dim)
    _check_fits(path, trained, ours)
    model.load_state_dict(trained)


def save_state(accelerator: Accelerator, model: nn.Module, ema: EMAModel, step: int, out: Path, keep: int) -> None:
    """Writes the training state after `step` steps and removes all but the newest `keep`, half-written ones too.

    Raises OSError where it cannot be written; then nothing of it is left.
    """
    final = out / "checkpoints" / f"step-{step:08d}"
    partial = final.with_name(final.name + ".partial")
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    accelerator.wait_for_everyone()
    with _writing(final, partial):
        accelerator.save_state(str(partial))
        if accelerator.is_main_process:
            save_file({name: tensor.contiguous() for name, tensor in named_ema(model, ema).items()}, partial / EMA_FILE)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        replace_folder(partial, final)
        kept = states(out)[-keep:]
        for path in final.parent.iterdir():
            ours = re.fullmatch(r"step-\d+(\.partial)?|\.step-\d+\.\d+\.old", path.name)
            if ours and path.is_dir() and path not in kept:
                shutil.rmtree(path)


def load_state(accelerator: Accelerator, model: nn.Module, ema: EMAModel, out: Path) -> int:
    """Loads the newest whole training state under `out`; returns the number of steps it has behind it.

    Raises FileNotFoundError where there is none, ValueError where it is damaged or belongs to another network.
    """
    path = newest(out)
    with _reading(path):
        shadow = load_file(path / EMA_FILE)
    _check_fits(path, shadow, named_ema(model, ema))
    with _reading(path):
        accelerator.load_state(str(path))
    for name, tensor in named_ema(model, ema).items():
        tensor.copy_(shadow[name])
    step = int(path.name.removeprefix("step-"))
    ema.optimization_step = step
    return step


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).strip().splitlines()[0]


@contextlib.contextmanager
def _writing(path: Path, partial: Path | None = None) -> Iterator[None]:
    """Says in one sentence why `path` could not be written, and removes the folder `partial` where one is given."""
    try:
        yield
    except BaseException as error:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
        if not isinstance(error, OSError | RuntimeError | SafetensorError):  # of a full disk torch raises the second
            raise
        reason = _first_line(error)
        raise OSError(
            f"{path} could not be written ({reason}): if the disk is full, make room, then run this again, a training "
            "with --resume."
        ) from error


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Says in one sentence why the state `path` could not be loaded."""
    try:
        yield
    except ValueError as error:  # torch, of an optimiser with other groups of parameters
        raise ValueError(
            f"{path} does not fit this optimiser ({error}): use the train.lr_scales it was trained with."
        ) from error
    except (RuntimeError, SafetensorError, OSError, EOFError, KeyError, pickle.UnpicklingError) as error:
        reason = _first_line(error)
        before = [state.name for state in states(path.parents[1]) if state.name < path.name]
        advice = f"--resume goes on from {before[-1]}" if before else "start without --resume"
        raise ValueError(f"{path} cannot be loaded ({reason}): if it is damaged, remove it and {advice}.") from error


def _check_fits(path: Path, stored: Mapping[str, torch.Tensor], ours: Mapping[str, torch.Tensor]) -> None:
    for name in sorted({*stored, *ours}):
        there, here = (str(tuple(weights[name].shape)) if name in weights else "not" for weights in (stored, ours))
        if there != here:
            raise ValueError(
                f"{path} does not fit this network ({name} is {there} there and {here} here): use the config it was "
                "trained with."
            )
