"""docs/evaluations.md and docs/latents.md have the figures of the files in docs/results that their commands wrote."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).parents[1] / "docs"
Report = dict[str, Any]


def row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def percent(share: float) -> str:
    return f"{share:.0%}".replace("%", " %")


def both(found: Report) -> str:
    return f"{percent(found['top1'])}, {percent(found['top5'])}"


def table(report: Report) -> Iterator[str]:
    for side, rows in report["rows"].items():
        for index, (name, found) in enumerate(rows.items()):
            shares = [found["generated"]["top1"], found["generated"]["top5"], found["over_ceiling"]["top5"]]
            shares += [found["floor"]["top5"]]
            first = "" if side == "64" or index else f"at {side}: "
            fidelity = [f"{found['frechet']:.1f}", *(f"{found[k]:.2f}" for k in ("precision", "recall"))]
            yield row(f"{first}`{name}`", *(f"{x:.2f}" for x in shares), *fidelity, f"{found['kernel']:.1f}")


def synonyms(report: Report) -> Iterator[str]:
    for stage in ("clip", "prior", "picture"):
        yield row(f"`{stage}`", both(report[stage]["word"]), both(report[stage]["name"]))


def upsamplers(report: Report) -> Iterator[str]:
    for start in ("real", "redrawn"):
        sizes = [report["sizes"][side][start] for side in ("256", "1024")]
        cells = [found[k]["psnr"] for found in sizes for k in ("upsampler", "bicubic", "lanczos")]
        yield row(f"`{start}`", *(f"{x:.1f}" for x in cells))


def priors(report: Report) -> Iterator[str]:
    for name, splits in report["rows"].items():
        for split, found in splits.items():
            decoded = both(found["decoded"]["generated"]) if "decoded" in found else ""
            figures = [f"{found['cosine']:.3f}, {found['cosine_shuffled']:.3f}", f"{found['top1']:.3f}"]
            figures += [f"{found['spread']:.2f}", f"{found['frechet']:.4f}", f"{found['milliseconds']:.1f}"]
            yield row(name, f"`{split}`", *figures, decoded)


def inversion(report: Report) -> Iterator[str]:
    for steps in ("25", "50", "100"):
        found, noise = report[steps], report[steps]["x_T"]
        whole = found["reconstruction"]
        cells = [f"{whole['mean']:.1f} ± {whole['std']:.1f}", f"{whole['least']:.1f}"]
        cells += [f"{found[k]['mean']:.1f}" for k in ("of_trained_concepts", "another_z_i", "random_x_T")]
        yield row(steps, *cells, f"{noise['mean']:.3f}", f"{noise['variance']:.2f}", f"{noise['neighbours']:.3f}")
    yield f"Another drawing in a drawing's place has {report['another_picture']['mean']:.1f} dB."


def kept(label: str, found: Report) -> str:
    low, high = found["kept_interval"]
    shares = [f"{found[k]:.2f}" for k in ("reconstructions", "variations")]
    return row(label, *shares, f"{found['kept']:.2f} ({low:.2f} to {high:.2f})")


def variations(report: Report) -> Iterator[str]:
    found = report["variations"]
    held_out = report["split"] == "test-pair"
    what = "held-out drawings (`test-pair`)" if held_out else "drawings of `train`"
    yield kept(f"{found['count']} {what}, top-1", found["top1"])
    yield kept("the same, top-5", found["top5"])
    for name in ("difference", "end", "start") if held_out else ():
        of = report["interpolations"][name]
        yield row(f"`{name}`", f"{of['mean']:.3f}", f"{of['least']:.3f}", f"{of['at_least_0.9']:.2f}")


WHOLE = (table, synonyms, upsamplers, priors)  # each a table of its own


@pytest.mark.parametrize(
    ("page", "name", "lines"),
    [
        ("evaluations.md", "table-train", table),
        ("evaluations.md", "table-test-pair", table),
        ("evaluations.md", "synonyms", synonyms),
        ("evaluations.md", "upsamplers", upsamplers),
        ("evaluations.md", "priors", priors),
        ("latents.md", "latents-inversion", inversion),
        ("latents.md", "latents-variations", variations),
        ("latents.md", "latents-variations-train", variations),
    ],
)
def test_page_has_the_figures_of_the_file(page: str, name: str, lines: Callable[[Report], Iterator[str]]) -> None:
    text = (DOCS / page).read_text(encoding="utf-8")
    found = list(lines(json.loads((DOCS / "results" / f"{name}.json").read_text(encoding="utf-8"))))
    missing = [line for line in found if line not in text]
    assert not missing, "\n".join(missing)
    if lines in WHOLE:
        assert "|\n" + "\n".join(found) + "\n\n" in text, "a table of the page has other rows than the file"


def test_inpainting_has_the_figures_of_both_sizes() -> None:
    reports = [json.loads((DOCS / "results" / f"latents-inpainting{at}.json").read_text()) for at in ("", "-1024")]
    text = (DOCS / "latents.md").read_text(encoding="utf-8")
    labels = {"drawings": "the drawings", "white": "white instead", "pasted": "pasted", "tuned": "tuned",
              "one walk": "replaced, one walk", "4 walks": "replaced, four walks"}  # fmt: skip
    for name, label in labels.items():
        cells: list[str] = []
        for report in reports:
            filled = report[name]["filled"]
            cells += [f"{report[name]['seam']:.3f}", *(f"{100 * filled[k]:.0f}" for k in ("top1", "top5"))]
        assert row(label, *cells) in text, row(label, *cells)
        assert all(report[name]["known"] == 1.0 for report in reports), name
