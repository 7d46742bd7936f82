"""Karlo's folders, read into our networks and written from them: `kakaobrain/karlo-v1-alpha`, `…-image-variations`.

Reads safetensors, and pickles weights-only. A folder of captions' stage holds a prior and no image encoder, one of
variations an image encoder and no prior; where both lie, both are read. The prior of Kandinsky 2.1 and 2.2 is the same
network and comes through `load_prior`. Their weights' licences go along (`unclip.folder.license_notice`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoTokenizer,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTextModelWithProjection,
    CLIPVisionModelWithProjection,
)

from decoder.decoder import Decoder
from prior.diffusion_prior import DiffusionPrior
from unclip.clip.model import CLIP
from unclip.convert import karlo_configs as configs
from unclip.convert import karlo_keys as keys
from unclip.core.files import whole_folder
from unclip.folder import INDEX, find_model, load_component, one_line, read_header
from unclip.presets import KARLO, KARLO_FAST
from upsamplers.upsampler import Upsampler

if TYPE_CHECKING:
    from unclip.pipeline import UnCLIP

TEXT2IMG, VARIATIONS = "UnCLIPPipeline", "UnCLIPImageVariationPipeline"
LICENSE = "creativeml-openrail-m"
CLASSES = {
    "prior": "PriorTransformer",
    "prior_scheduler": "UnCLIPScheduler",
    "text_proj": "UnCLIPTextProjModel",
    "decoder": "UNet2DConditionModel",
    "decoder_scheduler": "UnCLIPScheduler",
    "super_res_first": "UNet2DModel",
    "super_res_last": "UNet2DModel",
    "super_res_scheduler": "UnCLIPScheduler",
    "text_encoder": "CLIPTextModelWithProjection",
    "image_encoder": "CLIPVisionModelWithProjection",
}
# text_proj.py is where diffusers keeps this class now; older folders say "unclip" or "diffusers"
LIBRARIES = {"UnCLIPTextProjModel": "diffusers.pipelines.deprecated.unclip.text_proj"}
WEIGHTS = "diffusion_pytorch_model"


# Reading


def is_karlo(folder: Path) -> bool:
    """Whether a model folder is of Karlo's layout."""
    return read_json(folder / INDEX).get("_class_name") in (TEXT2IMG, VARIATIONS)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; nothing of what is none."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        data = None
    return data if isinstance(data, dict) else {}


def load(folder: Path, dtype: torch.dtype) -> dict[str, Any]:
    """A folder of Karlo's layout as the arguments of `UnCLIP`. Raises FileNotFoundError or ValueError."""
    index = read_json(folder / INDEX)
    for name in sorted(CLASSES.keys() & index.keys() - {"image_encoder"}):
        if index[name][-1] != CLASSES[name]:
            raise ValueError(f"{folder / INDEX} says {name} is a {index[name][-1]}, expected {CLASSES[name]}.")
    decoder = _load_decoder(folder, dtype)
    parts: dict[str, Any] = {"prior": None, "prior_scheduler": None, "decoder": decoder}
    if index["_class_name"] == TEXT2IMG:
        parts["prior"], parts["prior_scheduler"] = load_prior(folder, dtype)
    for ours, theirs in (("upsampler_256", "super_res_first"), ("upsampler_256_last", "super_res_last")):
        config = _config(folder / theirs)
        factor = (config.get("sample_size") or 0) // decoder.config["sample_size"]
        arguments = _translated(folder / theirs, configs.upsampler_arguments, config, factor)
        parts[ours] = _load_network(Upsampler, arguments, keys.upsampler_keys, {"": folder / theirs}, dtype)
    for ours, theirs in (("decoder", "decoder"), ("upsampler_256", "super_res")):
        parts[f"{ours}_scheduler"] = _load_scheduler(f"{ours}_scheduler", folder / f"{theirs}_scheduler")
    presets = {"karlo": KARLO, "default": KARLO, "fast": KARLO_FAST, "paper": None}  # it is not the paper's model
    return {**parts, "clip": load_clip(folder, dtype), "presets": presets, "license": LICENSE, "unit_norm": False}


def load_prior(source: str | Path, dtype: torch.dtype = torch.float32) -> tuple[DiffusionPrior, Any]:
    """The prior of Karlo or Kandinsky 2, and its scheduler, from a folder or hub name.

    With them Karlo's own can be replaced: `UnCLIP.from_pretrained(…, prior=prior, prior_scheduler=scheduler)`.
    Raises FileNotFoundError or ValueError.
    """
    folder = find_model(source)[0]
    arguments = _translated(folder / "prior", configs.prior_arguments, _config(folder / "prior"))
    prior = _load_network(DiffusionPrior, arguments, keys.prior_keys, {"": folder / "prior"}, dtype)
    schedulers = [folder / name for name in ("prior_scheduler", "scheduler") if (folder / name).is_dir()]
    return prior, _load_scheduler("prior_scheduler", (schedulers or [folder / "prior_scheduler"])[0])


def load_clip(folder: Path, dtype: torch.dtype) -> CLIP:
    """text_encoder/, image_encoder/ if there is one, and tokenizer/ as one CLIP."""
    text = _load_tower(CLIPTextModelWithProjection, folder / "text_encoder", dtype)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    except Exception as error:
        raise ValueError(f"{folder / 'tokenizer'} does not load ({one_line(error)}); fetch it again.") from error
    if not (folder / "image_encoder").is_dir():
        return CLIP(text, tokenizer).to(dtype).eval()
    image = _load_tower(CLIPVisionModelWithProjection, folder / "image_encoder", dtype)
    processor = CLIPImageProcessorPil.from_pretrained(folder / "feature_extractor")
    towers = {"text_config": text.config.to_dict(), "vision_config": image.config.to_dict()}
    config = CLIPConfig(**towers, projection_dim=text.config.projection_dim)
    # The scale of CLIP's cosines is no part of either tower: OpenAI's are at its upper end.
    state = {**text.state_dict(), **image.state_dict(), "logit_scale": torch.tensor(math.log(100.0))}
    model = CLIPModel.from_pretrained(None, config=config, state_dict=state, dtype=dtype)
    return CLIP(model, tokenizer, processor).to(dtype).eval()


def _load_decoder(folder: Path, dtype: torch.dtype) -> Decoder:
    configuration = _config(folder / "decoder"), _config(folder / "text_proj")
    arguments = _translated(folder / "decoder", configs.decoder_arguments, *configuration)
    folders = {"decoder.": folder / "decoder", "text_proj.": folder / "text_proj"}
    return _load_network(Decoder, arguments, keys.decoder_keys, folders, dtype)


def _load_network(cls: Any, arguments: dict[str, Any], pieces_of: Any, folders: dict[str, Path], dtype: torch.dtype):
    """A network of ours from one or more folders of theirs, each by the prefix of its keys."""
    with torch.device("meta"):
        network = cls(**arguments)
    theirs = {
        f"{prefix}{key}": tensor for prefix, path in folders.items() for key, tensor in read_weights(path).items()
    }
    try:
        state = keys.join(pieces_of(network), theirs, network, dtype)
    except ValueError as error:
        where = " with ".join(str(path) for path in folders.values())
        raise ValueError(f"{where} {error}; fetch the weights that belong to this config.json.") from error
    network.load_state_dict(state, assign=True)
    return network.eval()


def _load_tower(cls: Any, folder: Path, dtype: torch.dtype) -> Any:
    for path in folder.glob("*.safetensors"):
        read_header(path)
    try:
        model, report = cls.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    except Exception as error:
        raise ValueError(f"{folder} does not load as {cls.__name__} ({one_line(error)}); fetch it again.") from error
    odd = [
        key for kind in ("missing_keys", "unexpected_keys") for key in sorted(report[kind]) if "position_ids" not in key
    ]
    if odd:
        raise ValueError(f"{folder} lacks, or has beyond its config, the weights {keys.some(odd)}; fetch it again.")
    return model


def _load_scheduler(name: str, folder: Path) -> Any:
    class_name = read_json(folder / "scheduler_config.json").get("_class_name", "UnCLIPScheduler")
    if class_name not in ("UnCLIPScheduler", "DDPMScheduler", "DDIMScheduler"):
        raise ValueError(f"{folder} holds a {class_name}, expected an UnCLIPScheduler; fetch it again.")
    return load_component(name, class_name, folder.parent, torch.float32, folder)


def _config(folder: Path) -> dict[str, Any]:
    config = read_json(folder / "config.json")
    if not config:
        raise FileNotFoundError(f"{folder} holds no config.json that can be read; fetch it again.")
    return config


def _translated(folder: Path, translate: Any, *arguments: Any) -> dict[str, Any]:
    try:
        return translate(*arguments)
    except KeyError as error:
        raise ValueError(f"{folder / 'config.json'} does not say {error}; fetch it again.") from error
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'} {error}; it is no network of Karlo's kind.") from error


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of one of diffusers' networks: safetensors, in one file or by an index; else a pickle, weights-only.

    Raises FileNotFoundError or ValueError.
    """
    whole, index = folder / f"{WEIGHTS}.safetensors", folder / f"{WEIGHTS}.safetensors.index.json"
    files = [whole] if whole.is_file() else [folder / f for f in set(read_json(index).get("weight_map", {}).values())]
    if files:
        tensors: dict[str, Tensor] = {}
        for file in sorted(files):
            if not file.is_file():
                raise FileNotFoundError(f"{folder} lacks {file.name}; fetch it again.")
            read_header(file)
            tensors |= load_file(file)
        return tensors
    pickle = folder / f"{WEIGHTS}.bin"
    if not pickle.is_file():
        raise FileNotFoundError(f"{folder} lacks {whole.name} and {pickle.name}; fetch one of them.")
    try:
        state = torch.load(pickle, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{pickle} is no whole file of weights alone ({one_line(error)}); fetch it again.") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{pickle} holds {type(state).__name__}, expected tensors by name; fetch it again.")
    return state


# Writing


class Theirs(NamedTuple):
    """A network as diffusers has it; arguments: of ours, read back from the config."""

    name: str
    config: dict[str, Any]
    pieces: list[keys.Piece]
    ours: Any
    arguments: dict[str, Any]


def write_diffusers(pipe: UnCLIP, folder: str | Path) -> Path:
    """Writes a model as a folder of Karlo's layout, whole or not at all: each component loads by diffusers' class.

    Raises ValueError where a network is not of Karlo's kind, before anything is written.
    """
    networks = _networks(pipe)
    for network in networks:
        _check_kind(network)
    with whole_folder(Path(folder), INDEX) as partial:
        for name, config, pieces, ours, _ in networks:
            write_network(
                partial / name, {"_class_name": CLASSES[name], **config}, keys.split(pieces, ours.state_dict())
            )
        pipe.decoder_scheduler.save_pretrained(partial / "decoder_scheduler")
        pipe.upsampler_256_scheduler.save_pretrained(partial / "super_res_scheduler")
        if pipe.prior is not None:
            pipe.prior_scheduler.save_pretrained(partial / "prior_scheduler")
        _write_clip(pipe.clip, partial)
        (partial / INDEX).write_text(json.dumps(_index(pipe), indent=2) + "\n", encoding="utf-8")
        if pipe.license_text is not None:
            (partial / "LICENSE").write_text(pipe.license_text, encoding="utf-8")
    return Path(folder)


def _networks(pipe: UnCLIP) -> list[Theirs]:
    first, last = pipe.upsampler_256, pipe.upsampler_256_last
    if first is None or last is None or pipe.upsampler_1024 is not None or pipe.unit_norm:
        raise ValueError("this model is not of Karlo's kind: it has other upsamplers, or embeddings of unit norm.")
    decoder, proj = configs.decoder_config(pipe.decoder.config)
    arguments, pieces = configs.decoder_arguments(decoder, proj), keys.decoder_keys(pipe.decoder)
    found = []
    for name, config in (("decoder", decoder), ("text_proj", proj)):
        prefix = f"{name}."
        own = [p._replace(theirs=p.theirs.removeprefix(prefix)) for p in pieces if p.theirs.startswith(prefix)]
        found.append(Theirs(name, config, own, pipe.decoder, arguments))
    for name, net in (("super_res_first", first), ("super_res_last", last)):
        config = configs.upsampler_config(net.config)
        arguments = configs.upsampler_arguments(config, net.config["factor"])
        found.append(Theirs(name, config, keys.upsampler_keys(net), net, arguments))
    if pipe.prior is not None:
        config = configs.prior_config(pipe.prior.config)
        found.append(Theirs("prior", config, keys.prior_keys(pipe.prior), pipe.prior, configs.prior_arguments(config)))
    return found


def _check_kind(network: Theirs) -> None:
    """Raises ValueError unless what is read back from the config to be written describes our network."""
    with torch.device("meta"):
        described = dict(type(network.ours)(**network.arguments).config)
    for argument in described.keys() - {name for name in described if name.startswith("_")}:
        own, value = network.ours.config[argument], described[argument]
        if value != (list(own) if isinstance(own, tuple) else own):
            raise ValueError(f"{network.name} is not of Karlo's kind: its {argument} is {own}, not {value}.")


def write_network(folder: Path, config: Mapping[str, Any], state: Mapping[str, Tensor], name: str = WEIGHTS) -> None:
    """config.json and safetensors, as diffusers' and transformers' classes read them."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    save_file(dict(state), folder / f"{name}.safetensors", metadata={"format": "pt"})


def _write_clip(clip: CLIP, folder: Path) -> None:
    clip.tokenizer.save_pretrained(folder / "tokenizer")
    state = {key: value.contiguous() for key, value in clip.model.state_dict().items()}
    towers = {"text_encoder": ("text_", getattr(clip.model.config, "text_config", clip.model.config))}
    if clip.has_image_tower:
        towers["image_encoder"] = ("vis", clip.model.config.vision_config)
        clip.processor.save_pretrained(folder / "feature_extractor")
    for name, (prefix, config) in towers.items():
        part = {key: value for key, value in state.items() if key.startswith(prefix)}
        described = {**config.to_dict(), "architectures": [CLASSES[name]], "projection_dim": clip.dim}
        write_network(folder / name, described, part, "model")


def _index(pipe: UnCLIP) -> dict[str, Any]:
    names = [name for name in CLASSES if not name.startswith("prior") and name != "image_encoder"]
    names += ["image_encoder"] if pipe.prior is None and pipe.clip.has_image_tower else []
    names += [] if pipe.prior is None else ["prior", "prior_scheduler"]
    index: dict[str, Any] = {
        "_class_name": VARIATIONS if pipe.prior is None else TEXT2IMG,
        "_diffusers_version": "0.42.0",
    }
    for name in names:
        library = "transformers" if name.endswith("_encoder") else LIBRARIES.get(CLASSES[name], "diffusers")
        index[name] = [library, CLASSES[name]]
    if pipe.prior is None:
        index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
    return {**index, "tokenizer": ["transformers", "CLIPTokenizer"]}
