"""UnCLIP: caption → CLIP text embedding → prior → CLIP image embedding → 64 → 256 → 1024 (arXiv 2204.06125, §2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor

from decoder.decoder import Decoder
from prior.diffusion_prior import DiffusionPrior, best_of
from unclip.arguments import (
    Callback,
    DTypeName,
    OutputType,
    Pictures,
    as_type,
    cast,
    check_fit,
    check_prompts,
    check_seeds,
    choose_device,
    choose_dtype,
    finite,
    quantised,
    reporter,
)
from unclip.clip.model import CLIP, TextFeatures
from unclip.core.data import pixels_from_pil
from unclip.core.sampling import (
    guided,
    make_sampler,
    picture_generators,
    repeat_context,
    resolve_timesteps,
    sample,
    starting_noise,
)
from unclip.folder import components, find_model, fingerprint, load_component, read_index, whole_folder, write_component
from unclip.presets import StageSettings, override, read_presets, write_presets
from upsamplers.upsampler import Upsampler


@dataclass
class UnCLIPOutput:
    """What a call returns; every list runs over prompts, then over each prompt's pictures.

    images: pictures at the size asked for; stages: the same at every size up to it, by side; image_embeds: z_i (b, d);
    seeds: of each picture. Pictures are PIL images ("pil"), float arrays (b, h, w, 3) in [0, 1] ("np"), or float
    tensors (b, 3, h, w) in [−1, 1] ("pt").
    """

    images: Pictures
    image_embeds: Tensor
    stages: dict[int, Pictures]
    seeds: list[int]


class UnCLIP(DiffusionPipeline):
    """The whole stack. `UnCLIP.from_pretrained()` loads the embedded model; calling it draws pictures.

    A call is the sum of the public stages `encode_text`, `sample_z_i`, `decode`, `upsample`, each under its
    settings (`settings(preset)[stage]`). Picture i is a function of its prompt, its seed and its settings alone.
    `batch_size` holds how many pictures each stage works on at once.
    """

    model_cpu_offload_seq = "prior->decoder->upsampler_256->upsampler_1024"
    _exclude_from_cpu_offload = ["clip"]  # noqa: RUF012
    _optional_components = [f"upsampler_{s}{end}" for s in (256, 1024) for end in ("", "_scheduler")]  # noqa: RUF012

    def __init__(
        self,
        clip: CLIP,
        prior: DiffusionPrior,
        prior_scheduler: Any,
        decoder: Decoder,
        decoder_scheduler: Any,
        upsampler_256: Upsampler | None = None,
        upsampler_256_scheduler: Any = None,
        upsampler_1024: Upsampler | None = None,
        upsampler_1024_scheduler: Any = None,
        presets: Mapping[str, Any] | None = None,
        license: str | None = None,
        name: str = "unclip",
    ):
        """Raises ValueError where the components' widths or sizes do not fit each other, or a preset is wrong."""
        super().__init__()
        self.presets = read_presets(presets)
        self.register_modules(
            clip=clip,
            prior=prior,
            prior_scheduler=prior_scheduler,
            decoder=decoder,
            decoder_scheduler=decoder_scheduler,
            upsampler_256=upsampler_256,
            upsampler_256_scheduler=upsampler_256_scheduler,
            upsampler_1024=upsampler_1024,
            upsampler_1024_scheduler=upsampler_1024_scheduler,
        )
        check_fit(clip, prior, decoder, upsampler_256, upsampler_1024)
        self.register_to_config(presets=write_presets(self.presets), license=license)
        self.model_name = name
        self.batch_size = {"prior": 64, "decoder": 16, "upsampler_256": 1, "upsampler_1024": 1}
        self._null_contexts: dict[tuple[str, int], tuple[Any, Any]] = {}
        for net in (decoder, upsampler_256, upsampler_1024):
            if net is not None:
                net.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]

    # --- loading, saving

    @classmethod
    def from_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls,
        model: str | Path | None = None,
        dtype: torch.dtype | DTypeName | None = None,
        device: torch.device | str | None = None,
    ) -> UnCLIP:
        """Loads a model: the embedded one (None), a folder, or a hub name.

        dtype: of the weights in memory whatever they are stored in, fp32 by default; "auto" takes bf16 where it is
        native. device: "auto" takes what there is. Raises FileNotFoundError for what is not there, ValueError for what
        does not load.
        """
        place = choose_device(device)
        weights = choose_dtype(dtype, place)
        folder, name = find_model(model)
        index = read_index(folder)
        parts = {
            part: load_component(part, value[-1] if isinstance(value, list) else value, folder, weights)
            for part, value in components(index).items()
        }
        return cls(**parts, presets=index.get("presets"), license=index.get("license"), name=name).to(place)

    def save_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        folder: str | Path,
        dtype: torch.dtype | DTypeName | None = None,
        max_shard_size: str = "10GB",
        extra_files: Mapping[str, str] | None = None,
    ) -> Path:
        """Writes the model folder, whole or not at all; what had this name is replaced.

        dtype: of the stored weights, None as in memory; extra_files: further files' contents by name (a model card).
        """
        with whole_folder(Path(folder)) as partial:
            stored = None if dtype is None else choose_dtype(dtype, torch.device("cpu"))
            for name, component in self.components.items():
                if component is not None:
                    write_component(name, component, partial, stored, max_shard_size)
            self.save_config(partial)
            for file, text in (extra_files or {}).items():
                (partial / file).write_text(text, encoding="utf-8")
        return Path(folder)

    # --- what it is

    @property
    def networks(self) -> dict[int, str]:
        """The networks that draw, by the side of their pictures, smallest first."""
        found = {int(self.decoder.config["sample_size"]): "decoder"}
        for name in ("upsampler_256", "upsampler_1024"):
            net = getattr(self, name)
            if net is not None:
                found[max(found) * int(net.config["factor"])] = name
        return found

    @property
    def sizes(self) -> list[int]:
        """Sides of the pictures it offers, smallest first."""
        return list(self.networks)

    def settings(
        self,
        preset: str = "default",
        guidance_scale: float | None = None,
        prior_guidance_scale: float | None = None,
        steps: Sequence[int | Sequence[int] | None] | None = None,
    ) -> dict[str, StageSettings]:
        """Every stage's settings under a preset with the given ones in place.

        steps: up to four, for prior, decoder, 256, 1024; None keeps the preset's. Raises ValueError for an unknown
        preset or what a stage's scheduler cannot do.
        """
        if preset not in self.presets:
            raise ValueError(f"preset {preset!r} is unknown; this model has {', '.join(self.presets)}.")
        settings = override(self.presets[preset], guidance_scale, prior_guidance_scale, steps)
        for stage, chosen in settings.items():
            if getattr(self, stage) is not None:
                resolve_timesteps(self._sampler(stage, chosen), chosen.steps)
        return settings

    # --- the stages

    @torch.no_grad()
    def encode_text(self, prompts: str | Sequence[str]) -> TextFeatures:
        """Prompts to z_t (b, d), token states (b, n, w), mask (b, n). A prompt too long is cut, with a warning."""
        return self.clip.encode_text(prompts)

    @torch.no_grad()
    def encode_image(self, images: Image.Image | Sequence[Image.Image] | Tensor) -> Tensor:
        """z_i (b, d), float32 of unit norm, of pictures: PIL, of any sizes, or float (b, 3, h, w) in [−1, 1]."""
        if isinstance(images, Tensor):
            return self.clip.encode_image(images.to(self.clip.device)).float()
        images = [images] if isinstance(images, Image.Image) else list(images)
        if not images:
            raise ValueError("no pictures came; give at least one.")
        return torch.cat([self.clip.encode_image(pixels_from_pil(i).to(self.clip.device)).float() for i in images])

    @torch.no_grad()
    def sample_z_i(
        self,
        text: TextFeatures,
        seeds: Sequence[int],
        settings: StageSettings | None = None,
        callback: Callback | None = None,
    ) -> Tensor:
        """The prior (§2.2): of `draws` samples per row, the one with the largest z_i·z_t.

        text: b rows; returns z_i (b, d), float32 of unit norm as `encode_image` gives it.
        """
        settings = settings or self.settings()["prior"]
        self._check_rows(len(text.z_t), seeds)
        candidates = []
        for draw in range(1, settings.draws + 1):
            stage = "prior" if draw == 1 else f"prior-{draw}"
            condition = {"z_t": text.z_t, "text": text.states, "text_mask": text.mask}
            shape = (self.prior.config["embedding_dim"],)
            run = self._run(
                "prior", condition, shape, seeds, settings, callback, None, stage, (draw - 1, settings.draws)
            )
            candidates.append(run)
        # CLIP's embeddings have unit norm, and the decoder was trained on them; a regressed mean is shorter
        z_i = F.normalize(self.prior.unstandardize(torch.stack(candidates)).float(), dim=-1)  # draws b d
        return best_of(z_i, text.z_t)

    @torch.no_grad()
    def decode(
        self,
        z_i: Tensor,
        text: TextFeatures | None,
        seeds: Sequence[int],
        settings: StageSettings | None = None,
        callback: Callback | None = None,
        x_T: Tensor | None = None,
    ) -> Tensor:
        """The decoder (§2.1): z_i (b, d) and the caption's text (b rows, or None for none) to (b, 3, s, s) in [−1, 1].

        x_T: starting noise (b, 3, s, s); None draws each row's from its seed.
        """
        settings = settings or self.settings()["decoder"]
        self._check_rows(len(z_i), seeds)
        condition: dict[str, Tensor] = {"z_i": z_i}
        if text is not None and self.decoder.config["text_width"] is not None:
            condition |= {"text": text.states, "text_mask": text.mask}
        side = int(self.decoder.config["sample_size"])
        return self._run("decoder", condition, (3, side, side), seeds, settings, callback, x_T).clamp(-1, 1)

    @torch.no_grad()
    def upsample(
        self,
        images: Tensor,
        size: int,
        seeds: Sequence[int],
        settings: StageSettings | None = None,
        callback: Callback | None = None,
    ) -> Tensor:
        """One upsampler: pictures (b, 3, h, w) in [−1, 1], at 8 bits as from a file, to (b, 3, size, size)."""
        name = self.networks.get(size)
        if name is None or name == "decoder":
            raise ValueError(f"no upsampler to {size} px here; this model upsamples to {self.sizes[1:]}.")
        side = size // int(getattr(self, name).config["factor"])
        if tuple(images.shape[1:]) != (3, side, side):
            raise ValueError(f"pictures are {tuple(images.shape)}; for {size} px give (b, 3, {side}, {side}).")
        settings = settings or self.settings()[name]
        self._check_rows(len(images), seeds)
        condition = {"low": quantised(images)}
        return self._run(name, condition, (3, size, size), seeds, settings, callback).clamp(-1, 1)

    # --- the call

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        num_images: int = 1,
        seed: int = 0,
        size: int | None = None,
        preset: str = "default",
        guidance_scale: float | None = None,
        prior_guidance_scale: float | None = None,
        steps: Sequence[int | Sequence[int] | None] | None = None,
        output_type: OutputType = "pil",
        callback: Callback | None = None,
        z_i: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> UnCLIPOutput:
        """Draws `num_images` pictures of each prompt; the pictures of a prompt have the seeds seed, seed + 1, …

        size: side in pixels, by default the largest the model has. guidance_scale is the decoder's, 1 for none. steps:
        see `settings`. z_i (prompts · num_images, d) stands in for the prior's. generator: draws the seed instead of
        `seed`. Raises ValueError or TypeError, before any work, for arguments out of range.
        """
        prompts = check_prompts(prompt)
        seeds = check_seeds(seed, num_images, generator) * len(prompts)
        size = self.sizes[-1] if size is None else size
        if size not in self.sizes:
            raise ValueError(f"size {size!r} is not offered; this model draws {', '.join(map(str, self.sizes))} px.")
        if output_type not in ("pil", "np", "pt"):
            raise ValueError(f"output_type {output_type!r} is unknown; give 'pil', 'np' or 'pt'.")
        settings = self.settings(preset, guidance_scale, prior_guidance_scale, steps)
        if z_i is not None and tuple(z_i.shape) != (len(seeds), self.decoder.config["z_i_width"]):
            raise ValueError(f"z_i is {tuple(z_i.shape)}; give ({len(seeds)}, {self.decoder.config['z_i_width']}).")

        text = TextFeatures(*(part.repeat_interleave(num_images, 0) for part in self.encode_text(prompts)))
        z_i = self.sample_z_i(text, seeds, settings["prior"], callback) if z_i is None else z_i.to(text.z_t.device)
        stages: dict[int, Tensor] = {}
        x = z_i
        for side, name in self.networks.items():
            if side > size:
                break
            if name == "decoder":
                x = self.decode(z_i, text, seeds, settings[name], callback)
            else:
                x = self.upsample(x, side, seeds, settings[name], callback)
            stages[side] = x.cpu()
        self.maybe_free_model_hooks()
        pictures = {side: as_type(x, output_type) for side, x in stages.items()}
        return UnCLIPOutput(pictures[size], z_i.float().cpu(), pictures, seeds)

    # --- inside

    def _sampler(self, stage: str, settings: StageSettings) -> Any:
        return make_sampler(getattr(self, f"{stage}_scheduler"), settings.solver, **settings.options)  # pyright: ignore[reportArgumentType]

    def _run(
        self,
        name: str,
        conditions: Mapping[str, Tensor],
        shape: tuple[int, ...],
        seeds: Sequence[int],
        settings: StageSettings,
        callback: Callback | None,
        x_T: Tensor | None = None,
        stage: str | None = None,
        draw: tuple[int, int] = (0, 1),
    ) -> Tensor:
        """One network's sampling, `batch_size` pictures at a time: (b, *shape) in float32 on the network's device.

        stage: the name its noise is drawn under; draw: which of how many runs of this stage this is, for the callback.
        """
        net, at_once = getattr(self, name), self.batch_size[name]
        scheduler = self._sampler(name, settings)
        steps = resolve_timesteps(scheduler, settings.steps)
        device = self._place(net)
        results, batches = [], -(-len(seeds) // at_once)
        for batch in range(batches):
            rows = slice(batch * at_once, (batch + 1) * at_once)
            generators = picture_generators(seeds[rows], stage or name)
            drawn = starting_noise(shape, generators)  # also where x_T is given: the rest of the stream stays put
            noise = (drawn if x_T is None else x_T[rows].float()).to(device)
            context = net.encode_context(**{k: cast(v[rows], device, net.dtype) for k, v in conditions.items()})
            null = self._null_context(name, conditions, len(noise)) if settings.guidance_scale != 1 else None
            denoise = guided(net, context, null, settings.guidance_scale)
            report = reporter(callback, name, len(steps), draw[0] * batches + batch, draw[1] * batches)
            results.append(sample(denoise, scheduler, noise, steps, generators, report, eta=settings.eta))
        return finite(torch.cat(results), name, net.dtype)

    def _null_context(self, name: str, conditions: Mapping[str, Tensor], rows: int) -> Any:
        """Context of no conditions, `rows` times; kept until the network's weights, dtype or device change."""
        if name not in ("prior", "decoder"):
            return None
        net = getattr(self, name)
        mark = fingerprint(net)
        key = (name, conditions["text"].shape[1] if "text" in conditions else 0)
        if self._null_contexts.get(key, (None, None))[0] != mark:
            device = self._place(net)
            blank = {k: cast(torch.zeros_like(v[:1]), device, net.dtype) for k, v in conditions.items()}
            drops = ["drop_text"] if name == "prior" else ["drop_z_i", *(["drop_text"] if "text" in conditions else [])]
            dropped = {drop: torch.ones(1, dtype=torch.bool, device=device) for drop in drops}
            self._null_contexts[key] = (mark, net.encode_context(**blank, **dropped))
        return repeat_context(self._null_contexts[key][1], rows)

    def _place(self, net: Any) -> torch.device:
        """Where a network runs. Under offload its forward's hook brings it there now, for `encode_context` too."""
        hook = getattr(net, "_hf_hook", None)
        if hook is not None:
            hook.pre_forward(net)
        return getattr(hook, "execution_device", None) or net.device

    @staticmethod
    def _check_rows(rows: int, seeds: Sequence[int]) -> None:
        if rows != len(seeds) or not rows:
            raise ValueError(f"{rows} rows came with {len(seeds)} seeds; give one seed for each row, at least one.")
