"""A model is a folder: finding it, checking it before anything is loaded, loading its components, writing it."""

from __future__ import annotations

import copy
import hashlib
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMScheduler, UnCLIPScheduler
from torch import nn

from decoder.decoder import Decoder
from prior.autoregressive_prior import AutoregressivePrior
from prior.diffusion_prior import DiffusionPrior
from prior.pca import PCA
from unclip.clip.model import CLIP
from unclip.core.analytic import AnalyticDDPMScheduler
from unclip.core.checkpoint import export
from unclip.core.files import loading, one_line, whole_file
from unclip.presets import write_presets
from upsamplers.upsampler import Upsampler

INDEX = "model_index.json"
WEIGHTS = Path(__file__).parent / "weights"
CLASSES: dict[str, tuple[type, ...]] = {
    "clip": (CLIP,),
    "prior": (DiffusionPrior,),
    "decoder": (Decoder,),
    "upsampler_256": (Upsampler,),
    "upsampler_1024": (Upsampler,),
}
SCHEDULERS = (DDPMScheduler, AnalyticDDPMScheduler, DDIMScheduler, UnCLIPScheduler)
NETWORKS = tuple(CLASSES)
CLASSES |= {f"{name}_scheduler": SCHEDULERS for name in NETWORKS if name != "clip"}
CLASSES |= {"prior_ar": (AutoregressivePrior,), "pca": (PCA,)}  # the other prior; the basis of reconstructions
CLASSES["upsampler_256_last"] = (Upsampler,)  # the last step's own network, under the same scheduler
REQUIRED = ("clip", "prior", "prior_scheduler", "decoder", "decoder_scheduler")
HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.md", "LICENSE*"]
LICENSES = {
    "creativeml-openrail-m": (
        "CreativeML Open RAIL-M, whose restrictions on use go along with every copy",
        "https://huggingface.co/spaces/CompVis/stable-diffusion-license",
    )
}


def find_model(name: str | Path | None) -> tuple[Path, str]:
    """The folder of a model, and the name it goes by: None is the embedded one, else a folder, embedded or hub name.

    Raises FileNotFoundError for a folder that holds no model and for a name that cannot be had.
    """
    if name is None:
        return _with_index(WEIGHTS / "emoji"), "emoji"
    embedded = WEIGHTS / str(name)
    path = Path(name).expanduser()
    if path.is_dir():
        return _with_index(path), path.resolve().name
    if re.fullmatch(r"[\w-]+", str(name)) and (embedded.is_dir() or str(name) == "emoji"):
        return _with_index(embedded), str(name)
    if not re.fullmatch(r"[\w][\w.-]*/[\w][\w.-]*", str(name)):
        raise FileNotFoundError(
            f"there is no model {str(name)!r}; give a folder that holds {INDEX}, or a hub name owner/model."
        )
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(str(name), allow_patterns=HUB_FILES, ignore_patterns=["*.fp16.*"]))
        if pickled := [f"{path.parent.name}/*.bin" for path in folder.glob("*/config.json") if not has_weights(path)]:
            folder = Path(snapshot_download(str(name), allow_patterns=pickled, ignore_patterns=["*.fp16.*"]))
    except Exception as error:
        reason = one_line(error)
        raise FileNotFoundError(
            f"model {str(name)!r} is no folder here and could not be fetched from the hub ({reason}); "
            f"give a folder that holds {INDEX}, or try again online."
        ) from error
    return _with_index(folder), str(name)


def _with_index(folder: Path) -> Path:
    if not (folder / INDEX).is_file():
        raise FileNotFoundError(
            f"{folder} holds no {INDEX}; give a folder that `unclip assemble` or save_pretrained wrote."
        )
    return folder


def has_weights(config: Path) -> bool:
    """Whether safetensors lie beside a network's config.json."""
    return any(config.parent.glob("*.safetensors"))


def license_notice(license: str | None, folder: Path | None = None) -> str | None:
    """The text of a model folder's licence file; where there is none, name and address of a licence known here."""
    files = sorted(folder.glob("LICEN[SC]E*")) if folder else []
    if files:
        return files[0].read_text(encoding="utf-8")
    if license not in LICENSES:
        return None
    title, address = LICENSES[license]
    return f"The weights in this folder are under {title}:\n{address}\n"


def announce(name: str, license: str | None) -> None:
    """Says on stderr under which licence weights came, where it restricts their use."""
    if license in LICENSES:
        print("{}: weights under {}: {}".format(name, *LICENSES[license]), file=sys.stderr)


def load_folder(folder: Path, dtype: torch.dtype) -> dict[str, Any]:
    """A model folder as the arguments of `UnCLIP`. Raises FileNotFoundError or ValueError."""
    index = read_index(folder)
    parts = {
        part: load_component(part, value[-1] if isinstance(value, list) else value, folder, dtype)
        for part, value in components(index).items()
    }
    fields = {
        "presets": index.get("presets"),
        "license": index.get("license"),
        "unit_norm": index.get("unit_norm", True),
    }
    return {"prior": None, "prior_scheduler": None, **parts, **fields}


def read_index(folder: Path) -> dict[str, Any]:
    """A model folder's index, checked: components of known classes, all required ones there. Raises ValueError."""
    path = folder / INDEX
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({one_line(error)}); fetch or assemble the model again.") from error
    if not isinstance(index, dict) or index.get("_class_name") != "UnCLIP":
        found = index.get("_class_name") if isinstance(index, dict) else type(index).__name__
        raise ValueError(f"{path} describes {found!r}, expected 'UnCLIP'; give a model of this kind.")
    present = components(index)
    without_prior = index.get("prior") == index.get("prior_scheduler") == [None, None]
    required = [name for name in REQUIRED if not (without_prior and name.startswith("prior"))]
    if missing := [name for name in required if name not in present]:
        raise ValueError(f"{path} names no {missing[0]}, which every model has; assemble the model again.")
    for name, value in present.items():
        known = [cls.__name__ for cls in CLASSES[name]]
        found = value[-1] if isinstance(value, list) and value else value
        if found not in known:
            raise ValueError(
                f"{path} says {name} is a {found!r}, expected {' or '.join(known)}; give a model of this kind."
            )
        partner = "upsampler_256" if name.endswith("_last") else f"{name}_scheduler"
        if name.startswith("upsampler") and not name.endswith("scheduler") and partner not in present:
            raise ValueError(f"{path} names {name} without {partner}; assemble the model again.")
    return index


def components(index: Mapping[str, Any]) -> dict[str, Any]:
    """Of an index, the components that are there."""
    return {name: index[name] for name in CLASSES if index.get(name) not in (None, [None, None])}


def read_header(path: Path) -> dict[str, Any]:
    """Tensors of a safetensors file, by name. Raises ValueError where the file is shorter or longer than it says."""
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length + 8 > size:
                raise ValueError
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        whole = 8 + length + max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} ({size} bytes) is no whole safetensors file; fetch or make it again.") from error
    if whole != size:
        raise ValueError(f"{path} has {size} bytes where its header says {whole}; fetch or make it again.")
    return header


def check_weights(folder: Path) -> set[str]:
    """Names of the tensors in a component's safetensors files, all of which must be there and whole.

    Raises FileNotFoundError or ValueError.
    """
    files = set(folder.glob("*.safetensors"))
    for shards in folder.glob("*.safetensors.index.json"):
        try:
            files |= {folder / name for name in json.loads(shards.read_text(encoding="utf-8"))["weight_map"].values()}
        except (ValueError, KeyError, AttributeError) as error:
            raise ValueError(f"{shards} is no index of weights; fetch or make it again.") from error
    missing = sorted(file.name for file in files if not file.is_file())
    if missing or not files:
        raise FileNotFoundError(
            f"{folder} lacks {missing[0] if missing else 'its *.safetensors'}; fetch or make it again."
        )
    return {name for file in files for name in read_header(file)}


def load_component(name: str, class_name: str, root: Path, dtype: torch.dtype, folder: Path | None = None) -> Any:
    """A component from its folder (`root/name` unless given), strictly: no tensor missing, none over, no other shape.

    Raises FileNotFoundError or ValueError, in one sentence that names the folder.
    """
    folder = folder or root / name
    cls = next(cls for cls in CLASSES[name] if cls.__name__ == class_name)
    config = "scheduler_config.json" if name.endswith("_scheduler") else "config.json"
    if not (folder / config).is_file():
        raise FileNotFoundError(f"{folder} holds no {config}; fetch or assemble the model again.")
    stored = set() if name.endswith("_scheduler") else check_weights(folder)
    if name == "clip":
        component = CLIP.from_pretrained(folder, dtype=dtype).to(dtype)  # its buffers too
    else:
        with loading(folder, class_name):
            if name.endswith("_scheduler"):
                return cls.from_pretrained(folder)  # pyright: ignore[reportAttributeAccessIssue]
            component = cls.from_pretrained(folder, torch_dtype=dtype, low_cpu_mem_usage=True)  # pyright: ignore[reportAttributeAccessIssue]
    wanted = set((component.model if name == "clip" else component).state_dict())
    odd = sorted(wanted - stored) or (sorted(stored - wanted) if name != "clip" else [])
    if odd:
        problem = "lacks" if odd[0] in wanted else "has, beyond its config,"
        raise ValueError(f"{folder} {problem} the weights {odd[0]} ({len(odd)} in all); fetch or make it again.")
    return component.eval()


def write_component(name: str, component: Any, root: Path, dtype: torch.dtype | None, max_shard_size: str) -> None:
    """Writes a component under `root`, its weights in `dtype` if given; the component itself stays as it is."""
    if name == "clip":
        component.save_pretrained(root, dtype=dtype, max_shard_size=max_shard_size)
    elif name.endswith("_scheduler"):
        component.save_pretrained(root / name)
    else:
        if dtype is not None and dtype != component.dtype:
            component = cast_weights(component, dtype)
        component.save_pretrained(root / name, max_shard_size=max_shard_size)
    for path in root.rglob("*.json"):  # where it was loaded from says nothing about the model
        data = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(data, dict) and data.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def cast_weights(component: nn.Module, dtype: torch.dtype) -> Any:
    """A copy in `dtype`, but for what its class keeps in fp32: statistics that would lose their digits."""
    kept = set(getattr(component, "_keep_in_fp32_modules", None) or ())
    exact = {name: x.clone() for name, x in component.state_dict().items() if kept & set(name.split("."))}
    component = nn.Module.to(copy.deepcopy(component), dtype)  # diffusers' own `to` warns of nothing
    component.load_state_dict(exact, strict=False, assign=True)
    return component


def add_component(folder: Path, name: str, component: Any) -> Path:
    """Adds a component to a model folder, or replaces it; all else stays. Returns its folder."""
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    export(component, folder / name)
    index[name] = [type(component).__module__, type(component).__name__]
    with whole_file(folder / INDEX) as aside:
        aside.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return folder / name


def fingerprint(module: nn.Module) -> tuple[Any, ...]:
    """Changes whenever weights, dtype or device do; costs no pass over the weights."""
    return tuple((p.data_ptr(), p._version, p.dtype, str(p.device)) for p in module.parameters())


def model_digest(pipe: Any) -> str:
    """Twelve hex digits of what a pipeline holds: its presets, and each part's config and some values of each tensor.

    The same wherever the model lies; another one for another training. It costs no pass over the weights.
    """
    digest = hashlib.sha256(json.dumps([write_presets(pipe.presets), pipe.unit_norm]).encode())
    for name, part in sorted(pipe.components.items()):
        config = {key: value for key, value in getattr(part, "config", {}).items() if not key.startswith("_")}
        digest.update(json.dumps([name, config], sort_keys=True, default=str).encode())
        for key, tensor in part.state_dict().items() if isinstance(part, nn.Module) else ():
            some = tensor.detach().flatten()[:: max(1, tensor.numel() // 64)]
            digest.update(f"{key} {tuple(tensor.shape)} {some.tolist()}".encode())
    return digest.hexdigest()[:12]
