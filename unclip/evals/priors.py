"""A model's priors and their samplers side by side: how near, how varied and how quick their embeddings are, and what
pictures decoded from them show."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from prior.evaluate import compare, true_embeddings
from unclip.clip.evaluate import concepts_of
from unclip.core.data import DataConfig, ShardDataset
from unclip.core.files import write_json
from unclip.evals import concepts
from unclip.evals.corpus import load_corpus
from unclip.evals.features import Judge

if TYPE_CHECKING:
    from unclip.arguments import Callback, DTypeName
    from unclip.pipeline import UnCLIP
    from unclip.presets import StageSettings

SPLITS = ("train", "test-pair")
STEPS = (16, 32, 64)
COUNT = 300
SHOWN = ("cosine", "cosine_shuffled", "top1", "spread", "frechet", "milliseconds")
JUDGED = ("top1", "top5")
KEPT = ("count", "drawings", "generated", "ceiling", "floor", "over_ceiling")  # of the concepts' figures


def candidates(
    pipe: UnCLIP, steps: Sequence[int] = STEPS, guidance_scale: float | None = None
) -> dict[str, StageSettings]:
    """What is compared: the diffusion prior as the default preset draws, by plain DDPM and, where the model has the
    statistic, by analytic variance, one draw each, at so many steps; the autoregressive prior; where there is either.
    """
    rows: dict[str, StageSettings] = {}
    if pipe.prior is not None:
        own = pipe.settings(prior="diffusion", prior_guidance_scale=guidance_scale)["prior"]
        rows[f"diffusion, {own.solver}, {own.steps} steps, best of {own.draws}"] = own
        solvers = ["ddpm", *(["analytic"] if "x0_variance" in pipe.prior_scheduler.config else [])]
        for count, solver in product(steps, solvers):
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
    figures = compare(torch.cat(drawn), z_i, z_t, concepts_of(dataset))
    return {**{k: round(v, 4) for k, v in figures.items()}, "milliseconds": round(1000 * seconds / len(captions), 2)}


def evaluate(
    model: str | None,
    corpus: str | Path = "corpora/emoji-64",
    splits: Sequence[str] = SPLITS,
    steps: Sequence[int] = STEPS,
    guidance_scale: float | None = None,
    limit: int | None = None,
    count: int = COUNT,
    json_path: str | Path | None = None,
    device: str | None = None,
    dtype: DTypeName | None = None,
    callback: Callback | None = None,
) -> dict[str, Any]:
    """`unclip evals priors`: {"parameters": …, "rows": {row: {split: figures}}}, also written to `json_path`.

    limit: of pictures a split, the first so many of the concepts the model was trained on. count: of captions a split,
    how many are decoded, from the diffusion prior as the default preset draws and from the autoregressive one; figures
    of their rows then have "decoded", what `unclip evals concepts` says of these pictures. 0 decodes none. Raises
    ValueError, FileNotFoundError.
    """
    from unclip.arguments import choose_device
    from unclip.folder import find_model
    from unclip.pipeline import UnCLIP

    folder, name = find_model(model)
    trained = concepts.trained_concepts(folder)
    only = None if trained is None else str(folder / "concepts.txt")
    if count < 0:
        raise ValueError(f"count={count} came; give how many captions to decode, 0 for none.")
    real = load_corpus(corpus)
    for split in splits if count else ():
        concepts.choose(real.drawings, split, count, trained)  # bad arguments are named before the networks load
    datasets = {s: ShardDataset(DataConfig(str(corpus), s, concepts=only, limit=limit)) for s in splits}
    pipe = UnCLIP.from_pretrained(model, dtype, device)
    compared = candidates(pipe, steps, guidance_scale)
    if not compared:
        raise ValueError(f"{name} has no prior to measure: give a model that has one.")
    networks = {"diffusion": pipe.prior, "autoregressive": pipe.prior_ar}
    parameters = {row: sum(p.numel() for p in net.parameters()) for row, net in networks.items() if net is not None}
    rows: dict[str, dict[str, Any]] = {}
    report = {"model": name, "dtype": concepts.dtype_of(pipe), "guidance_scale": guidance_scale}
    report |= {"parameters": parameters, "rows": rows}
    judge = Judge(choose_device(device)) if count else None
    for i, (row, settings) in enumerate(compared.items()):
        rows[row] = {split: measure(pipe, dataset, settings, callback) for split, dataset in datasets.items()}
        if judge is not None and (i == 0 or settings.solver == "ar"):
            generate = concepts.generator_of(pipe, real, prior=settings, callback=callback)
            for split, figures in rows[row].items():
                decoded, *_ = concepts.measure(generate, real, split, count, trained, featurize=judge)
                figures["decoded"] = {part: decoded[part] for part in KEPT}
        if json_path is not None:  # what is measured is kept, should a later row not come to its end
            write_json(report, Path(json_path))
    return report


def table(report: dict[str, Any]) -> str:
    """A report as Markdown: a row for each prior and sampler, a group of columns for each split; –: not measured."""
    splits = list(next(iter(report["rows"].values())))
    columns = [*SHOWN, *(f"decoded {name}" for name in JUDGED)]
    head = ["prior", "parameters", *(f"{split} {name.replace('_', ' ')}" for split in splits for name in columns)]
    lines = [head, ["---"] * len(head)]
    for row, by_split in report["rows"].items():
        cells = [row, f"{report['parameters'][row.split(',')[0]]:,}"]
        for figures in (by_split[split] for split in splits):
            decoded = figures.get("decoded", {}).get("generated", {})
            cells += [str(figures[name]) for name in SHOWN] + [str(decoded.get(name, "–")) for name in JUDGED]
        lines.append(cells)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
