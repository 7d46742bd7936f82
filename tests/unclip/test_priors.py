"""Which prior draws z_i, and the basis of reconstructions: in a pipeline, in a model folder, on the command line."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from prior.autoregressive_prior import AutoregressivePrior
from prior.pca import PCA
from unclip.assemble import assemble, fit_basis, load_stage
from unclip.core.sampling import picture_generators
from unclip.pipeline import UnCLIP

D, W = 16, 24


def make_prior(seed: int = 0, **sizes) -> AutoregressivePrior:
    torch.manual_seed(seed)
    small = {"width": 32, "depth": 2, "heads": 2, "components": 6, "buckets": 16, "dot_buckets": 4}
    prior = AutoregressivePrior(**{"embedding_dim": D, "text_width": W, "context_length": 24, **small, **sizes})
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    z_i = F.normalize(torch.randn(50, prior.embedding_dim), dim=-1)
    prior.set_statistics(PCA.fit(z_i), z_i, torch.rand(50))
    return prior.eval()


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An autoregressive prior as its training leaves it."""
    folder = tmp_path_factory.mktemp("prior_ar")
    make_prior().save_pretrained(folder / "model")
    return folder


@pytest.fixture(scope="module")
def both(tiny_stages: dict[str, Path], stage: Path) -> UnCLIP:
    """A model with both priors, a basis and no upsamplers."""
    parts = {}
    for name in ("clip", "prior", "decoder"):
        parts |= load_stage(name, tiny_stages[name])
    parts |= load_stage("prior_ar", stage)
    presets = {"default": {"prior": {"solver": "ddpm", "steps": 3}, "decoder": {"steps": 2}}}
    return UnCLIP(**parts, pca=PCA.fit(torch.randn(40, D)), presets=presets)


def test_the_prior_asked_for_draws(both: UnCLIP) -> None:
    text = both.encode_text(["a red apple", "a green pear on a plate"])
    drawn = both.sample_z_i(text, [3, 4], both.settings(prior="ar")["prior"])
    own = both.prior_ar.sample(text.z_t, text.states, text.mask, picture_generators([3, 4], "prior"))
    assert torch.allclose(drawn, F.normalize(own, dim=-1), atol=1e-6)
    default, asked = (both.sample_z_i(text, [3, 4], both.settings(prior=p)["prior"]) for p in (None, "diffusion"))
    assert torch.equal(default, asked)
    assert not torch.allclose(default, drawn, atol=1e-2)


def test_a_call_takes_the_prior_and_its_guidance(both: UnCLIP) -> None:
    def z_i(**options):
        return both("a red apple", size=16, num_images=2, seed=5, **options).image_embeds

    text = both.encode_text(["a red apple"] * 2)
    settings = replace(both.settings(prior="ar")["prior"], guidance_scale=2.5)
    guided = z_i(prior="ar", prior_guidance_scale=2.5)
    assert torch.allclose(guided, both.sample_z_i(text, [5, 6], settings), atol=1e-6)
    assert not torch.allclose(guided, z_i(prior="ar"), atol=1e-3)


@pytest.mark.parametrize("batch_size", [64, 2])
def test_a_negative_prompt_leads_away(both: UnCLIP, batch_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(both.batch_size, "prior", batch_size)
    caption, long = "a red apple", "two yellow stars and a small purple house on a plate"
    guided = {"prior": "ar", "size": 16, "num_images": 3, "seed": 5, "guidance_scale": 1.0, "prior_guidance_scale": 2.5}
    text = both.encode_text([caption] * 3)
    plain = both(caption, **guided).image_embeds
    for negative in ("stars", long):
        away = both.encode_text([negative] * 3)
        n = max(text.mask.shape[1], away.mask.shape[1])
        here, there = (
            {
                "z_t": t.z_t,
                "text": F.pad(t.states, (0, 0, 0, n - t.states.shape[1])),
                "text_mask": F.pad(t.mask, (0, n - t.mask.shape[1])),
            }
            for t in (text, away)
        )
        own = both.prior_ar.sample(
            **here, generators=picture_generators([5, 6, 7], "prior"), guidance_scale=2.5, negative=there
        )
        drawn = both(caption, negative_prompt=negative, **guided).image_embeds
        assert torch.allclose(drawn, F.normalize(own, dim=-1), atol=1e-5)
        assert not torch.allclose(drawn, plain, atol=1e-3)
    itself = both(caption, negative_prompt=caption, **guided).image_embeds
    assert torch.allclose(itself, both(caption, **{**guided, "prior_guidance_scale": 1.0}).image_embeds, atol=1e-5)
    with pytest.raises(ValueError, match="guidance scale above 1"):
        both(caption, negative_prompt="stars", **{**guided, "prior_guidance_scale": 1.0})


def test_a_picture_is_its_seed_s_whatever_the_batch(both: UnCLIP) -> None:
    settings = both.settings(prior="ar")["prior"]
    text = both.encode_text(["a red apple"] * 3)
    every = both.sample_z_i(text, [1, 2, 3], settings)
    before, both.batch_size = both.batch_size, {**both.batch_size, "prior": 2}
    try:
        assert torch.allclose(both.sample_z_i(text, [1, 2, 3], settings), every, atol=1e-5)
    finally:
        both.batch_size = before
    assert not torch.allclose(every[0], every[1], atol=1e-3)


def test_several_draws_keep_the_nearest(both: UnCLIP) -> None:
    settings = both.settings(prior="ar")["prior"]
    text = both.encode_text(["a red apple"] * 4)
    one, best = (both.sample_z_i(text, [0, 1, 2, 3], replace(settings, draws=n)) for n in (1, 3))
    assert bool((F.cosine_similarity(best, text.z_t) >= F.cosine_similarity(one, text.z_t) - 1e-6).all())


def test_options_are_the_draw_s(both: UnCLIP) -> None:
    settings = both.settings(prior="ar")["prior"]
    text = both.encode_text(["a red apple"] * 2)
    greedy = both.sample_z_i(text, [0, 1], replace(settings, options={"top_p": 0.0}))
    own = both.prior_ar.sample(text.z_t, text.states, text.mask, picture_generators([0, 1], "prior"), top_p=0.0)
    assert torch.allclose(greedy, F.normalize(own, dim=-1), atol=1e-6)
    with pytest.raises(ValueError, match="temperature and top_p"):
        both.sample_z_i(text, [0, 1], replace(settings, options={"steps": 3}))


def test_every_token_is_reported_as_a_step_of_the_prior(both: UnCLIP) -> None:
    seen = []
    text = both.encode_text(["a red apple"])
    both.sample_z_i(text, [0], both.settings(prior="ar")["prior"], seen.append)
    assert [(p.stage, p.step, p.total) for p in seen] == [("prior", i + 1, 6) for i in range(6)]


def test_a_preset_may_name_it(both: UnCLIP) -> None:
    parts = {name: part for name, part in both.components.items() if part is not None}
    pipe = UnCLIP(**parts, presets={"default": {"prior": {"solver": "ar", "guidance_scale": 2.0, "draws": 1}}})
    assert pipe.settings()["prior"] == replace(pipe.settings()["prior"], solver="ar", guidance_scale=2.0)
    assert pipe.settings(prior="ar")["prior"] == pipe.settings()["prior"]
    assert pipe.settings(prior="diffusion")["prior"].solver == "dpm++"


def test_the_autoregressive_prior_alone_is_a_model(both: UnCLIP, tmp_path: Path) -> None:
    parts = {name: part for name, part in both.components.items() if part is not None}
    parts |= {"prior": None, "prior_scheduler": None}
    alone = UnCLIP.from_pretrained(UnCLIP(**parts).save_pretrained(tmp_path / "model"))
    options = {"size": 16, "seed": 2, "output_type": "pt", "steps": [None, 2]}
    for prompt in ("a red apple", "a red apple:2 | two stars"):
        drawn = alone(prompt, **options)
        assert torch.equal(drawn.image_embeds, alone(prompt, prior="ar", **options).image_embeds)
        assert torch.equal(drawn.image_embeds, both(prompt, prior="ar", **options).image_embeds)
    average = F.normalize(both.prior_ar.pca.mean, dim=0)  # which a lone weight of 0 leads to
    for pipe in (alone, both):
        assert torch.allclose(pipe("a red apple:0", prior="ar", **options).image_embeds[0], average, atol=1e-5)
    assert alone.vary("a red apple", n=1, size=16, steps=2).seeds == [0]
    with pytest.raises(ValueError, match="no diffusion prior; give prior='ar'"):
        alone("a red apple", prior="diffusion")


def test_both_priors_and_the_basis_are_in_the_folder(both: UnCLIP, tmp_path: Path) -> None:
    folder = both.save_pretrained(tmp_path / "model")
    loaded = UnCLIP.from_pretrained(folder)
    assert torch.equal(loaded.pca.components, both.pca.components)
    options = {"size": 16, "seed": 2, "prior": "ar", "output_type": "pt"}
    assert torch.equal(loaded("a red apple", **options).images, both("a red apple", **options).images)
    half = UnCLIP.from_pretrained(folder, dtype="bf16")
    assert half.pca.components.dtype == torch.float32
    assert half("a red apple", **options).image_embeds.isfinite().all()


def test_what_is_not_there_is_named(both: UnCLIP, pipe: UnCLIP) -> None:
    with pytest.raises(ValueError, match="no autoregressive prior; give prior='diffusion'"):
        pipe.settings(prior="ar")
    with pytest.raises(ValueError, match="prior 'gan' is unknown"):
        both.settings(prior="gan")
    parts = {name: part for name, part in both.components.items() if part is not None}
    with pytest.raises(ValueError, match="embedding width is 20 but CLIP's is 16"):
        UnCLIP(**{**parts, "prior_ar": make_prior(embedding_dim=20)})
    with pytest.raises(ValueError, match="principal components' width is 9 but CLIP's is 16"):
        UnCLIP(**{**parts, "pca": PCA(9)})


def test_the_basis_is_that_of_the_corpus_and_nothing_else_changes(
    copy_model: Callable[[], Path], tiny_corpus: Path
) -> None:
    model = copy_model()
    (model / "README.md").write_text("# A card\n")
    before = {
        path: path.read_bytes() for path in model.rglob("*") if path.is_file() and path.name != "model_index.json"
    }
    index = json.loads((model / "model_index.json").read_text())
    assert fit_basis(model, tiny_corpus) == model / "pca"
    assert {path: path.read_bytes() for path in before} == before
    after = json.loads((model / "model_index.json").read_text())
    assert after.pop("pca") == ["prior.pca", "PCA"]
    assert after == {name: value for name, value in index.items() if name != "pca"}

    pipe = UnCLIP.from_pretrained(model)
    from unclip.core.data import DataConfig, ShardDataset, to_pixels

    dataset = ShardDataset(DataConfig(str(tiny_corpus)))
    pictures = torch.cat([to_pixels(dataset[i]["image"][None]) for i in range(len(dataset))])
    expected = PCA.fit(pipe.encode_image(pictures))
    assert torch.allclose(pipe.pca.eigenvalues, expected.eigenvalues, atol=1e-5)
    again = (model / "pca" / "config.json").read_bytes()
    fit_basis(model, tiny_corpus)
    assert (model / "pca" / "config.json").read_bytes() == again


def test_assembling_names_what_is_no_autoregressive_prior(tiny_stages: dict[str, Path], tmp_path: Path) -> None:
    stages = {name: tiny_stages[name] for name in ("clip", "prior", "decoder")}
    with pytest.raises(ValueError, match=r"AutoregressivePrior|lacks the weights"):
        assemble(tmp_path / "model", **stages, prior_ar=tiny_stages["prior"])
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("known", [False, True])
def test_the_paper_s_preset_samples_by_analytic_variance_where_it_is_known(both: UnCLIP, known: bool, tmp_path) -> None:
    from unclip.core.sampling import make_sampler

    parts = {name: part for name, part in both.components.items() if part is not None}
    if known:
        parts["prior_scheduler"] = make_sampler(both.prior_scheduler, "analytic", x0_variance=[0.5] * 1000)
    made = UnCLIP(**parts)
    for pipe in (made, UnCLIP.from_pretrained(made.save_pretrained(tmp_path / "model"))):
        settings = pipe.settings("paper")["prior"]
        assert settings == replace(made.settings("paper")["prior"], solver="analytic" if known else "ddpm")
        assert (settings.steps, settings.draws) == (64, 2)
    assert made.settings()["prior"].solver == "dpm++"
    own = UnCLIP(**parts, presets={"paper": {"prior": {"solver": "ddpm"}}})
    assert own.settings("paper")["prior"].solver == "ddpm"


def test_analytic_variance_needs_its_statistic(both: UnCLIP) -> None:
    from unclip.core.sampling import make_sampler

    own = replace(both.settings()["prior"], solver="analytic", steps=4)
    text = both.encode_text(["a red apple"])
    with pytest.raises(ValueError, match="no x0_variance"):
        both.sample_z_i(text, [0], own)
    parts = {name: part for name, part in both.components.items() if part is not None}
    scheduler = make_sampler(both.prior_scheduler, "analytic", x0_variance=[0.5] * 1000)
    pipe = UnCLIP(**{**parts, "prior_scheduler": scheduler})
    plain = pipe.sample_z_i(text, [0], replace(own, solver="ddpm"))
    assert not torch.allclose(pipe.sample_z_i(text, [0], own), plain, atol=1e-3)
