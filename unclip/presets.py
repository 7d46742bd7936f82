"""How each stage is sampled: solver, steps, guidance. Three named presets; a model may have its own, as Karlo does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

STAGES = ("prior", "decoder", "upsampler_256", "upsampler_1024")
PriorName = Literal["diffusion", "ar"]
# What a stage has no use for: only of the prior are several draws made, and upsamplers have no caption to be guided by
IDLE = {"decoder": ("draws",)} | dict.fromkeys(STAGES[2:], ("draws", "guidance_scale", "guidance_interval"))


@dataclass(frozen=True)
class StageSettings:
    """One stage's sampling.

    solver: a name of `core.sampling.SOLVERS`; steps: a count, or the list of training steps to visit; guidance_scale:
    1 is the conditional model, without a second half to each call; draws: how many z_i the prior draws, of which the
    one with the larger z_i·z_t is kept (§2.2); eta: DDIM's η; options: further fields of the scheduler's config;
    eight_bits: whether an upsampler gets its pictures at 8 bits, as from a file, or as the stage before gave them;
    guidance_interval: the lowest and the highest training step that is guided, None for all (the others are as at
    scale 1, and take half as long).
    The prior's solver "ar" is the autoregressive prior: it has no steps, and its options are temperature and top_p.
    Raises ValueError for values out of range.
    """

    solver: str = "ddim"
    steps: int | tuple[int, ...] = 10
    guidance_scale: float = 1.0
    draws: int = 1
    eta: float = 0.0
    options: Mapping[str, Any] = field(default_factory=dict)
    eight_bits: bool = True
    guidance_interval: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.steps, Sequence) and not isinstance(self.steps, str):
            object.__setattr__(self, "steps", tuple(self.steps))
        counts = self.steps if isinstance(self.steps, tuple) else (self.steps,)
        if not counts or any(isinstance(s, bool) or not isinstance(s, int) for s in counts):
            raise ValueError(
                f"steps are {self.steps!r}; give a whole number of at least 1, or a list of training steps."
            )
        if isinstance(self.steps, int) and self.steps < 1:
            raise ValueError(f"steps are {self.steps}; give at least 1.")
        if not isinstance(self.guidance_scale, int | float) or not 0 <= self.guidance_scale <= 100:
            raise ValueError(f"guidance scale is {self.guidance_scale!r}; give a number from 0 to 100, 1 for none.")
        if self.guidance_interval is not None:
            object.__setattr__(self, "guidance_interval", check_interval(self.guidance_interval))
        if not isinstance(self.eta, int | float) or not 0 <= self.eta <= 1:
            raise ValueError(f"eta is {self.eta!r}; give a number from 0 to 1.")
        if not isinstance(self.solver, str) or not isinstance(self.options, Mapping):
            raise ValueError(
                f"solver is {self.solver!r} and options are {self.options!r}; give a name, and names with values."
            )
        if isinstance(self.draws, bool) or not isinstance(self.draws, int) or not 1 <= self.draws <= 64:
            raise ValueError(f"draws are {self.draws!r}; give a whole number from 1 to 64.")


def check_interval(interval: Any) -> tuple[int, int]:
    """An interval of training steps as a pair. Raises ValueError for what is none."""
    ends = list(interval) if isinstance(interval, Sequence) and not isinstance(interval, str) else []
    if len(ends) != 2 or any(isinstance(t, bool) or not isinstance(t, int) for t in ends) or ends[0] > ends[1]:
        raise ValueError(f"guidance interval is {interval!r}; give the lowest and the highest step, as [100, 900].")
    return ends[0], ends[1]


DEFAULTS: dict[str, dict[str, dict[str, Any]]] = {
    "fast": {
        "prior": {"solver": "dpm++", "steps": 8, "guidance_scale": 1.0, "draws": 2},
        "decoder": {"solver": "dpm++", "steps": 6, "guidance_scale": 2.0},
        "upsampler_256": {"solver": "ddim", "steps": 3},
        "upsampler_1024": {"solver": "ddim", "steps": 1},
    },
    "default": {
        "prior": {"solver": "dpm++", "steps": 16, "guidance_scale": 1.0, "draws": 2},
        "decoder": {"solver": "dpm++", "steps": 25, "guidance_scale": 2.0},
        "upsampler_256": {"solver": "ddim", "steps": 6},
        "upsampler_1024": {"solver": "ddim", "steps": 3},
    },
    # Table 3; the prior by "analytic" where its scheduler holds that variance (`read_presets`)
    "paper": {
        "prior": {"solver": "ddpm", "steps": 64, "guidance_scale": 1.0, "draws": 2},
        "decoder": {"solver": "ddpm", "steps": 250, "guidance_scale": 2.0},
        "upsampler_256": {"solver": "ddim", "steps": 27},
        "upsampler_1024": {"solver": "ddim", "steps": 15},
    },
}

# As its makers' pipeline samples it: noise, steps and pictures are the same
KARLO: dict[str, dict[str, Any]] = {
    "prior": {"solver": "unclip", "steps": 25, "guidance_scale": 4.0, "draws": 1},
    "decoder": {"solver": "unclip", "steps": 25, "guidance_scale": 8.0},
    "upsampler_256": {"solver": "unclip", "steps": 7, "eight_bits": False},
}
# Half the steps, and guidance where it helps: not at the noisiest and the cleanest levels (arXiv 2404.07724). The
# upsampler's second network is made for the step at t = 0 alone, so its seven steps stay.
KARLO_FAST: dict[str, dict[str, Any]] = {
    "prior": {"solver": "dpm++", "steps": 12, "guidance_scale": 4.0, "draws": 1},
    "decoder": {"solver": "dpm++", "steps": 12, "guidance_scale": 8.0, "guidance_interval": [150, 900]},
    "upsampler_256": KARLO["upsampler_256"],
}

# One draw: the product z_i·z_t that it is drawn for is among the higher ones (§2.2)
AUTOREGRESSIVE: dict[str, Any] = {"solver": "ar", "guidance_scale": 1.0, "draws": 1}


def read_presets(
    presets: Mapping[str, Mapping[str, Mapping[str, Any]] | None] | None, analytic: bool = False
) -> dict[str, dict[str, StageSettings]]:
    """A model's presets over the defaults: {preset: {stage: StageSettings}}.

    A stage that the model's preset leaves out, or a setting within it, is the default's of that name (of "default" for
    a preset of the model's own). A preset that is None, where it is not "default", is none of this model's. analytic:
    whether the prior's scheduler holds its analytic variance, by which "paper" then samples. Raises ValueError for an
    unknown stage or setting, or a value out of range.
    """
    merged: dict[str, dict[str, StageSettings]] = {}
    for name in [*DEFAULTS, *(n for n in presets or {} if n not in DEFAULTS)]:
        own = (presets or {}).get(name, {})
        if own is None and name != "default":
            continue
        if not isinstance(own, Mapping) or not all(isinstance(values, Mapping) for values in own.values()):
            raise ValueError(f"preset {name!r} is {own!r}; give a mapping of stages to their settings.")
        if unknown := [stage for stage in own if stage not in STAGES]:
            raise ValueError(f"preset {name!r} sets the stage {unknown[0]!r}; the stages are {', '.join(STAGES)}.")
        base = DEFAULTS.get(name, DEFAULTS["default"])
        if analytic and name == "paper":
            base = {**base, "prior": {**base["prior"], "solver": "analytic"}}
        merged[name] = {stage: _stage(name, stage, {**base[stage], **own.get(stage, {})}) for stage in STAGES}
    return merged


def write_presets(presets: Mapping[str, Mapping[str, StageSettings]]) -> dict[str, dict[str, dict[str, Any]] | None]:
    """The presets as plain JSON types, which `read_presets` reads; None for each default that the model leaves out."""
    return dict.fromkeys(DEFAULTS) | {name: write_preset(stages) for name, stages in presets.items()}


def write_preset(stages: Mapping[str, StageSettings]) -> dict[str, dict[str, Any]]:
    """One preset as plain JSON types: {stage: {setting: value}}."""
    return {
        stage: {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(settings).items()}
        for stage, settings in stages.items()
    }


def _stage(preset: str, stage: str, values: Mapping[str, Any]) -> StageSettings:
    known = [f.name for f in fields(StageSettings)]
    if unknown := [name for name in values if name not in known]:
        raise ValueError(f"preset {preset!r} gives {stage} the setting {unknown[0]!r}; known are {', '.join(known)}.")
    settings = StageSettings(**values)
    if vain := [name for name in IDLE.get(stage, ()) if getattr(settings, name) != getattr(StageSettings(), name)]:
        raise ValueError(f"preset {preset!r} gives {stage} the setting {vain[0]!r}, which has no effect; leave it out.")
    if settings.eta and settings.solver != "ddim":
        raise ValueError(
            f"preset {preset!r} gives {stage} eta {settings.eta} and the solver {settings.solver!r}; eta is ddim's."
        )
    return settings


def override(
    preset: Mapping[str, StageSettings],
    guidance_scale: float | None = None,
    prior_guidance_scale: float | None = None,
    steps: Sequence[int | Sequence[int] | None] | None = None,
    prior: PriorName | None = None,
) -> dict[str, StageSettings]:
    """A preset's stages with the caller's guidance scales, steps (one a stage; None keeps) and prior in place.

    prior: "diffusion" or "ar"; where the preset has the other one, this one's defaults; None keeps the preset's.
    """
    if prior not in (None, "diffusion", "ar"):
        raise ValueError(f"prior {prior!r} is unknown; give 'diffusion' or 'ar'.")
    settings = dict(preset)
    if prior is not None and (prior == "ar") != (settings["prior"].solver == "ar"):
        settings["prior"] = StageSettings(**(AUTOREGRESSIVE if prior == "ar" else DEFAULTS["default"]["prior"]))
    if steps is not None:
        if isinstance(steps, int | str) or not 1 <= len(steps) <= len(STAGES):
            raise ValueError(
                f"steps are {steps!r}; give up to four of them: {', '.join(STAGES)}; None keeps the preset's."
            )
        for stage, count in zip(STAGES, steps, strict=False):
            if count is not None:
                settings[stage] = replace(settings[stage], steps=count)
    for stage, scale in (("decoder", guidance_scale), ("prior", prior_guidance_scale)):
        if scale is not None:
            settings[stage] = replace(settings[stage], guidance_scale=scale)
    return settings
