import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from unclip.core.data import DataConfig, ShardDataset, load_image
from unclip.corpora import emoji, icons
from unclip.corpora.emoji import SETS, Concept, Drawing, base_of, captions_of, with_article

SMALL_SETS = ("noto", "noto-v1", "fluent-emoji", "fluent-emoji-flat", "twemoji", "emojione")
NAMES = [
    "red apple",
    "grinning face",
    "man artist",
    "woman artist",
    "artist",
    "bear",
    "cricket game",
    "cricket",
    "ruler",
]


def package(path: Path, members: dict[str, Any]) -> None:
    with tarfile.open(path, "w:gz") as tar:
        for name, value in members.items():
            data = json.dumps(value).encode()
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def body(i: int, j: int) -> str:
    return f'<rect x="{i}" y="{j}" width="{6 + i}" height="{8 - j}" fill="#{i * 20:02x}{j * 40:02x}80"/>'


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packages")
    symbols = [chr(0x1F400 + i) for i in range(len(NAMES))]
    table = {
        e: {"name": n, "group": "Food & Drink", "emoji_version": "1.0"} for e, n in zip(symbols, NAMES, strict=True)
    }
    table["F"] = {"name": "flag x", "group": "Flags", "emoji_version": "1.0"}
    table["N"] = {"name": "newest", "group": "Objects", "emoji_version": "17.0"}
    package(folder / "unicode-emoji-json-0.9.0.tgz", {"data-by-emoji.json": table})
    keywords = {symbols[0]: ["red_apple", "fruit", ":)", "red", "Mac"]}
    package(folder / "emojilib-4.0.3.tgz", {"dist/emoji-en-US.json": keywords})
    for j, style in enumerate(SMALL_SETS):
        found = {emoji.slug(n): {"body": body(i, j)} for i, n in enumerate(NAMES)}
        found |= {"red-apple-dark-skin-tone": {"body": body(1, 1)}, "flag-x": {"body": body(2, 2)}}
        aliases: dict[str, Any] = {}
        if style == "emojione":
            # an older set: the bear goes by another name, the game by the insect's
            found["bear-face"] = found.pop("bear")
            aliases = {"bear": {"parent": "bear-face"}, "cricket": {"parent": "cricket-game"}}
            del found["cricket"]
            found["ruler"] = {"body": ""}
        if style == "noto-v1":
            found["woman-artist"] = found["man-artist"]
        chars = {f"{ord(e):x}": emoji.slug(n) for e, n in zip(symbols, NAMES, strict=True)} if style == "noto" else {}
        info = {
            "name": f"Set {j}",
            "author": {"name": f"Author {j}", "url": f"https://example.org/{j}"},
            "license": {"spdx": f"L-{j}", "url": f"https://example.org/licence/{j}"},
        }
        icons_json = {"prefix": style, "width": 16, "height": 16, "icons": found, "aliases": aliases}
        members = {"icons.json": icons_json, "chars.json": chars, "info.json": info}
        package(folder / f"iconify-json-{style}-{SETS[style].version}.tgz", members)
    return folder


@pytest.fixture(scope="module")
def corpora(packages: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    root = tmp_path_factory.mktemp("corpora")
    for size in (32, 64):
        emoji.build(root / str(size), size, packages, sets=SMALL_SETS)
    return {size: root / str(size) for size in (32, 64)}


def rows_of(folder: Path) -> dict[str, dict[str, Any]]:
    found = {}
    for split in sorted({p.name.rsplit("-", 1)[0] for p in folder.glob("*.tar")}):
        data = ShardDataset(DataConfig(str(folder), split))
        found |= {row[1]: meta for row, meta in zip(data.rows, data.meta, strict=True)}
    return found


def test_what_is_joined(corpora: dict[int, Path]):
    rows = rows_of(corpora[64])
    assert {m["concept"] for m in rows.values()} == set(NAMES)
    assert "emojione-bear" in rows  # by alias
    assert "emojione-cricket" not in rows  # its alias is drawn for another concept
    assert "emojione-ruler" not in rows  # blank
    assert "noto-v1-woman-artist" not in rows  # the man's pixels
    assert len(rows) == len(NAMES) * 6 - 3
    apple = rows["noto-red-apple"]
    assert apple["keywords"] == ["fruit", "red", "mac"] and apple["group"] == "food-drink"
    assert apple["license"] == "L-0" and apple["style"] == "noto"


def test_sizes_agree_in_splits_and_pictures(corpora: dict[int, Path]):
    small, large = rows_of(corpora[32]), rows_of(corpora[64])
    assert small == large and list(small) == list(large)
    split = next(iter(large.values()))["split"]
    a, b = (ShardDataset(DataConfig(str(corpora[s]), split))[0]["image"].float() for s in (32, 64))
    assert a.shape == (4, 32, 32) and b.shape == (4, 64, 64)
    halved = b.unfold(1, 2, 2).unfold(2, 2, 2).mean((-1, -2))
    assert (a - halved).abs().mean() < 6


def test_a_build_is_reproducible(packages: Path, corpora: dict[int, Path], tmp_path: Path):
    emoji.build(tmp_path / "again", 32, packages, sets=SMALL_SETS, workers=2)
    for file in corpora[32].iterdir():
        if file.suffix != ".json" or file.name == "dataset.json":
            assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes(), file.name


def test_dataset_json_and_attribution(corpora: dict[int, Path]):
    summary = json.loads((corpora[64] / "dataset.json").read_text())
    rows = rows_of(corpora[64])
    assert summary["count"] == len(rows) == sum(summary["splits"].values())
    assert summary["size"] == 64 and set(summary["concepts"]) == set(NAMES)
    text = (corpora[64] / "ATTRIBUTION.md").read_text()
    for j in range(6):
        assert f"https://example.org/licence/{j}" in text and f"Author {j}" in text


def test_errors_are_one_sentence_and_leave_nothing(packages: Path, tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"unicode-emoji-json-0\.9\.0\.tgz"):
        emoji.build(tmp_path / "out", 32, tmp_path)
    with pytest.raises(ValueError, match="no set 'openmoji'"):
        emoji.build(tmp_path / "out", 32, packages, sets=("openmoji",))
    with pytest.raises(ValueError, match="size"):
        emoji.build(tmp_path / "out", 4, packages)
    (tmp_path / "there").mkdir()
    with pytest.raises(FileExistsError, match="exists already"):
        emoji.build(tmp_path / "there", 32, packages, sets=SMALL_SETS)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["there"]
    emoji.build(tmp_path / "there", 32, packages, sets=("noto",), overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["there"] and rows_of(tmp_path / "there")


def test_a_package_of_another_version_is_refused(packages: Path, tmp_path: Path):
    folder = Path(shutil.copytree(packages, tmp_path / "packages"))
    (folder / "iconify-json-noto-1.2.9.tgz").rename(folder / "iconify-json-noto-1.2.10.tgz")
    with pytest.raises(FileNotFoundError, match=r"no iconify-json-noto-1\.2\.9\.tgz, but iconify-json-noto-1\.2\.10"):
        emoji.build(tmp_path / "out", 32, folder, sets=("noto", "noto-v1"))
    assert [path.name for path in tmp_path.iterdir()] == ["packages"]


def test_fetching_without_npm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="npm is not installed"):
        icons.fetch("emojilib", "4.0.3", cache=tmp_path)


def test_fetching_runs_npm_pack_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    log = tmp_path / "calls"
    script = tmp_path / "bin" / "npm"
    script.parent.mkdir()
    script.write_text(
        f'#!/bin/sh\necho "$3" >> {log}\n[ "$3" = "@a/bad@1" ] && {{ echo E404 >&2; exit 1; }}\n: > "$5/a-b-1.tgz"\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}:/bin:/usr/bin")
    cache = tmp_path / "cache"
    assert icons.fetch("@a/b", "1", cache=cache) == icons.fetch("@a/b", "1", cache=cache) == cache / "a-b-1.tgz"
    assert log.read_text() == "@a/b@1\n"
    with pytest.raises(FileNotFoundError, match="could not fetch @a/bad@1: E404"):
        icons.fetch("@a/bad", "1", cache=cache)
    assert [p.name for p in cache.iterdir()] == ["a-b-1.tgz"]


def test_damaged_package_is_one_sentence(packages: Path, tmp_path: Path):
    whole = (packages / "emojilib-4.0.3.tgz").read_bytes()
    (tmp_path / "emojilib-4.0.3.tgz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="not a readable package"):
        icons.read_member(tmp_path / "emojilib-4.0.3.tgz", "dist/emoji-en-US.json")


# ---------------------------------------------------------------------------------------------- splits


def many_drawings(bases: int) -> list[Drawing]:
    found = []
    for i in range(bases):
        for variant in ("man ", "woman ", "") if i % 3 == 0 else ("",):
            name = f"{variant}job {i}"
            concept = Concept("x", name, "g", [], base_of(name))
            found += [Drawing(concept, s, name) for s in SMALL_SETS[: 6 if i % 5 else 3]]
    return found


def test_splits_do_not_leak():
    drawings = many_drawings(600)
    emoji.assign_splits(drawings)
    at: dict[str, set[str]] = defaultdict(set)
    base_at: dict[str, set[str]] = defaultdict(set)
    held: dict[str, set[str]] = defaultdict(set)
    families: dict[str, set[str]] = defaultdict(set)
    for d in drawings:
        at[d.concept.name].add(d.split)
        base_at[d.concept.base].add(d.split)
        families[d.concept.name].add(SETS[d.style].family)
        if d.split == "test-pair":
            held[d.concept.base].add(SETS[d.style].family)
    for base, splits in base_at.items():
        assert splits in ({"train"}, {"train", "test-pair"}, {"test-concept"}), base
    assert all(len(f) == 1 for f in held.values())
    # the twin drawings of a held-out pair's family are held out with it, in every variant
    for d in drawings:
        if d.split == "train" and d.concept.base in held:
            assert SETS[d.style].family not in held[d.concept.base]
    assert all("train" in splits for splits in at.values() if "test-pair" in splits)
    wide = [n for n, f in families.items() if len(f) >= 4 and at[n] != {"test-concept"}]
    assert 0.15 <= sum("test-pair" in at[n] for n in wide) / len(wide) <= 0.2
    assert 0.04 <= sum(s == {"test-concept"} for s in at.values()) / len(at) <= 0.05


def test_splits_do_not_depend_on_order():
    forward, backward = many_drawings(100), many_drawings(100)[::-1]
    emoji.assign_splits(forward)
    emoji.assign_splits(backward)
    assert [d.split for d in forward] == [d.split for d in backward[::-1]]


# ---------------------------------------------------------------------------------------------- words


def test_variants_share_a_base():
    assert len({base_of(n) for n in ("man artist", "woman artist", "artist")}) == 1
    assert len({base_of(n) for n in ("old man", "old woman", "older person")}) == 1
    assert len({base_of(n) for n in ("kiss", "kiss man, man", "kiss woman, man")}) == 1
    assert len({base_of(n) for n in ("person running", "woman running facing right")}) == 1
    assert len({base_of(n) for n in ("merman", "mermaid", "merperson", "man")}) == 2
    assert base_of("man’s shoe") != base_of("woman’s hat") and base_of("red apple") == "red apple"


def test_captions():
    apple = Concept("x", "red apple", "food-drink", ["fruit", "red", "mac"], "red apple")
    captions = captions_of(apple, "fluent-emoji")
    assert {"a red apple, glossy 3d", "a red apple", "red apple, glossy 3d"} <= set(captions)
    assert len(captions) == len(set(captions)) and all(c == c.lower() and "apple" in c for c in captions)
    assert not any(
        "red" in c.split() for c in " ".join(captions_of(apple, "emojione-monotone")).replace(",", "").split()
    )
    assert len({tuple(captions_of(apple, style)) for style in SETS}) == len(SETS)


def test_articles():
    said = {
        n: with_article(n, "objects") for n in ("eye", "glasses", "hourglass", "unicorn", "sushi", "man cartwheels")
    }
    assert said == {
        "eye": "an eye", "glasses": "glasses", "hourglass": "an hourglass", "unicorn": "a unicorn", "sushi": "sushi",
        "man cartwheels": "a man cartwheels",
    }  # fmt: skip
    assert with_article("heart suit", "symbols") == "heart suit"


# ---------------------------------------------------------------------------------------------- rasterising

CLIP = (
    '<defs><path id="a" d="M4 4h8v24h-8z"/></defs><use href="#a" id="b" fill="#0f0"/>'
    '<clipPath id="c"><use href="#d"/></clipPath><use href="#a" id="d" overflow="visible"/>'
    '<circle cx="16" cy="16" r="12" fill="#f00" clip-path="url(#c)"/>'
)
DRAWINGS = {
    "clip": CLIP,
    "gradient": '<linearGradient id="g"><stop stop-color="#f80"/><stop offset="1" stop-color="#08f" stop-opacity=".5"/>'
    '</linearGradient><circle cx="16" cy="16" r="13" fill="url(#g)"/>',
    "stroke": '<path d="M3 28 16 4l13 24z" fill="none" stroke="#407" stroke-width="3" stroke-linejoin="round"/>',
}


def reference(svg: str) -> np.ndarray:
    resvg = pytest.importorskip("resvg_py")
    return np.asarray(load_image(bytes(resvg.svg_to_bytes(svg_string=svg))).convert("RGBA"), dtype=float)


def premultiplied(rgba: np.ndarray) -> np.ndarray:
    return np.concatenate([rgba[..., :3] * rgba[..., 3:] / 255, rgba[..., 3:]], axis=-1)


@pytest.mark.parametrize("name", DRAWINGS)
def test_rasterising_equals_resvg(name: str):
    table = {"width": 32, "height": 32, "icons": {name: {"body": DRAWINGS[name]}}}
    unmended = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="64" height="64" viewBox="0 0 32 32">{DRAWINGS[name]}</svg>'
    )
    ours = np.asarray(icons.rasterise(icons.svg_of(table, name, 64), 64), dtype=float)
    difference = np.abs(premultiplied(ours) - premultiplied(reference(unmended)))
    assert difference.mean() < 1.5 and (difference.max(-1) > 64).mean() < 0.01


def test_mend_leaves_transformed_uses():
    moved = '<use href="#a" id="b" transform="scale(2)"/><clipPath><use href="#b"/></clipPath>'
    assert icons.mend_use(moved) == moved
    assert 'clipPath id="c"><use href="#a"/>' in icons.mend_use(CLIP)
    chain = '<use xlink:href="#a" id="b"/><use href="#b" id="c"/><use href="#c"/>'
    assert re.findall(r'href="#(\w)"', icons.mend_use(chain)) == ["a", "a", "a"]


def test_flipped_alias_and_padding():
    bar = {"body": '<path d="M0 0h4v8h-4z" fill="#f00"/>'}
    table = {
        "width": 16, "height": 8, "icons": {"bar": bar},
        "aliases": {"rab": {"parent": "bar", "hFlip": True}, "bar2": {"parent": "rab", "hFlip": True}},
    }  # fmt: skip
    bar_, rab, bar2 = (np.asarray(icons.rasterise(icons.svg_of(table, n, 32), 32)) for n in ("bar", "rab", "bar2"))
    assert bar_.shape == (32, 32, 4)
    assert np.array_equal(rab, bar_[:, ::-1]) and np.array_equal(bar2, bar_)
    assert bar_[..., 3].any(1).nonzero()[0].tolist() == list(range(8, 24))
    with pytest.raises(KeyError):
        icons.svg_of(table, "none", 32)


def test_webp_keeps_hidden_colours():
    from unclip.corpora.shards import encode_webp

    rgba = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 4), dtype=np.uint8))
    for effort in (0, 4):
        assert load_image(encode_webp(rgba, effort)).tobytes() == rgba.tobytes()


def test_importing_the_builder_runs_no_rasteriser():
    code = "import sys, unclip.corpora.emoji; assert 'pyvips' not in sys.modules and 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
