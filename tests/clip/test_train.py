"""CLIP's loss against plain cross-entropy, across processes, its augmentation, and a whole small run."""

import json
import math
import socket
import subprocess
import sys
import tarfile
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import CLIPModel

from unclip.clip.evaluate import evaluate
from unclip.clip.model import CLIP, CLIPArguments
from unclip.clip.remember import RememberedCLIP
from unclip.clip.train import (
    CLIPConfig,
    augment,
    clip_loss,
    contrastive_loss,
    keys_of,
    lock_text,
    run,
)
from unclip.core.config import TrainConfig, parse
from unclip.core.data import COLOURS, DataConfig, Draws, ShardDataset, collate
from unclip.core.train import train

TINY = CLIPArguments(
    dim=12,
    image_size=16,
    patch_size=8,
    image_width=32,
    image_depth=1,
    image_heads=2,
    text_width=32,
    text_depth=1,
    text_heads=2,
    vocab_size=300,
    context_length=20,
)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Plain squares of eight colours; a split `test` of the same."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for split in ("train", "test"):
        with tarfile.open(folder / f"{split}-00000.tar", "w") as tar:
            for name in list(COLOURS)[:8]:
                picture, meta = BytesIO(), {"captions": [f"a {name} square"], "concept": name, "style": "plain"}
                Image.new("RGB", (16, 16), COLOURS[name]).save(picture, "webp", lossless=True)
                files = {"webp": picture.getvalue(), "json": json.dumps({**meta, "keywords": ["box"]}).encode()}
                for suffix, content in files.items():
                    info = tarfile.TarInfo(f"{name}.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, BytesIO(content))
    return folder


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_loss_is_symmetric_cross_entropy_and_transformers():
    z_i, z_t, scale = unit(6, 8), unit(6, 8, seed=1), torch.tensor(20.0)
    logits, own = scale * z_i @ z_t.T, torch.arange(6)
    expected = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
    loss = contrastive_loss(z_i, z_t, scale)
    assert torch.allclose(loss, expected)
    assert torch.allclose(loss, contrastive_loss(z_t, z_i, scale))
    from transformers.models.clip.modeling_clip import image_text_contrastive_loss

    assert torch.allclose(loss, image_text_contrastive_loss(logits.T))
    assert torch.allclose(loss, contrastive_loss(z_i, z_t, scale, torch.arange(6)))


def test_samples_with_one_key_are_no_negatives():
    z_i, z_t, scale = unit(4, 8).requires_grad_(), unit(4, 8, seed=1).requires_grad_(), torch.tensor(20.0)
    keys = torch.tensor([7, 3, 7, 5])
    loss = contrastive_loss(z_i, z_t, scale, keys)
    total = torch.tensor(0.0)
    for i in range(4):
        others = [j for j in range(4) if j == i or keys[j] != keys[i]]
        for a, b in ((z_i, z_t), (z_t, z_i)):
            total = total - (scale * a[i] @ b[others].T).log_softmax(0)[others.index(i)] / 8
    assert torch.allclose(loss, total, atol=1e-6)
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, (z_i, z_t)))
    assert contrastive_loss(z_i, z_t, scale, torch.zeros(4, dtype=torch.long)) == 0


def test_keys_are_equal_where_texts_are():
    keys = keys_of(["apple", "pear", "apple"])
    assert keys[0] == keys[2] != keys[1]
    assert keys.dtype == torch.int64
    assert keys[0] == -7633964618339733793


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="expected one shape"):
        contrastive_loss(unit(4, 8), unit(3, 8), torch.tensor(1.0))


def test_two_processes_have_the_gradients_of_one(tmp_path: Path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    worker = str(Path(__file__).with_name("gather_worker.py"))
    commands = [[sys.executable, worker, str(rank), str(port), str(tmp_path / f"{rank}.pt")] for rank in (0, 1)]
    processes = [subprocess.Popen(command) for command in commands]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    halves = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    z_i, z_t = unit(6, 8).requires_grad_(), unit(6, 8, seed=1).requires_grad_()
    scale = torch.tensor(20.0, requires_grad=True)
    loss = contrastive_loss(z_i, z_t, scale, torch.tensor([1, 2, 3, 4, 1, 5]))
    loss.backward()
    mean = [(a + b) / 2 for a, b in zip(*halves, strict=True)]  # what DDP does with gradients of parameters
    assert torch.allclose(mean[0], loss.detach(), atol=1e-6)
    assert torch.allclose(mean[3], scale.grad, atol=1e-6)
    for whole, parts in ((z_i.grad, 1), (z_t.grad, 2)):
        joined = torch.cat([half[parts] for half in halves]) / 2  # the embeddings of a row live in one process
        assert torch.allclose(joined, whole, atol=1e-6)


def test_augmentation():
    x = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert augment(x, Draws(0, 0, range(4))) is x
    assert torch.allclose(augment(x, Draws(0, 0, range(4)), flip=1.0), x.flip(-1), atol=1e-5)
    moved = augment(x, Draws(0, 0, range(4)), shift=0.2, zoom=0.1)
    assert moved.abs().max() <= 1
    assert torch.allclose(moved[2:], augment(x[2:], Draws(0, 0, [2, 3]), shift=0.2, zoom=0.1), atol=1e-6)
    flat = torch.full_like(x, 0.25)
    assert torch.allclose(augment(flat, Draws(0, 0, range(4)), shift=0.4, zoom=0.3), flat, atol=1e-6)
    shifted = torch.zeros(1, 3, 16, 16)
    shifted[..., 8:10, 8:10] = 1
    u = Draws(0, 0, [0]).uniform(4)[0]
    result = augment(shifted, Draws(0, 0, [0]), shift=0.2)[0, 0]
    place = (result.sum(0) * torch.arange(16)).sum() / result.sum()
    assert place == pytest.approx(8.5 - 16 * 0.2 * (2 * u[2].item() - 1), abs=0.1)


def test_the_scale_stays_at_most_100():
    clip = CLIP.build(TINY, ["red"])
    with torch.no_grad():
        clip.model.logit_scale.fill_(9.0)
    scale = clip(torch.zeros(2, 3, 16, 16), *clip.tokenize(["red", "blue"])).logit_scale
    assert scale.item() == pytest.approx(100)
    scale.backward()
    assert clip.model.logit_scale.grad.item() == pytest.approx(100)  # the way back stays open


def test_a_run_learns_colours_and_is_evaluated(corpus: Path, tmp_path: Path):
    config = CLIPConfig(
        TINY,
        TrainConfig(
            str(tmp_path / "out"),
            steps=60,
            batch_size=8,
            learning_rate=3e-3,
            warmup=5,
            ema=0.5,
            precision="no",
            tracker="none",
        ),
        DataConfig(str(corpus)),
        DataConfig(str(corpus), "test"),
        evaluate=["test"],
        templates=["{}", "a {} square"],
    )
    folder = run(config)
    figures = json.loads((tmp_path / "out/evaluation.json").read_text())["test"]
    assert figures["top1"] > 0.8
    assert figures["image_to_text"] > 0.8
    assert (figures["count"], figures["labels"]) == (8, 8)
    log = [json.loads(line) for line in (tmp_path / "out/log.jsonl").read_text().splitlines()]
    assert log[-1]["validation/loss"] < 0.7 < math.log(8)
    assert isinstance(CLIP.from_pretrained(folder).model, CLIPModel)


def test_a_slower_text_tower_moves_less(corpus: Path, tmp_path: Path):
    """`lr_scales` finds the text tower by the name the recipes give it."""
    torch.manual_seed(0)
    clip = CLIP.build(TINY, ["red"])
    before = {name: p.detach().clone() for name, p in clip.named_parameters()}
    scales = {"model.text_model.": 0.0}
    settings = TrainConfig(str(tmp_path), 1, 4, lr_scales=scales, warmup=1, precision="no", tracker="none")
    config = CLIPConfig(TINY, settings, DataConfig(str(corpus)))
    train(settings, clip, clip_loss(config, clip), ShardDataset(config.data))
    for name, parameter in clip.named_parameters():
        assert torch.equal(parameter, before[name]) == name.startswith("model.text_model."), name


def test_a_locked_text_tower_keeps_its_cosines_and_is_not_trained(corpus: Path, tmp_path: Path):
    """As wide as its states, z_t is a rotation of the pooled state; the image tower is what learns."""
    torch.manual_seed(0)
    texts = [f"a {name} square" for name in COLOURS]
    clip = CLIP.build(replace(TINY, dim=32, dropout=0.5), texts).eval()
    clip.model.text_projection.weight.data = torch.eye(32)
    pooled = clip.encode_text(texts).z_t
    lock_text(clip, texts)
    z_t = clip.encode_text(texts).z_t
    assert torch.allclose(z_t @ z_t.T, pooled @ pooled.T, atol=1e-5)
    assert (z_t[:, 0] ** 2).mean() > (z_t[:, 1:] ** 2).mean(0).max()  # principal directions, the first the largest
    assert torch.equal(z_t, clip.train().encode_text(texts).z_t)  # without dropout, whatever the tower was made with
    before = {name: p.detach().clone() for name, p in clip.named_parameters()}
    lock_text(clip, None)  # as from a CLIP that was locked before: nothing is fitted anew
    assert all(torch.equal(p, before[name]) for name, p in clip.named_parameters())
    settings = TrainConfig(str(tmp_path / "out"), 1, 4, warmup=1, precision="no", tracker="none")
    train(
        settings,
        clip,
        clip_loss(CLIPConfig(TINY, settings, DataConfig(str(corpus))), clip),
        ShardDataset(DataConfig(str(corpus))),
    )
    for name, parameter in clip.named_parameters():
        assert torch.equal(parameter, before[name]) == name.startswith("model.text_"), name
    narrow = CLIP.build(replace(TINY, dim=5), texts)
    lock_text(narrow, texts)
    rows = narrow.model.text_projection.weight
    assert torch.allclose(rows @ rows.T, torch.eye(5), atol=1e-5)
    with pytest.raises(ValueError, match=r"model.dim is 33 and a locked text tower's states have 32"):
        lock_text(CLIP.build(replace(TINY, dim=33), texts), texts)


def test_micro_batches_are_refused(corpus: Path, tmp_path: Path):
    settings = TrainConfig(str(tmp_path), 1, 4, accumulation=2, precision="no", tracker="none")
    with pytest.raises(ValueError, match=r"accumulation is 2, but CLIP's negatives"):
        run(CLIPConfig(TINY, settings, DataConfig(str(corpus))))


def test_templates_without_a_place_are_refused_before_any_work(corpus: Path, tmp_path: Path):
    settings = TrainConfig(str(tmp_path / "out"), 1, 4, precision="no", tracker="none")
    with pytest.raises(ValueError, match=r"expected '\{\}' in each"):
        run(CLIPConfig(TINY, settings, DataConfig(str(corpus)), evaluate=["test"], templates=["{}", "a drawing"]))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ({"flip": 50.0}, "flip is 50.0; expected a part of the samples"),
        ({"zoom": 1.0}, "zoom 1.0; expected parts of a picture's side, zoom below 1"),
        ({"shift": -0.1}, "shift is -0.1 and"),
    ],
)
def test_augmentation_out_of_range_is_refused(corpus: Path, tmp_path: Path, what: dict, says: str):
    settings = TrainConfig(str(tmp_path / "out"), 1, 4, precision="no", tracker="none")
    with pytest.raises(ValueError, match=says):
        run(CLIPConfig(TINY, settings, DataConfig(str(corpus)), **what))


@pytest.mark.parametrize("what", [{"lock_text": True}, {"model": replace(TINY, text_layers=[0])}])
def test_a_text_tower_from_nothing_is_neither_locked_nor_picked_from(corpus: Path, tmp_path: Path, what: dict):
    settings = TrainConfig(str(tmp_path / "out"), 1, 4, precision="no", tracker="none")
    with pytest.raises(ValueError, match=r"model\.text is bpe, which starts from nothing"):
        run(CLIPConfig(**{"model": TINY, "train": settings, "data": DataConfig(str(corpus)), **what}))


def test_pictures_without_a_concept_are_trained_on_and_not_evaluated(unnamed: Path, tmp_path: Path):
    data = DataConfig(str(unnamed))
    settings = TrainConfig(str(tmp_path / "out"), 1, 4, precision="no", tracker="none")
    with pytest.raises(ValueError, match=r"4 of 4 samples of .*, train, name no concept, by which `evaluate` goes"):
        run(CLIPConfig(TINY, settings, data, evaluate=["train"]))
    with pytest.raises(ValueError, match=r"name no concept, by which `same: concept` goes"):  # all would be the same
        run(CLIPConfig(TINY, settings, data, same="concept"))
    assert not (tmp_path / "out").exists()
    assert run(CLIPConfig(TINY, settings, data)).is_dir()


def test_a_run_goes_on_only_with_its_words_and_heads(corpus: Path, tmp_path: Path):
    """Neither shows in the shape of a weight."""
    settings = TrainConfig(str(tmp_path / "out"), 1, 4, precision="no", tracker="none")
    run(CLIPConfig(TINY, settings, DataConfig(str(corpus))))
    settings = replace(settings, steps=2, resume=True)
    with pytest.raises(ValueError, match="vision tower of 2 heads, the config says 4"):
        run(CLIPConfig(replace(TINY, image_heads=4), settings, DataConfig(str(corpus))))
    with pytest.raises(ValueError, match="another vocabulary"):
        run(CLIPConfig(TINY, settings, DataConfig(str(corpus), limit=5)))
    run(CLIPConfig(TINY, settings, DataConfig(str(corpus))))
    assert (tmp_path / "out" / "checkpoints" / "step-00000002").is_dir()


def test_labels_must_hold_every_concept(corpus: Path):
    clip = CLIP.build(TINY, ["red"])
    with pytest.raises(ValueError, match="7 concepts"):
        evaluate(clip, ShardDataset(DataConfig(str(corpus))), ["red"])


def test_what_is_remembered_is_what_was_computed(corpus: Path):
    torch.manual_seed(0)
    clip = CLIP.build(TINY, ["a red square"])
    remembered, forgetful = RememberedCLIP(clip), RememberedCLIP(clip, room=100)
    x = torch.rand(4, 3, 16, 16) * 2 - 1
    for rows in ([0, 1], [1, 1, 2], [3, 0]):
        texts = [f"a red square {'red ' * i}" for i in rows]
        for of in (remembered, forgetful):
            assert torch.allclose(of.encode_image(x[rows]), clip.encode_image(x[rows]), atol=1e-6)
            ours, theirs = of.encode_text(texts), clip.encode_text(texts)
            assert torch.equal(ours.mask, theirs.mask)
            assert torch.allclose(ours.z_t, theirs.z_t, atol=1e-6)
            assert torch.allclose(ours.states[ours.mask], theirs.states[theirs.mask], atol=1e-5)
    with torch.no_grad():  # changes what would be computed, not what is remembered
        old = remembered.encode_image(x)
        clip.model.visual_projection.weight.normal_()
    assert torch.equal(remembered.encode_image(x), old)
    assert not torch.allclose(forgetful.encode_image(x), old)


def test_recipes_fit_their_config(request):
    for recipe in ("emoji/clip", "emoji/clip_near", "emoji/clip_backgrounds", "emoji/clip_bpe", "paper/clip"):
        config = parse(CLIPConfig, ["--config", str(Path(request.config.rootpath) / "recipes" / f"{recipe}.yaml")])
        assert isinstance(config.model, CLIPArguments)
        assert isinstance(config.data, DataConfig)


def test_loss_is_a_function_of_the_draws(corpus: Path):
    torch.manual_seed(0)
    clip = CLIP.build(TINY, ["red"])
    dataset = ShardDataset(DataConfig(str(corpus)))
    config = CLIPConfig(TINY, TrainConfig("unused", 1, 4), DataConfig(str(corpus)), shift=0.2)
    loss_fn = clip_loss(config, clip)
    batch = collate([dataset[i] for i in range(4)])
    batch["image"] = torch.randint(256, (4, 3, 16, 16), dtype=torch.uint8)
    losses = [loss_fn(clip, {**batch, "draws": Draws(0, step, range(4))})[0] for step in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]
    plain, metrics = loss_fn(clip, {**batch, "draws": Draws(0, 0, range(4))})
    drawn_near = clip_loss(replace(config, align=2.0), clip)(clip, {**batch, "draws": Draws(0, 0, range(4))})[0]
    assert torch.allclose(drawn_near, plain + 2 * (1 - metrics["cosine"]))
