"""What upsamplers are measured by: known errors, Lanczos in an upsampler's place, and a tiny model."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from unclip.core.data import to_pixels
from unclip.evals.corpus import load_corpus
from unclip.evals.upsamplers import enlarged, evaluate, figures_of, measure
from unclip.pipeline import UnCLIP
from upsamplers.degradations import downsample


def smooth(n: int, side: int) -> torch.Tensor:
    """Random pictures without fine detail, (n, 3, side, side) within (−0.9, 0.9)."""
    x = torch.rand(n, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 1.6 - 0.8
    return torch.nn.functional.interpolate(x, (side, side), mode="bicubic").clamp(-0.9, 0.9)


def test_a_known_error_has_the_psnr_it_should_and_the_same_picture_ssim_1() -> None:
    real = smooth(2, 64)
    low = downsample(real, 4)
    found = figures_of(real + 0.02, real, low)
    assert found["psnr"].tolist() == pytest.approx([40, 40], abs=1e-3)  # 10·log10(4 / 0.02²)
    assert found["psnr_back"].tolist() == pytest.approx([40, 40], abs=0.1)
    assert figures_of(real + 1e-6, real, low)["ssim"].tolist() == pytest.approx([1, 1], abs=1e-4)
    noise = torch.randn(real.shape, generator=torch.Generator().manual_seed(1))
    assert (figures_of(real + 0.2 * noise, real, low)["ssim"] < 0.9).all()


@pytest.mark.parametrize("method", ["bicubic", "lanczos"])
def test_enlarging_keeps_what_is_smooth(method: str) -> None:
    real = smooth(2, 64)
    x = enlarged(downsample(real, 4), 64, method)
    assert x.shape == real.shape
    assert (figures_of(x, real, downsample(real, 4))["psnr"] > 30).all()
    flat = torch.full((1, 3, 16, 16), 0.2)
    assert (enlarged(flat, 64, method) - 0.2).abs().max() < 1 / 255 + 1e-6


def test_lanczos_gains_nothing_over_itself_and_the_real_picture_much(
    sized_corpus: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, real = UnCLIP.from_pretrained(tiny_model), load_corpus(sized_corpus.with_name("tiny-64"))
    rows = list(range(6))
    low = to_pixels(load_corpus(sized_corpus, side=16).pictures(rows))
    settings = pipe.settings()["upsampler_256"]
    monkeypatch.setattr(UnCLIP, "upsample", lambda self, low, side, *rest: enlarged(low, side, "lanczos"))
    table, drawn = measure(pipe, low, real, rows, rows, settings)
    assert table["upsampler"] == table["lanczos"] != table["bicubic"]
    assert table["over_lanczos"] == {"mean": 0, "std": 0, "least": 0}
    assert torch.equal(drawn, enlarged(low, 64, "lanczos"))
    near = iter(to_pixels(real.pictures(rows)).add(0.002).split(4))
    monkeypatch.setattr(UnCLIP, "upsample", lambda self, *rest: next(near))
    table, _ = measure(pipe, low, real, rows, rows, settings)
    assert table["upsampler"]["psnr"] == pytest.approx(60, abs=0.1)
    assert table["over_lanczos"]["least"] > 20


def test_every_size_and_both_inputs_are_measured(sized_corpus: Path, tiny_model: Path, tmp_path: Path) -> None:
    path, model = tmp_path / "upsamplers.json", str(tiny_model)
    report = evaluate(model, sized_corpus, "test-pair", 2, 256, json_path=path)
    assert json.loads(path.read_text()) == report
    assert list(report["sizes"]) == ["64", "256"]
    for table in report["sizes"].values():
        assert list(table) == ["real", "redrawn"]
        assert table["real"] != table["redrawn"]
        assert list(table["real"]) == ["upsampler", "bicubic", "lanczos", "over_lanczos"]
    with pytest.raises(ValueError, match="size 16 is the decoder's"):
        evaluate(model, sized_corpus, "test-pair", 2, 16)
    with pytest.raises(ValueError, match="strength is 2"):
        evaluate(model, sized_corpus, "test-pair", 2, 64, strength=2)
    with pytest.raises(ValueError, match="40 drawings asked for"):
        evaluate(model, sized_corpus, "test-pair", 40, 64)


def test_drawings_of_any_concept_are_enlarged(copy_model: Callable[[], Path], sized_corpus: Path) -> None:
    model = copy_model()
    (model / "concepts.txt").write_text("blue fish\n")
    report = evaluate(str(model), sized_corpus, "test-pair", 4, 64)
    assert (report["count"], report["drawings_of_trained_concepts"], report["dtype"]) == (4, 1, "fp32")
