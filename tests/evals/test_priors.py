"""The comparison of priors: which rows there are, and what a row says."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from prior.autoregressive_prior import AutoregressivePrior
from prior.pca import PCA
from unclip.assemble import load_stage
from unclip.core.data import DataConfig, ShardDataset
from unclip.core.sampling import make_sampler
from unclip.evals.concepts import evaluate as concepts
from unclip.evals.priors import candidates, evaluate, measure, table
from unclip.pipeline import UnCLIP


@pytest.fixture(scope="module")
def pipe(tiny_stages: dict[str, Path]) -> UnCLIP:
    """Both priors, and a scheduler with the statistic of analytic variance."""
    parts = {}
    for name in ("clip", "prior", "decoder"):
        parts |= load_stage(name, tiny_stages[name])
    torch.manual_seed(0)
    prior = AutoregressivePrior(16, 24, 24, width=32, depth=1, heads=2, components=4, buckets=8, dot_buckets=4).eval()
    z_i = F.normalize(torch.randn(50, 16), dim=-1)
    prior.set_statistics(PCA.fit(z_i), z_i, torch.rand(50))
    parts["prior_scheduler"] = make_sampler(parts["prior_scheduler"], "analytic", x0_variance=[0.1] * 1000)
    return UnCLIP(**parts, prior_ar=prior)


def test_rows_are_what_the_model_can_do(pipe: UnCLIP, tiny_model: Path) -> None:
    rows = candidates(pipe, (2, 3), 1.5)
    assert list(rows) == [
        "diffusion, dpm++, 16 steps, best of 2",
        "diffusion, ddpm, 2 steps",
        "diffusion, analytic, 2 steps",
        "diffusion, ddpm, 3 steps",
        "diffusion, analytic, 3 steps",
        "autoregressive",
    ]
    assert {settings.guidance_scale for settings in rows.values()} == {1.5}
    plain = candidates(UnCLIP.from_pretrained(tiny_model), (2,))
    assert [name.split(", ")[1] for name in plain] == ["ddpm", "ddpm"]
    parts = {name: part for name, part in pipe.components.items() if part is not None}
    assert list(candidates(UnCLIP(**{**parts, "prior": None, "prior_scheduler": None}), (2,))) == ["autoregressive"]


def test_a_model_without_a_prior_is_named(tiny_stages: dict[str, Path], tiny_corpus: Path, tmp_path: Path) -> None:
    parts = {**load_stage("clip", tiny_stages["clip"]), **load_stage("decoder", tiny_stages["decoder"])}
    UnCLIP(prior=None, prior_scheduler=None, **parts).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="no prior to measure"):
        evaluate(str(tmp_path / "model"), tiny_corpus, ["train"], count=0)


def test_a_row_s_figures_are_those_of_what_was_drawn(pipe: UnCLIP, tiny_corpus: Path, monkeypatch) -> None:
    dataset = ShardDataset(DataConfig(str(tiny_corpus)))
    settings = candidates(pipe, (2,))["autoregressive"]
    figures = measure(pipe, dataset, settings)
    assert figures["count"] == len(dataset)
    assert figures["milliseconds"] > 0
    assert {**measure(pipe, dataset, settings), "milliseconds": 0} == {**figures, "milliseconds": 0}
    pictures = torch.stack([dataset[i]["image"] for i in range(len(dataset))]).float() / 127.5 - 1
    true = pipe.encode_image(pictures)
    monkeypatch.setattr(UnCLIP, "sample_z_i", lambda self, text, seeds, *rest: 3 * true[seeds])
    perfect = measure(pipe, dataset, settings)
    assert (perfect["cosine"], perfect["spread"], perfect["frechet"]) == (1, 1, 0)


def test_the_report_is_a_file_and_a_table(pipe: UnCLIP, tiny_corpus: Path, tmp_path: Path) -> None:
    model = pipe.save_pretrained(tmp_path / "model")
    report = evaluate(str(model), tiny_corpus, ["train"], (2,), None, 6, 0, tmp_path / "priors.json")
    assert json.loads((tmp_path / "priors.json").read_text()) == report
    assert set(report["parameters"]) == {"diffusion", "autoregressive"}
    lines = table(report).splitlines()
    assert len(lines) == 2 + len(report["rows"]) == 6
    assert len({line.count("|") for line in lines}) == 1
    assert f"{report['parameters']['autoregressive']:,}" in lines[-1]
    assert not any("decoded" in figures for row in report["rows"].values() for figures in row.values())
    assert "decoded top1" in lines[0] and lines[-1].endswith("| – | – |")


def test_pictures_of_both_priors_are_judged(pipe: UnCLIP, sized_corpus: Path, tmp_path: Path) -> None:
    """The figures are those of `unclip evals concepts`, given the same captions and seeds."""
    model, path = pipe.save_pretrained(tmp_path / "model"), tmp_path / "priors.json"
    report = evaluate(str(model), sized_corpus, ("train", "test-pair"), (2,), None, 6, 3, path)
    assert json.loads(path.read_text()) == report
    assert report["dtype"] == "fp32"
    names = list(report["rows"])
    judged = [name for name in names if "decoded" in report["rows"][name]["test-pair"]]
    assert judged == [names[0], "autoregressive"]
    for name, condition in zip(judged, ("prior", "ar"), strict=True):
        for split in ("train", "test-pair"):
            alone = concepts(str(model), split, 3, None, sized_corpus, condition=condition)
            decoded = report["rows"][name][split]["decoded"]
            assert decoded == {part: alone[part] for part in decoded}
            assert {"count", "generated", "ceiling", "floor"} <= decoded.keys()
    lines = table(report).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert lines[-1].split("|")[-2].strip() == str(decoded["generated"]["top5"])
    assert lines[3].endswith("| – | – |")
    with pytest.raises(ValueError, match="count=-1 came"):
        evaluate(str(model), sized_corpus, count=-1)
    with pytest.raises(ValueError, match="split='test-concept'"):
        evaluate(str(model), sized_corpus, ["test-concept"])
