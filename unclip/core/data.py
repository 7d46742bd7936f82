"""Training data: shards read at random by an index of offsets, batches, the draws of a batch, pictures ↔ tensors."""

from __future__ import annotations

import io
import json
import tarfile
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from unclip.core.files import read_lines, whole_file

PICTURES = ("webp", "png", "jpg", "jpeg")
MAX_PIXELS = 128 * 1024 * 1024

# Backgrounds by the name that captions give them, RGB 0 … 255
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 52, 52),
    "orange": (245, 150, 50),
    "yellow": (250, 220, 80),
    "green": (70, 165, 85),
    "blue": (60, 115, 215),
    "purple": (135, 80, 185),
    "pink": (245, 165, 195),
    "brown": (125, 85, 55),
    "grey": (135, 135, 135),
    "black": (20, 20, 20),
}


# ------------------------------------------------------------------------------------------------ pictures


def load_image(source: str | Path | bytes | Image.Image, size: int | None = None) -> Image.Image:
    """A picture from a file, from bytes or from PIL, as 8-bit RGB, or RGBA if it has transparency.

    EXIF rotation is applied, of an animation the first frame is taken; 16-bit, palette, CMYK and grey are converted.
    size: the picture is fitted into size × size and padded (transparently if it has alpha, else with white).
    Raises FileNotFoundError, ValueError (unreadable, or more than 128 Mi pixels), TypeError.
    """
    if isinstance(source, Image.Image):
        name, file = "the picture", source
    elif isinstance(source, bytes):
        name, file = "the picture", io.BytesIO(source)
    elif isinstance(source, (str, Path)):
        name, file = str(source), source
        if not Path(source).is_file():
            raise FileNotFoundError(f"There is no picture {source}.")
    else:
        raise TypeError(f"A picture is a path, bytes or a PIL image, not {type(source).__name__}.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = file if isinstance(file, Image.Image) else Image.open(file)
        if 0 in image.size:
            raise ValueError("it has no pixels")
        if image.width * image.height > MAX_PIXELS:
            raise Image.DecompressionBombError
        image = to_rgb(ImageOps.exif_transpose(image))
    except Image.DecompressionBombError:
        raise ValueError(f"{name} has more than {MAX_PIXELS // 2**20} Mi pixels: scale it down first.") from None
    except MemoryError:
        raise
    except Exception as error:  # damaged pixels and EXIF data make Pillow raise anything, an AttributeError too
        raise ValueError(f"{name} is not a readable picture ({error}).") from None
    return image if size is None else fit(image, size)


def to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL mode as 8-bit RGB, or RGBA if there is transparency. "I" may hold 8 bits or 16; more is scaled."""
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, dtype=np.float64)
        most, whole = values.max(initial=1.0), image.mode != "F"
        top = 255.0 if image.mode == "I" and most <= 255 else 65535.0 if whole and most <= 65535 else most
        image = Image.fromarray((values.clip(0) / top * 255).round().astype(np.uint8))
    return image.convert("RGBA" if image.has_transparency_data else "RGB")


def fit(image: Image.Image, size: int) -> Image.Image:
    """Scale an RGB or RGBA picture to fit size × size, centred, padded with white or transparency."""
    scale = size / max(image.size)
    w, h = (max(1, round(side * scale)) for side in image.size)
    method = Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.BICUBIC
    if image.mode == "RGBA":
        # premultiplied, so that the colour of transparent pixels does not bleed in
        image = image.convert("RGBa").resize((w, h), method).convert("RGBA")
    else:
        image = image.resize((w, h), method)
    if (w, h) == (size, size):
        return image
    canvas = Image.new(image.mode, (size, size), (255, 255, 255, 0)[: len(image.mode)])
    canvas.paste(image, ((size - w) // 2, (size - h) // 2))
    return canvas


def pil_from_pixels(x: Tensor) -> list[Image.Image]:
    """Pictures of a float tensor (b, 3, h, w) in [−1, 1]; values beyond are clipped."""
    if x.ndim != 4 or x.shape[1] != 3:
        raise ValueError(f"Pixels came as {tuple(x.shape)}, but (b, 3, h, w) is expected.")
    bytes_ = ((x.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return [Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy()) for picture in bytes_]


def pixels_from_pil(images: Image.Image | Sequence[Image.Image], size: int | None = None) -> Tensor:
    """Float tensor (b, 3, h, w) in [−1, 1] of pictures of one size; transparency becomes white."""
    if isinstance(images, Image.Image):
        images = [images]
    rows = [to_pixels(tensor_from_pil(load_image(image, size))[None]) for image in images]
    if not rows or len({row.shape for row in rows}) > 1:
        raise ValueError(f"Pictures of one size are expected, but {[i.size for i in images]} came: give `size`.")
    return torch.cat(rows)


def tensor_from_pil(image: Image.Image) -> Tensor:
    """uint8 tensor (3 or 4, h, w) of an RGB or RGBA picture."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def to_pixels(image: Tensor, background: Tensor | None = None) -> Tensor:
    """uint8 (b, 3 or 4, h, w) → float (b, 3, h, w) in [−1, 1], alpha composited onto `background` (b, 3), 0 … 255.

    Without a background, onto white.
    """
    if image.dtype != torch.uint8 or image.ndim != 4 or image.shape[1] not in (3, 4):
        raise ValueError(
            f"Pictures came as {image.dtype} {tuple(image.shape)}, but uint8 (b, 3 or 4, h, w) is expected."
        )
    x = image.float()
    if image.shape[1] == 4:
        alpha = x[:, 3:] / 255
        behind = x.new_full((1, 3, 1, 1), 255.0) if background is None else background.to(x)[:, :, None, None]
        x = x[:, :3] * alpha + behind * (1 - alpha)
    return x / 127.5 - 1


# ------------------------------------------------------------------------------------------------ draws


class Draws:
    """The random numbers of a batch. Row r depends on (seed, step, indices[r]) and the order of calls alone.

    indices: each row's index in the whole batch, so that neither the number of processes nor the size of a
    micro-batch changes a sample's numbers. Drawn on the CPU, handed out on `device`.
    """

    def __init__(
        self, seed: int, step: int, indices: Sequence[int] | Tensor, device: str | torch.device = "cpu"
    ) -> None:
        self.indices = [int(i) for i in indices]
        if min([seed, step, *self.indices]) < 0:
            raise ValueError(f"seed {seed}, step {step} and the indices must not be negative.")
        self.seed, self.step, self.device = seed, step, torch.device(device)
        # SeedSequence hashes the triple to 128 bits; torch's CPU generator would keep 32 of them
        self._rows = [np.random.Generator(np.random.PCG64([seed, step, i])) for i in self.indices]

    def __len__(self) -> int:
        return len(self._rows)

    def _out(self, array: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(array)
        return tensor if self.device.type == "cpu" else tensor.to(self.device)

    def normal(self, *shape: int) -> Tensor:
        """Standard normal, float32 (b, *shape)."""
        out = np.empty((len(self), *shape), np.float32)
        for i, row in enumerate(self._rows):
            out[i] = row.standard_normal(shape, np.float32)
        return self._out(out)

    def uniform(self, *shape: int) -> Tensor:
        """Uniform in [0, 1), float32 (b, *shape)."""
        out = np.empty((len(self), *shape), np.float32)
        for i, row in enumerate(self._rows):
            out[i] = row.random(shape, np.float32)
        return self._out(out)

    def integers(self, high: int) -> Tensor:
        """Uniform in 0 … high − 1, int64 (b,)."""
        if high < 1:
            raise ValueError(f"integers({high}): at least one integer to choose from is expected.")
        return self._out(np.array([row.integers(high) for row in self._rows], np.int64))


# ------------------------------------------------------------------------------------------------ shards


@dataclass
class DataConfig:
    """What of a corpus is used. path: a folder of shards; split: one, or several joined by `+`."""

    path: str
    split: str = "train"
    groups: list[str] | None = None  # only these groups
    concepts: str | None = None  # path of a text file, a concept a line: only these
    styles: list[str] | None = None  # only these styles
    limit: int | None = None  # the first so many of what is left
    background: float = 0.0  # probability of a named background colour instead of white


def read_index(shard: str | Path) -> dict[str, dict[str, tuple[int, int]]]:
    """{key: {suffix: (offset, length)}} of a tar shard in its order; kept beside it as `<shard>.index.json`.

    The index is made anew when the shard has changed. Raises ValueError if the shard is damaged.
    """
    shard = Path(shard)
    beside, stat = shard.with_name(shard.name + ".index.json"), shard.stat()
    stamp = [stat.st_size, stat.st_mtime_ns]
    with suppress(OSError, ValueError, KeyError, TypeError):
        stored = json.loads(beside.read_text())
        if stored["stamp"] == stamp:
            return stored["members"]
    members: dict[str, dict[str, tuple[int, int]]] = {}
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                if member.isfile():
                    key, _, suffix = member.name.removeprefix("./").partition(".")
                    if member.offset_data + member.size > stat.st_size:
                        raise tarfile.ReadError("unexpected end of data")
                    members.setdefault(key, {})[suffix] = (member.offset_data, member.size)
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"The shard {shard} is damaged ({error}): build or copy it again.") from None
    with suppress(OSError), whole_file(beside) as aside:  # a read-only corpus works without a stored index
        aside.write_text(json.dumps({"stamp": stamp, "members": members}))
    return members


class ShardDataset(Dataset[dict[str, Any]]):
    """The samples of a corpus in the order of its shards, by index.

    An item: `image` uint8 (4 or 3, h, w), `captions` (list of str), `concept`, `style`, `group`, `keywords`, `key`,
    `index`, and `z_i` float (d,) where the shard holds it.
    cache: decoded pictures stay in memory, up to `cache_bytes`.
    Raises FileNotFoundError, ValueError when there is nothing to read.
    """

    def __init__(self, config: DataConfig, cache: bool = True, cache_bytes: int = 1 << 30) -> None:
        if config.limit is not None and config.limit < 1:
            raise ValueError(f"data.limit is {config.limit}: give at least 1, or leave it out.")
        self.config = config
        self.room = self.cache_bytes = cache_bytes if cache else 0
        self._cache: dict[int, Tensor] = {}
        self.rows: list[tuple[Path, str, dict[str, tuple[int, int]]]] = []
        self.meta: list[dict[str, Any]] = []
        wanted = _wanted(config)
        for shard in _shards(config):
            with shard.open("rb") as file:
                for key, parts in read_index(shard).items():
                    if config.limit is not None and len(self.rows) >= config.limit:
                        return
                    meta = _read_meta(file, shard, key, parts)
                    if all(meta.get(name) in allowed for name, allowed in wanted.items()):
                        self.rows.append((shard, key, parts))
                        self.meta.append(meta)
        if not self.rows:
            raise ValueError(f"No sample of {config.path}, split {config.split}, fits groups, concepts and styles.")

    def __len__(self) -> int:
        return len(self.rows)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": {}, "room": self.cache_bytes}

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        index %= len(self)
        shard, key, parts = self.rows[index]
        meta = self.meta[index]
        item = {
            "image": self._image(index),
            "captions": meta["captions"],
            **{name: meta.get(name, "") for name in ("concept", "style", "group")},
            "keywords": meta.get("keywords", []),
            "index": index,
            "key": key,
        }
        if "z_i.npy" in parts:
            array = np.load(io.BytesIO(_read(shard, parts["z_i.npy"])), allow_pickle=False)
            item["z_i"] = torch.from_numpy(array.astype(np.float32))
        return item

    def _image(self, index: int) -> Tensor:
        if index in self._cache:
            return self._cache[index]
        shard, key, parts = self.rows[index]
        suffix = next((s for s in PICTURES if s in parts), None)
        if suffix is None:
            raise ValueError(f"The sample {key} in {shard} has no picture: expected one of {', '.join(PICTURES)}.")
        try:
            image = tensor_from_pil(load_image(_read(shard, parts[suffix])))
        except ValueError as error:
            raise ValueError(f"The sample {key} in {shard} cannot be used: {error}") from None
        if image.numel() <= self.room:
            self.room -= image.numel()
            self._cache[index] = image
        return image


def _shards(config: DataConfig) -> list[Path]:
    folder = Path(config.path)
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no corpus folder {folder}: build one with `unclip corpus` or `unclip pack`.")
    shards = []
    for split in config.split.split("+"):
        found = sorted(p for p in folder.glob(f"{split}-*.tar") if p.stem[len(split) + 1 :].isdigit())  # not train-2's
        if not found:
            have = sorted({path.name.rsplit("-", 1)[0] for path in folder.glob("*-[0-9]*.tar")})
            raise FileNotFoundError(f"{folder} holds no split {split!r}; it holds {', '.join(have) or 'no shards'}.")
        shards += found
    return shards


def _wanted(config: DataConfig) -> dict[str, set[str]]:
    """Allowed values of the fields that the config restricts."""
    wanted = {}
    if config.groups is not None:
        wanted["group"] = set(config.groups)
    if config.styles is not None:
        wanted["style"] = set(config.styles)
    if config.concepts is not None:
        if not Path(config.concepts).is_file():
            raise FileNotFoundError(f"There is no list of concepts {config.concepts}.")
        wanted["concept"] = set(read_lines(Path(config.concepts)))
    return wanted


def _read(shard: Path, place: tuple[int, int]) -> bytes:
    # opened anew each time: nothing is shared between forked workers
    with shard.open("rb") as file:
        file.seek(place[0])
        return file.read(place[1])


def _read_meta(file: Any, shard: Path, key: str, parts: dict[str, tuple[int, int]]) -> dict[str, Any]:
    try:
        offset, length = parts["json"]
        file.seek(offset)
        meta = json.loads(file.read(length))
        if not meta["captions"] or not all(isinstance(c, str) and c.strip() for c in meta["captions"]):
            raise ValueError("no caption, or an empty one")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"The sample {key} in {shard} has no usable key.json: {error}.") from None
    return meta


# ------------------------------------------------------------------------------------------------ batches


def collate(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Join items: `image` (b, 3 or 4, h, w) and `z_i` (b, d) stacked, all else in lists.

    Pictures without alpha get an opaque one where others have one. Raises ValueError if sizes differ, or some lack z_i.
    """
    images = [item["image"] for item in items]
    if len(sizes := {tuple(image.shape[-2:]) for image in images}) > 1:
        raise ValueError(f"Pictures of one batch have the sizes {sorted(sizes)}: pack the corpus with a size.")
    if len({image.shape[0] for image in images}) > 1:
        images = [i if i.shape[0] == 4 else torch.cat([i, torch.full_like(i[:1], 255)]) for i in images]
    batch: dict[str, Any] = {name: [item[name] for item in items] for name in items[0] if name not in ("image", "z_i")}
    batch["image"] = torch.stack(images)
    if stored := [item["z_i"] for item in items if "z_i" in item]:
        if len(stored) < len(items):
            raise ValueError(f"{len(stored)} of a batch's {len(items)} samples have a z_i.npy: give it to all or none.")
        batch["z_i"] = torch.stack(stored)
    return batch


def draw_pictures_and_captions(
    batch: dict[str, Any], draws: Draws, background_probability: float = 0.0
) -> tuple[Tensor, list[str]]:
    """Pick one caption per sample and its background: x0 float (b, 3, h, w) in [−1, 1], and the captions.

    With the given probability a drawing that has transparency stands on a named colour, and the caption says so.
    """
    if not 0 <= background_probability <= 1:
        raise ValueError(f"background_probability is {background_probability}, but a probability is in [0, 1].")
    image: Tensor = batch["image"]
    choice, coin = draws.uniform().cpu(), draws.uniform().cpu()
    colour = draws.integers(len(COLOURS)).cpu()
    captions = [options[int(u * len(options))] for u, options in zip(choice.tolist(), batch["captions"], strict=True)]
    if image.shape[1] == 3:
        return to_pixels(image), captions
    coloured = (coin < background_probability) & (image[:, 3] < 255).flatten(1).any(1).cpu()
    names, palette = list(COLOURS), torch.tensor(list(COLOURS.values()), dtype=torch.float32)
    background = torch.where(coloured[:, None], palette[colour], torch.tensor(255.0))
    captions = [
        f"{caption} on a {names[c]} background" if on else caption
        for caption, c, on in zip(captions, colour.tolist(), coloured.tolist(), strict=True)
    ]
    return to_pixels(image, background.to(image.device)), captions
