import pytest
import torch
from torch import nn

from unclip.core.unet import UNet


def randomised(**changes) -> UNet:
    torch.manual_seed(0)
    arguments = {
        "in_channels": 3,
        "out_channels": 3,
        "model_channels": 16,
        "channel_multipliers": (1, 2),
        "num_res_blocks": 1,
        "attention_levels": (1,),
        "head_channels": 8,
        "context_width": 12,
    }
    unet = UNet(**(arguments | changes))
    for parameter in unet.parameters():
        nn.init.normal_(parameter, std=0.1)
    return unet


def inputs(b=2, h=8, w=8):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(b, 3, h, w, generator=generator), torch.arange(b) * 300 + 5


@pytest.mark.parametrize("time_conditioning", ["scale_shift", "additive"])
@pytest.mark.parametrize("resblock_updown", [True, False])
@pytest.mark.parametrize("patch_size", [1, 2, 4])
def test_shapes_and_use_of_time_and_context(time_conditioning, resblock_updown, patch_size):
    unet = randomised(
        time_conditioning=time_conditioning,
        resblock_updown=resblock_updown,
        patch_size=patch_size,
        learned_variance=True,
        num_res_blocks=(1, 2),
    )
    x, t = inputs(h=16, w=24)
    keys_values = unet.project_context(torch.randn(2, 3, 12))
    out = unet(x, t, keys_values=keys_values)
    assert out.shape == (2, 6, 16, 24)
    assert not torch.allclose(out, unet(x, t + 100, keys_values=keys_values))
    assert not torch.allclose(out, unet(x, t))
    assert not torch.allclose(out, unet(x, t, torch.randn(2, unet.time_dim), keys_values))


def test_every_parameter_gets_a_gradient():
    unet = randomised(num_res_blocks=(1, 2), attention_levels=(0, 1))
    x, t = inputs()
    unet(x, t, keys_values=unet.project_context(torch.randn(2, 3, 12))).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in unet.parameters())


def test_starts_at_zero():
    unet = UNet(3, 3, 16, (1, 2), 1)
    assert not unet(*inputs()).any()


def test_a_row_of_a_batch_is_the_row_alone():
    unet = randomised()
    x, t = inputs(b=3)
    tokens = torch.randn(3, 4, 12)
    mask = torch.tensor([[True] * 4, [True, True, False, False], [True, False, False, False]])
    whole = unet(x, t, keys_values=unet.project_context(tokens), mask=mask)
    for i in range(3):
        n = int(mask[i].sum())
        alone = unet(x[i : i + 1], t[i : i + 1], keys_values=unet.project_context(tokens[i : i + 1, :n]))
        torch.testing.assert_close(whole[i : i + 1], alone, atol=1e-5, rtol=1e-4)


def test_memory_format_changes_nothing_and_stays():
    unet = randomised(patch_size=2)
    x, t = inputs(h=16, w=16)
    keys_values = unet.project_context(torch.randn(2, 3, 12))
    plain = unet(x, t, keys_values=keys_values)
    unet.to(memory_format=torch.channels_last)
    layouts = []
    for module in unet.modules():
        if isinstance(module, nn.Conv2d | nn.GroupNorm):
            module.register_forward_pre_hook(
                lambda _, args: layouts.append(args[0].is_contiguous(memory_format=torch.channels_last))
            )
    last = unet(x.contiguous(memory_format=torch.channels_last), t, keys_values=keys_values)
    torch.testing.assert_close(plain, last, atol=1e-5, rtol=1e-4)
    assert layouts and all(layouts)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_checkpointing_changes_no_gradient(dropout):
    gradients = []
    for checkpointing in (False, True):
        unet = randomised(dropout=dropout)
        unet.gradient_checkpointing = checkpointing
        x, t = inputs()
        tokens = torch.randn(2, 3, 12, generator=torch.Generator().manual_seed(2), requires_grad=True)
        torch.manual_seed(3)
        unet(x, t, keys_values=unet.project_context(tokens)).square().mean().backward()
        gradients.append([tokens.grad, *(p.grad for p in unet.parameters())])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


def test_without_attention_levels_there_is_none():
    assert not randomised(attention_levels=()).attention_layers()
    assert len(randomised().attention_layers()) == 1 + 1 + 2  # down, middle, up


@pytest.mark.parametrize(
    "changes, word",
    [
        ({"channel_multipliers": ()}, "channel_multipliers"),
        ({"num_res_blocks": (1, 2, 3)}, "num_res_blocks"),
        ({"patch_size": 3}, "patch_size"),
        ({"time_conditioning": "film"}, "time_conditioning"),
        ({"attention_levels": (2,)}, "attention_levels"),
        ({"head_channels": 7}, "head_channels"),
    ],
)
def test_refuses_arguments_that_do_not_fit(changes, word):
    with pytest.raises(ValueError, match=word):
        randomised(**changes)


@pytest.mark.parametrize("shape", [(2, 3, 9, 8), (2, 4, 8, 8), (3, 8, 8), (0, 3, 8, 8)])
def test_refuses_pictures_that_do_not_fit(shape):
    with pytest.raises(ValueError, match="x_t has shape"):
        randomised()(torch.zeros(shape), torch.zeros(2))


def test_refuses_steps_that_do_not_fit():
    with pytest.raises(ValueError, match="t has shape"):
        randomised()(torch.zeros(2, 3, 8, 8), torch.zeros(1))


@pytest.mark.parametrize("learned_variance", [False, True])
def test_a_mix_of_the_input_is_added_to_the_prediction_alone(learned_variance):
    """With one number for each pair of channels, the same at every t: the output is the plain one's plus these."""
    options = {"in_channels": 6, "learned_variance": learned_variance, "patch_size": 2}
    plain, mixed = randomised(**options), randomised(**options, mix_input=True)
    weights = plain.state_dict()
    mix = torch.arange(18.0).view(6, 3) / 10
    weights["input_mix.weight"], weights["input_mix.bias"] = torch.zeros(18, mixed.time_dim), mix.flatten()
    mixed.load_state_dict(weights)
    x, t = torch.randn(2, 6, 16, 8), torch.tensor([5, 900])
    out, expected = mixed(x, t), plain(x, t)
    torch.testing.assert_close(out[:, :3] - expected[:, :3], torch.einsum("bihw,io->bohw", x, mix))
    assert torch.equal(out[:, 3:], expected[:, 3:])


def test_a_mix_of_the_input_starts_at_zero_and_learns_to_copy():
    """What no layer before it does: the identity, whatever the scale of the picture."""
    unet = UNet(3, 3, 16, (1, 2), 1, mix_input=True)
    x, t = inputs()
    assert not unet(x, t).any()
    (unet(x, t) - x).square().mean().backward()
    assert unet.input_mix is not None and unet.input_mix.bias.grad is not None
    gradient = unet.input_mix.bias.grad.view(3, 3)
    assert (gradient.diagonal() < 0).all()
    assert gradient.diagonal().abs().min() > 2 * (gradient - gradient.diagonal().diag()).abs().max()


@pytest.mark.parametrize("mix_input", [False, True])
@pytest.mark.parametrize("time_conditioning", ["scale_shift", "additive"])
@torch.no_grad()
def test_times_of_a_whole_run_are_those_of_each_step(time_conditioning, mix_input):
    unet = randomised(time_conditioning=time_conditioning, mix_input=mix_input)
    x, _ = inputs(b=2)
    addend = torch.randn(2, unet.time_dim)
    for given in (addend, None):
        times = unet.at_steps([999, 500, 0], given, 2)
        for t in (torch.tensor([500, 500]), torch.tensor([0, 999])):
            torch.testing.assert_close(unet(x, t, given, times=times), unet(x, t, given), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_step_that_no_times_were_kept_for_is_nan_and_too_many_are_not_kept(monkeypatch: pytest.MonkeyPatch):
    unet = randomised()
    x, _ = inputs(b=2)
    out = unet(x, torch.tensor([500, 501]), times=unet.at_steps([500, 0], None, 2))
    assert out[0].isfinite().all() and out[1].isnan().all()
    monkeypatch.setattr("unclip.core.unet.MOST_TIMES", 2 * 2 * unet.time_projection.out_features)
    assert unet.at_steps([500, 0], None, 2) is not None
    assert unet.at_steps([500, 250, 0], None, 2) is None
