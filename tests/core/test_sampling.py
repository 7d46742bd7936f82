import math

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler

from unclip.core.diffusion import PREDICTION_TYPES, Diffusion, make_scheduler
from unclip.core.sampling import (
    SOLVERS,
    clamped,
    make_sampler,
    picture_generators,
    resolve_timesteps,
    respaced,
    sample,
    starting_noise,
)

FAST27 = [997, 800, 799, 600, 599, 500, 400, 399, 377, 355, 333, 311, 288, 266]
FAST27 += [244, 222, 200, 199, 177, 155, 133, 111, 88, 66, 44, 22, 0]
RESAMPLING = [999, 800, 600, 400, 600, 400, 200, 300, 350, 100, 0]
MEAN, STD = 0.3, 0.5


def gaussian_denoiser(diffusion: Diffusion, chain: list[int] | None = None):
    """The exact denoiser of data N(MEAN, STD²); with a chain, also the exact variance of its reverse steps."""

    def denoise(x_t, t):
        x, a_bar = x_t.double(), diffusion.alphas_cumprod.double()[int(t[0])]
        precision = a_bar * STD**2 + 1 - a_bar
        x0 = MEAN + a_bar.sqrt() * STD**2 / precision * (x - a_bar.sqrt() * MEAN)
        output = diffusion.from_x0(x, x0, t).float()
        if chain is None:
            return output
        below = [s for s in chain if s < int(t[0])]
        if not below:
            return torch.cat([output, torch.zeros_like(output)], 1)
        previous = diffusion.alphas_cumprod.double()[below[0]]
        beta = 1 - a_bar / previous
        posterior = beta * (1 - previous) / (1 - a_bar)
        variance = posterior + (previous.sqrt() * beta / (1 - a_bar)) ** 2 * STD**2 * (1 - a_bar) / precision
        v = 2 * (variance.log() - posterior.log()) / (beta.log() - posterior.log()) - 1
        return torch.cat([output, torch.full_like(output, float(v))], 1)

    return denoise


def draw(shape=(20000,), count=2, stage="a"):
    generators = picture_generators(range(count), stage)
    return starting_noise(shape, generators), generators


def toy(prediction="epsilon", learned=False, kind="cosine", clip=False):
    scheduler = make_scheduler(kind, prediction, learned, clip_sample=clip)
    kept = scheduler.alphas_cumprod.double()
    variance = STD**2 * (1 - kept) / (kept * STD**2 + 1 - kept)  # of x0 given x_t: what solver "analytic" needs
    scheduler.register_to_config(x0_variance=variance.tolist())
    return scheduler, Diffusion.from_scheduler(scheduler)


def cannot(solver, prediction, kind="cosine"):
    return solver == "unclip" and (prediction == "v_prediction" or kind == "linear")


# A target whose answer is known


@pytest.mark.parametrize("kind", ["cosine", "linear"])
@pytest.mark.parametrize("prediction", PREDICTION_TYPES)
@pytest.mark.parametrize("solver", SOLVERS)
def test_gaussian_is_recovered(solver, prediction, kind):
    if cannot(solver, prediction, kind):
        pytest.skip("UnCLIPScheduler has neither v-prediction nor a linear schedule")
    scheduler, diffusion = toy(prediction, kind=kind)
    x_T, generators = draw()
    # The first order and fixed variances of DDPM and DDIM cost 1/steps; solvers of second order 1/steps².
    steps, tolerance = (200, 0.04) if solver in ("ddpm", "ddim", "unclip") else (60, 0.03)
    x0 = sample(gaussian_denoiser(diffusion), make_sampler(scheduler, solver), x_T, steps, generators)
    assert float(x0.mean()) == pytest.approx(MEAN, abs=0.01)
    assert float(x0.std()) == pytest.approx(STD, rel=tolerance)


@pytest.mark.parametrize("solver", ["dpm++", "unipc"])
@pytest.mark.parametrize("prediction", PREDICTION_TYPES)
def test_few_steps_suffice_from_the_last_step_of_the_cosine_schedule(solver, prediction):
    scheduler, diffusion = toy(prediction)
    x_T, generators = draw()
    sampler = make_sampler(scheduler, solver)
    assert resolve_timesteps(sampler, 10)[0] == 999
    x0 = sample(gaussian_denoiser(diffusion), sampler, x_T, 10, generators)
    assert float(x0.mean()) == pytest.approx(MEAN, abs=0.01)
    assert float(x0.std()) == pytest.approx(STD, rel=0.05)


@pytest.mark.parametrize("solver", ["ddpm", "unclip"])
@pytest.mark.parametrize("steps", [FAST27, [999, 500, 300, 100, 20, 0], [999, 0]])
def test_learned_variance_is_exact_for_a_gaussian_in_any_steps(solver, steps):
    """Reverse steps of gaussian data are gaussian: with their mean and variance no number of steps is too small."""
    scheduler, diffusion = toy(learned=True)
    x_T, generators = draw((2, 30000), stage="b")
    x0 = sample(gaussian_denoiser(diffusion, steps), make_sampler(scheduler, solver), x_T, steps, generators)
    # The last step, to x0 itself, is the mean without noise: what is left at t = 0 is a variance of at most 4e-5.
    assert float(x0.mean()) == pytest.approx(MEAN, abs=0.01)
    assert float(x0.std()) == pytest.approx(STD, rel=0.01)


@pytest.mark.parametrize("solver", SOLVERS)
def test_resampling_keeps_the_gaussian(solver):
    scheduler, diffusion = toy("sample")
    x_T, generators = draw()
    down = list(range(999, -1, -10))
    steps = [*down[:60], *down[40:]]  # 409 → 599 → 0
    calls = []
    x0 = sample(
        gaussian_denoiser(diffusion),
        make_sampler(scheduler, solver),
        x_T,
        steps,
        generators,
        callback=lambda i, t, x: calls.append((i, t)),
    )
    assert float(x0.mean()) == pytest.approx(MEAN, abs=0.01)
    assert float(x0.std()) == pytest.approx(STD, rel=0.06)
    # The turning point is reached, not called at.
    assert calls == list(enumerate([*down[:59], *down[40:]]))


# Respacing


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("steps", [FAST27, [999], [999, 998, 0], list(range(999, -1, -1))])
def test_respaced_chain_has_the_kept_alphas(solver, steps):
    scheduler = make_sampler(toy()[0], solver)
    before = dict(scheduler.config), scheduler.alphas_cumprod.clone(), scheduler.timesteps.clone()
    chain = respaced(scheduler, steps)
    torch.testing.assert_close(chain.alphas_cumprod.float().flip(0), scheduler.alphas_cumprod[steps], rtol=0, atol=0)
    assert chain.timesteps.tolist() == list(range(len(steps)))[::-1]
    if hasattr(chain, "sigmas"):
        kept = scheduler.alphas_cumprod[steps]
        torch.testing.assert_close(chain.sigmas[:-1], ((1 - kept) / kept).sqrt(), rtol=1e-5, atol=0)
        assert chain.sigmas[-1] == 0
    assert dict(scheduler.config) == before[0]
    assert torch.equal(scheduler.alphas_cumprod, before[1]) and torch.equal(scheduler.timesteps, before[2])


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("solver", ["ddpm", "ddim", "dpm++", "dpm++sde", "unipc", "unclip"])
def test_a_count_is_the_schedulers_own_run(solver, learned):
    scheduler, diffusion = toy(learned=learned)
    sampler = make_sampler(scheduler, solver, timestep_spacing="leading") if solver in ("ddpm", "ddim") else None
    sampler = sampler or make_sampler(scheduler, solver)
    denoise = gaussian_denoiser(diffusion, list(range(999, -1, -1)) if learned else None)
    x_T, generators = draw((3, 4, 4))
    ours = sample(denoise, sampler, x_T, 20, generators)

    native = make_sampler(sampler, solver)
    native.set_timesteps(20)
    x, generators = draw((3, 4, 4))
    times = native.timesteps.tolist()
    for i, t in enumerate(times):
        output = denoise(x, torch.full((2,), t))
        if solver not in ("ddpm", "unclip"):
            output = output[:, :3]
        options = {} if solver == "unipc" else {"generator": generators}
        if solver == "unclip":
            options["prev_timestep"] = times[i + 1] if i + 1 < len(times) else None
        x = native.step(output, t, x, **options).prev_sample
    torch.testing.assert_close(ours, x, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("prediction", ["epsilon", "sample"])
@pytest.mark.parametrize("count", [2, 4, 7, 25, 1000])
def test_unclip_draws_its_own_run_to_the_last_bit(prediction, count):
    """Karlo's pictures are this scheduler's, told of each skip; ε is divided by √ᾱ = 5e-5 at the first step."""
    scheduler = make_sampler(make_scheduler("cosine", prediction), "unclip")
    x_T, generators = draw((3, 4, 4))

    def denoise(x, t):
        return torch.sin(3 * x) + t.view(-1, 1, 1, 1) / 1000

    ours = sample(denoise, scheduler, x_T, count, generators)
    x, generators = draw((3, 4, 4))
    scheduler.set_timesteps(count)
    times = scheduler.timesteps.tolist()
    assert times == [round(i * 999 / (count - 1)) for i in range(count)][::-1]
    for t, following in zip(times, [*times[1:], None], strict=True):
        x = scheduler.step(denoise(x, torch.full((2,), t)), t, x, following, generators).prev_sample
    assert torch.equal(ours, x)


def test_a_list_is_the_schedulers_own_run_where_it_takes_lists():
    for solver in ("ddpm", "dpm++"):
        scheduler, diffusion = toy("v_prediction")
        sampler, (x_T, generators) = make_sampler(scheduler, solver), draw((3, 4, 4))
        denoise = gaussian_denoiser(diffusion)
        ours = sample(denoise, sampler, x_T, FAST27, generators)
        native = make_sampler(scheduler, solver)
        native.set_timesteps(timesteps=FAST27)
        x, generators = draw((3, 4, 4))
        for t in FAST27:
            x = native.step(denoise(x, torch.full((2,), t)), t, x, generator=generators).prev_sample
        torch.testing.assert_close(ours, x, rtol=1e-4, atol=1e-4)


def test_eta_one_is_ddpm():
    scheduler, diffusion = toy("sample")
    runs = [
        sample(
            gaussian_denoiser(diffusion),
            make_sampler(scheduler, solver),
            *draw((50,))[:1],
            FAST27,
            draw((1,))[1],
            **eta,
        )
        for solver, eta in (("ddim", {"eta": 1.0}), ("ddpm", {}))
    ]
    torch.testing.assert_close(*runs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_eta_one_is_finite_from_any_step_to_any(schedule):
    """What is left of the noise, 1 − ᾱ − σ², is next to 0 there; rounded below 0 it has no root."""
    scheduler = make_scheduler(schedule, "sample")
    for steps in [*range(1, 60), *((999, t) for t in range(999))]:
        x_T, generators = draw((1,), 1)
        x0 = sample(lambda x, t: 0 * x, make_sampler(scheduler, "ddim"), x_T, steps, generators, eta=1.0)
        assert torch.isfinite(x0).all(), steps


def test_ddim_runs_each_list_to_the_end():
    """A denoiser that knows x0 brings DDIM there in one step or many, whatever the list."""
    scheduler, diffusion = toy()
    truth = torch.linspace(-0.9, 0.9, 12).view(1, 3, 4)
    for steps in (1, 7, 27, FAST27, [999, 998, 3], RESAMPLING):
        x_T, generators = draw((3, 4), 1)
        x0 = sample(
            lambda x, t: diffusion.from_x0(x, truth, t), make_sampler(scheduler, "ddim"), x_T, steps, generators
        )
        torch.testing.assert_close(x0, truth, rtol=0, atol=2e-3)


# One generator per picture


def coupled_denoiser(diffusion, learned):
    """Deterministic, different for each picture and step, with an x0 well outside ±1 here and there."""

    def denoise(x_t, t):
        output = diffusion.from_x0(x_t, torch.tanh(3 * x_t + t.view(-1, 1, 1, 1) / 500 - 1) * 1.5, t)
        return torch.cat([output, torch.sin(x_t)], 1) if learned else output

    return denoise


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("steps", [9, RESAMPLING])
@pytest.mark.parametrize("solver", SOLVERS)
def test_picture_of_a_batch_is_the_picture_alone(solver, steps, learned):
    scheduler, diffusion = toy(learned=learned, clip=True)
    sampler, denoise = make_sampler(scheduler, solver), coupled_denoiser(diffusion, learned)

    def run(seeds):
        generators = picture_generators(seeds, "decoder")
        return sample(denoise, sampler, starting_noise((3, 4, 4), generators), steps, generators)

    together = run([5, 6, 7])
    for i, seed in enumerate([5, 6, 7]):
        torch.testing.assert_close(run([seed])[0], together[i], rtol=0, atol=1e-5)
    assert not torch.allclose(together[0], together[1])
    assert torch.equal(run([5, 6, 7]), together)  # nothing of a run is left in the scheduler


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("learned", [False, True])
def test_clip_sample_holds_for_every_solver(solver, learned):
    scheduler, diffusion = toy(learned=learned, clip=True)
    x_T, generators = draw((3, 8, 8))
    denoise = coupled_denoiser(diffusion, learned)
    x0 = sample(denoise, make_sampler(scheduler, solver), x_T, 12, generators)
    assert float(x0.abs().max()) <= 1 + 1e-4
    x0 = sample(denoise, make_sampler(scheduler, solver, clip_sample=False), *draw((3, 8, 8))[:1], 12, generators)
    assert float(x0.abs().max()) > 1.2


@pytest.mark.parametrize("prediction", PREDICTION_TYPES)
def test_clamped_changes_only_what_is_outside(prediction):
    _, diffusion = toy(prediction)
    t = torch.tensor([10, 600])
    x_t, x0 = torch.randn(2, 3, 4, 4), torch.rand(2, 3, 4, 4) * 4 - 2
    extra = torch.randn(2, 3, 4, 4)
    output = clamped(lambda x, t: torch.cat([diffusion.from_x0(x, x0, t), extra], 1), diffusion, 1.0)(x_t, t)
    torch.testing.assert_close(diffusion.to_x0(x_t, output[:, :3], t), x0.clamp(-1, 1), rtol=0, atol=1e-4)
    assert torch.equal(output[:, 3:], extra)


@pytest.mark.parametrize("solver", SOLVERS)
def test_bfloat16_noise_gives_bfloat16_pictures(solver):
    scheduler, diffusion = toy(clip=True)
    x_T, generators = draw((3, 4, 4))
    seen = []

    def denoise(x_t, t):
        seen.append((x_t.dtype, t.dtype, tuple(t.shape)))
        return gaussian_denoiser(diffusion)(x_t, t).bfloat16()

    x0 = sample(denoise, make_sampler(scheduler, solver), x_T.bfloat16(), 8, generators)
    assert x0.dtype == torch.bfloat16 and torch.isfinite(x0).all() and float(x0.abs().max()) <= 1.01
    assert set(seen) == {(torch.float32, torch.int64, (2,))}


@pytest.mark.gpu
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("solver", SOLVERS)
def test_another_device_draws_the_same_picture(solver, learned):
    scheduler, diffusion = toy(learned=learned, clip=True)
    runs = []
    for device in ("cpu", "cuda"):
        generators = picture_generators([0, 1], "decoder")
        x_T = starting_noise((3, 4, 4), generators, device)
        runs.append(sample(coupled_denoiser(diffusion, learned), make_sampler(scheduler, solver), x_T, 9, generators))
    torch.testing.assert_close(runs[0], runs[1].cpu(), rtol=0, atol=1e-3)


# Randomness


def test_generators_are_a_function_of_seed_and_stage():
    first = [torch.randn(3, generator=g).tolist() for g in picture_generators([0, 1, 0], "prior")]
    assert first[0] == first[2] != first[1]
    assert torch.randn(3, generator=picture_generators([0], "decoder")[0]).tolist() != first[0]
    # Pinned: pictures of a seed must not change from release to release or from process to process.
    assert picture_generators([0], "prior")[0].initial_seed() == 3324751977413314185


def test_a_generator_in_place_of_a_seed_runs_on():
    given = torch.Generator().manual_seed(3)
    first, second = (picture_generators([given, 3], stage) for stage in ("prior", "decoder"))
    assert first[0] is second[0] is given
    assert first[1].initial_seed() == picture_generators([3], "prior")[0].initial_seed()
    with pytest.raises(TypeError, match="must be integers"):
        picture_generators(["3"], "prior")


def test_starting_noise_is_normal_and_moves():
    noise = starting_noise((3, 100, 100), picture_generators([0, 1], "a"), dtype=torch.float64)
    assert noise.shape == (2, 3, 100, 100) and noise.dtype == torch.float64
    assert float(noise.mean()) == pytest.approx(0, abs=0.01) and float(noise.std()) == pytest.approx(1, abs=0.01)


def test_bad_input_gets_one_sentence():
    scheduler, diffusion = toy()
    sampler, denoise = make_sampler(scheduler), gaussian_denoiser(diffusion)
    x_T, generators = draw((3, 4, 4))
    cases = [
        (ValueError, "1 to 1000", lambda: sample(denoise, sampler, x_T, 0, generators)),
        (ValueError, "within 0 to 999", lambda: sample(denoise, sampler, x_T, [1000, 0], generators)),
        (ValueError, "within 0 to 999", lambda: sample(denoise, sampler, x_T, [], generators)),
        (ValueError, "repeat", lambda: sample(denoise, sampler, x_T, [5, 5, 1], generators)),
        (ValueError, "going up", lambda: sample(denoise, sampler, x_T, [5, 1, 5], generators)),
        (ValueError, "1 generators for 2", lambda: sample(denoise, sampler, x_T, 5, generators[:1])),
        (ValueError, "generators for 2", lambda: sample(denoise, sampler, x_T, 5, generators[0])),  # pyright: ignore
        (ValueError, "eta", lambda: sample(denoise, sampler, x_T, 5, generators, eta=0.5)),
        (ValueError, "floating point", lambda: sample(denoise, sampler, x_T.long(), 5, generators)),
        (TypeError, "EulerDiscrete", lambda: sample(denoise, EulerDiscreteScheduler(), x_T, 5, generators)),
        (ValueError, "denoise returned", lambda: sample(lambda x, t: x[:, :1], sampler, x_T, 5, generators)),
        (ValueError, "unknown", lambda: make_sampler(scheduler, "euler")),  # pyright: ignore
        (ValueError, "no option", lambda: make_sampler(scheduler, "ddim", solver_order=2)),
        (TypeError, "expected a diffusers scheduler", lambda: make_sampler("ddim")),
        (ValueError, "v_prediction", lambda: make_sampler(make_scheduler("cosine", "v_prediction"), "unclip")),
        (TypeError, "integers", lambda: picture_generators([0.5], "a")),  # pyright: ignore
        (ValueError, "positive", lambda: starting_noise((0, 4), generators)),
        (
            ValueError,
            "use_karras_sigmas",
            lambda: sample(denoise, DPMSolverMultistepScheduler(use_karras_sigmas=True), x_T, 5, generators),
        ),
    ]
    for error, message, call in cases:
        with pytest.raises(error, match=message):
            call()


def test_a_network_without_variance_channels_needs_a_scheduler_without():
    scheduler, diffusion = toy(learned=True)
    x_T, generators = draw((3, 4, 4))
    with pytest.raises(ValueError, match="learned_range"):
        sample(gaussian_denoiser(diffusion), make_sampler(scheduler), x_T, 5, generators)
    assert isinstance(make_sampler(scheduler, "ddim"), DDIMScheduler)
    assert math.isfinite(
        float(sample(gaussian_denoiser(diffusion), make_sampler(scheduler, "ddim"), x_T, 5, generators).sum())
    )
