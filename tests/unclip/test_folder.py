"""Model folders: they round-trip, the broken ones are refused in one sentence, foreign ones stay."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from prior.autoregressive_prior import AutoregressivePrior
from prior.pca import PCA
from unclip.folder import INDEX, find_model, model_digest, write_component
from unclip.pipeline import UnCLIP
from unclip.presets import read_presets

PROMPTS = ["a red apple", "two yellow stars and a small purple house"]


def test_folder_round_trip_keeps_pictures_and_names_no_place(pipe: UnCLIP, tiny_model: Path, tmp_path: Path) -> None:
    folder = pipe.save_pretrained(tmp_path / "again")
    again = UnCLIP.from_pretrained(str(folder))
    assert torch.equal(again(PROMPTS, output_type="pt").images, pipe(PROMPTS, output_type="pt").images)
    assert again.presets == pipe.presets
    assert again.config["license"] == "apache-2.0"
    assert again.model_name == "again"
    for path in folder.rglob("*.json"):
        assert str(tiny_model.parent) not in path.read_text()
    names = {str(p.relative_to(folder)) for p in folder.rglob("*")}
    assert names == {str(p.relative_to(tiny_model)) for p in tiny_model.rglob("*")}
    assert not any(name.endswith((".bin", ".pt", ".pkl")) for name in names)


def test_the_embedded_model_is_not_a_folder_that_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("unclip.folder.WEIGHTS", tmp_path / "weights")
    for name in ("emoji", "weights/emoji"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "weights" / "emoji" / INDEX).write_text("{}")
    assert find_model(None) == (tmp_path / "weights" / "emoji", "emoji")
    with pytest.raises(FileNotFoundError, match=INDEX):
        find_model("emoji")  # a folder that is named


def test_half_precision_storage_runs_in_fp32(pipe: UnCLIP, tmp_path: Path) -> None:
    folder = pipe.save_pretrained(tmp_path / "half", dtype="fp16", max_shard_size="10KB")
    assert len(list((folder / "decoder").glob("*.safetensors"))) > 1
    half = UnCLIP.from_pretrained(folder)
    assert half.dtype == torch.float32
    assert pipe.dtype == torch.float32
    for name in ("prior", "decoder", "upsampler_256"):
        for a, b in zip(getattr(half, name).parameters(), getattr(pipe, name).parameters(), strict=True):
            assert torch.equal(a, b.half().float())
    assert torch.equal(half.clip.model.logit_scale, pipe.clip.model.logit_scale.half().float())


def test_half_precision_storage_keeps_the_digits_of_statistics(tmp_path: Path) -> None:
    """A quantiser's edges lie closer together than fp16 tells apart: the tokens of an embedding must stay."""
    small = {"width": 16, "depth": 1, "heads": 2, "components": 4, "buckets": 512, "dot_buckets": 4}
    prior = AutoregressivePrior(embedding_dim=16, text_width=24, context_length=24, **small)
    z_i = F.normalize(torch.randn(400, 16, generator=torch.Generator().manual_seed(0)) + 3, dim=-1)
    prior.set_statistics(PCA.fit(z_i), z_i, torch.linspace(0.2, 0.3, 400))
    write_component("prior_ar", prior, tmp_path, torch.bfloat16, "1GB")
    again = AutoregressivePrior.from_pretrained(tmp_path / "prior_ar").state_dict()
    for name, x in prior.state_dict().items():
        exact = name.split(".")[0] in ("pca", "quantiser", "dots")
        assert torch.equal(again[name].to(x.dtype), x if exact or not x.is_floating_point() else x.bfloat16().float())


def test_bf16_draws_nearly_the_same(pipe: UnCLIP, tiny_model: Path) -> None:
    half = UnCLIP.from_pretrained(tiny_model, dtype="bf16")
    assert half.dtype == half.clip.dtype == torch.bfloat16
    z_i = torch.randn(1, 16)
    difference = half.decode(z_i, None, [0]) - pipe.decode(z_i, None, [0])
    assert difference.dtype == torch.float32
    assert difference.abs().mean() < 0.1


def test_a_model_may_stop_early(pipe: UnCLIP, tmp_path: Path) -> None:
    parts = {name: part for name, part in pipe.components.items() if "upsampler" not in name}
    short = UnCLIP.from_pretrained(UnCLIP(**parts).save_pretrained(tmp_path / "short"))
    assert short.sizes == [16]
    assert short("a red apple").images[0].size == (16, 16)
    with pytest.raises(ValueError, match="size 64 is not offered"):
        short("a red apple", size=64)
    assert short.presets == read_presets(None)


def test_a_digest_is_of_what_a_model_holds(pipe: UnCLIP, copy_model) -> None:
    folder = copy_model()

    def digest() -> str:
        return model_digest(UnCLIP.from_pretrained(folder))

    assert digest() == model_digest(pipe)
    found = {digest()}
    weights = folder / "prior" / "diffusion_pytorch_model.safetensors"
    changed = load_file(weights)
    changed[max(changed)] *= 1.01
    save_file(changed, weights, {"format": "pt"})
    for file, old, new in (
        ("model_index.json", '"guidance_scale": 2.0', '"guidance_scale": 2.5'),
        ("decoder_scheduler/scheduler_config.json", '"clip_sample_range": 1.0', '"clip_sample_range": 2.0'),
    ):
        found.add(digest())
        text = (folder / file).read_text()
        assert old in text
        (folder / file).write_text(text.replace(old, new))
    assert len({*found, digest()}) == 4


def damage_truncate(folder: Path) -> None:
    path = folder / "decoder" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def damage_header(folder: Path) -> None:
    (folder / "prior" / "diffusion_pytorch_model.safetensors").write_bytes(b"\xff" * 64)


def damage_remove(folder: Path) -> None:
    (folder / "decoder" / "diffusion_pytorch_model.safetensors").unlink()


def damage_config(folder: Path) -> None:
    path = folder / "decoder" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_channels": 16}))


def damage_deeper(folder: Path) -> None:
    path = folder / "upsampler_256" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_res_blocks": 2}))


def damage_shallower(folder: Path) -> None:
    path = folder / "prior" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "depth": 1}))


def damage_index(folder: Path) -> None:
    (folder / "model_index.json").write_text("{")


def damage_class(folder: Path) -> None:
    path = folder / "model_index.json"
    path.write_text(path.read_text().replace('"Decoder"', '"UNet2DModel"'))


def damage_required(folder: Path) -> None:
    path = folder / "model_index.json"
    path.write_text(path.read_text().replace('"prior_scheduler"', '"other"'))


def damage_clip(folder: Path) -> None:
    path = folder / "clip" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def damage_tokenizer(folder: Path) -> None:
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")


def damage_half_a_tokenizer(folder: Path) -> None:
    path = folder / "tokenizer" / "tokenizer.json"
    path.write_bytes(path.read_bytes()[:200])


def damage_clip_config(folder: Path) -> None:
    (folder / "clip" / "config.json").write_text("{")


def damage_presets(folder: Path) -> None:
    path = folder / "model_index.json"
    index = json.loads(path.read_text())
    index["presets"] = {"default": {"decoder": {"steps": 0}}}
    path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (damage_truncate, "bytes where its header says"),
        (damage_header, "no whole safetensors file"),
        (damage_remove, "lacks its"),
        (damage_config, "does not load as Decoder"),
        (damage_deeper, "lacks the weights|does not load as Upsampler"),
        (damage_shallower, "beyond its config"),
        (damage_index, "is not JSON"),
        (damage_class, "expected Decoder"),
        (damage_required, "names no prior_scheduler"),
        (damage_clip, "bytes"),
        (damage_tokenizer, r"^\S+/tokenizer does not load as CLIP's tokenizer \("),
        (damage_half_a_tokenizer, r"^\S+/tokenizer does not load as CLIP's tokenizer \("),
        (damage_clip_config, r"^\S+/clip does not load as CLIP \("),
        (damage_presets, "steps are 0"),
    ],
)
def test_a_damaged_folder_is_one_sentence(damage, says: str, copy_model) -> None:
    folder = copy_model()
    damage(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=says) as caught:
        UnCLIP.from_pretrained(folder)
    assert "\n" not in str(caught.value)
    assert str(caught.value).count(" again.") <= 1


@pytest.mark.parametrize("name", ["nowhere", "./nowhere", "a/b/c", "/nowhere/at/all", ""])
def test_an_unknown_model_is_one_sentence(name: str) -> None:
    with pytest.raises(FileNotFoundError, match="give a folder"):
        UnCLIP.from_pretrained(name)


def test_a_foreign_folder_is_never_overwritten(pipe: UnCLIP, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(FileExistsError, match=r"holds no model_index\.json"):
        pipe.save_pretrained(tmp_path / "mine")
    assert [p.name for p in tmp_path.rglob("*")] == ["mine", "letter.txt"]
