import io
import json
import os
import pickle
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from unclip.core.data import (
    COLOURS,
    DataConfig,
    Draws,
    ShardDataset,
    collate,
    draw_pictures_and_captions,
    fit,
    load_image,
    pil_from_pixels,
    pixels_from_pil,
    read_index,
    tensor_from_pil,
    to_pixels,
)


def drawing(seed: int, size: int = 8, mode: str = "RGBA") -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (size, size, len(mode)), dtype=np.uint8))


def webp(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "webp", lossless=True, exact=True)
    return file.getvalue()


def write_shard(path: Path, samples: dict[str, dict[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for key, parts in samples.items():
            for suffix, data in parts.items():
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def sample(i: int, **changes) -> dict[str, bytes]:
    meta = {"captions": [f"thing {i}", f"a thing {i}"], "concept": f"c{i % 3}", "style": "ab"[i % 2], "group": "g"}
    return {"webp": webp(drawing(i)), "json": json.dumps({**meta, **changes}).encode()}


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    write_shard(tmp_path / "train-00000.tar", {f"k{i}": sample(i) for i in range(4)})
    write_shard(tmp_path / "train-00001.tar", {f"k{i}": sample(i) for i in range(4, 7)})
    write_shard(tmp_path / "test-00000.tar", {"k9": sample(9)})
    return tmp_path


# ---------------------------------------------------------------------------------------------- shards


def test_items_are_what_was_written_in_order(corpus: Path):
    data = ShardDataset(DataConfig(str(corpus)))
    assert [data[i]["key"] for i in range(len(data))] == [f"k{i}" for i in range(7)]
    for i in (0, 5, 0):
        assert torch.equal(data[i]["image"], tensor_from_pil(drawing(i)))
    assert data[4]["captions"] == ["thing 4", "a thing 4"]
    assert data[-1]["index"] == 6
    with pytest.raises(IndexError):
        data[7]


def test_restrictions(corpus: Path, tmp_path: Path):
    listed = tmp_path / "concepts.txt"
    listed.write_text("c0\nc2\n\n", encoding="utf-8-sig")  # the mark that some editors put first is no text

    def keys(**kwargs):
        return [row[1] for row in ShardDataset(DataConfig(str(corpus), **kwargs)).rows]

    assert keys(styles=["a"]) == ["k0", "k2", "k4", "k6"]
    assert keys(concepts=str(listed)) == ["k0", "k2", "k3", "k5", "k6"]
    assert keys(concepts=str(listed), styles=["b"], limit=1) == ["k3"]
    assert keys(split="test+train", limit=2) == ["k9", "k0"]
    with pytest.raises(ValueError, match="No sample"):
        keys(groups=["nothing"])
    with pytest.raises(ValueError, match=r"data\.limit is 0"):
        keys(limit=0)


def test_a_split_is_not_another_that_begins_with_its_name(corpus: Path):
    write_shard(corpus / "train-2-00000.tar", {"k20": sample(20)})
    assert len(ShardDataset(DataConfig(str(corpus)))) == 7
    assert len(ShardDataset(DataConfig(str(corpus), "train-2"))) == 1


def test_missing_folder_and_split_are_named(corpus: Path):
    with pytest.raises(FileNotFoundError, match="no corpus folder"):
        ShardDataset(DataConfig(str(corpus / "nowhere")))
    with pytest.raises(FileNotFoundError, match="'valid'; it holds test, train"):
        ShardDataset(DataConfig(str(corpus), split="valid"))


def test_index_is_kept_and_follows_the_shard(corpus: Path):
    shard, beside = corpus / "test-00000.tar", corpus / "test-00000.tar.index.json"
    first = read_index(shard)
    # a marked index proves that the second reading takes it from disk
    stored = json.loads(beside.read_text())
    stored["members"]["marked"] = {}
    beside.write_text(json.dumps(stored))
    assert "marked" in read_index(shard)
    write_shard(shard, {"other": sample(1)})
    os.utime(shard, ns=(1, 1))
    assert list(read_index(shard)) == ["other"] != list(first)
    beside.write_text("{half")
    assert list(read_index(shard)) == ["other"]
    assert not list(corpus.glob("*.partial"))


def test_offsets_are_those_of_the_bytes(corpus: Path):
    shard = corpus / "train-00000.tar"
    for i, parts in enumerate(read_index(shard).values()):
        offset, length = parts["webp"]
        assert shard.read_bytes()[offset : offset + length] == webp(drawing(i))


def test_truncated_shard_is_one_sentence(corpus: Path):
    shard = corpus / "train-00000.tar"
    shard.write_bytes(shard.read_bytes()[:1700])
    with pytest.raises(ValueError, match=r"train-00000\.tar is damaged"):
        ShardDataset(DataConfig(str(corpus)))


@pytest.mark.parametrize(
    ("parts", "sentence"),
    [
        ({"webp": b"no picture"}, "k1 in .*train-00000.tar cannot be used: the picture is not a readable picture"),
        ({"webp": webp(drawing(0))[:60]}, "k1 in .*train-00000.tar cannot be used"),
        ({"json": b"{"}, "k1 in .* no usable key.json"),
        ({"json": b'{"captions": ["  "]}'}, "k1 in .* no usable key.json: no caption"),
        ({"json": b"[]"}, "k1 in .* no usable key.json"),
    ],
)
def test_bad_samples_are_named(corpus: Path, parts: dict[str, bytes], sentence: str):
    write_shard(corpus / "train-00000.tar", {"k0": sample(0), "k1": {**sample(1), **parts}})
    with pytest.raises(ValueError, match=sentence):
        ShardDataset(DataConfig(str(corpus)))[1]


def test_sample_without_picture_is_named(corpus: Path):
    write_shard(corpus / "test-00000.tar", {"k1": {"json": sample(1)["json"]}})
    with pytest.raises(ValueError, match=r"k1 in .* has no picture"):
        ShardDataset(DataConfig(str(corpus), split="test"))[0]


def test_cache_holds_pictures_up_to_its_room(corpus: Path):
    one = 4 * 8 * 8
    data = ShardDataset(DataConfig(str(corpus)), cache_bytes=2 * one)
    first = [data[i]["image"] for i in range(4)]
    assert data[0]["image"] is first[0]
    assert data[3]["image"] is not first[3]
    assert torch.equal(data[3]["image"], first[3])
    uncached = ShardDataset(DataConfig(str(corpus)), cache=False)
    assert uncached[0]["image"] is not uncached[0]["image"]


def test_workers_see_the_same_items(corpus: Path):
    data = ShardDataset(DataConfig(str(corpus)), cache_bytes=2 * 4 * 8 * 8)
    data[0], data[1]
    worker = pickle.loads(pickle.dumps(data))
    assert torch.equal(worker[3]["image"], data[3]["image"])
    assert worker[3]["image"] is worker[3]["image"]  # it has room of its own
    plain, spread = (DataLoader(data, 2, collate_fn=collate, num_workers=n) for n in (0, 2))
    for a, b in zip(plain, spread, strict=True):
        assert a["key"] == b["key"] and torch.equal(a["image"], b["image"])


def test_embeddings_are_read(corpus: Path):
    file = io.BytesIO()
    np.save(file, np.arange(3, dtype=np.float16))
    write_shard(corpus / "test-00000.tar", {"k1": {**sample(1), "z_i.npy": file.getvalue()}})
    data = ShardDataset(DataConfig(str(corpus), split="test"))
    assert torch.equal(collate([data[0], data[0]])["z_i"], torch.arange(3.0).expand(2, 3))
    lacking = {name: value for name, value in data[0].items() if name != "z_i"}
    for items in ([data[0], lacking], [lacking, data[0]]):
        with pytest.raises(ValueError, match=r"1 of a batch's 2 samples have a z_i\.npy"):
            collate(items)


def test_collate_mixes_alpha_and_refuses_sizes():
    rgb, rgba = ({"image": tensor_from_pil(drawing(1, mode=m)), "key": m} for m in ("RGB", "RGBA"))
    batch = collate([rgb, rgba])
    assert batch["image"].shape == (2, 4, 8, 8) and batch["key"] == ["RGB", "RGBA"]
    assert (batch["image"][0, 3] == 255).all()
    with pytest.raises(ValueError, match="sizes"):
        collate([rgb, {"image": tensor_from_pil(drawing(1, 9, "RGB")), "key": "x"}])


# ---------------------------------------------------------------------------------------------- draws


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**40), st.integers(0, 2**30), st.lists(st.integers(0, 10**6), min_size=1, max_size=5))
def test_a_row_depends_on_its_own_triple_alone(seed: int, step: int, indices: list[int]):
    def take(draws: Draws) -> list[torch.Tensor]:
        return [draws.normal(2, 3), draws.uniform(), draws.integers(1000), draws.uniform(4)]

    together = take(Draws(seed, step, indices))
    for i, index in enumerate(indices):
        for whole, alone in zip(together, take(Draws(seed, step, torch.tensor([index]))), strict=True):
            assert torch.equal(whole[i : i + 1], alone)


def test_draws_differ_between_rows_steps_and_seeds():
    rows = [Draws(seed, step, range(50)).normal(4) for seed in range(5) for step in range(5)]
    assert len({tuple(r.tolist()) for r in torch.cat(rows)}) == 1250
    # swapping step and index, or 32-bit wrapping, must not repeat a row
    assert not torch.equal(Draws(0, 1, [2]).normal(4), Draws(0, 2, [1]).normal(4))
    assert not torch.equal(Draws(0, 0, [1]).normal(4), Draws(0, 0, [1 + 2**32]).normal(4))


def test_draws_have_their_distributions():
    draws = Draws(3, 7, range(200))
    normal, uniform, integers = draws.normal(100), draws.uniform(100), draws.integers(10)
    assert abs(normal.mean()) < 0.03 and abs(normal.std() - 1) < 0.03
    assert uniform.min() >= 0 and uniform.max() < 1 and abs(uniform.mean() - 0.5) < 0.02
    assert abs(torch.corrcoef(normal)[0, 1:]).max() < 0.5
    assert integers.dtype == torch.int64 and set(integers.tolist()) == set(range(10))
    assert draws.normal().shape == (200,)


def test_draws_refuse_nonsense():
    with pytest.raises(ValueError, match="negative"):
        Draws(0, -1, [0])
    with pytest.raises(ValueError, match="at least one"):
        Draws(0, 0, [0]).integers(0)


# ---------------------------------------------------------------------------------------------- pictures ↔ tensors


def test_pixels_round_trip():
    picture = drawing(3, mode="RGB")
    x = pixels_from_pil(picture)
    assert x.shape == (1, 3, 8, 8) and x.min() >= -1 and x.max() <= 1
    assert pil_from_pixels(x)[0].tobytes() == picture.tobytes()
    assert pil_from_pixels(x * 5)[0].getextrema() == ((0, 255),) * 3
    with pytest.raises(ValueError, match="expected"):
        pil_from_pixels(x[0])


def test_compositing_against_pil():
    picture = drawing(4)
    for name, rgb in {**COLOURS, "white": (255, 255, 255)}.items():
        ours = to_pixels(tensor_from_pil(picture)[None], None if name == "white" else torch.tensor([rgb]))
        theirs = Image.alpha_composite(Image.new("RGBA", picture.size, rgb), picture).convert("RGB")
        assert (ours - pixels_from_pil(theirs)).abs().max() <= 1.01 * 2 / 255


def batch_of(n: int, mode: str = "RGBA"):
    return collate([{"image": tensor_from_pil(drawing(i, mode=mode)), "captions": ["a", "b", "c"]} for i in range(n)])


def test_caption_and_background_agree():
    batch = batch_of(100)
    batch["image"][:, :, 0, 0] = 0  # a transparent corner shows the background
    x0, captions = draw_pictures_and_captions(batch, Draws(0, 0, range(100)), 0.5)
    assert {caption[0] for caption in captions} == set("abc")
    white = 0
    for picture, caption in zip(x0, captions, strict=True):
        rgb = (255, 255, 255)
        if " on a " in caption:
            rgb = COLOURS[caption.removesuffix(" background").rsplit(" ", 1)[1]]
        white += rgb == (255, 255, 255)
        assert torch.allclose(picture[:, 0, 0], torch.tensor(rgb) / 127.5 - 1)
    assert 25 < white < 75


def test_a_sample_is_drawn_the_same_in_any_batch():
    batch = batch_of(6)
    x0, captions = draw_pictures_and_captions(batch, Draws(5, 2, range(6)), 0.5)
    part = {"image": batch["image"][4:], "captions": batch["captions"][4:]}
    x0_part, captions_part = draw_pictures_and_captions(part, Draws(5, 2, [4, 5]), 0.5)
    assert torch.equal(x0[4:], x0_part) and captions[4:] == captions_part


def test_opaque_pictures_keep_their_background():
    _, captions = draw_pictures_and_captions(batch_of(20, "RGB"), Draws(0, 0, range(20)), 1.0)
    assert set(captions) <= set("abc")
    with pytest.raises(ValueError, match="probability"):
        draw_pictures_and_captions(batch_of(2), Draws(0, 0, range(2)), 1.5)


def test_every_kind_of_picture_loads(tmp_path: Path):
    rgb = drawing(1, 16, "RGB")
    palette = rgb.quantize(8)
    palette.info["transparency"] = 0
    deep = Image.fromarray(np.linspace(0, 65535, 256).reshape(16, 16).astype(np.uint16))
    kinds = {
        "rgb.png": (rgb, "RGB"), "rgba.png": (drawing(1, 16), "RGBA"), "grey.png": (rgb.convert("L"), "RGB"),
        "la.png": (drawing(1, 16).convert("LA"), "RGBA"), "palette.png": (palette, "RGBA"),
        "bit.png": (rgb.convert("1"), "RGB"), "deep.png": (deep, "RGB"), "cmyk.jpg": (rgb.convert("CMYK"), "RGB"),
        "float.tiff": (rgb.convert("F"), "RGB"), "dot.png": (rgb.crop((0, 0, 1, 1)), "RGB"),
    }  # fmt: skip
    for name, (picture, mode) in kinds.items():
        picture.save(tmp_path / name)
        loaded = load_image(tmp_path / name)
        assert (loaded.mode, loaded.size) == (mode, picture.size), name
        assert load_image((tmp_path / name).read_bytes(), 32).size == (32, 32), name
    deep_values = np.asarray(load_image(tmp_path / "deep.png"))[..., 0]
    assert deep_values.min() == 0 and deep_values.max() == 255 and len(np.unique(deep_values)) == 256


def test_rotation_and_animation(tmp_path: Path):
    picture = Image.new("RGB", (4, 2), "red")
    exif = picture.getexif()
    exif[0x0112] = 6
    picture.save(tmp_path / "turned.jpg", exif=exif)
    assert load_image(tmp_path / "turned.jpg").size == (2, 4)
    frames = [Image.new("RGB", (4, 4), c) for c in ("red", "blue")]
    frames[0].save(tmp_path / "film.gif", save_all=True, append_images=frames[1:])
    assert load_image(tmp_path / "film.gif").convert("RGB").getpixel((0, 0)) == (255, 0, 0)


def test_unreadable_pictures_are_one_sentence(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="no picture"):
        load_image(tmp_path / "none.png")
    (tmp_path / "text.png").write_text("hello")
    with pytest.raises(ValueError, match=r"text\.png is not a readable picture"):
        load_image(tmp_path / "text.png")
    drawing(1, 64).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:900])
    with pytest.raises(ValueError, match="not a readable picture"):
        load_image(tmp_path / "cut.png")
    # turned on its side, which makes Pillow write the data anew, and the name of its software is a number
    entries = struct.pack("<HHLL", 0x0112, 3, 1, 6) + struct.pack("<HHLf", 0x0131, 11, 1, 0.5)
    exif = b"Exif\0\0II*\0" + struct.pack("<LH", 8, 2) + entries + bytes(4)
    Image.new("RGB", (4, 2)).save(tmp_path / "exif.jpg", exif=exif)
    with pytest.raises(ValueError, match=r"exif\.jpg is not a readable picture"):
        load_image(tmp_path / "exif.jpg")
    with pytest.raises(TypeError, match="not int"):
        load_image(3)  # pyright: ignore[reportArgumentType]


def test_giant_picture_is_one_sentence(tmp_path: Path):
    path = tmp_path / "giant.png"
    Image.new("1", (20_000, 20_000)).save(path)
    with pytest.raises(ValueError, match=r"giant\.png has more than 128 Mi pixels"):
        load_image(path)


def test_fitting_keeps_proportions_and_centres():
    wide = fit(Image.new("RGB", (40, 20), "red"), 8)
    assert wide.getpixel((4, 4)) == (255, 0, 0) and wide.getpixel((4, 0)) == (255, 255, 255)
    tall = fit(Image.new("RGBA", (1, 100), "red"), 10)
    assert tall.size == (10, 10) and np.asarray(tall)[..., 3].sum() == 10 * 255
    # the colour hidden under transparency must not bleed into what is visible
    hidden = np.zeros((16, 16, 4), np.uint8)
    hidden[..., :3], hidden[4:12, 4:12] = (0, 255, 0), (255, 0, 0, 255)
    small = np.asarray(fit(Image.fromarray(hidden), 8))
    assert (small[small[..., 3] > 8][:, 1] < 8).all()


def test_pictures_of_several_sizes_need_a_size():
    pictures = [drawing(1, 8, "RGB"), drawing(1, 9, "RGB")]
    with pytest.raises(ValueError, match="give `size`"):
        pixels_from_pil(pictures)
    assert pixels_from_pil(pictures, 8).shape == (2, 3, 8, 8)
