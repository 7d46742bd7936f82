"""The embedded model, or another: how long each preset takes, what bf16 changes, and what tiles save.

    python -m benchmarks.presets --json docs/results/performance-presets.json

Seconds are medians of several pictures, drawn in turn by every preset. PSNR is that of the pictures' 8 bits.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.machine import Run, describe, memory_mb, timed, write
from unclip.arguments import DTYPES, quantised
from unclip.pipeline import UnCLIP

PROMPTS = ["a red apple, glossy 3D", "an owl, flat", "a rocket, simple", "a green pear, blob"]


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    options = parser().parse_args(arguments)
    device = torch.device(options.device)
    if options.threads:
        torch.set_num_threads(options.threads)
    pipes = {dtype: UnCLIP.from_pretrained(options.model, DTYPES[dtype], device) for dtype in options.dtypes}
    presets = of_presets(pipes, options, device)
    tiles = of_tiles(next(iter(pipes.values())), options, device)
    print(f"{table(presets)}\n\n{table(tiles)}")
    if options.json:
        write(options.json, {"machine": describe(device), "options": vars(options), "rows": presets, "tiles": tiles})


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    p = argparse.ArgumentParser(prog="python -m benchmarks.presets", description=(__doc__ or "").partition("\n")[0])
    p.add_argument("--model", help="folder or hub name; the embedded model if left out")
    p.add_argument("--device", default="cpu")
    p.add_argument("--presets", nargs="+", default=["default", "fast"], help="the first is what ratios are to")
    p.add_argument("--dtypes", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    p.add_argument("--tiles", nargs="+", type=int, default=[512, 256], help="sides of the tiles of the last upsampler")
    p.add_argument("--pictures", type=int, default=4)
    p.add_argument("--threads", type=int, default=0, help="0: as many as torch takes")
    p.add_argument("--json", type=Path, help="file of the results")
    return p


def of_presets(pipes: dict[str, UnCLIP], options: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """A row for every preset and dtype: seconds of each stage and of a picture."""
    sides = [(preset, dtype) for preset in options.presets for dtype in pipes]
    runs: dict[tuple[str, str], list[dict[str, Run]]] = {side: [] for side in sides}
    for preset, dtype in sides:
        picture(pipes[dtype], preset, PROMPTS[0], 0, device)
    for n in range(options.pictures):
        for preset, dtype in sides:
            runs[preset, dtype].append(picture(pipes[dtype], preset, PROMPTS[n % len(PROMPTS)], n, device))
            print(f"picture {n + 1}, {preset} {dtype}", file=sys.stderr)
    rows, (first, *_) = [], options.presets
    for preset, dtype in sides:
        seconds = {
            name: statistics.median(run[name].seconds for run in runs[preset, dtype]) for name in runs[sides[0]][0]
        }
        totals = [[sum(run.seconds for run in one.values()) for one in runs[p, dtype]] for p in (preset, first)]
        last = list(seconds)[-1]
        outputs = [[one[last].output for one in runs[preset, d]] for d in (dtype, options.dtypes[0])]
        rows.append(
            {
                "preset": preset,
                "dtype": dtype,
                **seconds,
                "total": statistics.median(totals[0]),
                f"time of {first}'s": statistics.median(a / b for a, b in zip(*totals, strict=True)),
                f"PSNR to {options.dtypes[0]}": None if dtype == options.dtypes[0] else psnr(*map(torch.cat, outputs)),
            }
        )
    return rows


def picture(pipe: UnCLIP, preset: str, prompt: str, seed: int, device: torch.device) -> dict[str, Run]:
    """One picture, stage by stage."""
    settings, runs = pipe.settings(preset), {}
    runs["text"] = timed(lambda: pipe.encode_text(prompt).z_t, device)
    text = pipe.encode_text(prompt)
    runs["prior"] = timed(lambda: pipe.sample_z_i(text, [seed], settings["prior"]), device)
    x = runs["prior"].output
    for side, name in pipe.networks.items():
        if name == "decoder":
            runs[str(side)] = timed(lambda x=x: pipe.decode(x, text, [seed], settings["decoder"]), device)
        else:
            runs[str(side)] = timed(lambda x=x, s=side, n=name: pipe.upsample(x, s, [seed], settings[n]), device)
        x = runs[str(side)].output
    return runs


def of_tiles(pipe: UnCLIP, options: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """A row for the last upsampler run whole and in tiles of every size, of one picture."""
    *_, (before, _), (side, name) = [(0, ""), *pipe.networks.items()]
    low = pipe(PROMPTS[0], size=before, preset=options.presets[-1], output_type="pt").images
    assert isinstance(low, Tensor)
    settings, rows, whole = pipe.settings(options.presets[-1])[name], [], None
    for tile in (None, *options.tiles):
        pipe.use_tiles(tile)
        memory = memory_mb(lambda: pipe.upsample(low, side, [0], settings), device)
        run = timed(lambda: pipe.upsample(low, side, [0], settings), device)
        whole = run.output if whole is None else whole
        compared = {"PSNR to the whole": psnr(run.output, whole), "largest": float((run.output - whole).abs().max())}
        rows.append(
            {
                "picture": side,
                "tile": tile or "whole",
                "seconds": run.seconds,
                "MB": memory,
                **(compared if tile else dict.fromkeys(compared)),
            }
        )
    pipe.use_tiles(None)
    return rows


def psnr(x: Tensor, y: Tensor) -> float:
    """Peak signal to noise ratio in dB of two pictures in [−1, 1], at 8 bits."""
    error = float((quantised(x.float()) - quantised(y.float())).square().mean())
    return 10 * math.log10(4 / error) if error else math.inf


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows of the same keys in Markdown."""
    lines = [f"| {' | '.join(rows[0])} |", "|---" * len(rows[0]) + "|"]
    for row in rows:
        cells = ["–" if v is None else f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
