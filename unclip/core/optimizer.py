"""AdamW over a network's groups of parameters, and the learning rate of a step."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from unclip.core.config import TrainConfig


def learning_rate(config: TrainConfig, step: int) -> float:
    """The rate of step `step` (from 0): linear warm-up, constant, linear decay over the last `decay` steps."""
    up = (step + 1) / max(1, config.warmup)
    down = (config.steps - step) / max(1, config.decay)
    return config.learning_rate * min(1.0, up, down)


def optimizer_of(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW; decoupled decay on matrices only; the rate of each group is `scale` times the schedule's."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not trained:
        raise ValueError("the network has no parameter to train.")
    if unknown := [prefix for prefix in config.lr_scales if not any(name.startswith(prefix) for name in trained)]:
        raise ValueError(
            f"train.lr_scales names {', '.join(unknown)}, but no trained parameter's name begins so: "
            f"take the beginning of a name such as {next(iter(trained))}."
        )
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in trained.items():
        scale = next((s for prefix, s in config.lr_scales.items() if name.startswith(prefix)), 1.0)
        groups.setdefault((scale, parameter.ndim > 1), []).append(parameter)
    # a third of the time on a CPU; but with fp16 it steps over what overflowed without saying so
    fused = config.precision != "fp16" and all(parameter.device.type == "cpu" for parameter in trained.values())
    return torch.optim.AdamW(
        [
            {"params": params, "scale": scale, "weight_decay": config.weight_decay if matrix else 0.0}
            for (scale, matrix), params in groups.items()
        ],
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.eps,
        fused=fused or None,
    )


@contextlib.contextmanager
def settings_kept(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Inside, an earlier state is loaded; the settings of the groups stay what they are, though a state brings its own.

    The moments then take the memory order of their parameters: on a CPU the fused step reads all as flat memory, and
    would take those of a run with another `channels_last` for other elements', silently.
    """
    settings = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    yield
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if name != "step":
                state[name] = torch.empty_like(parameter).copy_(value)
