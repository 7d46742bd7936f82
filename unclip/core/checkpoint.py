"""What a training run leaves on disk: resumable states, and a folder that `from_pretrained` loads.

Everything is written under a name that ends in `.partial` and then renamed, so that a final name holds
a whole thing, always.
"""

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch import nn

from unclip.core.files import replace_folder, whole_folder

EMA_FILE = "ema.safetensors"


def export(model: Any, folder: Path) -> None:
    """Writes a network's or scheduler's own folder (its `save_pretrained`) to `folder`, whole or not at all."""
    with whole_folder(folder) as partial:
        model.save_pretrained(partial)


def named_ema(model: nn.Module, ema: EMAModel) -> dict[str, torch.Tensor]:
    """The averaged weights under their parameters' names."""
    names = [name for name, _ in model.named_parameters()]
    return dict(zip(names, ema.shadow_params, strict=True))


def states(out: Path) -> list[Path]:
    """The whole training states under `out`, oldest first."""
    return sorted(path for path in (out / "checkpoints").glob("step-*") if path.suffix != ".partial")


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


def save_state(accelerator: Accelerator, model: nn.Module, ema: EMAModel, step: int, out: Path, keep: int) -> None:
    """Writes the training state after `step` steps and removes all but the newest `keep`."""
    final = out / "checkpoints" / f"step-{step:08d}"
    partial = final.with_name(final.name + ".partial")
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial))
    if accelerator.is_main_process:
        shadow = {name: tensor.contiguous() for name, tensor in named_ema(model, ema).items()}
        save_file(shadow, partial / EMA_FILE, metadata={"optimization_step": str(ema.optimization_step)})
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        replace_folder(partial, final)
        for path in states(out)[:-keep]:
            shutil.rmtree(path)


def load_state(accelerator: Accelerator, model: nn.Module, ema: EMAModel, out: Path) -> int:
    """Loads the newest whole training state under `out`; returns the number of steps it has behind it.

    Raises FileNotFoundError where there is none, ValueError where it belongs to another network.
    """
    path = newest(out)
    try:
        accelerator.load_state(str(path))
        shadow: Mapping[str, torch.Tensor] = load_file(path / EMA_FILE)
        for name, tensor in named_ema(model, ema).items():
            tensor.copy_(shadow[name])
    except (KeyError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{path} does not fit this network ({reason}): use the config it was trained with.") from error
    step = int(path.name.removeprefix("step-"))
    ema.optimization_step = step
    return step
