"""The embedded model, or another: how good its 64×64 pictures are against the seconds they take, by solver and steps.

    python -m benchmarks.curve --json docs/results/performance-curve.json

Top-5 is nearest-concept accuracy over the real drawings' own (`unclip evals concepts`), guidance that of the preset.
Steps are chosen by the column of training captions; the held-out pairs are there to be read. Seconds are of one prompt
from text to 64×64, medians of several, in turn by every row.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.machine import describe, timed, write
from benchmarks.presets import PROMPTS, table
from unclip.arguments import DTYPES
from unclip.evals.concepts import generator_of, measure, trained_concepts
from unclip.evals.corpus import Corpus, load_corpus
from unclip.evals.features import Judge
from unclip.folder import find_model
from unclip.pipeline import UnCLIP
from unclip.presets import StageSettings

SOLVERS = {"ddim": 1.0, "dpm++": 0.0}  # with η; DPM-Solver++ has none
SPLITS = ("train", "test-pair")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    options = parser().parse_args(arguments)
    device = torch.device(options.device)
    pipe = UnCLIP.from_pretrained(options.model, DTYPES[options.dtype], device)
    preset = pipe.settings(options.preset)["decoder"]
    sides = [
        replace(preset, solver=solver, eta=SOLVERS[solver], steps=steps)
        for solver in options.solvers
        for steps in options.steps
    ]
    seconds = of_time(pipe, sides, options, device)
    real, trained = load_corpus(options.corpus), trained_concepts(find_model(options.model)[0])
    quality = functools.partial(of_quality, pipe, real, trained, options.preset, options.count, Judge(device))
    rows = [
        {"solver": side.solver, "steps": side.steps, **quality(side), "seconds": taken}
        for side, taken in zip(sides, seconds, strict=True)
    ]
    print(table(rows))
    if options.json:
        write(options.json, {"machine": describe(device), "options": vars(options), "rows": rows})


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    p = argparse.ArgumentParser(prog="python -m benchmarks.curve", description=(__doc__ or "").partition("\n")[0])
    p.add_argument("--model", help="folder or hub name; the embedded model if left out")
    p.add_argument("--device", default="cpu")
    p.add_argument("--dtype", choices=("fp32", "bf16"), default="bf16")
    p.add_argument("--preset", default="default", help="of the prior, and of the decoder's guidance")
    p.add_argument("--solvers", nargs="+", choices=tuple(SOLVERS), default=list(SOLVERS))
    p.add_argument("--steps", nargs="+", type=int, default=[2, 4, 8, 16, 32])
    p.add_argument("--corpus", default="corpora/emoji-64")
    p.add_argument("--count", type=int, default=300, help="captions of each split")
    p.add_argument("--pictures", type=int, default=4, help="that are timed")
    p.add_argument("--json", type=Path, help="file of the results")
    return p


def of_quality(
    pipe: UnCLIP,
    real: Corpus,
    trained: Collection[str] | None,
    preset: str,
    count: int,
    judge: Judge,
    side: StageSettings,
) -> dict[str, float]:
    """Top-5 accuracy over the ceiling, of `count` captions of each split; the decoder's settings are `side`."""
    found, generate = {}, generator_of(pipe, real, preset=preset, decoder=side)
    for split in SPLITS:
        figures = measure(generate, real, split, count, trained, featurize=judge)[0]
        found[f"top-5, {split}"] = figures["over_ceiling"]["top5"]
        print(f"{side.solver} {side.steps} {split}: {found[f'top-5, {split}']}", file=sys.stderr)
    return found


def of_time(
    pipe: UnCLIP, sides: Sequence[StageSettings], options: argparse.Namespace, device: torch.device
) -> list[float]:
    """Seconds of one prompt to its 64×64 picture, each row's median."""
    prior = pipe.settings(options.preset)["prior"]

    def draw(side: StageSettings, n: int) -> torch.Tensor:
        text = pipe.encode_text(PROMPTS[n % len(PROMPTS)])
        return pipe.decode(pipe.sample_z_i(text, [n], prior), text, [n], side)

    for side in sides:
        draw(side, 0)
    runs = [
        [timed(lambda side=side, n=n: draw(side, n), device).seconds for side in sides] for n in range(options.pictures)
    ]
    return [statistics.median(of_side) for of_side in zip(*runs, strict=True)]


if __name__ == "__main__":
    main()
