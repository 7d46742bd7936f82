"""How other projects sample a stage: their networks, their schedulers, the loop of their pipelines; nothing of ours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.stacks import CONTEXT_LENGTH, FACTOR
from unclip.clip.model import TextFeatures
from unclip.presets import KARLO

Generators = list[torch.Generator]


class Diffusers:
    """The stages of diffusers' `UnCLIPPipeline`, each by itself, given what the stage before would give it.

    text, empty: the prompts' features and those of the empty prompt, one row; both are padded as that pipeline pads.
    All of the pipeline's tensors have the networks' dtype, as there.
    """

    def __init__(self, networks: dict[str, nn.Module], schedulers: dict[str, Any], dtype: torch.dtype):
        self.networks: dict[str, Any] = networks
        self.schedulers = schedulers
        self.dtype = dtype

    def prior(self, text: TextFeatures, empty: TextFeatures, steps: int, generators: Generators) -> Tensor:
        """z_i (b, d)."""
        both, net = self._both(text, empty), self.networks["prior"]
        x = self._noise((len(text.z_t), text.z_t.shape[1]), generators)

        def predict(x: Tensor, t: Tensor) -> Tensor:
            out = net(torch.cat([x, x]), t, both.z_t, both.states, both.mask).predicted_image_embedding
            null, conditional = out.chunk(2)
            return null + KARLO["prior"]["guidance_scale"] * (conditional - null)

        return net.post_process_latents(self._loop("prior_scheduler", predict, x, steps, generators)).float()

    def decoder(
        self, z_i: Tensor, text: TextFeatures, empty: TextFeatures, steps: int, generators: Generators
    ) -> Tensor:
        """Pictures (b, 3, side, side) in [−1, 1]."""
        both, net, proj = self._both(text, empty), self.networks["decoder"], self.networks["text_proj"]
        states, addend = proj(
            image_embeddings=z_i.to(self.dtype),
            prompt_embeds=both.z_t,
            text_encoder_hidden_states=both.states,
            do_classifier_free_guidance=True,
        )
        mask = F.pad(both.mask, (proj.clip_extra_context_tokens, 0), value=True)
        side = net.config.sample_size
        x = self._noise((len(z_i), 3, side, side), generators)

        def predict(x: Tensor, t: Tensor) -> Tensor:
            out = net(torch.cat([x, x]), t, states, addend, attention_mask=mask).sample
            null, conditional = out.chunk(2)
            eps = null[:, :3] + KARLO["decoder"]["guidance_scale"] * (conditional[:, :3] - null[:, :3])
            return torch.cat([eps, conditional[:, 3:]], dim=1)

        return self._loop("decoder_scheduler", predict, x, steps, generators).clamp(-1, 1).float()

    def super_resolution(self, low: Tensor, steps: int, generators: Generators) -> Tensor:
        """Pictures (b, 3, 4·side, 4·side) in [−1, 1]; low: (b, 3, side, side)."""
        side = FACTOR * low.shape[-1]
        # in fp32: on a CPU this resize is not there in bf16, and the pipeline as it is stops here
        large = F.interpolate(low, (side, side), mode="bicubic", align_corners=False, antialias=True).to(self.dtype)
        x = self._noise(tuple(large.shape), generators)
        last = int(self._steps("upsampler_256_scheduler", steps)[-1])

        def predict(x: Tensor, t: Tensor) -> Tensor:
            net = self.networks["super_res_last" if int(t) == last else "super_res_first"]
            return net(torch.cat([x, large], dim=1), t).sample

        return self._loop("upsampler_256_scheduler", predict, x, steps, generators).clamp(-1, 1).float()

    def _steps(self, name: str, steps: int) -> Tensor:
        self.schedulers[name].set_timesteps(steps)
        return self.schedulers[name].timesteps

    @torch.no_grad()
    def _loop(self, name: str, predict: Any, x: Tensor, steps: int, generators: Generators) -> Tensor:
        timesteps = self._steps(name, steps)
        for t, after in zip(timesteps, [*timesteps[1:], None], strict=True):
            step = self.schedulers[name].step(predict(x, t), t, x, prev_timestep=after, generator=generators)
            x = step.prev_sample
        return x

    def _noise(self, shape: tuple[int, ...], generators: Generators) -> Tensor:
        device = next(self.networks["decoder"].parameters()).device
        return randn_tensor(shape, generator=generators, device=device, dtype=self.dtype)

    def _both(self, text: TextFeatures, empty: TextFeatures) -> TextFeatures:
        """[empty | text] along the batch, padded to the tokenizer's longest."""
        parts = [TextFeatures(*(part.expand(len(text.z_t), *part.shape[1:]) for part in empty)), text]
        missing = [CONTEXT_LENGTH - part.mask.shape[1] for part in parts]
        states = [F.pad(part.states, (0, 0, 0, n)) for part, n in zip(parts, missing, strict=True)]
        masks = [F.pad(part.mask, (0, n)) for part, n in zip(parts, missing, strict=True)]
        z_t, joined = torch.cat([part.z_t for part in parts]), torch.cat(states)
        return TextFeatures(z_t.to(self.dtype), joined.to(self.dtype), torch.cat(masks))


class Dalle2:
    """dalle2-pytorch's prior: of our width, depth and heads, with weights of its own, as its architecture is another.

    Raises ImportError in one sentence where the package is missing.
    """

    def __init__(self, width: int, depth: int, heads: int, dtype: torch.dtype, device: torch.device):
        try:
            from dalle2_pytorch import DiffusionPrior, DiffusionPriorNetwork  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ImportError(
                f"--peer dalle2 needs the package dalle2-pytorch ({error}); run: pip install dalle2-pytorch."
            ) from error
        torch.manual_seed(0)
        sizes = {"dim": width, "depth": depth, "heads": heads, "dim_head": width // heads}
        net = DiffusionPriorNetwork(**sizes, max_text_len=CONTEXT_LENGTH)
        dropped = {"text_cond_drop_prob": 0.1, "image_cond_drop_prob": 0.1}  # else it refuses to guide
        self.net: Any = DiffusionPrior(net, image_embed_dim=width, timesteps=1000, **dropped)
        self.net.to(device).eval()
        self.dtype, self.device = dtype, device

    @torch.no_grad()
    def prior(self, text: TextFeatures, steps: int, guidance_scale: float) -> Tensor:
        """z_i (b, d)."""
        condition = {
            "text_embed": text.z_t.to(self.device, torch.float32),
            "text_encodings": text.states.to(self.device, torch.float32),
        }
        # by autocast, as its noise and schedule are fp32 whatever its weights are
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            # its grid of n steps makes n − 1 calls
            return self.net.p_sample_loop(
                tuple(text.z_t.shape), text_cond=condition, cond_scale=guidance_scale, timesteps=steps + 1
            ).float()


def make_generators(seeds: Sequence[int]) -> Generators:
    """One generator for each picture."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]
