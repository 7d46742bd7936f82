"""How long each stage takes here and in another project: both in one process, in turn, with the same weights.

    python -m benchmarks.sampling --peer diffusers --json docs/results/sampling.json

Every round runs each side once, one after the other. A ratio is the other's seconds over ours within a round, the
median over the rounds. Encoding prompts is no part of a stage on either side.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.machine import Run, describe, gflop, memory_mb, peak, timed, write
from benchmarks.peers import Dalle2, Diffusers, make_generators
from benchmarks.stacks import (
    FACTOR,
    SIZES,
    STAGES,
    make_clip,
    make_inputs,
    make_ours,
    make_schedulers,
    make_text,
    make_theirs,
    sizes,
)
from prior.diffusion_prior import DiffusionPrior
from unclip.arguments import DTYPES
from unclip.core.diffusion import make_scheduler
from unclip.core.sampling import guided, make_sampler, picture_generators, sample, starting_noise
from unclip.presets import KARLO, StageSettings

STEPS = {"prior": 25, "decoder": 10, "super_resolution": 7}
OURS = {"prior": "prior", "decoder": "decoder", "super_resolution": "upsampler_256"}
DALLE2 = {"width": 512, "depth": 6, "heads": 8, "steps": 64, "guidance_scale": 2.0}
Work = Callable[[int], Tensor]  # of a number of steps: the whole stage


@dataclass
class Row:
    """One stage in one dtype. Seconds are medians; `ratio` is against the peer in fp32, as it runs by default.

    difference: the largest from the peer's output, as a part of its largest value, both in fp32. psnr: in dB, of our
    output in this dtype against ours in fp32. fraction: of the machine's peak in the same dtype.
    """

    stage: str
    dtype: str
    batch: int
    steps: int
    seconds: float
    peer_seconds: float
    ratio: float
    peer_seconds_same_dtype: float
    ratio_same_dtype: float
    memory_mb: float | None
    peer_memory_mb: float | None
    gflop: float
    peer_gflop: float
    fraction: float
    peer_fraction: float
    difference: float | None = None
    psnr: float | None = None


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    options = parser().parse_args(arguments)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("benchmarks: --device cuda, but there is none here; take --device cpu.")
    if options.threads:
        torch.set_num_threads(options.threads)
    peaks = {name: peak(DTYPES[name], device, options.peak_side) for name in dict.fromkeys(["fp32", *options.dtypes])}
    measure = of_dalle2 if options.peer == "dalle2" else of_diffusers
    try:
        rows = measure(options, device, {name: max(values.values()) for name, values in peaks.items()})
    except ImportError as error:
        raise SystemExit(f"benchmarks: {error}") from error
    print(table(rows))
    if options.json:
        result = {"machine": describe(device), "options": vars(options), "peak_gflops": peaks}
        write(options.json, {**result, "rows": [asdict(row) for row in rows]})


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    p = argparse.ArgumentParser(prog="python -m benchmarks.sampling", description=(__doc__ or "").partition("\n")[0])
    p.add_argument("--peer", choices=("diffusers", "dalle2"), default="diffusers")
    p.add_argument("--device", default="cpu")
    p.add_argument("--size", choices=tuple(SIZES), default="mid", help="of the networks; Karlo's are 3.3 billion")
    p.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    p.add_argument("--dtypes", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    p.add_argument("--batch", type=int, default=1, help="pictures at once")
    p.add_argument("--tokens", type=int, default=16, help="of a prompt, out of 77")
    p.add_argument("--steps", nargs="+", type=int, help="of each stage, in the order of --stages")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--threads", type=int, default=0, help="0: as many as torch takes")
    p.add_argument("--compile", action="store_true", help="compile our networks; the peer stays as it is")
    p.add_argument("--peak-side", type=int, default=2048, help="of the matrices that measure the machine")
    p.add_argument("--json", type=Path, help="file of the results")
    return p


# --- what runs


def of_diffusers(options: argparse.Namespace, device: torch.device, peaks: Mapping[str, float]) -> list[Row]:
    """Rows of every stage and dtype against diffusers."""
    chosen = sizes(options.size, options.stages)
    clip = make_clip(chosen["embedding"]).to(device)
    inputs = make_inputs(clip, chosen, options.batch, options.tokens, device)
    works: dict[tuple[str, str, str], Work] = {}  # (side, dtype, stage)
    for dtype in dict.fromkeys(["fp32", *options.dtypes]):
        theirs = make_theirs(chosen)
        pipe = make_ours(clip, theirs, DTYPES[dtype]).to(device) if dtype in options.dtypes else None
        moved = {name: network.to(device, DTYPES[dtype]) for name, network in theirs.items()}
        peer = Diffusers(moved, make_schedulers(), DTYPES[dtype])
        if pipe is not None:
            pipe.batch_size = dict.fromkeys(pipe.batch_size, int(options.batch))
            if options.compile:
                pipe.compile()
        for stage in options.stages:
            ours, other = stage_works(stage, pipe, peer, inputs, options.batch)
            works["peer", dtype, stage] = other
            if pipe is not None:
                works["ours", dtype, stage] = ours
    steps = dict(zip(options.stages, options.steps, strict=True)) if options.steps else STEPS
    rows: list[Row] = []
    for stage in options.stages:
        rows += measure_stage(stage, works, steps[stage], options, peaks, device)
    return rows


def stage_works(stage: str, pipe: Any, peer: Diffusers, inputs: Mapping[str, Any], batch: int) -> tuple[Work, Work]:
    """One stage here and there, of the same inputs and noise."""
    text, empty, z_i, low = (inputs[name] for name in ("text", "empty", "z_i", "low"))
    seeds = range(batch)

    def ours(steps: int) -> Tensor:
        settings = StageSettings(**{**KARLO[OURS[stage]], "steps": steps})
        generators = make_generators(seeds)
        if stage == "prior":
            return pipe.sample_z_i(text, generators, settings)
        if stage == "decoder":
            return pipe.decode(z_i, text, generators, settings)
        return pipe.upsample(low, low.shape[-1] * FACTOR, generators, settings)

    def theirs(steps: int) -> Tensor:
        generators = make_generators(seeds)
        if stage == "prior":
            return peer.prior(text, empty, steps, generators)
        if stage == "decoder":
            return peer.decoder(z_i, text, empty, steps, generators)
        return peer.super_resolution(low, steps, generators)

    return ours, theirs


def of_dalle2(options: argparse.Namespace, device: torch.device, peaks: Mapping[str, float]) -> list[Row]:
    """Rows of the prior in every dtype against dalle2-pytorch, both guided, of one width and depth."""
    width, depth, heads, scale = (DALLE2[name] for name in ("width", "depth", "heads", "guidance_scale"))
    text = make_text(int(width), options.batch, options.tokens, device)
    scheduler = make_sampler(make_scheduler("cosine", "sample", clip_sample=False), "ddim")
    works: dict[tuple[str, str, str], Work] = {}
    for dtype in dict.fromkeys(["fp32", *options.dtypes]):
        peer = Dalle2(int(width), int(depth), int(heads), DTYPES[dtype], device)
        torch.manual_seed(0)
        net = DiffusionPrior(int(width), int(width), 77, int(width), int(depth), int(heads)).eval()
        net: Any = net.to(device, DTYPES[dtype])  # pyright: ignore[reportArgumentType]
        if options.compile:
            net.compile()
        parts = [part.to(DTYPES[dtype]) if part.is_floating_point() else part for part in text]
        drop = torch.ones(options.batch, dtype=torch.bool, device=device)

        def ours(steps: int, net: Any = net, parts: list[Tensor] = parts, drop: Tensor = drop) -> Tensor:
            generators = picture_generators(range(options.batch), "prior")
            with torch.no_grad():
                denoise = guided(net, net.encode_context(*parts), net.encode_context(*parts, drop_text=drop), scale)
            x_T = starting_noise((int(width),), generators, device)
            return net.unstandardize(sample(denoise, scheduler, x_T, steps, generators))

        works["ours", dtype, "prior"] = ours
        works["peer", dtype, "prior"] = lambda steps, peer=peer: peer.prior(text, steps, scale)
    steps = options.steps[0] if options.steps else int(DALLE2["steps"])
    return measure_stage("prior", works, steps, options, peaks, device, same_weights=False)


# --- how it is measured


def measure_stage(
    stage: str,
    works: Mapping[tuple[str, str, str], Work],
    steps: int,
    options: argparse.Namespace,
    peaks: Mapping[str, float],
    device: torch.device,
    same_weights: bool = True,
) -> list[Row]:
    """Runs all sides in turn, `rounds` times, each after two steps of its own, which are not timed."""
    sides = [(side, dtype) for side, dtype, name in works if name == stage]
    memory = {side: memory_mb(lambda side=side: works[*side, stage](2), device) for side in sides}
    counted = {side: of_steps(works[side, options.dtypes[0], stage], steps) for side in ("ours", "peer")}
    runs: dict[tuple[str, str], list[Run]] = {side: [] for side in sides}
    for n in range(options.rounds):
        for side in sides:
            works[*side, stage](2)
            runs[side].append(timed(lambda side=side: works[*side, stage](steps), device))
            print(f"{stage}, round {n + 1}, {' '.join(side)}: {runs[side][-1].seconds:.2f} s", file=sys.stderr)
    rows = []
    for dtype in options.dtypes:
        ours, peer, same = runs["ours", dtype], runs["peer", "fp32"], runs["peer", dtype]
        seconds = [statistics.median(run.seconds for run in side) for side in (ours, peer, same)]
        both = ours[0].output, (peer if dtype == "fp32" else runs.get(("ours", "fp32"), ours))[0].output
        rows.append(
            Row(
                stage,
                dtype,
                options.batch,
                steps,
                seconds=seconds[0],
                peer_seconds=seconds[1],
                ratio=ratio(peer, ours),
                peer_seconds_same_dtype=seconds[2],
                ratio_same_dtype=ratio(same, ours),
                memory_mb=memory["ours", dtype],
                peer_memory_mb=memory["peer", dtype],
                gflop=counted["ours"],
                peer_gflop=counted["peer"],
                fraction=counted["ours"] / seconds[0] / peaks[dtype],
                peer_fraction=counted["peer"] / seconds[2] / peaks[dtype],
                difference=difference(*both) if dtype == "fp32" and same_weights else None,
                psnr=psnr(*both) if dtype != "fp32" and ("ours", "fp32") in runs else None,
            )
        )
    return rows


def of_steps(work: Work, steps: int) -> float:
    """GFLOP of a stage of so many steps, from those of two and three: each further step costs the same."""
    two, three = gflop(lambda: work(2)), gflop(lambda: work(3))
    return two + (steps - 2) * (three - two)


def ratio(peer: Sequence[Run], ours: Sequence[Run]) -> float:
    """The median over the rounds of the peer's seconds over ours."""
    return statistics.median(a.seconds / b.seconds for a, b in zip(peer, ours, strict=True))


def difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, as a part of the largest value."""
    return float((ours - theirs).abs().max() / theirs.abs().max())


def psnr(x: Tensor, y: Tensor) -> float:
    """Peak signal to noise ratio in dB, of a range as wide as y's."""
    error = float((x - y).square().mean())
    return 20 * math.log10(float(y.max() - y.min())) - 10 * math.log10(error) if error else math.inf


def table(rows: Sequence[Row]) -> str:
    """The rows in Markdown; where two numbers stand, the first is ours."""
    heads = (
        "stage", "dtype", "batch", "steps", "ours, s", "peer fp32, s", "ratio", "peer same dtype, s", "ratio",
        "MB", "GFLOP", "of peak", "difference", "PSNR, dB",
    )  # fmt: skip
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for r in rows:
        memory = ["–" if mb is None else f"{mb:.0f}" for mb in (r.memory_mb, r.peer_memory_mb)]
        cells = [
            r.stage, r.dtype, str(r.batch), str(r.steps), f"{r.seconds:.3g}", f"{r.peer_seconds:.3g}", f"{r.ratio:.2f}",
            f"{r.peer_seconds_same_dtype:.3g}", f"{r.ratio_same_dtype:.2f}", " / ".join(memory),
            f"{r.gflop:.4g} / {r.peer_gflop:.4g}", f"{r.fraction:.0%} / {r.peer_fraction:.0%}",
            "–" if r.difference is None else f"{r.difference:.0e}", "–" if r.psnr is None else f"{r.psnr:.1f}",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
