"""How far a set of generated pictures is from a set of real ones, in a judge's features (`features.py`).

Three figures: the Fréchet distance of the two as normals (arXiv 1706.08500); precision and recall, how much of either
lies within the other (arXiv 1904.06991); and a kernel distance, which assumes no normals and needs fewer pictures, as
CMMD (arXiv 2401.09603) has it. CMMD takes CLIP's embeddings. Here the only CLIP at hand is the one that the pictures
are drawn from, which would judge itself; so EfficientNet's features take their place, which steer nothing. None of
the figures compares with those of other papers: the pictures are few, and other ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prior.evaluate import frechet_distance

NEIGHBOURS = 3


def fidelity(inception: tuple[Tensor, Tensor], judge: tuple[Tensor, Tensor]) -> dict[str, float]:
    """`frechet`, `precision` and `recall` in Inception's features, `kernel` in EfficientNet's.

    Each is a pair: of n generated pictures, of m real ones; (n, d) and (m, d). Raises ValueError for fewer than five.
    """
    if min(len(features) for features in (*inception, *judge)) < NEIGHBOURS + 2:
        counts = f"{len(inception[0])} generated and {len(inception[1])} real pictures"
        raise ValueError(f"{counts} came; two sets are compared from {NEIGHBOURS + 2} pictures each on, so give more.")
    precision, recall = precision_recall(*inception)
    return {
        "frechet": round(frechet_distance(*inception), 2),
        "precision": round(precision, 4),
        "recall": round(recall, 4),
        "kernel": round(kernel_distance(*judge), 2),
    }


def precision_recall(generated: Tensor, real: Tensor, neighbours: int = NEIGHBOURS) -> tuple[float, float]:
    """How many generated features (n, d) lie within the real ones (m, d), and the other way round, in [0, 1].

    A point lies within a set if it is at most as far from one of its points as that one's k-th neighbour in the set.
    """
    return within(generated, real, neighbours), within(real, generated, neighbours)


def within(points: Tensor, others: Tensor, neighbours: int = NEIGHBOURS) -> float:
    others = others.double()
    radii = distances(others, others).kthvalue(neighbours + 1, dim=1).values  # the nearest of all is the point itself
    return float((distances(points.double(), others) <= radii).any(dim=1).double().mean())


def kernel_distance(generated: Tensor, real: Tensor) -> float:
    """1000 × the squared maximum mean discrepancy of two sets, (n, d) and (m, d), by its unbiased estimator.

    0 on average where both are of one distribution, then as often below as above. The kernel is CMMD's, a normal's; its
    width, 10 there for CLIP's embeddings, is the median distance between the real features.
    """
    x, y = generated.double(), real.double()
    squares = [distances(a, b).square() for a, b in ((x, x), (y, y), (x, y))]
    n, m = len(x), len(y)
    median = squares[1][~torch.eye(m, dtype=torch.bool)].median()
    xx, yy, xy = (torch.exp(-s / (2 * median.clamp(min=1e-12))) for s in squares)
    own = (xx.sum() - xx.trace()) / (n * (n - 1)) + (yy.sum() - yy.trace()) / (m * (m - 1))
    return float(1000 * (own - 2 * xy.mean()))


def distances(a: Tensor, b: Tensor) -> Tensor:
    # a distance to oneself must come out as 0, which the shortcut by a matrix product does not give
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
