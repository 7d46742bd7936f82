"""Does a word that no caption held lead to what it means? A hundred synonyms, "kitty" for the cat (synonyms.txt).

The words are of the emoji corpus's keyword sets (emojilib) and are kept out of its captions. Three things are asked of
each: whether CLIP's z_t of the word is near the z_i of drawings of the right concept, whether the prior's z_i is, and
whether a judge that takes no part in training (`features.py`) finds that concept in the picture. The same is asked of
the concepts' own names: that is as much as a synonym could reach.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from unclip.core.data import to_pixels
from unclip.core.files import write_json
from unclip.evals.concepts import Gallery, corpus_features, dtype_of, rates
from unclip.evals.corpus import Corpus, load_corpus, to_bytes
from unclip.evals.features import JUDGE, Featurize, Judge
from unclip.evals.sheets import read_captions

if TYPE_CHECKING:
    from unclip.arguments import Callback, DTypeName
    from unclip.pipeline import UnCLIP

SYNONYMS = Path(__file__).with_name("synonyms.txt")
TEXTS = ("word", "name")


class Synonym(NamedTuple):
    """A word, and the concepts any of which is right; the first is the nearest."""

    word: str
    concepts: tuple[str, ...]


def read_synonyms(path: str | Path = SYNONYMS) -> list[Synonym]:
    """The synonyms of a text file with lines `word: concept, concept`. Raises FileNotFoundError, ValueError."""
    found = []
    for line in read_captions(path):
        if line.startswith("#"):
            continue
        word, colon, rest = line.partition(":")
        concepts = tuple(part.strip() for part in rest.split(",") if part.strip())
        if not word.strip() or not colon or not concepts:
            raise ValueError(f"{path} has the line {line!r}; write a word, a colon, and concepts between commas.")
        found.append(Synonym(word.strip(), concepts))
    if not found:
        raise ValueError(f"{path} holds no synonym; give a text file with lines such as `kitty: cat, cat face`.")
    return found


def captioned(words: Iterable[str], captions: Iterable[str]) -> list[str]:
    """Those of the words that a caption holds, as whole words, in singular or plural."""
    held = "\n".join({f" {' '.join(re.findall(r'[a-z0-9]+', caption.lower()))} " for caption in captions})
    return [word for word in words if any(f" {form} " in held for form in forms_of(word))]


def forms_of(word: str) -> set[str]:
    plain = " ".join(re.findall(r"[a-z0-9]+", word.lower()))
    return {plain, f"{plain}s", f"{plain}es", plain.removesuffix("s"), plain.removesuffix("es")} - {""}


def check(synonyms: Sequence[Synonym], corpus: Corpus) -> None:
    """Raises ValueError where a training caption of the corpus holds a synonym, or a concept is not in it."""
    captions = (c for d, own in zip(corpus.drawings, corpus.captions, strict=True) if d.split == "train" for c in own)
    if held := captioned([synonym.word for synonym in synonyms], captions):
        raise ValueError(
            f"{len(held)} synonyms, such as {held[0]!r}, are in training captions of {corpus.folder}, where they "
            "measure nothing new; take them off the list, or out of the captions."
        )
    known = {drawing.concept for drawing in corpus.drawings}
    if lost := [synonym for synonym in synonyms if not set(synonym.concepts) <= known]:
        concepts = ", ".join(lost[0].concepts)
        raise ValueError(f"{corpus.folder} does not have all of {concepts}, of {lost[0].word!r}; correct the list.")


def ranks(scores: Tensor, names: Sequence[str], synonyms: Sequence[Synonym]) -> Tensor:
    """How many wrong concepts are as near as the nearest right one, or nearer, (n,); 0 is right at first guess.

    scores (n, c): nearness of each synonym's query to each of the named concepts.
    """
    places = {name: i for i, name in enumerate(names)}
    right = torch.zeros(scores.shape, dtype=torch.bool)
    for i, synonym in enumerate(synonyms):
        right[i, [places[concept] for concept in synonym.concepts]] = True
    best = scores.masked_fill(~right, -torch.inf).max(dim=1, keepdim=True).values  # n 1
    return ((scores >= best) & ~right).sum(dim=1)


@torch.no_grad()
def measure(
    pipe: UnCLIP,
    corpus: Corpus,
    synonyms: Sequence[Synonym],
    template: str = "{}",
    preset: str = "default",
    seed: int = 0,
    featurize: Featurize | None = None,
    judge: str = JUDGE,
    callback: Callback | None = None,
) -> dict[str, Any]:
    """By "clip", "prior" and "picture", for each of `TEXTS`: top1 and top5 among all concepts; `words`: their ranks.

    template: the prompt, {} standing for the word. Picture i has the seed seed + i.
    """
    featurize, settings = featurize or Judge(), pipe.settings(preset)
    names = [drawing.concept for drawing in corpus.drawings]
    z_i = torch.cat([pipe.encode_image(to_pixels(batch)).cpu() for batch in corpus.batches()])
    embedded, seen = Gallery(F.normalize(z_i, dim=-1), names), Gallery(corpus_features(corpus, judge, featurize), names)
    seeds = list(range(seed, seed + len(synonyms)))
    found: dict[str, dict[str, Tensor]] = {"clip": {}, "prior": {}, "picture": {}}
    for kind in TEXTS:
        words = [synonym.word if kind == "word" else synonym.concepts[0] for synonym in synonyms]
        text = pipe.encode_text([template.replace("{}", word) for word in words])
        drawn = pipe.sample_z_i(text, seeds, settings["prior"], callback)
        features = featurize(to_bytes(pipe.decode(drawn, text, seeds, settings["decoder"], callback), corpus.side))
        scores = {
            # CLIP's cosines as they are: z_t lies beside all z_i, and taking their mean off it would leave mostly that
            "clip": text.z_t.float().cpu() @ F.normalize(embedded.means, dim=-1).T,
            "prior": drawn.cpu() @ F.normalize(embedded.means, dim=-1).T,
            "picture": seen.direction(features) @ seen.direction(seen.means).T,
        }
        for by, nearness in scores.items():
            found[by][kind] = ranks(nearness, embedded.names, synonyms)
    figures: dict[str, Any] = {by: {kind: rates(found[by][kind], len(synonyms)) for kind in TEXTS} for by in found}
    columns = [found[by]["word"].tolist() for by in found]
    figures["words"] = {
        synonym.word: dict(zip(found, row, strict=True))
        for synonym, row in zip(synonyms, zip(*columns, strict=True), strict=True)
    }
    return figures


def evaluate(
    model: str | None,
    corpus: str | Path = "corpora/emoji-64",
    synonyms: str | Path = SYNONYMS,
    template: str = "{}",
    preset: str = "default",
    seed: int = 0,
    json_path: Path | None = None,
    device: str | None = None,
    dtype: DTypeName | None = None,
    callback: Callback | None = None,
) -> dict[str, Any]:
    """`unclip evals synonyms`: the figures of a model (None: the embedded one), also written to `json_path`.

    Raises ValueError where the corpus's captions hold a synonym, or the template no {}; FileNotFoundError.
    """
    from unclip.arguments import choose_device
    from unclip.pipeline import UnCLIP

    if "{}" not in template:
        raise ValueError(f"template is {template!r}; write {{}} where the word is to stand.")
    words, real = read_synonyms(synonyms), load_corpus(corpus)
    check(words, real)
    pipe = UnCLIP.from_pretrained(model, dtype, device)
    judge = Judge(choose_device(device))
    figures = {
        "model": pipe.model_name,
        "dtype": dtype_of(pipe),
        "count": len(words),
        "concepts": len({drawing.concept for drawing in real.drawings}),
        "template": template,
        "preset": preset,
        "seed": seed,
    } | measure(pipe, real, words, template, preset, seed, judge, callback=callback)
    if json_path is not None:
        write_json(figures, json_path)
    return figures
