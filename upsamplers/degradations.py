"""Corruption of the low-resolution pictures that upsamplers are trained on (paper §2.1; BSR: arXiv 2103.14006).

Pictures are float tensors (b, 3, h, w) in [−1, 1], on any device. Everything random comes from `draws`, one row per
picture, so that a picture is degraded in the same way alone and in any batch.
"""

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import kornia.enhance
import kornia.filters
import torch
import torch.nn.functional as F
from torch import Tensor

Step = Literal["blur1", "blur2", "resize", "to_final", "noise", "jpeg", "sensor"]
STEPS: tuple[Step, ...] = ("blur1", "blur2", "resize", "to_final", "noise", "jpeg", "sensor")
RESIZE_MODES = ("bilinear", "bicubic", "area")
JPEG_PROBABILITY = 0.9
SENSOR_PROBABILITY = 0.25


class RowDraws(Protocol):
    """Random numbers whose row i depends on sample i alone (`core.data.Draws`)."""

    def uniform(self, *shape: int) -> Tensor: ...

    def normal(self, *shape: int) -> Tensor: ...


@dataclass(frozen=True)
class Strength:
    """Ranges of one BSR variant; noise in levels of 255."""

    blur: float  # factor on the widths of the gaussian kernels
    noise: tuple[float, float]
    jpeg: tuple[float, float]


STRENGTHS = {
    "full": Strength(blur=1.0, noise=(2, 25), jpeg=(30, 95)),  # Zhang et al., arXiv 2103.14006
    "light": Strength(blur=0.25, noise=(2, 8), jpeg=(80, 95)),  # Rombach et al., arXiv 2112.10752
}


def downsample(x0: Tensor, factor: int) -> Tensor:
    """Clean low-resolution pictures (b, 3, h/factor, w/factor) of x0 (b, 3, h, w), by antialiased bicubic resizing."""
    check(x0, factor)
    size = (x0.shape[2] // factor, x0.shape[3] // factor)
    return F.interpolate(x0, size, mode="bicubic", antialias=True, align_corners=False).clamp(-1, 1)


def gaussian_blur(low: Tensor) -> Tensor:
    """The corruption of the 64 → 256 upsampler (§2.1): gaussian blur of kernel 3 and σ 0.6, same shape."""
    check(low, 1)
    return kornia.filters.gaussian_blur2d(low, (3, 3), (0.6, 0.6))


@torch.no_grad()
def bsr(x0: Tensor, draws: RowDraws, strength: str = "full", factor: int = 4) -> Tensor:
    """The corruption of the 256 → 1024 upsampler (§2.1): BSR degradation, of strength "full" or "light".

    Shuffles per picture: two gaussian blurs, a resize of random mode and factor, a resize to exactly 1/factor (after
    the random one), gaussian noise, JPEG, sensor noise; JPEG once more at the end.

    x0: (b, 3, h, w) in [−1, 1], sides divisible by `factor`; returns (b, 3, h/factor, w/factor) in [−1, 1].
    """
    check(x0, factor)
    if strength not in STRENGTHS:
        raise ValueError(f"strength is {strength!r}; expected one of {', '.join(map(repr, STRENGTHS))}")
    parameters = Parameters(draws, x0.shape, STRENGTHS[strength], factor)
    pictures = list(((x0.float() + 1) / 2).unbind(0))  # of sizes that differ between the two resizes
    for position in range(len(STEPS)):
        apply_position(pictures, parameters, position)
    low = jpeg(torch.stack(pictures), parameters.last_quality)
    return (low * 2 - 1).to(x0.dtype)


class Parameters:
    """What is drawn for each picture of a batch, all at once and in a fixed order: tensors with the batch first."""

    def __init__(self, draws: RowDraws, shape: torch.Size, strength: Strength, factor: int):
        _, _, height, width = shape
        self.final_size = (height // factor, width // factor)
        rank = draws.uniform(len(STEPS)).tolist()
        self.orders = [sorted(range(len(STEPS)), key=row.__getitem__) for row in rank]  # step at each position
        resize, to_final = STEPS.index("resize"), STEPS.index("to_final")
        for order in self.orders:
            i, j = sorted((order.index(resize), order.index(to_final)))
            order[i], order[j] = resize, to_final
        blur = draws.uniform(2, 5)
        self.covariances = blur_covariances(blur, strength.blur, factor)  # b 2 2 2
        self.radius = math.ceil(3 * math.sqrt(strength.blur * (4 + factor)))  # three of the largest σ
        resizes = draws.uniform(3).tolist()
        self.modes = [[RESIZE_MODES[int(3 * u)] for u in row[:2]] for row in resizes]
        scales = [1 / (1 + row[2] * (2 * factor - 1)) for row in resizes]  # 1 … 1/(2·factor)
        self.sizes = [(max(1, round(height * s)), max(1, round(width * s))) for s in scales]
        noise = draws.uniform(2 + 3 + 9)
        self.noise_level = between(noise[:, 0], *strength.noise) / 255  # b
        self.noise_mixing = noise_mixing(noise[:, 1], noise[:, 2:5], noise[:, 5:].reshape(-1, 3, 3))  # b 3 3
        self.noise = draws.normal(3, height, width)
        quality = draws.uniform(3)
        self.quality, self.last_quality = between(quality[:, :2], *strength.jpeg).unbind(1)  # b
        self.has_jpeg = (quality[:, 2] < JPEG_PROBABILITY).tolist()
        sensor = draws.uniform(2)
        self.has_sensor = (sensor[:, 0] < SENSOR_PROBABILITY).tolist()
        self.shot = torch.exp(between(sensor[:, 1], math.log(1e-4), math.log(0.012)))  # b
        self.sensor_noise = draws.normal(3, height, width)


def apply_position(pictures: list[Tensor], parameters: Parameters, position: int) -> None:
    """Applies to each picture the step its order has at `position`, in batches of those that share step and sizes."""
    groups: dict[tuple, list[int]] = defaultdict(list)
    for i, picture in enumerate(pictures):
        step = STEPS[parameters.orders[i][position]]
        target: tuple = ()
        if step == "resize":
            target = (parameters.sizes[i], parameters.modes[i][0])
        elif step == "to_final":
            target = (parameters.final_size, parameters.modes[i][1])
        skipped = (step == "jpeg" and not parameters.has_jpeg[i]) or (step == "sensor" and not parameters.has_sensor[i])
        if not skipped:
            groups[step, tuple(picture.shape), target].append(i)
    for (step, _, target), rows in groups.items():
        batch = torch.stack([pictures[i] for i in rows])  # n 3 h w
        changed = run_step(step, batch, target, parameters, rows)
        for i, picture in zip(rows, changed.unbind(0), strict=True):
            pictures[i] = picture


def run_step(step: Step, x: Tensor, target: tuple, parameters: Parameters, rows: list[int]) -> Tensor:
    """One step of BSR on pictures x (n, 3, h, w) in [0, 1], which are the `rows` of the batch."""
    height, width = x.shape[-2:]
    steps: dict[Step, Callable[[], Tensor]] = {
        "blur1": lambda: blur(x, parameters.covariances[rows, 0], parameters.radius),
        "blur2": lambda: blur(x, parameters.covariances[rows, 1], parameters.radius),
        "resize": lambda: resize(x, *target),
        "to_final": lambda: resize(x, *target),
        "noise": lambda: add_noise(
            x,
            parameters.noise[rows, :, :height, :width],
            parameters.noise_level[rows],
            parameters.noise_mixing[rows],
        ),
        "jpeg": lambda: jpeg(x, parameters.quality[rows]),
        "sensor": lambda: add_sensor_noise(x, parameters.sensor_noise[rows, :, :height, :width], parameters.shot[rows]),
    }
    return steps[step]()


def between(u: Tensor, low: float, high: float) -> Tensor:
    return low + (high - low) * u


def blur_covariances(u: Tensor, scale: float, factor: int) -> Tensor:
    """Covariances (b, 2, 2, 2) in pixels² of gaussian kernels from uniforms (b, 2, 5): half isotropic, half not."""
    isotropic = (scale * (2 + 0.2 * factor) * u[..., 1]) ** 2  # the width is σ
    axes = scale * (4 + factor) * u[..., 2:4]  # the anisotropic widths are variances, as in the reference
    variances = torch.where(u[..., :1] < 0.5, isotropic[..., None].expand_as(axes), axes).clamp(min=0.01)
    angle = math.pi * u[..., 4]
    cos, sin = angle.cos(), angle.sin()
    rotation = torch.stack([torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)], -2)
    return rotation @ torch.diag_embed(variances) @ rotation.mT


def blur(x: Tensor, covariance: Tensor, radius: int) -> Tensor:
    """Gaussian blur of x (n, 3, h, w) by kernels of covariance (n, 2, 2) and side 2·radius + 1; mirrors at borders."""
    side = torch.arange(-radius, radius + 1, device=x.device, dtype=x.dtype)
    offsets = torch.stack(torch.meshgrid(side, side, indexing="ij"), dim=-1)  # k k 2
    distances = torch.einsum("yxi,nij,yxj->nyx", offsets, torch.linalg.inv(covariance), offsets)
    border = "reflect" if radius < min(x.shape[-2:]) else "replicate"
    return kornia.filters.filter2d(x, torch.exp(-distances / 2), border, normalized=True)


def resize(x: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    """Resizes as camera and web software does: without antialiasing, except by area."""
    aligned = {} if mode == "area" else {"align_corners": False}
    return F.interpolate(x, size, mode=mode, **aligned).clamp(0, 1)


def noise_mixing(kind: Tensor, variances: Tensor, basis: Tensor) -> Tensor:
    """Matrices (b, 3, 3) that turn white noise into colour (40 %), grey (40 %) or channel-correlated noise (20 %).

    Channel-correlated: a random covariance, with eigenvalues `variances` (b, 3) and the eigenvectors that `basis`
    (b, 3, 3) gives when made orthogonal.
    """
    colour = torch.eye(3, device=kind.device).expand(len(kind), 3, 3)
    grey = torch.zeros_like(colour).index_fill(2, torch.zeros(1, dtype=torch.long, device=kind.device), 1.0)
    orthogonal = torch.linalg.qr(basis - 0.5)[0]
    correlated = orthogonal * variances.sqrt()[:, None, :]
    kind = kind[:, None, None]
    return torch.where(kind > 0.6, colour, torch.where(kind < 0.4, grey, correlated))


def add_noise(x: Tensor, noise: Tensor, level: Tensor, mixing: Tensor) -> Tensor:
    """Adds gaussian noise of standard deviation `level` (n,), its channels mixed by (n, 3, 3)."""
    mixed = torch.einsum("nij,njhw->nihw", mixing, noise)
    return (x + level[:, None, None, None] * mixed).clamp(0, 1)


def add_sensor_noise(x: Tensor, noise: Tensor, shot: Tensor) -> Tensor:
    """Shot and read noise in linear light; `shot` (n,) is the variance of a white pixel.

    Read noise follows from shot noise as cameras have it (Brooks et al., arXiv 1811.11127, §3.1).
    """
    shot = shot[:, None, None, None]
    read = torch.exp(2.18 * shot.log() + 1.2)
    linear = x.clamp(0, 1) ** 2.2
    return (linear + (shot * linear + read).sqrt() * noise).clamp(0, 1) ** (1 / 2.2)


def jpeg(x: Tensor, quality: Tensor) -> Tensor:
    """JPEG's losses on x (n, 3, h, w) in [0, 1], at a quality (n,) of 1 … 100."""
    return kornia.enhance.jpeg_codec_differentiable(x.clamp(0, 1), quality).clamp(0, 1)


def check(x: Tensor, factor: int) -> None:
    if x.ndim != 4 or x.shape[1] != 3 or 0 in x.shape or x.shape[2] % factor or x.shape[3] % factor:
        divisible = f" with h and w divisible by {factor}" if factor > 1 else ""
        raise ValueError(f"the pictures have shape {tuple(x.shape)}; expected (b, 3, h, w){divisible}")
