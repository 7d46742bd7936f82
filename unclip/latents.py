"""The mathematics of (z_i, x_T): great circles, text differences, weighted means. Pure functions of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

ITERATIONS = 100
TINY = 1e-9  # below, a direction is rounding errors


class Latent(NamedTuple):
    """A picture taken apart (§3): z_i (b, d), what CLIP sees of it, of unit norm; x_T (b, 3, s, s), what is left."""

    z_i: Tensor
    x_T: Tensor

    def row(self, i: int) -> Latent:
        """Picture i alone, as a batch of one."""
        return Latent(self.z_i[i : i + 1], self.x_T[i : i + 1])

    def repeat(self, n: int) -> Latent:
        """Each row n times in a row."""
        return Latent(self.z_i.repeat_interleave(n, 0), self.x_T.repeat_interleave(n, 0))


def slerp(a: Tensor, b: Tensor, t: float | Tensor) -> Tensor:
    """Spherical interpolation of rows: from a (t = 0, exactly) to b (t = 1, exactly), (n, …) in a's dtype.

    The direction runs along the great circle, the norm linearly. a, b: (n, …), each row one vector; t: a number or
    (n,), beyond [0, 1] the circle goes on. A zero vector takes the other's direction, so that the way is straight; of
    the many ways between opposite vectors one is taken, always the same. Raises ValueError where shapes differ.
    """
    if a.shape != b.shape or a.ndim < 2:
        raise ValueError(f"slerp came with {tuple(a.shape)} and {tuple(b.shape)}; give two of one shape (n, …).")
    start, end = a.double().flatten(1), b.double().flatten(1)
    t = torch.as_tensor(t, dtype=torch.float64, device=a.device).expand(len(a))[:, None]
    norm_a, norm_b = start.norm(dim=1, keepdim=True), end.norm(dim=1, keepdim=True)
    u, v = _directions(start, end, norm_a, norm_b)
    # acos(u·v) has no digits left near 0 and π; this has (Kahan)
    angle = 2 * torch.atan2((u - v).norm(dim=1, keepdim=True), (u + v).norm(dim=1, keepdim=True))
    away = v - (u * v).sum(1, keepdim=True) * u
    length = away.norm(dim=1, keepdim=True)
    away = torch.where(length > TINY, away / length.clamp(min=TINY), _perpendicular(u))
    direction = torch.cos(t * angle) * u + torch.sin(t * angle) * away
    between = direction * torch.lerp(norm_a, norm_b, t).clamp(min=0)
    out = torch.where(t == 0, start, torch.where(t == 1, end, between))
    return out.view(a.shape).to(a.dtype)


def _directions(a: Tensor, b: Tensor, norm_a: Tensor, norm_b: Tensor) -> tuple[Tensor, Tensor]:
    """a and b at unit norm, (n, d); a zero vector becomes the other's direction, two of them stay zero."""
    smallest = torch.finfo(torch.float64).tiny
    u, v = a / norm_a.clamp(min=smallest), b / norm_b.clamp(min=smallest)
    return torch.where(norm_a > 0, u, v), torch.where(norm_b > 0, v, u)


def _perpendicular(u: Tensor) -> Tensor:
    """One unit vector at right angles to each row of u, (n, d): of the axis that u is least along."""
    axis = torch.nn.functional.one_hot(u.abs().argmin(1), u.shape[1]).to(u.dtype)
    rest = axis - (u * axis).sum(1, keepdim=True) * u
    return rest / rest.norm(dim=1, keepdim=True).clamp(min=TINY)


def text_difference(z_t: Tensor, z_t0: Tensor) -> Tensor:
    """z_d = norm(z_t − z_t0), the direction from one caption to another (§3.3): (n, d) of unit norm.

    z_t, z_t0: (n, d). Raises ValueError where the two are equal: there is no direction then.
    """
    difference = z_t.double() - z_t0.double()
    length = difference.norm(dim=-1, keepdim=True)
    if bool((length < 1e-6).any()):
        raise ValueError("the two captions have the same embedding; give captions that differ.")
    return (difference / length).to(z_t.dtype)


def weighted_mean(z: Tensor, weights: Sequence[float]) -> Tensor:
    """Mean of k embeddings on the sphere by their weights: z (k, n, d) to (n, d); its norm is the mean of the norms.

    Its direction is where the weighted great-circle ways to all of them cancel (Buss and Fillmore 2001): of two it is
    slerp, and the order of more does not matter. Weights count relative to each other; where one is all, its embedding
    comes back as it was. Raises ValueError for weights that are negative or all zero, and for embeddings of zeros.
    """
    if z.ndim != 3 or len(z) != len(weights) or not len(z):
        raise ValueError(f"embeddings {tuple(z.shape)} came with {len(weights)} weights; give (k, n, d) and k of them.")
    w = torch.tensor([float(weight) for weight in weights], dtype=torch.float64, device=z.device)
    if not bool(w.isfinite().all()) or float(w.min()) < 0 or float(w.sum()) == 0:
        raise ValueError(f"weights are {list(weights)}; give numbers of at least 0, and not only zeros.")
    if bool((z.flatten(0, 1).norm(dim=1) == 0).any()):
        raise ValueError(
            "an embedding is all zeros and has no direction; give the embedding of a picture or a caption."
        )
    z, w = z[w > 0], w[w > 0] / w.sum()
    if len(z) == 1:
        return z[0]
    if len(z) == 2:
        return slerp(z[0], z[1], float(w[1]))
    norm = z.double().norm(dim=-1, keepdim=True)  # k n 1
    return (_centre(z / norm, w) * torch.einsum("k, k n c -> n c", w, norm)).to(z.dtype)


def _centre(z: Tensor, w: Tensor) -> Tensor:
    """The weighted spherical mean of unit vectors z (k, n, d), weights w (k,) of sum 1, by its own fixed point."""
    mean = torch.einsum("k, k n d -> n d", w, z)
    length = mean.norm(dim=1, keepdim=True)
    mean = torch.where(length > TINY, mean / length.clamp(min=TINY), z[int(w.argmax())])
    for _ in range(ITERATIONS):
        along = (z * mean).sum(-1, keepdim=True)  # k n 1
        away = z - along * mean
        length = away.norm(dim=-1, keepdim=True)
        ways = torch.atan2(length, along) * away / length.clamp(min=TINY)  # k n d, on the plane that touches at mean
        step = torch.einsum("k, k n d -> n d", w, ways)
        angle = step.norm(dim=1, keepdim=True)
        mean = torch.cos(angle) * mean + torch.sin(angle) * step / angle.clamp(min=TINY)
        mean = mean / mean.norm(dim=1, keepdim=True)
        if float(angle.max()) < TINY:
            break
    return mean
