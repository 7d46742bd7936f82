"""A model's priors and their samplers side by side: how near, how varied and how quick the embeddings they draw are."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from prior.evaluate import compare, true_embeddings
from unclip.core.data import DataConfig, ShardDataset
from unclip.core.files import write_json

if TYPE_CHECKING:
    from unclip.arguments import Callback, DTypeName
    from unclip.pipeline import UnCLIP
    from unclip.presets import StageSettings

SPLITS = ("train", "test-pair")
STEPS = (16, 32, 64)
SHOWN = ("cosine", "cosine_shuffled", "top1", "spread", "frechet", "milliseconds")


def candidates(
    pipe: UnCLIP, steps: Sequence[int] = STEPS, guidance_scale: float | None = None
) -> dict[str, StageSettings]:
    """What is compared: the diffusion prior as the default preset draws, by plain DDPM and, where the model has the
    statistic, by analytic variance, one draw each, at so many steps; the autoregressive prior, where there is one.
    """
    own = pipe.settings(prior="diffusion", prior_guidance_scale=guidance_scale)["prior"]
    rows = {f"diffusion, {own.solver}, {own.steps} steps, best of {own.draws}": own}
    solvers = ["ddpm", *(["analytic"] if "x0_variance" in pipe.prior_scheduler.config else [])]
    for count in steps:
        for solver in solvers:
            settings = replace(own, solver=solver, steps=count, draws=1, eta=0.0, options={})
            rows[f"diffusion, {solver}, {count} steps"] = settings
    if pipe.prior_ar is not None:
        rows["autoregressive"] = pipe.settings(prior="ar", prior_guidance_scale=guidance_scale)["prior"]
    return rows


@torch.no_grad()
def measure(pipe: UnCLIP, dataset: ShardDataset, settings: StageSettings, callback: Callback | None = None) -> dict:
    """`prior.evaluate.compare`'s figures over a split, and `milliseconds` that one embedding took to draw."""
    z_i, captions = true_embeddings(pipe.clip, dataset)
    texts = [pipe.encode_text(captions[i : i + 128]) for i in range(0, len(captions), 128)]
    started = time.perf_counter()
    drawn, first = [], 0
    for text in texts:
        seeds = list(range(first, first + len(text.z_t)))
        drawn.append(F.normalize(pipe.sample_z_i(text, seeds, settings, callback), dim=-1).to(z_i.device))
        first += len(seeds)
    seconds = time.perf_counter() - started
    z_t = torch.cat([F.normalize(text.z_t.float(), dim=-1) for text in texts])
    figures = compare(torch.cat(drawn), z_i, z_t, [meta["concept"] for meta in dataset.meta])
    return {**{k: round(v, 4) for k, v in figures.items()}, "milliseconds": round(1000 * seconds / len(captions), 2)}


def evaluate(
    model: str | None,
    corpus: str | Path = "corpora/emoji-64",
    splits: Sequence[str] = SPLITS,
    steps: Sequence[int] = STEPS,
    guidance_scale: float | None = None,
    limit: int | None = None,
    json_path: str | Path | None = None,
    device: str | None = None,
    dtype: DTypeName | None = None,
    callback: Callback | None = None,
) -> dict[str, Any]:
    """`unclip evals priors`: {"parameters": …, "rows": {row: {split: figures}}}, also written to `json_path`.

    limit: of pictures a split, the first so many of the concepts the model was trained on. Raises ValueError,
    FileNotFoundError.
    """
    from unclip.folder import find_model
    from unclip.pipeline import UnCLIP

    folder, name = find_model(model)
    concepts = folder / "concepts.txt"
    only = str(concepts) if concepts.is_file() else None
    datasets = {s: ShardDataset(DataConfig(str(corpus), s, concepts=only, limit=limit)) for s in splits}
    pipe = UnCLIP.from_pretrained(model, dtype, device)
    rows = {
        row: {split: measure(pipe, dataset, settings, callback) for split, dataset in datasets.items()}
        for row, settings in candidates(pipe, steps, guidance_scale).items()
    }
    networks = {"diffusion": pipe.prior, "autoregressive": pipe.prior_ar}
    parameters = {row: sum(p.numel() for p in net.parameters()) for row, net in networks.items() if net is not None}
    report = {"model": name, "guidance_scale": guidance_scale, "parameters": parameters, "rows": rows}
    if json_path is not None:
        write_json(report, Path(json_path))
    return report


def table(report: dict[str, Any]) -> str:
    """A report as Markdown: a row for each prior and sampler, a group of columns for each split."""
    splits = list(next(iter(report["rows"].values())))
    head = ["prior", "parameters", *(f"{split} {name.replace('_', ' ')}" for split in splits for name in SHOWN)]
    lines = [head, ["---"] * len(head)]
    for row, by_split in report["rows"].items():
        count = report["parameters"][row.split(",")[0]]
        lines.append([row, f"{count:,}", *(str(by_split[split][name]) for split in splits for name in SHOWN)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
