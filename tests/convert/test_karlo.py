"""Karlo's folders into ours and back: exact, and what a pipeline of them does."""

import json
import re
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file
from torch import nn

from decoder.decoder import Decoder
from prior.diffusion_prior import DiffusionPrior
from unclip.cli import main
from unclip.convert import karlo_configs as configs
from unclip.convert import karlo_keys as keys
from unclip.convert.karlo import load_prior, write_diffusers
from unclip.core.diffusion import make_scheduler
from unclip.pipeline import UnCLIP
from upsamplers.upsampler import Upsampler

NETWORKS = ("prior", "decoder", "upsampler_256", "upsampler_256_last")
WEIGHTS = "diffusion_pytorch_model"
SHORT = {"preset": "karlo", "steps": (2, 2, 2), "output_type": "np"}


def states(pipe: UnCLIP) -> dict[str, torch.Tensor]:
    """All weights of a pipeline by name."""
    networks = {name: getattr(pipe, name) for name in NETWORKS} | {"clip": pipe.clip}
    return {
        f"{name}.{key}": w for name, net in networks.items() if net is not None for key, w in net.state_dict().items()
    }


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture(scope="module")
def pipe(text2img: Path) -> UnCLIP:
    return UnCLIP.from_pretrained(text2img)


# --- there and back


@pytest.mark.parametrize("layout", ["text2img", "variations"])
def test_there_and_back_is_exact(layout, request, parts, tmp_path: Path):
    """Their folder, ours, ours as a folder, theirs again, ours again: the same weights and the same configs."""
    source = request.getfixturevalue(layout)
    first = UnCLIP.from_pretrained(source)
    second = UnCLIP.from_pretrained(first.save_pretrained(tmp_path / "ours"))
    back = write_diffusers(second, tmp_path / "theirs")
    third = UnCLIP.from_pretrained(back)
    assert equal(states(first), states(second)) and equal(states(first), states(third))
    assert first.presets == second.presets == third.presets
    for name, part in parts.items():
        folder = source / name
        assert (back / name).is_dir() == folder.is_dir()
        if not folder.is_dir() or not isinstance(part, nn.Module):
            continue
        again = type(part).from_pretrained(back / name)
        assert equal(again.state_dict(), part.state_dict())
        stored = json.loads((folder / "config.json").read_text())
        for key, value in json.loads((back / name / "config.json").read_text()).items():
            if "version" not in key and key in stored:
                assert value == stored[key], (name, key)
    for name in ("prior_scheduler", "decoder_scheduler", "super_res_scheduler"):
        if (source / name).is_dir():
            stored = dict(parts[name].config)
            stored.pop("_use_default_values", None)  # how the object was built, which no file says
            assert dict(parts[name].from_pretrained(back / name).config) == stored
    assert json.loads((back / "model_index.json").read_text())["_class_name"].startswith("UnCLIP")
    if layout == "text2img":
        prompt = "a red apple"
        assert np.array_equal(first(prompt, **SHORT).images, third(prompt, **SHORT).images)


def test_diffusers_pipeline_loads_what_is_written(pipe: UnCLIP, tmp_path: Path):
    from diffusers import UnCLIPPipeline

    again = UnCLIPPipeline.from_pretrained(write_diffusers(pipe, tmp_path / "theirs"))
    assert equal(again.text_proj.state_dict(), load_file(tmp_path / "theirs" / "text_proj" / f"{WEIGHTS}.safetensors"))


@pytest.mark.parametrize("library", ["unclip", "diffusers"])
def test_pickles_and_either_library(library, pipe: UnCLIP, text2img: Path, tmp_path: Path):
    folder = Path(shutil.copytree(text2img, tmp_path / "pickled"))
    for path in folder.glob(f"*/{WEIGHTS}.safetensors"):
        torch.save(load_file(path), path.with_suffix(".bin"))
        path.unlink()
    tower = folder / "text_encoder" / "model.safetensors"
    torch.save(load_file(tower), tower.with_name("pytorch_model.bin"))
    tower.unlink()
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace('"unclip"', f'"{library}"'))
    assert equal(states(UnCLIP.from_pretrained(folder)), states(pipe))


def test_a_hub_name_fetches_pickles_only_where_there_is_nothing_else(pipe, text2img, tmp_path: Path, monkeypatch):
    hub, cache = Path(shutil.copytree(text2img, tmp_path / "hub")), tmp_path / "cache"
    for path in hub.glob(f"*/{WEIGHTS}.safetensors"):
        torch.save(load_file(path), path.with_suffix(".bin"))
    (hub / "decoder" / f"{WEIGHTS}.safetensors").unlink()
    (hub / "prior" / f"{WEIGHTS}.fp16.safetensors").write_bytes(b"x")
    (hub / "prior" / f"{WEIGHTS}.fp16.bin").write_bytes(b"x")

    def snapshot_download(name: str, allow_patterns, ignore_patterns) -> str:
        assert name == "kakaobrain/karlo-v1-alpha"
        files = [str(path.relative_to(hub)) for path in hub.rglob("*") if path.is_file()]
        for file in filter_repo_objects(files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            (cache / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(hub / file, cache / file)
        return str(cache)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    fetched = UnCLIP.from_pretrained("kakaobrain/karlo-v1-alpha")
    assert fetched.model_name == "kakaobrain/karlo-v1-alpha"
    assert equal(states(fetched), states(pipe))
    assert [str(path.relative_to(cache)) for path in cache.rglob("*.bin")] == [f"decoder/{WEIGHTS}.bin"]
    assert not list(cache.rglob("*.fp16.*"))


def test_half_precision_is_the_weights_rounded(pipe: UnCLIP, text2img: Path):
    half = UnCLIP.from_pretrained(text2img, dtype="bf16")
    assert half.dtype == torch.bfloat16
    assert equal(states(half), {key: w.bfloat16() if w.is_floating_point() else w for key, w in states(pipe).items()})


def test_a_number_for_each_level_is_the_number(pipe: UnCLIP, text2img: Path, tmp_path: Path):
    folder = Path(shutil.copytree(text2img, tmp_path / "levels"))
    path = folder / "decoder" / "config.json"
    levels = {"attention_head_dim": [8, 8, 8], "cross_attention_dim": [36, 36, 36]}
    path.write_text(json.dumps({**json.loads(path.read_text()), **levels}))
    assert equal(states(UnCLIP.from_pretrained(folder)), states(pipe))


def test_shards(pipe: UnCLIP, text2img: Path, parts, tmp_path: Path):
    folder = Path(shutil.copytree(text2img, tmp_path / "shards"))
    shutil.rmtree(folder / "decoder")
    parts["decoder"].save_pretrained(folder / "decoder", max_shard_size="100KB")
    assert len(list((folder / "decoder").glob("*.safetensors"))) > 1
    assert equal(states(UnCLIP.from_pretrained(folder)), states(pipe))


def test_the_command_converts_both_ways(pipe: UnCLIP, text2img: Path, tmp_path: Path, capsys):
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for arguments, out in (([str(text2img)], ours), (["--to-diffusers", str(ours)], theirs)):
        with pytest.raises(SystemExit) as exit_:
            main(["convert", "karlo", *arguments, str(out)])
        assert not exit_.value.code
        printed = capsys.readouterr()
        assert printed.out.splitlines()[-1] == str(out)
        assert printed.err.count("CreativeML Open RAIL-M") == 1
    assert json.loads((ours / "model_index.json").read_text())["_class_name"] == "UnCLIP"
    assert not list(ours.rglob("*.bin"))
    assert equal(states(UnCLIP.from_pretrained(ours)), states(pipe))
    assert equal(states(UnCLIP.from_pretrained(theirs)), states(pipe))
    (tmp_path / "letter").mkdir()
    (tmp_path / "letter" / "dear.txt").write_text("you")
    with pytest.raises(SystemExit) as exit_:
        main(["convert", "karlo", str(text2img), str(tmp_path / "letter")])
    assert exit_.value.code == 2 and "holds no model_index.json" in capsys.readouterr().err


def test_the_licence_goes_along(text2img: Path, tmp_path: Path, capsys):
    notice = UnCLIP.from_pretrained(text2img).save_pretrained(tmp_path / "ours") / "LICENSE"
    assert "https://huggingface.co/spaces/CompVis/stable-diffusion-license" in notice.read_text()
    own = Path(shutil.copytree(text2img, tmp_path / "licensed"))
    (own / "LICENSE.md").write_text("the whole text")
    capsys.readouterr()
    pipe = UnCLIP.from_pretrained(own)
    printed = capsys.readouterr()
    assert not printed.out and printed.err.count("licensed: weights under CreativeML Open RAIL-M") == 1
    assert (pipe.save_pretrained(tmp_path / "copy") / "LICENSE").read_text() == "the whole text"
    assert (write_diffusers(pipe, tmp_path / "theirs") / "LICENSE").read_text() == "the whole text"


# --- what it does with them


def test_sizes_of_the_real_ones():
    """The parameters of Karlo's networks, from their configs alone."""
    widths = {"block_out_channels": [320, 640, 960, 1280], "layers_per_block": 3}
    cross = {"attention_head_dim": 64, "cross_attention_dim": 1536, "class_embed_type": "identity"}
    decoder = {**widths, **cross, "sample_size": 64, "in_channels": 3, "out_channels": 6, "norm_eps": 1e-5}
    decoder |= {"resnet_time_scale_shift": "scale_shift", "mid_block_type": "UNetMidBlock2DSimpleCrossAttn"}
    decoder |= configs.block_types([False, True, True, True])
    proj = {"time_embed_dim": 1280, "cross_attention_dim": 1536}
    super_res = {**widths, **configs.block_types([False] * 4), "sample_size": 256, "in_channels": 6, "out_channels": 3}
    with torch.device("meta"):
        prior = DiffusionPrior(**configs.prior_arguments({"num_embeddings": 77, "embedding_dim": 768}))
        net = Decoder(**configs.decoder_arguments(decoder, proj))
        upsampler = Upsampler(**configs.upsampler_arguments({**super_res, "add_attention": False}, 4))

    def count(network: nn.Module) -> int:  # the prior's statistics are parameters to diffusers, buffers here
        return sum(tensor.numel() for tensor in network.state_dict().values())

    assert count(prior) == 1_022_030_080
    assert count(net.unet) == 885_439_686
    assert count(net) - count(net.unet) == 7_878_400
    assert count(upsampler) == 691_579_523


def test_keys_cover_every_tensor_of_ours_once(pipe: UnCLIP):
    maps = {"prior": keys.prior_keys, "decoder": keys.decoder_keys, "upsampler_256": keys.upsampler_keys}
    for name, pieces_of in maps.items():
        net, rows = getattr(pipe, name), {}
        for piece in pieces_of(net):
            rows.setdefault(piece.ours, []).append(piece.rows)
        state = net.state_dict()
        assert rows.keys() == state.keys()
        for key, parts in rows.items():
            ends = [0, *(stop for _, stop in parts)] if parts[0] else [0, len(state[key])]
            assert parts == [None] or parts == list(pairwise(ends))
            assert ends[-1] == len(state[key])


def test_a_null_context_follows_clips_weights(text2img: Path):
    """The null condition is the encoded empty prompt: it changes with the text tower."""
    one, other = UnCLIP.from_pretrained(text2img), UnCLIP.from_pretrained(text2img)
    before = one("a red apple", **SHORT).images
    for pipe in (one, other):
        with torch.no_grad():
            pipe.clip.model.text_projection.weight.mul_(2)
    assert np.array_equal(one("a red apple", **SHORT).images, other("a red apple", **SHORT).images)
    assert not np.allclose(one("a red apple", **SHORT).images, before)


def test_seeds_are_pictures_of_their_own(pipe: UnCLIP):
    together = pipe(["a red apple", "a pear"], num_images=2, seed=3, **SHORT)
    alone = pipe("a pear", seed=4, **SHORT)
    assert together.seeds == [3, 4, 3, 4]
    # nearly all: see the seeds of test_karlo_parity.py for the pixels that rounding decides
    assert np.isclose(together.images[3], alone.images[0], atol=1 / 255).mean() >= 0.999
    assert pipe("a pear", seed=4, steps=(2, 2, 2), output_type="np").stages.keys() == {8, 32}


def test_another_prior_and_a_1024_upsampler_as_components(text2img: Path, pipe: UnCLIP):
    small = {"model_channels": 8, "channel_multipliers": (1, 2), "num_res_blocks": 1}
    upsampler = Upsampler(**small, sample_size=128, patch_size=2).eval()
    prior, scheduler = load_prior(text2img)
    with torch.no_grad():
        prior.head.bias.add_(1.0)
    given = {"upsampler_1024": upsampler, "upsampler_1024_scheduler": make_scheduler("linear", "v_prediction")}
    other = UnCLIP.from_pretrained(text2img, prior=prior, prior_scheduler=scheduler, **given)
    assert other.sizes == [8, 32, 128]
    a, b = (p("a pear", **SHORT, size=32) for p in (pipe, other))
    assert not torch.allclose(a.image_embeds, b.image_embeds, atol=1e-3)
    large = other("a pear", preset="karlo", steps=(2, 2, 2, 1), size=128, output_type="np")
    assert large.images.shape == (1, 128, 128, 3)
    assert np.array_equal(large.stages[32], b.images)
    with pytest.raises(ValueError, match="other upsamplers"):
        write_diffusers(other, text2img.with_name("never"))
    assert not text2img.with_name("never").exists()


def test_variations_need_no_prompt_and_captions_need_a_prior(variations: Path, pipe: UnCLIP, pictures):
    other = UnCLIP.from_pretrained(variations)
    with pytest.raises(ValueError, match="no prior"):
        other("a red apple")
    with pytest.raises(ValueError, match="no image encoder"):
        pipe(image=pictures)
    z_i = other.encode_image(pictures[:2])
    assert not torch.allclose(z_i.norm(dim=1), torch.ones(2), atol=0.1)
    by_z_i = other(z_i=z_i.repeat_interleave(2, 0), num_images=2, **SHORT)
    by_image = other(image=pictures[:2], num_images=2, **SHORT)
    assert np.array_equal(by_z_i.images, by_image.images)
    captioned = other(["a red apple", "a pear"], image=pictures[:2], num_images=2, **SHORT)
    assert not np.allclose(captioned.images, by_image.images)
    assert np.allclose(pipe(z_i=z_i, **SHORT).images[0], by_image.images[0], atol=1e-3)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"prompt": "a", "generator": [torch.Generator()] * 2}, "2 generators came for 1 pictures"),
        ({"prompt": "a", "generator": []}, "0 generators"),
        ({"image": []}, "image came empty"),
        ({"image": torch.zeros(1, 3, 20, 20), "z_i": torch.zeros(1, 24)}, "together with z_i"),
        ({"prompt": ["a", "b"], "image": torch.zeros(1, 3, 20, 20)}, "1 pictures came with 2 prompts"),
        ({"z_i": torch.zeros(3, 24), "num_images": 2}, "z_i is"),
        ({}, "of type NoneType"),
        ({"prompt": ""}, "prompt is empty"),
    ],
)
def test_bad_arguments(pipe: UnCLIP, arguments, says):
    with pytest.raises((ValueError, TypeError), match=says):
        pipe(**arguments)


def test_our_own_model_is_not_written_as_karlo(tiny_model: Path, text2img: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="not of Karlo's kind"):
        write_diffusers(UnCLIP.from_pretrained(tiny_model), tmp_path / "theirs")
    pipe = UnCLIP.from_pretrained(text2img)
    pipe.decoder.register_to_config(z_i_scale=2.0)
    with pytest.raises(ValueError, match=r"decoder is not of Karlo's kind: its z_i_scale is 2.0, not 1.0"):
        write_diffusers(pipe, tmp_path / "theirs")
    assert not (tmp_path / "theirs").exists()


def test_the_page_runs(text2img: Path, variations: Path, pictures, tmp_path: Path, monkeypatch):
    """docs/karlo.md's code from top to bottom, on the small folders: 32 px stand for 256, 128 for 1024."""
    monkeypatch.chdir(tmp_path)
    pictures[0].save("cat.png")
    folders = {
        "kakaobrain/karlo-v1-alpha-image-variations": variations,
        "kakaobrain/karlo-v1-alpha": text2img,
        "kandinsky-community/kandinsky-2-1-prior": text2img,
        "karlo": text2img,
    }
    small = {"model_channels": 8, "channel_multipliers": (1, 2), "num_res_blocks": 1, "sample_size": 128}
    given = {"upsampler": Upsampler(**small).eval(), "scheduler": make_scheduler("linear", "v_prediction")}
    page = (Path(__file__).parents[2] / "docs" / "karlo.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", page, re.M | re.S)
    assert len(blocks) == 5
    for block in blocks:
        for name, folder in folders.items():
            block = block.replace(f'("{name}"', f"({str(folder)!r}")
        exec(compile(block.replace("size=1024", "size=128"), "docs/karlo.md", "exec"), given)
    assert given["images"][0].size == (128, 128)
    assert isinstance(given["prior"], DiffusionPrior)
