"""Nearest-concept accuracy on planted features: the answers are known without the judge network."""

import pytest
import torch

from unclip.evals.concepts import Draw, Gallery, choose, measure, over_ceiling, shuffled, wilson
from unclip.evals.corpus import Corpus, Drawing

CONCEPTS, STYLES, SIDE = 12, 4, 8


def planted_picture(concept: int, style: int) -> torch.Tensor:
    """A picture that is one-hot in its concept, with a little of its style: (3, 8, 8) uint8."""
    picture = torch.zeros(3, SIDE * SIDE, dtype=torch.uint8)
    picture[0, concept] = 250
    picture[1, style] = 40
    return picture.reshape(3, SIDE, SIDE)


def flat(pictures: torch.Tensor) -> torch.Tensor:
    return pictures.flatten(1).float() / 255


@pytest.fixture
def corpus(tmp_path):
    drawings, pictures = [], []
    for concept in range(CONCEPTS):
        for style in range(STYLES):
            split = "test-pair" if style == 3 and concept % 2 else "train"
            name = f"thing {concept}"
            drawings.append(
                Drawing(len(drawings), f"{concept:02}-{style}", f"{name}, {style}", name, str(style), "things", split)
            )
            pictures.append(planted_picture(concept, style))
    return Corpus(tmp_path, drawings, torch.stack(pictures).__getitem__)


def perfect(corpus):
    return lambda captions, draws: corpus.pictures([draw.drawing.index for draw in draws])


def test_mean_without_is_the_mean_of_the_others():
    features = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    gallery = Gallery(features, ["a", "b", "a", "a", "b", "b", "b"])
    torch.testing.assert_close(
        gallery.mean_without(torch.tensor([2, 6])), torch.stack([features[[0, 3]].mean(0), features[[1, 4, 5]].mean(0)])
    )


def test_the_drawing_itself_never_helps():
    """Features without meaning: only a drawing's own presence in its concept's mean could make it right."""
    features = torch.randn(200, 64, generator=torch.Generator().manual_seed(0))
    names = [str(i % 40) for i in range(200)]
    gallery = Gallery(features, names)
    assert (gallery.ranks(features, torch.arange(200)) < 1).float().mean() < 0.1


def test_ranks_are_those_of_a_corpus_without_the_drawing():
    features = torch.randn(30, 8, generator=torch.Generator().manual_seed(0))
    names = [str(i % 6) for i in range(30)]
    gallery = Gallery(features, names)
    for j in range(30):
        rest = [i for i in range(30) if i != j]
        means = torch.stack([features[[i for i in rest if names[i] == name]].mean(0) for name in gallery.names])
        scores = torch.cosine_similarity(features[j] - gallery.centre, means - gallery.centre)
        expected = (scores > scores[int(names[j])]).sum()
        assert gallery.ranks(features[j : j + 1], torch.tensor([j])) == expected


def test_ranks_do_not_depend_on_scale_or_shift():
    generator = torch.Generator().manual_seed(1)
    features, queries = torch.randn(20, 6, generator=generator), torch.randn(10, 6, generator=generator)
    names, index = [str(i % 5) for i in range(20)], torch.arange(10)
    plain = Gallery(features, names).ranks(queries, index)
    moved = Gallery(3 * features + 2, names).ranks(3 * queries + 2, index)
    assert torch.equal(plain, moved)


def test_a_picture_that_says_nothing_is_wrong():
    features = torch.randn(20, 6, generator=torch.Generator().manual_seed(1))
    gallery = Gallery(features, [str(i % 5) for i in range(20)])
    ranks = gallery.ranks(gallery.centre.expand(3, -1), torch.arange(3))
    assert (ranks == 4).all()  # ties count against the picture


def test_a_perfect_generator_scores_the_ceiling(corpus):
    figures, draws, pictures, features = measure(perfect(corpus), corpus, count=20, featurize=flat, judge="flat")
    assert figures["generated"] == figures["ceiling"]
    assert figures["ceiling"]["top1"] == 1
    assert figures["floor"]["top1"] == 0
    assert figures["over_ceiling"]["top5"] == 1
    assert len(draws) == len(pictures) == len(features) == 20


def test_a_shuffled_generator_scores_the_floor(corpus):
    def shifted(captions, draws):
        """Draws another concept than was asked for."""
        names = [int(draw.drawing.concept.split()[1]) for draw in draws]
        return torch.stack([planted_picture((name + 5) % CONCEPTS, 0) for name in names])

    figures, *_ = measure(shifted, corpus, count=20, featurize=flat, judge="flat")
    assert figures["generated"]["top1"] == figures["over_ceiling"]["top1"] == 0
    assert figures["ceiling"]["top1"] == 1


def test_half_right_is_half_of_the_ceiling(corpus):
    def half(captions, draws):
        names = [int(draw.drawing.concept.split()[1]) for draw in draws]
        return torch.stack([planted_picture(name if name < 6 else name - 6, 0) for name in names])

    figures, *_ = measure(half, corpus, count=42, featurize=flat, judge="flat")
    low, high = figures["over_ceiling"]["top1_interval"]
    assert figures["over_ceiling"]["top1"] == figures["generated"]["top1"] == pytest.approx(0.5, abs=0.15)
    assert low < figures["over_ceiling"]["top1"] < high


def test_captions_are_of_the_split_and_of_trained_concepts_only(corpus):
    trained = {"thing 1", "thing 3"}
    draws = choose(corpus.drawings, "test-pair", 5, trained)
    assert {draw.drawing.split for draw in draws} == {"test-pair"}
    assert {draw.drawing.concept for draw in draws} == trained
    assert [draw.seed for draw in draws] == [0, 1, 2, 3, 4]  # drawn again, with other noise


def test_the_choice_is_fixed_and_grows_from_the_front(corpus):
    drawings = corpus.drawings
    assert choose(drawings, "train", 9) == choose(list(reversed(drawings)), "train", 9)
    assert choose(drawings, "train", 20)[:9] == choose(drawings, "train", 9)
    assert choose(drawings, "train", 9, seed=1) != choose(drawings, "train", 9)


def test_a_concept_with_one_drawing_is_not_asked_for(corpus):
    lonely = Drawing(48, "lonely", "lonely, 0", "lonely", "0", "things", "train")
    assert lonely not in [draw.drawing for draw in choose([*corpus.drawings, lonely], "train", 100)]
    with pytest.raises(ValueError, match="one real drawing only"):
        Gallery(torch.eye(3), ["a", "a", "b"]).ranks(torch.eye(3), torch.arange(3))


def test_shuffling_always_changes_the_concept(corpus):
    draws = choose(corpus.drawings, "train", 60)
    others = shuffled(draws)
    assert all(draws[i].drawing.concept != draws[j].drawing.concept for i, j in enumerate(others))


def test_two_measurements_are_the_same(corpus):
    first, second = (measure(perfect(corpus), corpus, count=7, featurize=flat, judge="flat")[0] for _ in range(2))
    assert first == second


def test_the_figures_have_the_keys_their_readers_use(corpus):
    figures, *_ = measure(perfect(corpus), corpus, count=7, featurize=flat, judge="flat")
    for part in ("generated", "ceiling", "floor"):
        assert set(figures[part]) == {"top1", "top5", "top1_interval", "top5_interval"}
    assert {"split", "count", "drawings", "seed", "concepts", "over_ceiling"} <= set(figures)


@pytest.mark.parametrize(("rate", "n"), [(0.0, 20), (1.0, 20), (0.5, 300)])
def test_wilson_holds_the_rate(rate, n):
    low, high = wilson(rate, n)
    assert 0 <= low <= rate <= high <= 1
    assert high - low > 0


def test_intervals_widen_where_drawings_repeat():
    ranks = torch.tensor([0, 9] * 50)
    ceiling = torch.zeros(100, dtype=torch.long)
    many = over_ceiling(ranks, ceiling, list(range(100)), 1)["top1_interval"]
    few = over_ceiling(ranks, ceiling, [i % 10 for i in range(100)], 1)["top1_interval"]
    assert few[1] - few[0] > many[1] - many[0]


def test_bad_input_is_named(corpus):
    with pytest.raises(ValueError, match="split='test'"):
        choose(corpus.drawings, "test", 3)
    with pytest.raises(ValueError, match="count=0"):
        choose(corpus.drawings, "train", 0)
    with pytest.raises(ValueError, match="No drawing of split"):
        choose(corpus.drawings, "train", 3, {"a thing of nowhere"})
    with pytest.raises(TypeError, match="uint8"):
        measure(lambda captions, draws: torch.zeros(len(draws), 3, 8, 8), corpus, count=2, featurize=flat, judge="flat")
    with pytest.raises(ValueError, match="2 captions gave 1 pictures"):
        measure(
            lambda captions, draws: perfect(corpus)(captions, draws)[:1], corpus, count=2, featurize=flat, judge="flat"
        )
    with pytest.raises(ValueError, match="NaN"):
        Gallery(torch.full((2, 2), torch.nan), ["a", "a"])


def test_draws_carry_what_a_generator_needs(corpus):
    seen: list[Draw] = []

    def watch(captions, draws):
        assert captions == [draw.drawing.caption for draw in draws]
        seen.extend(draws)
        return perfect(corpus)(captions, draws)

    _, draws, *_ = measure(watch, corpus, count=7, featurize=flat, judge="flat", batch_size=3)
    assert seen == draws
