"""The emoji corpus: one concept drawn by several hands, with captions, in splits that do not leak."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from unclip.core.files import write_json
from unclip.corpora import icons
from unclip.corpora.shards import ShardWriter, encode_webp, new_folder


class IconSet(NamedTuple):
    """One set of drawings: package version, drawing family, the words captions call it by, whether it has colours."""

    version: str
    family: str
    words: str
    colour: bool = True


SETS: dict[str, IconSet] = {
    "noto": IconSet("1.2.9", "noto", "shaded"),
    "noto-v1": IconSet("1.2.5", "noto-v1", "blob"),
    "fluent-emoji": IconSet("1.2.7", "fluent", "glossy 3d"),
    "fluent-emoji-flat": IconSet("1.2.6", "fluent", "flat"),
    "fluent-emoji-high-contrast": IconSet("1.2.6", "fluent", "black and white", colour=False),
    "twemoji": IconSet("1.2.5", "twemoji", "simple"),
    "emojione": IconSet("1.2.3", "emojione", "cartoon"),
    "emojione-monotone": IconSet("1.2.1", "emojione", "monochrome", colour=False),
}
COLOUR_SETS = tuple(name for name, icon_set in SETS.items() if icon_set.colour)
WORDS = {"unicode-emoji-json": "0.9.0", "emojilib": "4.0.3"}
NEWEST = 16.0  # Emoji 17 is drawn by two of the sets only
TEST_CONCEPT, TEST_PAIR = 0.05, 0.2


@dataclass
class Concept:
    """An emoji that is neither a flag nor a skin tone. `base` is shared by its man, woman and person variants."""

    emoji: str
    name: str
    group: str
    keywords: list[str]
    base: str


@dataclass
class Drawing:
    """One concept drawn by one set."""

    concept: Concept
    style: str
    icon: str
    split: str = "train"
    key: str = field(init=False)

    def __post_init__(self) -> None:
        self.key = f"{self.style}-{slug(self.concept.name)}"


# ------------------------------------------------------------------------------------------------ words


def slug(text: str) -> str:
    """Lower-case ASCII words joined by hyphens, the way icon names are written."""
    text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", text.replace("'", "").replace("&", " ")).strip("-")


def code_points(emoji: str) -> str:
    return "-".join(f"{ord(c):x}" for c in emoji if c != "\ufe0f")


_VARIANT = re.compile(
    r"\b(?:man|woman|men|women|person|people|boy|girl|child|adult|baby|and|mrs|mx|facing right)\b(?!['’]s)|[^\w\s'’-]"
)
_SAME_BASE = {
    "old": "older", "santa claus": "claus", "princess": "prince", "mermaid": "mer", "merman": "mer",
    "merperson": "mer", "queen": "king", "": "person", "mother christmas": "claus", "with crown": "king",
}  # fmt: skip


def base_of(name: str) -> str:
    """What the man, woman and person variants of a concept share: `woman health worker` → `health worker`."""
    base = " ".join(_VARIANT.sub(" ", name.lower()).split())
    return _SAME_BASE.get(base, base)


def clean_keywords(raw: Iterable[str], name: str) -> list[str]:
    """At most eight lower-case keywords that are plain words and not the name itself."""
    words = (k.replace("_", " ").strip().lower() for k in raw)
    plain = (k for k in words if re.fullmatch(r"[a-z][a-z0-9' -]+", k))
    return [k for k in dict.fromkeys(plain) if slug(k) != slug(name)][:8]


def read_concepts(words: dict[str, Path]) -> list[Concept]:
    """Every Unicode emoji that is no flag, in Unicode's order."""
    table = icons.read_member(words["unicode-emoji-json"], "data-by-emoji.json")
    keywords = icons.read_member(words["emojilib"], "dist/emoji-en-US.json")
    return [
        Concept(
            emoji=emoji,
            name=entry["name"].lower(),
            group=slug(entry["group"]),
            keywords=clean_keywords(keywords.get(emoji, []), entry["name"]),
            base=base_of(entry["name"]),
        )
        for emoji, entry in table.items()
        if entry["group"] != "Flags" and float(entry["emoji_version"]) <= NEWEST
    ]


_NO_ARTICLE = re.compile(
    r"^[\d\W]|[^s]s$|\b(?:rice|bread|sushi|ice|food|fog|dango|oden|sake|mate|tofu|people|men|women)$"
)


def with_article(name: str, group: str) -> str:
    """`red apple` → `a red apple`; plurals, symbols and the like stay as they are."""
    if group == "symbols" or "," in name or "(" in name:
        return name
    head = re.split(r" (?:with|without|in|on|of|holding|facing) ", name)[0]
    if _NO_ARTICLE.search(head) and not re.match(r"(?:wo)?man |person ", name):
        return name
    return ("an " if re.match(r"(?!uni|one|eu|us)[aeiou]|hour", name) else "a ") + name


_COLOURS = re.compile(
    r"\b(?:red|orange|yellow|green|blue|purple|violet|brown|black|white|pink|grey|gray|gold(?:en)?|silver|blond|"
    r"light|dark|colou?rful|rainbow|colou?r)\b\s*"
)


def captions_of(concept: Concept, style: str) -> list[str]:
    """About six different lower-case captions of a drawing; colour words are left out where they are false."""
    words, name, keywords = SETS[style].words, concept.name, concept.keywords
    if not SETS[style].colour:
        name = " ".join(_COLOURS.sub("", name).split()) or name
        keywords = [k for k in keywords if not _COLOURS.search(k)]
    thing = with_article(name, concept.group)
    group = concept.group.replace("-", " and ", 1).replace("-", " ")
    captions = [
        f"{thing}, {words}",
        thing,
        f"{name}, {words}",
        f"a {words} drawing of {thing}",
        f"{group}: {name} in {words} style",
    ]
    if keywords:
        captions.append(f"{name}, {', '.join(keywords[:3])}, {words} style")
    return list(dict.fromkeys(caption.lower() for caption in captions))


# ------------------------------------------------------------------------------------------------ drawings


def join(style: str, package: Path, concepts: Sequence[Concept], names: dict[str, str]) -> list[Drawing]:
    """The drawings of one set, one per concept at most.

    An icon joins by its code points (chars.json), else by its name, else by `names` (other sets' name → code points),
    else by an alias, provided that its drawing has not joined another concept: older sets use some names otherwise.
    """
    table = icons.read_member(package, "icons.json")
    by_code = {code_points(c.emoji): c for c in concepts}
    by_slug = {slug(c.name): c for c in concepts}
    codes = {n: "-".join(p for p in c.split("-") if p != "fe0f") for c, n in chars_of(package)}
    aliases: dict[str, Any] = table.get("aliases", {})
    found: dict[str, Drawing] = {}
    used: set[str] = set()

    def add(icon: str, drawn_by: str, concept: Concept | None) -> None:
        if concept is not None and concept.emoji not in found:
            found[concept.emoji] = Drawing(concept, style, icon)
            used.add(drawn_by)

    for icon in table["icons"]:
        add(icon, icon, by_code.get(codes.get(icon, "")) or by_slug.get(icon))
    for icon in table["icons"]:
        add(icon, icon, None if icon in used else by_code.get(names.get(icon, "")))
    for icon, alias in aliases.items():
        concept = by_code.get(codes.get(icon, "")) or by_slug.get(icon) or by_code.get(names.get(icon, ""))
        flipped = alias.get("hFlip") or alias.get("vFlip")
        add(icon, alias["parent"], concept if flipped or alias["parent"] not in used else None)
    order = {c.emoji: i for i, c in enumerate(concepts)}
    return sorted(found.values(), key=lambda d: order[d.concept.emoji])


def chars_of(package: Path) -> list[tuple[str, str]]:
    return list(icons.read_member(package, "chars.json", missing={}).items())


def _draw(size: int, svg: str) -> bytes:
    """Lossless WebP of one drawing."""
    return encode_webp(icons.rasterise(svg, size), effort=4 if size <= 128 else 1)


def _digest(svg: str) -> str:
    """What identifies a drawing's pixels at 64×64; empty for a blank one."""
    rgba = np.array(icons.rasterise(svg, 64))
    rgba[rgba[..., 3] == 0] = 0
    return hashlib.blake2b(rgba.tobytes(), digest_size=16).hexdigest() if (rgba[..., 3] > 16).sum() > 4 else ""


def _map(fn: Callable[[str], Any], items: Iterable[str], workers: int) -> Iterator[Any]:
    if workers <= 1:
        yield from map(fn, items)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        yield from pool.map(fn, items, chunksize=16)


# ------------------------------------------------------------------------------------------------ splits


def share(*parts: str) -> float:
    """A number in [0, 1) that depends on the parts alone."""
    digest = hashlib.blake2b("\0".join(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def assign_splits(drawings: Sequence[Drawing]) -> None:
    """Set each drawing's split by hash of its base concept, so that variants stay together and size does not matter.

    test-concept: 5 % of the concepts, nowhere else. test-pair: of the concepts drawn by four families or more, a fifth
    loses one family to it (with its variants); each stays in training by another family.
    """
    bases: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for d in drawings:
        bases[d.concept.base][d.concept.name].add(SETS[d.style].family)
    rest = sorted(bases, key=lambda base: share("concept", base))
    new = _take(rest, lambda base: len(bases[base]), TEST_CONCEPT)
    held_out: dict[str, str] = {}
    rest = sorted(set(bases) - new, key=lambda base: share("pair", base))
    wide = {base: [f for f in bases[base].values() if len(f) >= 4] for base in rest}
    for base in rest:
        families = set.intersection(*wide[base]) if wide[base] else set()
        # a variant that only this family draws would leave training altogether
        families -= {min(f) for f in bases[base].values() if len(f) == 1}
        if families:
            held_out[base] = min(families, key=lambda family: share("family", base, family))
    paired = _take([base for base in rest if base in held_out], lambda base: len(wide[base]), TEST_PAIR)
    for d in drawings:
        if d.concept.base in new:
            d.split = "test-concept"
        elif d.concept.base in paired and held_out[d.concept.base] == SETS[d.style].family:
            d.split = "test-pair"
        else:
            d.split = "train"


def _take(ordered: Sequence[str], weight: Callable[[str], int], fraction: float) -> set[str]:
    """The first of `ordered` that together weigh at most `fraction` of all; what would not fit is passed over."""
    room, taken = fraction * sum(map(weight, ordered)), set()
    for base in ordered:
        if weight(base) <= room:
            room -= weight(base)
            taken.add(base)
    return taken


# ------------------------------------------------------------------------------------------------ the corpus


def attribution(info: dict[str, dict[str, Any]]) -> str:
    """ATTRIBUTION.md: who drew the sets and wrote the words, and under which licence."""
    lines = [
        "# Attribution",
        "",
        "Pictures of this corpus are rasterised from vector drawings, otherwise unchanged.",
        "",
        "| style | drawings | author | licence |",
        "|---|---|---|---|",
    ]
    for style, i in info.items():
        author, licence = i["author"], i["license"]
        source = f"[{i['name']}]({author['url']})" if author.get("url") else i["name"]
        terms = f"[{licence['spdx']}]({licence['url']})" if licence.get("url") else licence["spdx"]
        lines.append(f"| {style} | {source}, as packaged in @iconify-json/{style} | {author['name']} | {terms} |")
    lines += [
        "",
        "Names, groups: [unicode-emoji-json](https://github.com/muan/unicode-emoji-json), Mu-An Chiou, MIT.",
        "Keywords: [emojilib](https://github.com/muan/emojilib), Mu-An Chiou, MIT.",
    ]
    return "\n".join(lines) + "\n"


def _collect(
    sets: Sequence[str], packages: str | Path | None, cache: str | Path | None
) -> tuple[list[Drawing], dict[str, Path]]:
    """Every drawing of the sets that joins a concept, and the sets' tarballs."""
    words = {name: icons.fetch(name, version, packages, cache) for name, version in WORDS.items()}
    files = {s: icons.fetch(f"@iconify-json/{s}", SETS[s].version, packages, cache) for s in sets}
    concepts = read_concepts(words)
    names = {n: "-".join(p for p in c.split("-") if p != "fe0f") for f in files.values() for c, n in chars_of(f)}
    return [d for s in sets for d in join(s, files[s], concepts, names)], files


def _keep(drawings: Sequence[Drawing], digests: Iterable[str]) -> list[Drawing]:
    """Drop blank drawings and those whose pixels have been seen, but leave a concept one drawing where it has one."""
    pairs = [(drawing, digest) for drawing, digest in zip(drawings, digests, strict=True) if digest]
    first = {digest: drawing for drawing, digest in reversed(pairs)}
    drawn = {drawing.concept.name for drawing in first.values()}
    kept = []
    for drawing, digest in pairs:
        if first[digest] is drawing or drawing.concept.name not in drawn:
            kept.append(drawing)
            drawn.add(drawing.concept.name)
    return kept


def build(
    out: str | Path,
    size: int = 64,
    packages: str | Path | None = None,
    cache: str | Path | None = None,
    sets: Sequence[str] = COLOUR_SETS,
    overwrite: bool = False,
    workers: int = 1,
    progress: Callable[[Iterable[Any], int, str], Iterable[Any]] | None = None,
) -> dict[str, Any]:
    """Build the emoji corpus at `size` pixels in the folder `out` and return its dataset.json.

    packages: a folder of the packages' .tgz files; None: fetch them with npm into `cache`.
    progress: wraps an iterable given its length and a word, as a progress bar does.
    Splits and the choice of drawings are the same at every size. Raises ValueError, FileNotFoundError, FileExistsError.
    """
    if unknown := [s for s in sets if s not in SETS]:
        raise ValueError(f"There is no set {unknown[0]!r}: choose among {', '.join(SETS)}.")
    if not sets or not 8 <= size <= 2048:
        raise ValueError(f"Building needs at least one set and a size from 8 to 2048 pixels, not {size}.")
    bar = progress or (lambda items, _total, _what: items)
    with new_folder(out, overwrite) as folder:
        drawings, files = _collect(sets, packages, cache)
        tables = {s: icons.read_member(files[s], "icons.json") for s in sets}
        info = {s: icons.read_member(files[s], "info.json") for s in sets}
        svgs = (icons.svg_of(tables[d.style], d.icon, 64) for d in drawings)
        kept = _keep(drawings, bar(_map(_digest, svgs, workers), len(drawings), "compare"))
        assign_splits(kept)
        svgs = (icons.svg_of(tables[d.style], d.icon, size) for d in kept)
        pictures = bar(_map(partial(_draw, size), svgs, workers), len(kept), "draw")
        with ShardWriter(folder) as writer:
            for drawing, picture in zip(kept, pictures, strict=True):
                writer.add(drawing.key, picture, meta_of(drawing, info[drawing.style]["license"]["spdx"]))
        (folder / "ATTRIBUTION.md").write_text(attribution(info), encoding="utf-8")
        summary = summary_of(kept, size, {s: info[s]["license"]["spdx"] for s in sets})
        write_json(summary, folder / "dataset.json")
    return summary


def meta_of(drawing: Drawing, licence: str) -> dict[str, Any]:
    """key.json of a drawing."""
    concept = drawing.concept
    return {
        "captions": captions_of(concept, drawing.style),
        "concept": concept.name,
        "style": drawing.style,
        "group": concept.group,
        "split": drawing.split,
        "license": licence,
        "keywords": concept.keywords,
        "emoji": concept.emoji,
    }


def summary_of(drawings: Sequence[Drawing], size: int, licences: dict[str, str]) -> dict[str, Any]:
    """dataset.json."""
    return {
        "name": "emoji",
        "size": size,
        "count": len(drawings),
        "splits": dict(Counter(d.split for d in drawings)),
        "groups": dict(Counter(d.concept.group for d in drawings)),
        "styles": {s: {"words": SETS[s].words, "family": SETS[s].family, "count": sum(d.style == s for d in drawings),
                       "license": licence} for s, licence in licences.items()},
        "concepts": list(dict.fromkeys(d.concept.name for d in drawings)),
    }  # fmt: skip
