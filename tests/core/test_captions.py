"""Keywords in the place of concepts: what stands where, how often, and which words never do."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from unclip.core.captions import forms_of, holds, read_forms, stand_in
from unclip.core.data import DataConfig, Draws, ShardDataset, collate, draw_pictures_and_captions, tensor_from_pil
from unclip.corpora.shards import ShardWriter, encode_webp

CAPTIONS = ["a cat, flat", "Cat, flat", "an animal drawn flat", "a wildcat"]
BLANK = Image.new("RGBA", (8, 8))


@pytest.mark.parametrize(
    ("keyword", "expected"),
    [("meow", ["a meow, flat", "meow, flat"]), ("old pet", ["an old pet, flat", "old pet, flat"])],
)
def test_a_keyword_takes_the_place_of_the_concept_and_its_article(keyword: str, expected: list[str]) -> None:
    assert stand_in(CAPTIONS, "cat", [keyword], 0.0) == expected


def test_captions_that_do_not_name_the_concept_stay() -> None:
    assert stand_in(CAPTIONS, "dog", ["puppy"], 0.5) == CAPTIONS
    assert stand_in(CAPTIONS, "", ["puppy"], 0.5) == stand_in(CAPTIONS, "cat", [], 0.5) == CAPTIONS
    assert stand_in(["(c++) book"], "(c++)", ["code"], 0.5) == ["code book"]


def test_every_keyword_has_its_turn() -> None:
    drawn = {stand_in(["cat"], "cat", ["one", "two", "three"], u)[0] for u in (0.0, 0.5, 0.999)}
    assert drawn == {"one", "two", "three"}


def test_keywords_stand_in_a_share_of_captions_and_change_nothing_else() -> None:
    image = tensor_from_pil(BLANK)
    item = {"image": image, "captions": ["a cat"], "concept": "cat", "keywords": ["meow", "pet"]}
    batch = collate([item] * 400)
    x0, captions = draw_pictures_and_captions(batch, Draws(0, 0, range(400)), 0.5, 0.5)
    same, named = draw_pictures_and_captions(batch, Draws(0, 0, range(400)), 0.5)
    assert torch.equal(x0, same)
    assert {caption.split(" on ")[0] for caption in captions} == {"a cat", "a meow", "a pet"}
    assert [c.split(" on ")[1:] for c in captions] == [c.split(" on ")[1:] for c in named]
    assert 160 < sum("cat" in caption for caption in captions) < 240  # 4 deviations of 10
    with pytest.raises(ValueError, match="keyword_probability"):
        draw_pictures_and_captions(batch, Draws(0, 0, range(400)), 0.0, 1.5)


def test_words_are_held_whole_in_singular_and_plural() -> None:
    forms = forms_of("kitten")
    assert all(holds(text, forms) for text in ("kitten", "two Kittens", "a kitten-face"))
    assert not any(holds(text, forms) for text in ("kit", "smitten", ""))
    assert not holds("kitten", frozenset())


def test_a_data_set_has_no_keyword_that_holds_a_word_left_out(tmp_path: Path) -> None:
    keywords = ["kittens", "hello kitty", "pet"]
    meta = {"captions": ["a cat"], "concept": "cat", "keywords": keywords, "split": "train"}
    with ShardWriter(tmp_path) as writer:
        writer.add("cat", encode_webp(BLANK), meta)
    words = tmp_path / "words.txt"
    words.write_text("# not to be heard\nkitty: cat, cat face\n\nkitten\n")
    assert read_forms(words) >= {"kitty", "kitten", "kittens"}
    for path, expected in ((None, keywords), (str(words), ["pet"])):
        assert ShardDataset(DataConfig(str(tmp_path), leave_out=path))[0]["keywords"] == expected
    with pytest.raises(FileNotFoundError, match="list of words"):
        ShardDataset(DataConfig(str(tmp_path), leave_out=str(tmp_path / "none.txt")))
