"""How a network is trained: `TrainConfig`, and the command line of every stage, which reads one."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Literal, TypeVar

from jsonargparse import ActionConfigFile, ArgumentParser

Config = TypeVar("Config")


@dataclass
class TrainConfig:
    """How a network is trained. `batch_size` counts the samples of one optimiser step over all processes."""

    out: str  # folder of checkpoints, logs and the exported model
    steps: int
    batch_size: int
    accumulation: int = 1  # micro-batches a process splits its share into
    learning_rate: float = 1e-4
    lr_scales: dict[str, float] = field(default_factory=dict)  # factor on the rate of parameters by prefix of name
    warmup: int = 100  # steps of linear warm-up
    decay: int = 0  # the last steps, over which the rate falls linearly to zero
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0  # decoupled; not on vectors (biases, norms)
    clip_grad: float = 1.0
    ema: float = 0.9999  # upper end: the decay after n steps is min(ema, (1 + n) / (10 + n))
    precision: Literal["auto", "no", "bf16", "fp16"] = "auto"  # autocast over fp32 weights; bf16 where it is native
    channels_last: bool = False
    gradient_checkpointing: bool = False  # activations are computed twice instead of kept
    compile: bool = False
    seed: int = 0
    workers: int = 0
    tracker: str = "tensorboard"  # any accelerate tracker by name, or "none"
    log_every: int = 50
    validate_every: int = 1000
    save_every: int = 1000
    keep: int = 2  # training states kept
    resume: bool = False


def parse(config_class: type[Config], args: Sequence[str] | None = None) -> Config:
    """Reads a stage's config from `--config FILE`, with `--any.field value` overrides and `--resume`.

    `config_class` is a dataclass with a field `train: TrainConfig`. `--print_config` prints what would be used. In an
    option's name a dash is as good as an underscore.
    """
    parser = ArgumentParser(description=config_class.__doc__)
    parser.add_argument("--config", action=ActionConfigFile, help="recipe, YAML")
    parser.add_argument("--resume", action="store_true", help="go on from the newest training state")
    parser.add_class_arguments(config_class)
    parsed = parser.parse_args([underscored(word) for word in (sys.argv[1:] if args is None else args)])
    values = parser.instantiate(parsed)
    config = config_class(**{f.name: values[f.name] for f in fields(config_class)})  # pyright: ignore
    config.train.resume = config.train.resume or parsed.resume  # pyright: ignore[reportAttributeAccessIssue]
    return config


def underscored(word: str) -> str:
    """A word of a command line, underscores for dashes in its name where it is an option."""
    name, equals, value = word.partition("=")
    return f"--{name[2:].replace('-', '_')}{equals}{value}" if word.startswith("--") else word


def check_parts(config: object, *names: str) -> None:
    """Raises ValueError unless each of these fields of a stage's config is a part of the samples, 0 to 1."""
    for name in names:
        if not 0 <= getattr(config, name) <= 1:
            raise ValueError(f"{name} is {getattr(config, name)}; expected a part of the samples, 0 to 1.")


def main(config_class: type[Config], run: Callable[[Config], object], args: Sequence[str] | None = None) -> None:
    """A stage's command: parses, runs, and says in one sentence what was wrong with the input."""
    config = parse(config_class, args)
    try:
        run(config)
    except KeyboardInterrupt as interrupt:
        print(str(interrupt) or "interrupted; what was saved is kept.", file=sys.stderr)
        sys.exit(130)
    except (ValueError, TypeError, FloatingPointError, OSError, ImportError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
