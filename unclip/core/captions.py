"""Words of captions: a keyword in the place of a concept, the names of backgrounds, words that are kept out."""

import re
from collections.abc import Collection, Sequence
from pathlib import Path

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


def plain(text: str) -> str:
    """Its words in lower case, a space between two."""
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))


def forms_of(word: str) -> set[str]:
    """A word as a plain text may hold it, singular or plural."""
    said = plain(word)
    return {said, f"{said}s", f"{said}es", said.removesuffix("s"), said.removesuffix("es")} - {""}


def holds(text: str, forms: Collection[str]) -> bool:
    """Whether the text holds one of the forms as whole words."""
    said = f" {plain(text)} " if forms else ""
    return any(f" {form} " in said for form in forms)


def read_forms(path: str | Path) -> frozenset[str]:
    """The forms of all words of a text file, a line each; what follows a colon, and lines with #, are no part of it.

    Raises FileNotFoundError.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no list of words {path}; give a text file with a word a line.")
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    words = (line.partition(":")[0] for line in lines if not line.startswith("#"))
    return frozenset(form for word in words for form in forms_of(word))


def stand_in(captions: list[str], concept: str, keywords: Sequence[str], u: float) -> list[str]:
    """Those captions that name the concept, the keyword at u in [0, 1) in its place; all as they are if none does."""
    if not (concept and keywords):
        return captions
    keyword = keywords[int(u * len(keywords))]
    article = "an " if keyword[0] in "aeiou" else "a "
    named = re.compile(rf"(?<!\w)(an? )?{re.escape(concept)}(?!\w)", re.IGNORECASE)
    found = (named.subn(lambda m: (article if m[1] else "") + keyword, caption, count=1) for caption in captions)
    return [caption for caption, times in found if times] or captions
