"""What a training run leaves on disk: resumable states, and a folder that `from_pretrained` loads.

Everything is written under a name that ends in `.partial` and then renamed, so that a final name holds
a whole thing, always.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch import nn

from unclip.core.files import replace_folder, whole_folder

EMA_FILE = "ema.safetensors"


def export(model: nn.Module, folder: Path) -> None:
    """Writes a network's own folder (its `save_pretrained`) to `folder`, whole or not at all."""
    with whole_folder(folder) as partial:
        model.save_pretrained(partial)  # pyright: ignore[reportCallIssue]  # diffusers' and transformers' models have it


def named_ema(model: nn.Module, ema: EMAModel) -> dict[str, torch.Tensor]:
    """The averaged weights under their parameters' names."""
    names = [name for name, _ in model.named_parameters()]
    return dict(zip(names, ema.shadow_params, strict=True))


def states(out: Path) -> list[Path]:
    """The whole training states under `out`, oldest first."""
    return sorted(path for path in (out / "checkpoints").glob("step-*") if path.suffix != ".partial")


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
    found = states(out)
    if not found:
        raise FileNotFoundError(f"no training state under {out / 'checkpoints'}: start without --resume.")
    path = found[-1]
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
