import json
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn
from torch.nn import functional as F

from decoder.decoder import Decoder
from unclip.core.sampling import cat_contexts, map_context

PAPER = Path(__file__).parents[2] / "recipes" / "paper"
TINY = {
    "sample_size": 16,
    "model_channels": 16,
    "channel_multipliers": (1, 2),
    "num_res_blocks": 1,
    "attention_resolutions": (8,),
    "head_channels": 8,
    "z_i_width": 12,
    "z_i_scale": 3.0,
    "text_width": 10,
    "context_width": 24,
}


def randomised(**changes) -> Decoder:
    torch.manual_seed(0)
    decoder = Decoder(**(TINY | changes))
    for parameter in decoder.parameters():
        nn.init.normal_(parameter, std=0.1)
    return decoder.eval()


def inputs(b=3):
    generator = torch.Generator().manual_seed(1)
    conditions = {
        "z_i": torch.randn(b, 12, generator=generator),
        "text": torch.randn(b, 5, 10, generator=generator),
        "text_mask": torch.arange(5) < torch.tensor([5, 3, 1])[:b, None],
    }
    return torch.randn(b, 3, 16, 16, generator=generator), torch.arange(b) * 300 + 5, conditions


def flags(*values: bool):
    return torch.tensor(values)


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


OWN_TRANSFORMER = pytest.mark.parametrize("text_layers", [0, 2])


@OWN_TRANSFORMER
@pytest.mark.parametrize("sketch_side", [None, 4])
def test_both_ways_to_call_agree_in_value_and_gradient(text_layers, sketch_side):
    x_t, t, conditions = inputs()
    conditions |= {"drop_z_i": flags(False, True, False), "drop_text": flags(True, False, False)}
    outputs, gradients = [], []
    for halves in (False, True):
        decoder = randomised(text_layers=text_layers, text_heads=4, sketch_side=sketch_side)
        output = decoder(x_t, t, decoder.encode_context(**conditions)) if halves else decoder(x_t, t, **conditions)
        output.square().sum().backward()
        outputs.append(output)
        gradients.append({name: p.grad for name, p in decoder.named_parameters()})
    assert torch.equal(*outputs)
    for name, gradient in gradients[0].items():
        assert gradient is not None and gradient.any(), name
        assert torch.equal(gradient, gradients[1][name]), name


def test_a_step_over_a_context_runs_no_projection_of_conditions():
    decoder = randomised(sketch_side=4)
    x_t, t, conditions = inputs()
    context = decoder.encode_context(**conditions)
    expected = decoder(x_t, t, context)
    untouched = ("context_kv", "context_z_i", "context_text", "context_norm", "time_z_i", "time_text", "sketch")
    for name, parameter in decoder.named_parameters():
        if any(part in name for part in untouched):
            parameter.data.fill_(float("nan"))
    assert torch.equal(decoder(x_t, t, context), expected)


def test_context_holds_each_layers_keys_and_values_and_the_addend():
    decoder = randomised(text_width=None)
    z_i = inputs()[2]["z_i"]
    context = decoder.encode_context(z_i=z_i)
    tokens = decoder.context_norm(decoder.context_z_i(3 * z_i).reshape(3, 4, 24))
    assert context.mask is None
    close(context.time, decoder.time_z_i(3 * z_i))
    layers = decoder.unet.attention_layers()
    assert len(context.keys_values) == len(layers) == 4
    for layer, (k, v) in zip(layers, context.keys_values, strict=True):
        expected = layer.context_kv(tokens)  # b n (k | v)
        close(torch.cat([k, v], 1).transpose(1, 2).reshape(3, 4, -1), expected)


def test_the_sketch_is_of_the_conditions_alone_and_stands_beside_x_t():
    decoder = randomised(sketch_side=4)
    x_t, t, conditions = inputs()
    output, sketch = decoder(x_t, t, return_sketch=True, **conditions)
    assert sketch.shape == (3, 3, 4, 4)
    assert torch.equal(sketch, decoder(x_t + 1, t + 1, return_sketch=True, **conditions)[1])
    assert torch.equal(output, decoder(x_t, t, **conditions))
    alone = decoder(None, None, return_sketch=True, **conditions)
    assert alone[0] is None
    assert torch.equal(alone[1], sketch)
    context = decoder.encode_context(**conditions)
    beside = torch.cat([x_t, F.interpolate(sketch, (16, 16), mode="bilinear")], dim=1)
    close(output, decoder.unet(beside, t, context.time, context.keys_values, context.mask))
    wide = decoder(torch.randn(3, 3, 16, 32), t, context)  # learned variance doubles the channels
    assert wide.shape == (3, 6, 16, 32)
    everything = flags(True, True, True)
    none = decoder.encode_context(**conditions, drop_z_i=everything, drop_text=everything).sketch
    assert none is not None
    close(none[0], none[1])  # without conditions all samples have one sketch
    assert not torch.allclose(sketch[0], sketch[1])
    assert randomised()(x_t, t, return_sketch=True, **conditions)[1] is None
    with pytest.raises(ValueError, match=r"expected \(b, 3, h, w\)"):
        decoder(x_t[:, :2], t, context)
    with pytest.raises(ValueError, match="return_sketch"):
        decoder(None, t, context)


@OWN_TRANSFORMER
def test_dropped_text_is_no_text(text_layers):
    decoder = randomised(text_layers=text_layers, text_heads=4)
    x_t, t, conditions = inputs()
    dropped = decoder(x_t, t, **conditions, drop_text=flags(True, False, True))
    without = decoder(x_t, t, z_i=conditions["z_i"])
    kept = decoder(x_t, t, **conditions)
    close(dropped[[0, 2]], without[[0, 2]])
    close(dropped[1], kept[1])
    assert not torch.allclose(kept, without)


@pytest.mark.parametrize("null_z_i", ["learned", "zeros"])
def test_dropped_conditions_get_no_gradient_and_others_keep_theirs(null_z_i):
    decoder = randomised(null_z_i=null_z_i)
    gradients = []
    for drop in ({}, {"drop_z_i": flags(True, False, False), "drop_text": flags(False, False, True)}):
        x_t, t, conditions = inputs()
        conditions["z_i"].requires_grad_()
        conditions["text"].requires_grad_()
        decoder(x_t, t, **conditions, **drop).square().sum().backward()
        gradients.append((conditions["z_i"].grad, conditions["text"].grad))
    (full_z_i, full_text), (z_i, text) = gradients
    assert not z_i[0].any() and not text[2].any()
    assert full_z_i.any(1).all() and full_text.flatten(1).any(1).all()
    close(z_i[1], full_z_i[1])
    close(text[1], full_text[1])


def test_dropped_z_i_is_the_null_embedding():
    x_t, t, conditions = inputs()
    zeros = randomised(null_z_i="zeros")
    close(zeros(x_t, t, z_i=conditions["z_i"], drop_z_i=flags(*3 * [True])), zeros(x_t, t, z_i=torch.zeros(3, 12)))
    learned = randomised()
    null = learned.null_embedding.expand(3, -1) / 3
    close(learned(x_t, t, z_i=conditions["z_i"], drop_z_i=flags(*3 * [True])), learned(x_t, t, z_i=null))


@OWN_TRANSFORMER
def test_padding_does_not_matter(text_layers):
    decoder = randomised(text_layers=text_layers, text_heads=4)
    x_t, t, conditions = inputs()
    expected = decoder(x_t, t, **conditions)
    filled = conditions["text"].masked_fill(~conditions["text_mask"][..., None], float("nan"))
    close(decoder(x_t, t, **(conditions | {"text": filled})), expected)
    wider = torch.cat([filled, torch.full((3, 4, 10), 7.0)], 1)
    mask = torch.cat([conditions["text_mask"], torch.zeros(3, 4, dtype=torch.bool)], 1)
    close(decoder(x_t, t, z_i=conditions["z_i"], text=wider, text_mask=mask), expected)


def test_a_row_of_a_batch_is_the_row_alone():
    decoder = randomised()
    x_t, t, conditions = inputs()
    whole = decoder(x_t, t, **conditions)
    for i in range(3):
        close(
            whole[i : i + 1], decoder(x_t[i : i + 1], t[i : i + 1], **{k: v[i : i + 1] for k, v in conditions.items()})
        )


def test_contexts_join_and_map():
    decoder = randomised()
    x_t, t, conditions = inputs()
    context = decoder.encode_context(**conditions)
    null = decoder.encode_context(**conditions, drop_z_i=flags(*3 * [True]), drop_text=flags(*3 * [True]))
    both = decoder(torch.cat([x_t, x_t]), torch.cat([t, t]), cat_contexts(context, null))
    close(both, torch.cat([decoder(x_t, t, context), decoder(x_t, t, null)]))
    first = map_context(lambda tensor: tensor[:1], context)
    close(decoder(x_t[:1], t[:1], first), decoder(x_t, t, context)[:1])


def test_save_and_load_round_trip(tmp_path):
    decoder = randomised(text_layers=1, text_heads=4, patch_size=2, attention_resolutions=(4,))
    decoder.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["channel_multipliers"] == [1, 2]
    assert not list(tmp_path.glob("*.bin"))
    x_t, t, conditions = inputs()
    loaded = Decoder.from_pretrained(tmp_path)
    assert torch.equal(loaded(x_t, t, **conditions), decoder(x_t, t, **conditions))


def test_overfits_one_batch():
    torch.manual_seed(0)
    decoder = Decoder(**(TINY | {"learned_variance": False})).train()
    x_t, t, conditions = inputs()
    target = torch.randn(3, 3, 1, 1).expand(3, 3, 16, 16)
    x_t = x_t[:1].expand(3, -1, -1, -1)  # one noise, one step: only the conditions tell the pictures apart
    optimizer = torch.optim.Adam(decoder.parameters(), 3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        loss = (decoder(x_t, t[:1].expand(3), **conditions) - target).square().mean()
        loss.backward()
        optimizer.step()
    assert loss < 0.02 * target.square().mean()


def test_checkpointing_through_diffusers_changes_no_gradient():
    gradients = []
    for checkpointing in (False, True):
        decoder = randomised()
        if checkpointing:
            decoder.enable_gradient_checkpointing()
            assert decoder.unet.gradient_checkpointing
        x_t, t, conditions = inputs()
        decoder(x_t, t, **conditions).square().sum().backward()
        gradients.append([p.grad for p in decoder.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        close(plain, checkpointed)


def test_bf16_autocast_stays_near_fp32():
    decoder = randomised()
    x_t, t, conditions = inputs()
    expected = decoder(x_t, t, **conditions)
    with torch.autocast("cpu", torch.bfloat16):
        got = decoder(x_t, t, **conditions).float()
    assert (got - expected).square().mean() < 1e-3 * expected.square().mean()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"z_i": torch.zeros(3, 11)}, "z_i has shape"),
        ({"text": torch.zeros(3, 5, 11)}, "text has shape"),
        ({"text": torch.zeros(2, 5, 10)}, "text has shape"),
        ({"text_mask": torch.ones(3, 5)}, "text_mask is"),
        ({"text_mask": torch.ones(3, 4, dtype=torch.bool)}, "text_mask is"),
        ({"drop_z_i": torch.ones(3)}, "drop_z_i is"),
        ({"drop_text": torch.ones(2, dtype=torch.bool)}, "drop_text is"),
    ],
)
def test_refuses_conditions_that_do_not_fit(changes, message):
    x_t, t, conditions = inputs()
    with pytest.raises(ValueError, match=message):
        randomised()(x_t, t, **(conditions | changes))


def test_refuses_other_misuse():
    x_t, t, conditions = inputs()
    decoder = randomised()
    with pytest.raises(ValueError, match="either a context or conditions"):
        decoder(x_t, t)
    with pytest.raises(ValueError, match="either a context or conditions"):
        decoder(x_t, t, decoder.encode_context(**conditions), **conditions)
    with pytest.raises(ValueError, match="without text_width"):
        randomised(text_width=None)(x_t, t, **conditions)
    with pytest.raises(ValueError, match="grids of this decoder"):
        randomised(attention_resolutions=(32,))
    with pytest.raises(ValueError, match="null_z_i"):
        randomised(null_z_i="none")


def test_paper_size_is_the_papers():
    with torch.device("meta"):
        decoder = Decoder(**yaml.safe_load((PAPER / "decoder.yaml").read_text())["model"])
    assert sum(p.numel() for p in decoder.parameters()) == pytest.approx(3.5e9, rel=0.05)


def test_z_t_enters_the_time_embedding_in_place_of_the_last_token():
    decoder, other = randomised(z_t_width=7), randomised()
    _, _, conditions = inputs()
    z_t = torch.randn(3, 7, generator=torch.Generator().manual_seed(2))
    context = decoder.encode_context(**conditions, z_t=z_t)
    torch.testing.assert_close(context.time, decoder.time_z_i(3 * conditions["z_i"]) + decoder.time_z_t(z_t))
    assert {n.split(".")[0] for n, _ in decoder.named_parameters()} - {
        n.split(".")[0] for n, _ in other.named_parameters()
    } == {"time_z_t"}
    for wrong in ({"z_t": z_t[:, :5]}, {}):
        with pytest.raises(ValueError, match="z_t is"):
            decoder.encode_context(**conditions, **wrong)
    with pytest.raises(ValueError, match="z_t is"):
        other.encode_context(**conditions, z_t=z_t)
    with pytest.raises(ValueError, match="always has a caption"):
        decoder.encode_context(**conditions, z_t=z_t, drop_text=flags(True, False, False))
    with pytest.raises(ValueError, match="always has a caption"):
        decoder.encode_context(conditions["z_i"], z_t=z_t)
    with pytest.raises(ValueError, match="only with text_width"):
        Decoder(**(TINY | {"text_width": None, "z_t_width": 7}))


def test_the_norm_may_cover_the_text_alone():
    decoder = randomised(norm_context="text")
    _, _, conditions = inputs()
    words = decoder.encode_text(conditions["text"], conditions["text_mask"])
    tokens = decoder.context_z_i(3 * conditions["z_i"]).unflatten(1, (4, 24))
    expected = decoder.unet.project_context(torch.cat([decoder.context_norm(words), tokens], dim=1))
    for (k, v), (expected_k, expected_v) in zip(
        decoder.encode_context(**conditions).keys_values, expected, strict=True
    ):
        close(k, expected_k)
        close(v, expected_v)
    alone = decoder.encode_context(conditions["z_i"]).keys_values[0][0]
    close(alone, decoder.unet.project_context(tokens)[0][0])
