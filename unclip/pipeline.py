"""UnCLIP: caption → CLIP text embedding → prior → CLIP image embedding → 64 → 256 → 1024 (arXiv 2204.06125, §2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from torch import Tensor

from decoder.decoder import Decoder
from prior.autoregressive_prior import AutoregressivePrior
from prior.diffusion_prior import DiffusionPrior, best_of
from prior.pca import PCA
from unclip import inpainting, manipulations, stages
from unclip.arguments import (
    Callback,
    DTypeName,
    OutputType,
    Picture,
    check_fit,
    check_request,
    check_seeds,
    choose_device,
    choose_dtype,
    quantised,
)
from unclip.clip.model import CLIP, TextFeatures
from unclip.convert import karlo
from unclip.core.data import load_image, pil_from_pixels, pixels_from_pil
from unclip.core.files import whole_folder
from unclip.core.sampling import INVERSE, Seed, make_sampler, resolve_timesteps
from unclip.folder import INDEX, announce, find_model, license_notice, load_folder, write_component
from unclip.presets import PriorName, StageSettings, override, read_presets, write_presets
from unclip.prompts import best_rows, check_best_of, check_negative, decode_prompts, embed_prompts, plain
from unclip.sources import check_output_type
from unclip.stages import Known, UnCLIPOutput, check_prior, finish, run_stage
from upsamplers.upsampler import Upsampler


class UnCLIP(DiffusionPipeline):
    """The whole stack. `UnCLIP.from_pretrained()` loads the embedded model; calling it draws pictures.

    A call is the sum of the public stages `encode_text`, `sample_z_i`, `decode`, `upsample`, each under its
    settings (`settings(preset)[stage]`). Picture i is a function of its prompt, its seed and its settings alone.
    `batch_size` holds how many pictures each stage works on at once; `use_tiles` bounds the memory of upsampling.
    """

    model_cpu_offload_seq = "prior->prior_ar->decoder->upsampler_256->upsampler_256_last->upsampler_1024"
    _exclude_from_cpu_offload = ["clip", "pca"]  # noqa: RUF012
    _optional_components = [  # noqa: RUF012
        *(f"{name}{end}" for name in ("prior", "upsampler_256", "upsampler_1024") for end in ("", "_scheduler")),
        "upsampler_256_last",
        "prior_ar",
        "pca",
    ]

    def __init__(
        self,
        clip: CLIP,
        prior: DiffusionPrior | None,
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
        upsampler_256_last: Upsampler | None = None,
        unit_norm: bool = True,
        prior_ar: AutoregressivePrior | None = None,
        pca: PCA | None = None,
    ):
        """upsampler_256_last makes the first upsampler's last step; prior_ar: the autoregressive prior, beside the
        other or in its place; without any, pictures are given, not prompts. pca: the basis of reconstructions.

        unit_norm: whether z_t and z_i have norm 1, or are as CLIP projects them. Raises ValueError where the
        components' widths or sizes do not fit each other, or a preset is wrong.
        """
        super().__init__()
        self.presets = read_presets(presets, analytic="x0_variance" in getattr(prior_scheduler, "config", {}))
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
            upsampler_256_last=upsampler_256_last,
            prior_ar=prior_ar,
            pca=pca,
        )
        check_fit(clip, prior, decoder, upsampler_256, upsampler_1024, prior_ar=prior_ar, pca=pca)
        self.register_to_config(presets=write_presets(self.presets), license=license, unit_norm=unit_norm)
        self.model_name, self.unit_norm, self.license_text = name, unit_norm, license_notice(license)
        self.batch_size = {"prior": 64, "decoder": 16, "upsampler_256": 1, "upsampler_1024": 1}
        self.tile: int | None = None
        self._null_contexts: dict[str, tuple[Any, Any]] = {}
        for net in (decoder, upsampler_256, upsampler_256_last, upsampler_1024):
            if net is not None:
                net.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]

    # --- loading, saving

    @classmethod
    def from_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls,
        model: str | Path | None = None,
        dtype: torch.dtype | DTypeName | None = None,
        device: torch.device | str | None = None,
        **components: Any,
    ) -> UnCLIP:
        """Loads a model: the embedded one (None), a folder, or a hub name; Karlo's as well (`unclip.convert.karlo`).

        dtype: of the weights in memory whatever they are stored in, fp32 by default; "auto" takes bf16 where it is
        native. device: "auto" takes what there is. components: of `UnCLIP`'s arguments, in place of the folder's.
        Raises FileNotFoundError for what is not there, ValueError for what does not load.
        """
        device = choose_device(device)
        weights = choose_dtype(dtype, device)
        folder, name = find_model(model)
        parts = karlo.load(folder, weights) if karlo.is_karlo(folder) else load_folder(folder, weights)
        pipe = cls(**{**parts, "name": name, **components}).to(device)
        pipe.license_text = license_notice(parts["license"], folder)
        announce(name, parts["license"])
        return pipe

    def save_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        folder: str | Path,
        dtype: torch.dtype | DTypeName | None = None,
        max_shard_size: str = "10GB",
        extra_files: Mapping[str, str] | None = None,
    ) -> Path:
        """Writes the model folder, whole or not at all; a model of this name is replaced, else FileExistsError.

        dtype: of the stored weights, None as in memory; extra_files: further files' contents by name (a model card).
        """
        with whole_folder(Path(folder), INDEX) as partial:
            stored = None if dtype is None else choose_dtype(dtype, torch.device("cpu"))
            for name, component in self.components.items():
                if component is not None:
                    write_component(name, component, partial, stored, max_shard_size)
            self.save_config(partial)
            license = {} if self.license_text is None else {"LICENSE": self.license_text}
            for file, text in {**license, **(extra_files or {})}.items():
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
        prior: PriorName | None = None,
    ) -> dict[str, StageSettings]:
        """Every stage's settings under a preset with the given ones in place.

        steps: up to four, for prior, decoder, 256, 1024; None keeps the preset's. prior: which one draws z_i; None
        keeps the preset's, or takes "ar" where that is the only one. Raises ValueError for an unknown preset, a prior
        that is not there, or what a stage's scheduler cannot do.
        """
        if preset not in self.presets:
            raise ValueError(f"preset {preset!r} is unknown; this model has {', '.join(self.presets)}.")
        if prior is None and self.prior is None and self.prior_ar is not None:
            prior = "ar"
        settings = override(self.presets[preset], guidance_scale, prior_guidance_scale, steps, prior)
        if self.prior_ar is not None or settings["prior"].solver == "ar":
            check_prior(self, settings["prior"])
        for stage, chosen in settings.items():
            if chosen.solver != "ar" and getattr(self, stage) is not None:
                resolve_timesteps(self.sampler(stage, chosen), chosen.steps)
        return settings

    # --- the stages

    @torch.no_grad()
    def encode_text(self, prompts: str | Sequence[str]) -> TextFeatures:
        """Prompts to z_t (b, d), token states (b, n, w), mask (b, n). A prompt too long is cut, with a warning."""
        return self.clip.encode_text(prompts, normalize=self.unit_norm)

    @torch.no_grad()
    def encode_image(self, images: Picture | Sequence[Picture] | Tensor) -> Tensor:
        """z_i (b, d), float32 of unit norm, of pictures: PIL or paths, of any sizes, or float (b, 3, h, w) in [−1, 1].

        PIL pictures are prepared by CLIP's own processor. Of a model whose `unit_norm` is off, z_i is as projected.
        """
        if isinstance(images, Tensor):
            return self.clip.encode_image(images.to(self.clip.device), self.unit_norm).float()
        pictures = [images] if isinstance(images, Picture) else list(images)
        if not pictures:
            raise ValueError("no pictures came; give at least one.")
        opaque = [pil_from_pixels(pixels_from_pil(load_image(picture)))[0] for picture in pictures]
        return self.clip.encode_pictures(opaque, self.unit_norm).float()

    @torch.no_grad()
    def sample_z_i(
        self,
        text: TextFeatures,
        seeds: Sequence[Seed],
        settings: StageSettings | None = None,
        callback: Callback | None = None,
        negative: str | None = None,
    ) -> Tensor:
        """The prior (§2.2), of the two that which the settings name: of `draws` samples per row, the one with the
        largest z_i·z_t.

        text: b rows; negative: a prompt that guidance leads away from. Returns z_i (b, d), float32 of unit norm as
        `encode_image` gives it. Raises ValueError where the model has no such prior.
        """
        settings = settings or self.settings()["prior"]
        check_prior(self, settings)
        self._check_rows(len(text.z_t), seeds)
        condition = {"z_t": text.z_t, "text": text.states, "text_mask": text.mask}
        if settings.solver == "ar":
            z_i = stages.run_autoregressive(self, condition, seeds, settings, callback, negative, settings.draws)
        else:
            shape, draws = (self.prior.config["embedding_dim"],), settings.draws
            x0 = run_stage(self, "prior", condition, shape, seeds, settings, callback, negative=negative, draws=draws)
            z_i = self.prior.unstandardize(x0).float()
        z_i = z_i.unflatten(0, (settings.draws, -1))  # draws b d
        # CLIP's embeddings have unit norm, and the decoder was trained on them; a regressed mean is shorter
        return best_of(F.normalize(z_i, dim=-1) if self.unit_norm else z_i, text.z_t)

    @torch.no_grad()
    def decode(
        self,
        z_i: Tensor | None,
        text: TextFeatures | None,
        seeds: Sequence[Seed],
        settings: StageSettings | None = None,
        callback: Callback | None = None,
        x_T: Tensor | None = None,
        negative: str | None = None,
        known: Known | None = None,
    ) -> Tensor:
        """The decoder (§2.1): z_i (b, d) and the caption's text (b rows, or None for none) to (b, 3, s, s) in [−1, 1].

        z_i may be None, for the caption alone. x_T: starting noise (b, 3, s, s), or with the solver "ddim_inverse" the
        pictures, whose noise comes back; None draws each row's from its seed. negative: a prompt that guidance leads
        away from, where the decoder reads text. known: pixels that all rows keep.
        """
        settings = settings or self.settings()["decoder"]
        self._check_rows(len(seeds) if z_i is None else len(z_i), seeds)
        condition = stages.decoder_conditions(self, z_i, text, len(seeds), negative)
        side = int(self.decoder.config["sample_size"])
        shape = (3, side, side)
        x = run_stage(self, "decoder", condition, shape, seeds, settings, callback, x_T, negative=negative, known=known)
        return x if settings.solver in INVERSE else x.clamp(-1, 1)

    @torch.no_grad()
    def upsample(
        self,
        images: Tensor,
        size: int,
        seeds: Sequence[Seed],
        settings: StageSettings | None = None,
        callback: Callback | None = None,
        known: Known | None = None,
    ) -> Tensor:
        """One upsampler: pictures (b, 3, h, w) in [−1, 1] to (b, 3, size, size); known: pixels that all rows keep."""
        name = self.networks.get(size)
        if name is None or name == "decoder":
            raise ValueError(f"no upsampler to {size} px here; this model upsamples to {self.sizes[1:]}.")
        side = size // int(getattr(self, name).config["factor"])
        if tuple(images.shape[1:]) != (3, side, side):
            raise ValueError(f"pictures are {tuple(images.shape)}; for {size} px give (b, 3, {side}, {side}).")
        settings = settings or self.settings()[name]
        self._check_rows(len(images), seeds)
        condition = {"low": quantised(images) if settings.eight_bits else images}
        return run_stage(self, name, condition, (3, size, size), seeds, settings, callback, known=known).clamp(-1, 1)

    def check_size(self, size: int | None) -> int:
        """A size that is offered; None is the largest. Raises ValueError for another."""
        size = self.sizes[-1] if size is None else size
        if size not in self.sizes:
            raise ValueError(f"size {size!r} is not offered; this model draws {', '.join(map(str, self.sizes))} px.")
        return size

    compile = stages.compile_networks
    use_tiles = stages.use_tiles

    # --- what one can do with (z_i, x_T): §3, §4

    invert = manipulations.invert
    mix = manipulations.mix
    vary = manipulations.vary
    interpolate = manipulations.interpolate
    edit = manipulations.edit
    reconstruct = manipulations.reconstruct
    study = manipulations.study
    probe = manipulations.probe
    img2img = manipulations.img2img
    inpaint = inpainting.inpaint

    # --- the call

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
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
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        image: Picture | Sequence[Picture] | Tensor | None = None,
        prior: PriorName | None = None,
        negative_prompt: str | None = None,
        best_of: int = 1,
    ) -> UnCLIPOutput:
        """Draws `num_images` pictures of each prompt; the pictures of a prompt have the seeds seed, seed + 1, …

        size: side in pixels, by default the largest the model has. guidance_scale is the decoder's, 1 for none. steps:
        see `settings`. z_i (prompts · num_images, d) stands in for the prior's, or that of `image`, a picture for each
        prompt (as `encode_image` takes them); prompts may then be left out. generator: draws the seed instead of
        `seed`; a list, one for each picture: all noise of a picture, stage after stage, is its generator's. prior: see
        `settings`.

        A prompt may have parts with weights, "a cat:1.5 | a dog" (`unclip.prompts`). negative_prompt: what guidance
        leads away from, where it is on. best_of: each picture is, of so many drawings of successive seeds, the one that
        CLIP finds nearest to the prompt. Raises ValueError or TypeError, before any work, for arguments out of range.
        """
        prompts, given, asked = check_request(prompt, image, z_i, num_images)
        check_seeds(seed, num_images)
        seeds = check_seeds(seed, num_images * check_best_of(best_of, prompts, self.clip, num_images), generator, asked)
        size, output_type = self.check_size(size), check_output_type(output_type)
        if best_of == 1 and (given is not None or z_i is not None):
            for part in prompts or ():
                plain(part)  # parts and weights are z_i's, and would say nothing here
        settings = self.settings(preset, guidance_scale, prior_guidance_scale, steps, prior)
        hears = ("prior", "decoder") if given is None and z_i is None else ("decoder",)
        negative_prompt = check_negative(negative_prompt, self, settings, hears)
        rows = len(seeds) // best_of
        if z_i is not None and tuple(z_i.shape) != (rows, self.decoder.config["z_i_width"]):
            raise ValueError(f"z_i is {tuple(z_i.shape)}; give ({rows}, {self.decoder.config['z_i_width']}).")
        if z_i is None and given is None:
            check_prior(self, settings["prior"])

        if given is not None:
            z_i = self.encode_image(given).repeat_interleave(num_images, 0)
        if prompts is None:
            assert z_i is not None  # check_request
            x = self.decode(z_i, None, seeds, settings["decoder"], callback, negative=negative_prompt)
            return finish(self, x, z_i, seeds, size, settings, output_type, callback)
        z_i = None if z_i is None else z_i.repeat_interleave(best_of, 0)
        meant = embed_prompts(self, prompts, seeds, settings["prior"], callback, negative_prompt, z_i)
        x, z_i = decode_prompts(self, meant, seeds, settings["decoder"], callback, negative_prompt), meant.z_i
        if best_of > 1:
            kept = best_rows(self.encode_image(x), meant.z_t, best_of)
            x, z_i, seeds = x[kept], z_i[kept], [seeds[i] for i in kept]
        return finish(self, x, z_i, seeds, size, settings, output_type, callback)

    def sampler(self, stage: str, settings: StageSettings) -> Any:
        """The scheduler that samples a stage under these settings."""
        return make_sampler(getattr(self, f"{stage}_scheduler"), settings.solver, **settings.options)  # pyright: ignore[reportArgumentType]

    @staticmethod
    def _check_rows(rows: int, seeds: Sequence[Seed]) -> None:
        if rows != len(seeds) or not rows:
            raise ValueError(f"{rows} rows came with {len(seeds)} seeds; give one seed for each row, at least one.")
