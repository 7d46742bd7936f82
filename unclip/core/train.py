"""The one training loop. A stage brings a network, a loss and a config; see `Contract 3` in docs/architecture.md."""

import contextlib
import functools
import json
import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence, Sized
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import parse_flag_from_env, set_seed
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from unclip.core import checkpoint
from unclip.core.config import TrainConfig
from unclip.core.data import DataConfig, Draws, ShardDataset, collate
from unclip.core.optimizer import learning_rate, optimizer_of, settings_kept
from unclip.core.products import computes_bf16

Batch = dict[str, Any]
LossFn = Callable[[nn.Module, Batch], tuple[Tensor, dict[str, Tensor]]]
SampleFn = Callable[[nn.Module, Batch], Tensor]

# What of a scheduler a network is trained with; the rest is for sampling
TRAINED_WITH = ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "prediction_type", "variance_type")


def processes() -> PartialState:
    """This process among those a launcher started. accelerate joins processes on CPUs only where it is told so."""
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available())


@functools.lru_cache(maxsize=2)
def _order(length: int, seed: int, epoch: int) -> Tensor:
    """An epoch's permutation of 0 … length − 1. Kept, as every step of the epoch asks for it."""
    return torch.randperm(length, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))


def rows_of(step: int, config: TrainConfig, length: int, rank: int = 0, world: int = 1) -> list[tuple[int, int]]:
    """(index in the whole batch, index in the dataset) of the samples that process `rank` of `world` sees in a step.

    Each epoch is a permutation drawn from (seed, epoch); a batch may span several. No step depends on the one before,
    so that resuming is exact.
    """
    share = config.batch_size // world
    rows = []
    for i in range(rank * share, (rank + 1) * share):
        epoch, position = divmod(step * config.batch_size + i, length)
        rows.append((i, int(_order(length, config.seed, epoch)[position])))
    return rows


class _Steps:
    """Batch sampler: the dataset indices of every micro-batch from step `start` on."""

    def __init__(self, config: TrainConfig, length: int, start: int, rank: int, world: int):
        self.config, self.length, self.start, self.rank, self.world = config, length, start, rank, world

    def __iter__(self) -> Iterator[list[int]]:
        micro = self.config.batch_size // self.world // self.config.accumulation
        for step in range(self.start, self.config.steps):
            rows = [index for _, index in rows_of(step, self.config, self.length, self.rank, self.world)]
            for first in range(0, len(rows), micro):
                yield rows[first : first + micro]


class _Interrupt:
    """Turns Ctrl-C and SIGTERM into a flag that the loop reads between two steps; asked again later, it stops at once.

    A launcher of several processes hands on the signal that the terminal has sent already: within five seconds, two
    are one.
    """

    def __enter__(self) -> "_Interrupt":
        self.asked, self.since = False, 0.0
        self.previous: dict[int, Any] = {}
        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(ValueError):  # not in the main thread: nothing to catch there
                self.previous[number] = signal.signal(number, self._ask)
        return self

    def _ask(self, number: int, _: object) -> None:
        if self.asked and time.monotonic() - self.since > 5:
            raise KeyboardInterrupt
        if not self.asked:
            self.asked, self.since = True, time.monotonic()

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def agreed(self, accelerator: Accelerator) -> bool:
        """True on every process as soon as one was asked."""
        if accelerator.num_processes == 1:
            return self.asked
        asked: Any = accelerator.reduce(torch.tensor(float(self.asked), device=accelerator.device))
        return bool(asked.item())


def check(config: TrainConfig, model: nn.Module | None = None) -> None:
    """Refuses, before any work and before anything is written, what cannot run; model: None where none is made yet.

    Raises FileNotFoundError where there is nothing to resume, else ValueError.
    """
    world, out = processes().num_processes, Path(config.out)
    for name in ("steps", "batch_size", "accumulation", "log_every", "validate_every", "save_every", "keep"):
        if getattr(config, name) < 1:
            raise ValueError(f"train.{name} is {getattr(config, name)}: it must be at least 1.")
    if not config.clip_grad > 0:
        raise ValueError(f"train.clip_grad is {config.clip_grad}: it must be above 0, and .inf clips nothing.")
    if not 0 <= config.ema < 1:
        raise ValueError(f"train.ema is {config.ema}: it must be at least 0 and below 1.")
    if config.batch_size % (world * config.accumulation):
        raise ValueError(
            f"batch_size {config.batch_size} cannot be split over {world} processes with {config.accumulation} "
            f"micro-batches each: make it a multiple of {world * config.accumulation}."
        )
    supported = model is None or getattr(model, "_supports_gradient_checkpointing", False)
    if config.gradient_checkpointing and not supported:
        raise ValueError(
            f"{type(model).__name__} has no gradient checkpointing: leave train.gradient_checkpointing out."
        )
    if config.resume:
        checkpoint.newest(out)
        network: Any = getattr(model, "config", {})
        checkpoint.check_same(out / "model" / "config.json", network, sorted({*network} - {"dropout"}))
    elif checkpoint.states(out):
        raise ValueError(f"{config.out} holds the states of an earlier run: add --resume, or choose another train.out.")


def save_scheduler(config: TrainConfig, model: nn.Module, scheduler: Any) -> None:
    """Checks the config, then writes a diffusers scheduler to `OUT/scheduler/`.

    Raises what `check` raises, and ValueError where a run is resumed that was trained with another noise schedule,
    prediction type or kind of variance.
    """
    check(config, model)
    folder = Path(config.out) / "scheduler"
    if config.resume:
        checkpoint.check_same(folder / "scheduler_config.json", scheduler.config, TRAINED_WITH)
    processes().wait_for_everyone()
    if processes().is_main_process:
        checkpoint.export(scheduler, folder)


def datasets_of(data: DataConfig, validation: DataConfig | None) -> tuple[ShardDataset, ShardDataset | None]:
    """The training set and the validation set of a stage's config; what ShardDataset raises, and ValueError."""
    if validation is not None and validation.background not in (0, data.background):
        raise ValueError(
            f"validation.background is {validation.background}, but losses draw backgrounds as often as "
            f"data.background says, {data.background}: leave it out."
        )
    return ShardDataset(data), ShardDataset(validation) if validation else None


def _to(batch: Batch, device: torch.device) -> Batch:
    return {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}


@contextlib.contextmanager
def averaged(model: nn.Module, ema: EMAModel) -> Iterator[None]:
    """Inside, the network carries the averaged weights."""
    parameters = list(model.parameters())
    ema.store(parameters)
    ema.copy_to(parameters)
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        ema.restore(parameters)
        model.train(was_training)


def fixed_batch(dataset: Dataset, indices: Sequence[int], seed: int, device: torch.device) -> Batch:
    """These samples of a dataset with draws that are the same at every call."""
    batch = _to(collate([dataset[i] for i in indices]), device)
    return {**batch, "draws": Draws(seed, 0, list(indices), device)}


@torch.no_grad()
def validation_loss(
    model: nn.Module, loss_fn: LossFn, dataset: Dataset, config: TrainConfig, device: torch.device
) -> dict[str, float]:
    """Mean loss and metrics over the first samples of `dataset`: eight batches at most, draws that never change."""
    size = max(1, min(config.batch_size, 64))
    length = min(len(dataset), 8 * size)  # pyright: ignore[reportArgumentType]
    totals: dict[str, float] = {}
    for first in range(0, length, size):
        indices = range(first, min(first + size, length))
        loss, metrics = loss_fn(model, fixed_batch(dataset, indices, config.seed, device))
        for name, value in {"loss": loss, **metrics}.items():
            totals[name] = totals.get(name, 0.0) + float(value) * len(indices) / length
    return {f"validation/{name}": total for name, total in totals.items()}


class _Run:
    """The parts of a run, as accelerate prepared them, and what happens between two looks at the clock."""

    def __init__(self, config: TrainConfig, model: nn.Module, dataset: Sized):
        self.config, self.out, self.length = config, Path(config.out), len(dataset)
        tracker = None if config.tracker == "none" else config.tracker
        device: Any = processes().device
        precision = config.precision
        if precision == "auto":
            precision = "bf16" if computes_bf16(device) else "no"
        self.accelerator = Accelerator(
            cpu=device.type == "cpu", mixed_precision=precision, log_with=tracker, project_dir=config.out
        )
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        check(config, model)
        if self.length == 0:
            raise ValueError("the training set is empty: look at `data.split` and what narrows it.")
        self.model: Any = model.to(self.accelerator.device).train()  # what a network starts from came in eval mode
        if config.channels_last:
            self.model = self.model.to(memory_format=torch.channels_last)
        if config.gradient_checkpointing:
            self.model.enable_gradient_checkpointing()
        if config.compile:
            self.model.compile()
        optimizer = optimizer_of(self.model, config)
        self.out.mkdir(parents=True, exist_ok=True)
        if tracker:
            self.accelerator.init_trackers("logs", config={k: str(v) for k, v in asdict(config).items()})
        set_seed(config.seed, device_specific=True)  # dropout inside networks; everything else comes from Draws
        self.wrapped, self.optimizer = self.accelerator.prepare(self.model, optimizer)
        self.ema = EMAModel(self.model.parameters(), decay=config.ema, foreach=True)
        self.start = 0
        if config.resume:
            with settings_kept(optimizer):
                self.start = checkpoint.load_state(self.accelerator, self.model, self.ema, self.out)
            self.export()  # a run killed between the two parts of `save` left an older one
        self.bar = tqdm(
            total=config.steps,
            initial=self.start,
            disable=not self.accelerator.is_main_process,
            desc=self.out.name,
            unit="step",
        )
        self.sums: dict[str, Tensor] = {}
        self.count, self.since = 0, time.perf_counter()

    def batches(self, dataset: Dataset) -> Iterator[Batch]:
        """Every micro-batch of this process, from the first step to come, with its draws."""
        config, device = self.config, self.accelerator.device
        sampler = _Steps(config, self.length, self.start, self.rank, self.world)
        # its seed comes from a generator of its own: torch's is dropout's, and a resumed run is given the state of that
        own: Any = {"batch_sampler": sampler, "collate_fn": collate, "generator": torch.Generator()}
        loader = iter(DataLoader(dataset, num_workers=config.workers, **own))
        for step in range(self.start, config.steps):
            rows = [i for i, _ in rows_of(step, config, self.length, self.rank, self.world)]
            micro = len(rows) // config.accumulation
            for first in range(0, len(rows), micro):
                batch = _to(next(loader), device)
                batch["draws"] = Draws(config.seed, step, rows[first : first + micro], device)
                yield batch

    def update(self, step: int, loss_fn: LossFn, batches: Iterator[Batch]) -> None:
        """One step of the optimiser."""
        accelerator, config = self.accelerator, self.config
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config, step) * group["scale"]
        for part in range(config.accumulation):
            last = part == config.accumulation - 1
            with contextlib.nullcontext() if last else accelerator.no_sync(self.wrapped):
                loss, metrics = loss_fn(self.wrapped, next(batches))
                accelerator.backward(loss / config.accumulation)
            for name, value in {"loss": loss, **metrics}.items():
                self.add(name, value.detach().float() / config.accumulation)
        norm: Any = accelerator.clip_grad_norm_(self.wrapped.parameters(), config.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if not accelerator.optimizer_step_was_skipped:  # fp16 skips a step whose gradients overflow, by design
            self.add("grad_norm", norm.detach())
            self.ema.step(self.model.parameters())
        self.count += 1
        self.bar.update()

    def add(self, name: str, value: Tensor) -> None:
        self.sums[name] = self.sums[name] + value if name in self.sums else value

    def report(self, done: int) -> None:
        """Logs the means since the last report; FloatingPointError where one is not finite."""
        means: dict[str, Any] = {k: self.accelerator.reduce(v, "mean") for k, v in self.sums.items()}
        values = {k: float(mean) / self.count for k, mean in means.items()}
        if not all(math.isfinite(v) for v in values.values()):
            raise FloatingPointError(
                f"the loss is no longer finite near step {done} ({values}): go back to the last state with --resume "
                "and a lower train.learning_rate."
            )
        speed = self.config.batch_size * self.count / (time.perf_counter() - self.since)
        rate = learning_rate(self.config, done - 1)
        self.scalars({**values, "learning_rate": rate, "images_per_second": speed}, done)
        self.bar.set_postfix(loss=f"{values['loss']:.4f}", images_per_s=f"{speed:.1f}")
        self.sums, self.count, self.since = {}, 0, time.perf_counter()

    def scalars(self, values: dict[str, float], done: int) -> None:
        """To accelerate's trackers, and to `OUT/log.jsonl`."""
        self.accelerator.log(values, step=done)
        if self.accelerator.is_main_process:
            with (self.out / "log.jsonl").open("a") as file:
                file.write(json.dumps({"step": done, **values}) + "\n")

    def validate(self, done: int, loss_fn: LossFn, dataset: Dataset, sample_fn: SampleFn | None) -> None:
        """Loss on fixed samples with fixed draws, and pictures where the stage makes them, of the averaged weights."""
        takers = [tracker for tracker in self.accelerator.trackers if hasattr(tracker, "log_images")]
        with averaged(self.model, self.ema):
            self.scalars(validation_loss(self.model, loss_fn, dataset, self.config, self.accelerator.device), done)
            if sample_fn is not None and takers and self.accelerator.is_main_process:
                batch = fixed_batch(dataset, range(min(16, len(dataset))), self.config.seed, self.accelerator.device)  # pyright: ignore
                with torch.no_grad():
                    pictures = sample_fn(self.model, batch)
                array = ((pictures.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
                for tracker in takers:
                    options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                    tracker.log_images({"samples": array}, step=done, **options)  # pyright: ignore[reportAttributeAccessIssue]
        self.accelerator.wait_for_everyone()
        self.since = time.perf_counter()

    def save(self, done: int) -> None:
        """A state to resume from, and the network."""
        checkpoint.save_state(self.accelerator, self.model, self.ema, done, self.out, self.config.keep)
        self.export()
        self.since = time.perf_counter()

    def export(self) -> None:
        """The network with its averaged weights as `OUT/model`."""
        if self.accelerator.is_main_process:
            with averaged(self.model, self.ema):
                checkpoint.export(self.model, self.out / "model")
        self.accelerator.wait_for_everyone()


def train(
    config: TrainConfig,
    model: nn.Module,
    loss_fn: LossFn,
    dataset: Dataset,
    validation: Dataset | None = None,
    sample_fn: SampleFn | None = None,
) -> Path:
    """Trains `model` on `dataset`; returns the folder of the exported network, which carries the averaged weights.

    `loss_fn(model, batch) -> (loss, metrics)`: a scalar and a dictionary of scalars; its randomness comes from
    `batch["draws"]` alone. `sample_fn(model, batch)` makes pictures (n, 3, h, w) in [−1, 1] from a validation batch.
    Raises ValueError for a config that cannot run, FloatingPointError for a loss that is not finite (nothing is saved
    after it), KeyboardInterrupt on Ctrl-C or SIGTERM, with the state saved.
    """
    run = _Run(config, model, dataset)  # pyright: ignore[reportArgumentType]
    batches = run.batches(dataset)
    done = run.start
    with _Interrupt() as interrupt, run.bar:
        for step in range(run.start, config.steps):
            run.update(step, loss_fn, batches)
            done = step + 1
            stop = done == config.steps or interrupt.agreed(run.accelerator)
            if stop or any(done % every == 0 for every in (config.log_every, config.validate_every, config.save_every)):
                run.report(done)
            if validation is not None and (stop or done % config.validate_every == 0):
                run.validate(done, loss_fn, validation, sample_fn)
            if stop or done % config.save_every == 0:
                run.save(done)
            if stop:
                break
    run.accelerator.end_training()
    if done < config.steps:
        raise KeyboardInterrupt(f"stopped after step {done} of {config.steps}; go on with --resume.")
    return Path(config.out) / "model"
