"""Joins trained stages into one model folder, which `UnCLIP.from_pretrained` loads."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from prior.pca import PCA
from unclip.arguments import DTypeName, choose_dtype
from unclip.clip.evaluate import embed_pictures
from unclip.core.data import DataConfig, ShardDataset
from unclip.folder import add_component, find_model, load_component
from unclip.pipeline import UnCLIP

CLASS_NAMES = {
    "clip": "CLIP",
    "prior": "DiffusionPrior",
    "prior_ar": "AutoregressivePrior",
    "decoder": "Decoder",
    "upsampler_256": "Upsampler",
    "upsampler_1024": "Upsampler",
}


def assemble(
    out: str | Path,
    clip: str | Path,
    prior: str | Path | None,
    decoder: str | Path,
    upsampler_256: str | Path | None = None,
    upsampler_1024: str | Path | None = None,
    dtype: DTypeName = "fp16",
    max_shard_size: str = "15MB",
    card: str | Path | None = None,
    presets: str | Path | None = None,
    files: Sequence[str | Path] = (),
    license: str | None = "apache-2.0",
    prior_ar: str | Path | None = None,
) -> Path:
    """Writes the model folder `out`, whole or not at all, and returns it.

    Each stage is a training's output: `model/` and, but for CLIP and prior_ar, `scheduler/`. One of the two priors may
    be None. dtype: of the weights on disk; card: a Markdown file that becomes README.md; presets: a JSON file {preset:
    {stage: settings}} over the defaults; files: further text files to go along (concepts.txt: what it was trained on).
    Raises FileNotFoundError for what is missing, ValueError for stages that do not fit each other.
    """
    if prior is None and prior_ar is None:
        raise ValueError("neither prior nor prior_ar came; give the output folder of one of them, or of both.")
    stored = choose_dtype(dtype, torch.device("cpu"))
    extra = {} if card is None else {"README.md": _read(card)}
    extra |= {Path(file).name: _read(file) for file in files}
    own = None if presets is None else _read_json(Path(presets))
    stages = {
        "clip": clip,
        "prior": prior,
        "prior_ar": prior_ar,
        "decoder": decoder,
        "upsampler_256": upsampler_256,
        "upsampler_1024": upsampler_1024,
    }
    parts: dict[str, Any] = {"prior": None, "prior_scheduler": None}
    for name, folder in stages.items():
        if folder is not None:
            parts |= load_stage(name, Path(folder))
    pipe = UnCLIP(**parts, presets=own, license=license)
    for name in CLASS_NAMES:
        if getattr(pipe, name) is not None:
            _check_range(name, getattr(pipe, name), stored)
    return pipe.save_pretrained(out, dtype=stored, max_shard_size=max_shard_size, extra_files=extra)


def load_stage(name: str, folder: Path) -> dict[str, Any]:
    """A trained stage's network, and its scheduler where it has one, by their names in a model folder."""
    model = folder / "model" / "clip" if name == "clip" else folder / "model"
    if not model.is_dir():
        raise FileNotFoundError(f"{model} is not there; give as {name} the output folder of its training.")
    parts = {name: load_component(name, CLASS_NAMES[name], folder, torch.float32, model)}
    if name not in ("clip", "prior_ar"):
        path = folder / "scheduler" / "scheduler_config.json"
        class_name = _read_json(path).get("_class_name", "DDPMScheduler")
        scheduler = f"{name}_scheduler"
        parts[scheduler] = load_component(scheduler, str(class_name), folder, torch.float32, folder / "scheduler")
    return parts


def fit_basis(
    model: str | Path, corpus: str | Path, split: str = "train", limit: int | None = None, device: str | None = None
) -> Path:
    """Fits the principal components of a corpus's pictures, on white, as a model's CLIP sees them (§4, figure 7).

    They become the component `pca` of the model's folder, which is returned; `limit`: the first so many pictures.
    Raises FileNotFoundError or ValueError.
    """
    folder, _ = find_model(model)
    dataset = ShardDataset(DataConfig(str(corpus), split, limit=limit))
    pipe = UnCLIP.from_pretrained(folder, device=device)
    return add_component(folder, "pca", PCA.fit(embed_pictures(pipe.clip, dataset, pipe.unit_norm)))


def _check_range(name: str, network: torch.nn.Module, dtype: torch.dtype) -> None:
    limit = torch.finfo(dtype).max
    for key, value in network.state_dict().items():
        if value.is_floating_point() and not bool((value.abs() <= limit).all()):
            raise ValueError(
                f"{key} of {name} does not fit {dtype} (or is NaN); store in another dtype, or train it again."
            )


def _read(path: str | Path) -> str:
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there; give a file.")
    return path.read_text(encoding="utf-8")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(_read(path))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); give a JSON file.") from error
    if not isinstance(data, dict):
        raise ValueError(
            f"{path} holds {type(data).__name__}, expected an object of names and values; give another file."
        )
    return data
