"""Writing shards: tar files of `key.webp` + `key.json` that `unclip.core.data.ShardDataset` reads."""

from __future__ import annotations

import io
import json
import tarfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from unclip.core.files import whole_folder


def encode_webp(picture: Image.Image, effort: int = 4) -> bytes:
    """Lossless WebP of an RGB or RGBA picture; colours under transparent pixels are kept. effort: 0 (quick) … 6."""
    file = io.BytesIO()
    picture.save(file, "webp", lossless=True, exact=True, method=effort, quality=20 * effort if effort < 5 else 100)
    return file.getvalue()


@contextmanager
def new_folder(out: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty folder that becomes OUT when the block ends well, as `whole_folder` does.

    Raises FileExistsError if OUT exists and overwrite is false, or if it is no corpus: nothing but corpora is replaced.
    """
    out = Path(out)
    if out.exists() and not overwrite:
        raise FileExistsError(f"{out} exists already: choose another folder, or overwrite it (--overwrite).")
    with whole_folder(out, "dataset.json") as partial:
        yield partial


class ShardWriter:
    """Appends samples to `<split>-00000.tar`, `<split>-00001.tar`, … in a folder; the same samples give the same bytes.

    per_shard: samples in one tar file.
    """

    def __init__(self, folder: str | Path, per_shard: int = 2000) -> None:
        if per_shard < 1:
            raise ValueError(f"per_shard is {per_shard}, but a shard holds at least 1 sample.")
        self.folder, self.per_shard = Path(folder), per_shard
        self.counts: Counter[str] = Counter()
        self._open: dict[str, tarfile.TarFile] = {}

    def add(self, key: str, picture: bytes, meta: dict[str, Any], extension: str = "webp") -> None:
        """Add one sample; meta is key.json and must name its `split`. The key holds no dot and no slash."""
        if not key or "." in key or "/" in key:
            raise ValueError(f"The key {key!r} is empty or holds a dot or a slash, which the shard layout forbids.")
        split = meta["split"]
        number, within = divmod(self.counts[split], self.per_shard)
        if within == 0:
            self._finish(split)
            self._open[split] = tarfile.open(  # noqa: SIM115 (closed by _finish)
                self.folder / f"{split}-{number:05d}.tar", "w", format=tarfile.USTAR_FORMAT
            )
        for suffix, data in ((extension, picture), ("json", json.dumps(meta, ensure_ascii=False).encode())):
            info = tarfile.TarInfo(f"{key}.{suffix}")
            info.size = len(data)
            self._open[split].addfile(info, io.BytesIO(data))
        self.counts[split] += 1

    def _finish(self, split: str) -> None:
        if split in self._open:
            self._open.pop(split).close()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *_: object) -> None:
        for split in list(self._open):
            self._finish(split)
