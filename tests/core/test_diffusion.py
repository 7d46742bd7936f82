import math

import pytest
import torch
from diffusers import DDPMScheduler, UnCLIPScheduler

from unclip.core.diffusion import PREDICTION_TYPES, Diffusion, discretized_gaussian_log_likelihood, make_scheduler

T_ALL = torch.tensor([0, 1, 2, 10, 250, 499, 750, 990, 998, 999])
KINDS = ("cosine", "linear")


def draw(t, channels=3, size=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (len(t), channels, size, size)
    return torch.rand(shape, generator=generator) * 2 - 1, torch.randn(shape, generator=generator)


def diffusion(kind="cosine", prediction_type="epsilon", **options):
    return Diffusion.from_scheduler(make_scheduler(kind, prediction_type, **options))


def test_constants_of_the_paper():
    cosine, linear = diffusion("cosine"), diffusion("linear")
    assert float(cosine.betas[0]) == pytest.approx(4.12842e-5, rel=1e-5)
    assert float(cosine.betas[999]) == pytest.approx(0.999, rel=1e-6)
    assert float(cosine.alphas_cumprod[499]) == pytest.approx(0.4938436, rel=1e-6)
    assert float(linear.alphas_cumprod[999]) == pytest.approx(4.03583e-5, rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_schedule_is_the_schedulers(kind):
    scheduler = make_scheduler(kind)
    ours = Diffusion.from_scheduler(scheduler)
    torch.testing.assert_close(ours.alphas_cumprod, scheduler.alphas_cumprod, rtol=1e-4, atol=0)
    t = T_ALL
    torch.testing.assert_close(ours.snr(t), ours.alphas_cumprod[t] / (1 - ours.alphas_cumprod[t]), rtol=3e-3, atol=0)
    x0, noise = draw(t)
    torch.testing.assert_close(ours.add_noise(x0, noise, t), scheduler.add_noise(x0, noise, t), rtol=1e-4, atol=1e-5)
    v = diffusion(kind, "v_prediction")
    torch.testing.assert_close(v.target(x0, noise, t), scheduler.get_velocity(x0, noise, t), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_target_means_x0_and_eps(kind, prediction_type):
    d, t = diffusion(kind, prediction_type), T_ALL
    x0, noise = (x.double() for x in draw(t))
    x_t, target = d.add_noise(x0, noise, t), d.target(x0, noise, t)
    # Coefficients are float32; at the cosine schedule's end ε is divided by 5e-5.
    near_end = 5e-3 if prediction_type == "epsilon" else 5e-5
    torch.testing.assert_close(d.to_x0(x_t, target, t), x0, rtol=0, atol=near_end)
    torch.testing.assert_close(d.to_eps(x_t, target, t), noise, rtol=0, atol=5e-5)
    torch.testing.assert_close(d.from_x0(x_t, x0, t), target, rtol=0, atol=5e-5)


def test_posterior_is_bayes_rule():
    """q(x_{t−1}|x_t,x0) ∝ q(x_t|x_{t−1})·q(x_{t−1}|x0): the product of two gaussians."""
    d = diffusion("linear")
    t = torch.arange(1, 1000)
    x0, x_t = (x.double() for x in draw(t, 1, 1))
    beta, previous = d.betas[t].double().view(-1, 1, 1, 1), d.alphas_cumprod[t - 1].double().view(-1, 1, 1, 1)
    precision = (1 - beta) / beta + 1 / (1 - previous)
    expected = ((1 - beta).sqrt() / beta * x_t + previous.sqrt() / (1 - previous) * x0) / precision
    mean, log_variance = d.posterior(x0, x_t, t)
    torch.testing.assert_close(mean, expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(log_variance.double(), -precision.log(), rtol=0, atol=2e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_posterior_at_zero_is_x0(kind):
    d, t = diffusion(kind), torch.zeros(3, dtype=torch.long)
    x0, x_t = draw(t)
    mean, log_variance = d.posterior(x0, x_t, t)
    torch.testing.assert_close(mean, x0)
    assert torch.isfinite(log_variance).all()


@pytest.mark.parametrize("cls", [DDPMScheduler, UnCLIPScheduler])
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("t", [1, 2, 500, 998, 999])
def test_step_of_diffusers_is_our_posterior(cls, learned, t):
    variance_type = "learned_range" if learned else ("fixed_small" if cls is DDPMScheduler else "fixed_small_log")
    scheduler = cls(beta_schedule="squaredcos_cap_v2", prediction_type="epsilon", variance_type=variance_type)
    d, ts = Diffusion.from_scheduler(scheduler), torch.full((2,), t)
    assert d.learned_variance == learned and d.clip == 1.0
    x0, noise = draw(ts)
    x_t = d.add_noise(x0, noise, ts)
    v = torch.rand(x0.shape) * 2 - 1
    output = torch.cat([noise, v], 1) if learned else noise
    stepped = scheduler.step(output, t, x_t, generator=torch.Generator().manual_seed(1)).prev_sample
    prediction, variance = d.split(output)
    x0_predicted = d.to_x0(x_t, prediction, ts).clamp(-1, 1)
    mean, log_variance = d.posterior(x0_predicted, x_t, ts)
    if variance is not None:
        log_variance = d.learned_log_variance(variance, ts)
    drawn = torch.randn(x0.shape, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(stepped, mean + (0.5 * log_variance).exp() * drawn, rtol=2e-3, atol=2e-3)


def test_learned_variance_lies_between_its_ends():
    d, t = diffusion(learned_variance=True), T_ALL
    ones = torch.ones(len(t), 3, 2, 2)
    low, high = d.learned_log_variance(-ones, t), d.learned_log_variance(ones, t)
    torch.testing.assert_close(high[:, 0, 0, 0], d.log_betas[t])
    torch.testing.assert_close(low[:, 0, 0, 0], d.posterior_log_variance[t])
    assert (high >= low).all()


@pytest.mark.parametrize("weighting", ["none", "min_snr", "snr_plus_one"])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_weights_agree_in_x0_space(kind, weighting):
    """One wrong x0, said as ε, x0 or v, costs the same under a weight; unweighted SNR, 1 and SNR + 1 times as much."""
    t = torch.tensor([1, 100, 300, 500, 700, 900])
    x0, noise = (x.double() for x in draw(t))
    wrong = x0 + 0.3
    for prediction_type in PREDICTION_TYPES:
        d = diffusion(kind, prediction_type)
        x_t = d.add_noise(x0, noise, t)
        if weighting == "snr_plus_one" and prediction_type == "epsilon":
            with pytest.raises(ValueError, match="snr_plus_one has no bound for the prediction epsilon"):
                d.loss_weight(t, weighting)
            continue
        loss = d.loss(d.from_x0(x_t, wrong, t), x0, x_t, noise, t, weighting=weighting)
        snr = d.snr(t)
        factor = {"epsilon": snr, "sample": torch.ones_like(snr), "v_prediction": snr + 1}[prediction_type]
        weight = {"none": factor, "min_snr": snr.clamp(max=5.0), "snr_plus_one": (snr + 1).clamp(max=5.0)}[weighting]
        expected = 0.09 * weight
        torch.testing.assert_close(loss, expected, rtol=1e-2, atol=1e-4)


def test_loss_is_zero_at_the_target_and_per_sample():
    for prediction_type in PREDICTION_TYPES:
        d, t = diffusion(prediction_type=prediction_type), T_ALL
        x0, noise = draw(t)
        x_t = d.add_noise(x0, noise, t)
        output = d.target(x0, noise, t).clone()
        assert d.loss(output, x0, x_t, noise, t).abs().max() == 0
        output[3] += 1
        loss = d.loss(output, x0, x_t, noise, t)
        assert loss.shape == t.shape and loss[3] == pytest.approx(1.0) and loss[loss > 0].numel() == 1


def test_vlb_trains_the_variance_alone():
    d, t = diffusion(learned_variance=True), T_ALL
    x0, noise = draw(t)
    x_t = d.add_noise(x0, noise, t)
    output = torch.cat([draw(t, seed=5)[1], torch.zeros_like(x0)], 1).requires_grad_()
    d.loss(output, x0, x_t, noise, t).sum().backward()
    with_vlb = output.grad
    output.grad = None
    d.loss(output, x0, x_t, noise, t, lambda_vlb=0).sum().backward()
    torch.testing.assert_close(with_vlb[:, :3], output.grad[:, :3])
    assert (output.grad[:, 3:] == 0).all()
    assert with_vlb[1:, 3:].abs().sum((1, 2, 3)).min() > 0


def test_vlb_is_zero_where_the_model_is_the_posterior():
    d = diffusion(prediction_type="sample", learned_variance=True)
    t = torch.tensor([1, 100, 900])
    x0, noise = draw(t)
    x_t = d.add_noise(x0, noise, t)
    output = torch.cat([x0, -torch.ones_like(x0)], 1)
    torch.testing.assert_close(d.loss(output, x0, x_t, noise, t), torch.zeros(3), rtol=0, atol=1e-4)


def test_vlb_prefers_the_true_variance():
    """Where the mean is off by a known amount, the KL is least where σ² is the mean squared deviation."""
    d = diffusion("linear", "sample", learned_variance=True)
    t = torch.tensor([2])
    x0 = torch.zeros(1, 1, 1, 1)
    x_t = d.add_noise(x0, torch.ones_like(x0), t)
    error = 0.004
    v = torch.linspace(-1, 1, 401)
    losses = [float(d.loss(torch.tensor([[[[error]], [[float(w)]]]]), x0, x_t, torch.ones_like(x0), t)) for w in v]
    wanted = math.log(math.exp(d.posterior_log_variance[2]) + (float(d.posterior_x0[2]) * error) ** 2)
    best = d.learned_log_variance(v[int(torch.tensor(losses).argmin())].view(1, 1, 1, 1), t)
    assert float(d.posterior_log_variance[2]) + 1e-4 < wanted < float(d.log_betas[2])
    assert float(best) == pytest.approx(wanted, abs=5e-3)


def test_discretized_likelihood_is_a_distribution():
    levels = torch.linspace(-1, 1, 256).view(1, 1, 1, -1).double()
    for mean, std in ((0.0, 0.05), (0.9, 0.3), (-1.0, 0.02), (0.5, 3.0)):
        log_mass = discretized_gaussian_log_likelihood(
            levels, torch.full_like(levels, mean), torch.full_like(levels, 2 * math.log(std))
        )
        assert float(log_mass.exp().sum()) == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wild_outputs_keep_loss_and_gradient_finite(prediction_type, dtype):
    d, t = diffusion(prediction_type=prediction_type, learned_variance=True), T_ALL
    x0, noise = draw(t)
    x0[0, 0], x0[0, 1] = 1.0, -1.0
    x_t = d.add_noise(x0, noise, t)
    for scale in (0.0, 1.0, 100.0, 1e4):
        output = (scale * draw(t, 6, seed=3)[1]).to(dtype).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            loss = d.loss(output, x0, x_t, noise, t, weighting="min_snr")
        assert loss.dtype == torch.float32 and torch.isfinite(loss).all()
        loss.mean().backward()
        assert torch.isfinite(output.grad).all()


def test_zero_terminal_snr_has_finite_weights():
    scheduler = DDPMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    d, t = Diffusion.from_scheduler(scheduler), torch.tensor([999, 5])
    x0, noise = draw(t)
    assert d.snr(t)[0] == 0
    assert torch.isfinite(d.loss(torch.zeros_like(x0), x0, d.add_noise(x0, noise, t), noise, t, "min_snr")).all()


def test_scheduler_survives_its_json(tmp_path):
    scheduler = make_scheduler(
        "linear", "v_prediction", learned_variance=True, clip_sample=False, num_train_timesteps=100
    )
    scheduler.save_pretrained(tmp_path)
    loaded = Diffusion.from_scheduler(DDPMScheduler.from_pretrained(tmp_path))
    torch.testing.assert_close(loaded.alphas_cumprod, Diffusion.from_scheduler(scheduler).alphas_cumprod)
    assert (loaded.prediction_type, loaded.learned_variance, loaded.clip) == ("v_prediction", True, None)


def test_bad_input_gets_one_sentence():
    d = diffusion(learned_variance=True)
    x0, noise = draw(torch.tensor([1, 2]))
    t = torch.tensor([1, 2])
    with pytest.raises(ValueError, match="does not fit"):
        d.loss(x0, x0, x0, noise, t)
    with pytest.raises(ValueError, match="expected integers of shape"):
        d.add_noise(x0, noise, t.float())
    with pytest.raises(ValueError, match="expected integers of shape"):
        d.add_noise(x0, noise, t[:1])
    with pytest.raises(ValueError, match="unknown"):
        d.loss_weight(t, "p2")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="unknown"):
        make_scheduler("sigmoid")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="unknown"):
        make_scheduler(prediction_type="flow")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="betas"):
        Diffusion(torch.tensor([0.5, 1.5]), "epsilon")
    with pytest.raises(ValueError, match="2c"):
        d.split(torch.zeros(1, 3, 2, 2))
