"""A folder of Karlo's kind that does not fit is refused whole, by one sentence that names what is wrong."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from unclip.pipeline import UnCLIP

WEIGHTS = "diffusion_pytorch_model"


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(folder: Path, change: Callable[[dict], None]) -> None:
    path = folder / f"{WEIGHTS}.safetensors"
    state = load_file(path)
    change(state)
    save_file(state, path)


def unknown_key(folder: Path) -> None:
    edit_weights(folder / "prior", lambda state: state.update(surprise=torch.ones(1)))


def missing_keys(folder: Path) -> None:
    def change(state):
        for name in ("query", "key", "value"):
            del state[f"mid_block.attentions.0.to_{name[0]}.weight"]
        del state["conv_in.bias"]

    edit_weights(folder / "decoder", change)


def misshapen_key(folder: Path) -> None:
    edit_weights(folder / "text_proj", lambda state: state.update({"embedding_proj.bias": torch.ones(5)}))


def other_config(folder: Path) -> None:
    edit_json(folder / "prior" / "config.json", num_layers=4)


def other_activation(folder: Path) -> None:
    edit_json(folder / "super_res_last" / "config.json", act_fn="gelu")


def other_blocks(folder: Path) -> None:
    edit_json(folder / "decoder" / "config.json", down_block_types=["DownBlock2D"] * 3)


def no_width(folder: Path) -> None:
    path = folder / "decoder" / "config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "block_out_channels"}))


def several_heads(folder: Path) -> None:
    edit_json(folder / "decoder" / "config.json", attention_head_dim=[8, 8, 4])


def other_proj(folder: Path) -> None:
    edit_json(folder / "text_proj" / "config.json", cross_attention_dim=40)


def no_config(folder: Path) -> None:
    (folder / "decoder" / "config.json").write_text("[")


def no_weights(folder: Path) -> None:
    (folder / "super_res_first" / f"{WEIGHTS}.safetensors").unlink()


def no_folder(folder: Path) -> None:
    shutil.rmtree(folder / "text_proj")


def cut_weights(folder: Path) -> None:
    path = folder / "prior" / f"{WEIGHTS}.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def cut_pickle(folder: Path) -> None:
    path = folder / "prior" / f"{WEIGHTS}.safetensors"
    torch.save(load_file(path), path.with_suffix(".bin"))
    path.unlink()
    path = path.with_suffix(".bin")
    path.write_bytes(path.read_bytes()[:-100])


def code_in_pickle(folder: Path) -> None:
    path = folder / "prior" / f"{WEIGHTS}.safetensors"
    path.unlink()
    torch.save(nn.Linear(2, 2), path.with_suffix(".bin"))


def no_dictionary(folder: Path) -> None:
    path = folder / "prior" / f"{WEIGHTS}.safetensors"
    path.unlink()
    torch.save([torch.ones(1)], path.with_suffix(".bin"))


def tower_lacks(folder: Path) -> None:
    path = folder / "text_encoder" / "model.safetensors"
    state = load_file(path)
    del state["text_projection.weight"]
    save_file(state, path, metadata={"format": "pt"})


def other_class(folder: Path) -> None:
    edit_json(folder / "model_index.json", decoder=["diffusers", "AutoencoderKL"])


def other_scheduler(folder: Path) -> None:
    edit_json(folder / "decoder_scheduler" / "scheduler_config.json", _class_name="EulerDiscreteScheduler")


def no_tokenizer(folder: Path) -> None:
    shutil.rmtree(folder / "tokenizer")


def other_pipeline(folder: Path) -> None:
    edit_json(folder / "model_index.json", _class_name="StableDiffusionPipeline")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (unknown_key, "prior has the unknown keys surprise"),
        (missing_keys, "decoder .*lacks the keys decoder.*in all"),
        (misshapen_key, r"text_proj.embedding_proj.bias \(5,\) \(expected \(64,\)\)"),
        (other_config, "lacks the keys transformer_blocks.3"),
        (other_activation, "super_res_last.config.json says act_fn is 'gelu'"),
        (other_blocks, "says down_block_types is"),
        (no_width, "does not say 'block_out_channels'"),
        (several_heads, r"attention_head_dim is \[8, 8, 4\]"),
        (other_proj, "cross_attention_dim is 40, where the decoder's is 36"),
        (no_config, "no config.json that can be read"),
        (no_weights, "super_res_first lacks"),
        (no_folder, "text_proj holds no config.json"),
        (cut_weights, "bytes where its header says"),
        (cut_pickle, "no whole file of weights alone"),
        (code_in_pickle, "no whole file of weights alone"),
        (no_dictionary, "holds list, expected tensors by name"),
        (tower_lacks, "text_encoder lacks.* text_projection.weight"),
        (other_class, "decoder is a AutoencoderKL, expected UNet2DConditionModel"),
        (other_scheduler, "holds a EulerDiscreteScheduler"),
        (no_tokenizer, "tokenizer does not load"),
        (other_pipeline, "describes 'StableDiffusionPipeline'"),
    ],
)
def test_a_folder_that_does_not_fit_is_one_sentence(damage, says, text2img: Path, tmp_path: Path):
    folder = Path(shutil.copytree(text2img, tmp_path / "damaged"))
    damage(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=says) as caught:
        UnCLIP.from_pretrained(folder)
    assert "\n" not in str(caught.value)
