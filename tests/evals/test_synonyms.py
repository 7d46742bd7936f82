"""Synonyms: the list itself, what counts as right, and the three measures on a tiny model."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from unclip.core.data import to_pixels
from unclip.corpora.shards import ShardWriter, encode_webp
from unclip.evals.corpus import load_corpus
from unclip.evals.synonyms import Synonym, captioned, check, measure, ranks, read_synonyms
from unclip.pipeline import UnCLIP

ROOT = Path(__file__).parents[2]
CONCEPTS = ("cat", "dog", "fish")
SYNONYMS = [Synonym("kitty", ("cat",)), Synonym("pup", ("dog", "fish"))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    noise = np.random.default_rng(0)
    with ShardWriter(folder) as writer:
        for concept in CONCEPTS:
            for style in ("flat", "blob"):
                picture = Image.fromarray(noise.integers(0, 256, (64, 64, 3), dtype=np.uint8))
                captions = [f"a {concept}, {style}", f"{concept}, pet, {style} style"]
                meta = {"captions": captions, "concept": concept, "style": style, "group": "things", "split": "train"}
                writer.add(f"{style}-{concept}", encode_webp(picture), meta)
    return folder


def flat(pictures: torch.Tensor) -> torch.Tensor:
    return pictures.flatten(1).float()


def test_the_list_has_a_hundred_words_for_concepts_of_the_embedded_model() -> None:
    synonyms = read_synonyms()
    drawn = set((ROOT / "unclip/weights/emoji/concepts.txt").read_text(encoding="utf-8").splitlines())
    assert len(synonyms) == len({synonym.word for synonym in synonyms}) == 100
    assert all(synonym.concepts[0] in drawn for synonym in synonyms)
    assert not captioned([synonym.word for synonym in synonyms], drawn)


def test_words_are_found_whole_and_in_the_plural() -> None:
    captions = ["a Cat-face, flat", "two kittens on a mat", "buses: a bus"]
    assert captioned(["cat", "at", "kitten", "bus", "kit", "cat face", "face cat"], captions) == [
        "cat",
        "kitten",
        "bus",
        "cat face",
    ]
    assert captioned(["mats", "pup"], captions) == ["mats"]


def test_any_right_concept_counts_and_a_tie_with_a_wrong_one_does_not() -> None:
    scores = torch.tensor([[0.3, 0.9, 0.5], [0.9, 0.1, 0.5], [0.5, 0.5, 0.5], [0.9, 0.9, 0.1]])
    two = Synonym("x", ("b", "c"))
    assert ranks(scores, ["a", "b", "c"], [two] * 4).tolist() == [0, 1, 1, 1]
    assert ranks(scores, ["a", "b", "c"], [Synonym("x", ("c",))] * 4).tolist() == [1, 1, 2, 2]


def test_a_synonym_in_a_training_caption_is_refused(folder: Path) -> None:
    corpus = load_corpus(folder)
    check(SYNONYMS, corpus)
    with pytest.raises(ValueError, match="1 synonyms, such as 'pet'"):
        check([*SYNONYMS, Synonym("pet", ("dog",))], corpus)
    with pytest.raises(ValueError, match="all of cat, lion, of 'puss'"):
        check([Synonym("puss", ("cat", "lion"))], corpus)


def test_lines_are_read_and_a_wrong_one_is_named(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_text("# words\nkitty: cat , cat face\n\nbok choy: leafy green\n", encoding="utf-8")
    assert read_synonyms(path) == [Synonym("kitty", ("cat", "cat face")), Synonym("bok choy", ("leafy green",))]
    for wrong in ("kitty cat", "kitty:", ": cat"):
        path.write_text(f"{wrong}\n", encoding="utf-8")
        with pytest.raises(ValueError, match="write a word, a colon"):
            read_synonyms(path)
    path.write_text("# nothing\n", encoding="utf-8")
    with pytest.raises(ValueError, match="holds no synonym"):
        read_synonyms(path)


def test_a_prior_and_a_decoder_that_know_the_word_are_right(folder: Path, tiny_model: Path, monkeypatch) -> None:
    """The prior gives the right concept's mean z_i, the decoder the drawing itself; CLIP stays random."""
    corpus, pipe = load_corpus(folder), UnCLIP.from_pretrained(tiny_model)
    names = [drawing.concept for drawing in corpus.drawings]
    first = [names.index(synonym.concepts[0]) for synonym in SYNONYMS]
    pictures = to_pixels(corpus.pictures(first))
    z_i = F.normalize(pipe.encode_image(to_pixels(corpus.pictures(range(6)))), dim=-1)
    means = torch.stack([z_i[[i for i in range(6) if names[i] == names[j]]].mean(0) for j in first])
    monkeypatch.setattr(UnCLIP, "sample_z_i", lambda self, text, seeds, *rest: means)
    monkeypatch.setattr(UnCLIP, "decode", lambda self, z_i, text, seeds, *rest: pictures)
    found = measure(pipe, corpus, SYNONYMS, featurize=flat, judge="flat")
    assert found["prior"]["word"]["top1"] == found["picture"]["word"]["top1"] == found["picture"]["name"]["top1"] == 1
    assert found["words"]["kitty"] == {"clip": found["words"]["kitty"]["clip"], "prior": 0, "picture": 0}
    right = sum(row["clip"] < 1 for row in found["words"].values())
    assert found["clip"]["word"]["top1"] == right / 2
    json.dumps(found)
