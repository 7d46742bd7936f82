"""The commands' functions on a tiny model and a tiny corpus: files, keys, determinism, errors."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from unclip.core.data import to_pixels
from unclip.corpora.shards import ShardWriter, encode_webp
from unclip.evals.concepts import Draw, evaluate, generator_of, measure, trained_concepts
from unclip.evals.corpus import load_corpus, to_bytes
from unclip.evals.sheets import caption_sheet, read_captions

CONCEPTS = ("red apple", "green pear", "blue fish", "yellow star")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Four concepts in three styles at 64×64 with transparency; one pair of the fish held out."""
    folder = tmp_path_factory.mktemp("corpus")
    noise = np.random.default_rng(0)
    with ShardWriter(folder) as writer:
        for concept in CONCEPTS:
            for style in ("flat", "shaded", "blob"):
                split = "test-pair" if (concept, style) == ("blue fish", "blob") else "train"
                picture = Image.fromarray(noise.integers(0, 256, (64, 64, 4), dtype=np.uint8))
                captions = [f"a {concept}, {style}", f"a {concept}"]
                meta = {"captions": captions, "concept": concept, "style": style, "group": "things", "split": split}
                writer.add(f"{style}-{concept.replace(' ', '-')}", encode_webp(picture), meta)
    (folder / "dataset.json").write_text(json.dumps({"name": "tiny"}))
    return folder


def test_a_corpus_is_all_its_splits_on_white(folder):
    corpus = load_corpus(folder)
    assert len(corpus.drawings) == 12
    assert {drawing.split for drawing in corpus.drawings} == {"train", "test-pair"}
    assert [drawing.index for drawing in corpus.drawings] == list(range(12))
    assert all(drawing.caption == f"a {drawing.concept}, {drawing.style}" for drawing in corpus.drawings)
    batches = torch.cat(list(corpus.batches(5)))
    assert batches.shape == (12, 3, 64, 64) and torch.equal(batches[[7, 3]], corpus.pictures([7, 3]))


def test_bytes_of_pixels_come_back():
    pictures = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    assert torch.equal(to_bytes(to_pixels(pictures)), pictures)
    assert to_bytes(torch.full((1, 3, 16, 16), 3.0)).unique().tolist() == [255]


def test_evaluate_writes_figures_and_sheet(folder, tiny_model, tmp_path):
    (tmp_path / "out").mkdir()
    path, sheet = tmp_path / "out" / "concepts.json", tmp_path / "out" / "sheet.png"
    figures = evaluate(str(tiny_model), "train", 4, path, folder, sheet=sheet)
    assert json.loads(path.read_text()) == figures
    assert (figures["model"], figures["dtype"]) == (tiny_model.name, "fp32")
    assert figures["preset"] == "default" and figures["concepts"] == 4
    assert {"generated", "ceiling", "floor", "over_ceiling", "count", "split", "seed"} <= set(figures)
    assert Image.open(sheet).width > 4 * 128
    assert sorted(p.name for p in path.parent.iterdir()) == ["concepts.json", "sheet.png"]
    assert evaluate(str(tiny_model), "train", 4, None, folder) == figures


def test_captions_come_from_the_model_s_concepts(folder, tiny_model, copy_model):
    model = copy_model()
    assert trained_concepts(model) is None
    (model / "concepts.txt").write_text("blue fish\n\nyellow star\n")
    figures = evaluate(str(model), "train", 6, None, folder)
    assert (figures["concepts_asked"], figures["concepts"], figures["drawings"]) == (2, 4, 5)
    (model / "concepts.txt").write_text("a thing of nowhere\n")
    with pytest.raises(ValueError, match=r"concepts\.txt"):
        evaluate(str(model), "train", 6, None, folder)


def test_conditions_differ_and_pictures_are_of_their_seed(folder, tiny_model):
    from unclip.pipeline import UnCLIP

    corpus, pipe = load_corpus(folder), UnCLIP.from_pretrained(tiny_model)
    flat = lambda pictures: pictures.flatten(1).float()  # noqa: E731
    pictures = {}
    for condition in ("prior", "true_z_i", "text", "caption"):
        generate = generator_of(pipe, corpus, condition)
        _, draws, pictures[condition], _ = measure(generate, corpus, count=3, featurize=flat, judge="flat")
        alone = generate([draws[2].drawing.caption], draws[2:])
        difference = (alone[0].int() - pictures[condition][2].int()).abs()
        assert (difference <= 1).float().mean() > 0.99
    assert not torch.equal(pictures["prior"], pictures["true_z_i"])
    assert not torch.equal(pictures["text"], pictures["true_z_i"])
    assert all(not torch.equal(pictures["caption"], pictures[other]) for other in ("prior", "true_z_i", "text"))


def test_best_of_is_the_picture_that_a_call_of_the_pipeline_keeps(folder, tiny_model):
    from unclip.pipeline import UnCLIP

    corpus, pipe = load_corpus(folder), UnCLIP.from_pretrained(tiny_model)
    draws = [Draw(corpus.drawings[0], 2), Draw(corpus.drawings[1], 3)]
    captions = [draw.drawing.caption for draw in draws]
    kept = generator_of(pipe, corpus, best_of=3)(captions, draws)
    for picture, draw in zip(kept, draws, strict=True):
        asked = {"size": pipe.sizes[0], "output_type": "pt"}
        own = pipe(draw.drawing.caption, seed=3 * draw.seed, best_of=3, **asked).images
        others = pipe(draw.drawing.caption, 3, seed=3 * draw.seed, **asked).images
        assert ((to_bytes(own, corpus.side)[0].int() - picture.int()).abs() <= 1).float().mean() > 0.99
        assert sum(torch.equal(own[0], other) for other in others) == 1
    with pytest.raises(ValueError, match="best_of is 0"):
        generator_of(pipe, corpus, best_of=0)(captions, draws)


def test_a_caption_s_picture_is_the_one_sample_draws(tiny_model, tmp_path):
    from unclip.pipeline import UnCLIP

    captions = tmp_path / "captions.txt"
    captions.write_text("a red apple\n\na blue fish\n")
    path = caption_sheet(str(tiny_model), tmp_path / "sheet.png", captions, size=64, columns=2)
    alone = UnCLIP.from_pretrained(tiny_model)("a blue fish", seed=0, size=64).images[0]
    windows = np.lib.stride_tricks.sliding_window_view(np.array(Image.open(path), dtype=int), (64, 64, 3))[:, :, 0]
    near = (np.abs(windows[::1, 64:] - np.array(alone, dtype=int)) <= 1).mean(axis=(2, 3, 4))
    assert near.max() > 0.99


def test_bad_input_is_named_before_any_work(folder, tiny_model, tmp_path):
    model = str(tiny_model)
    with pytest.raises(FileNotFoundError, match="no corpus folder"):
        evaluate(model, "train", 3, None, tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        evaluate(str(tmp_path / "nowhere"), "train", 3, None, folder)
    with pytest.raises(ValueError, match="split='test'"):
        evaluate(model, "test", 3, None, folder)
    with pytest.raises(ValueError, match="condition='z'"):
        evaluate(model, "train", 3, None, folder, condition="z")
    with pytest.raises(ValueError, match="preset"):
        evaluate(model, "train", 3, None, folder, preset="nowhere")
    with pytest.raises(ValueError, match=r"sheet\.tiff"):
        evaluate(model, "train", 3, None, folder, sheet=tmp_path / "sheet.tiff")
    with pytest.raises(FileNotFoundError, match="list of captions"):
        read_captions(tmp_path / "nowhere.txt")
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(ValueError, match="no caption"):
        read_captions(tmp_path / "empty.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["empty.txt"]
