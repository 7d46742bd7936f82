"""Principal components of CLIP's image embeddings: the coordinates of the autoregressive prior (paper §2.2) and of the
reconstructions from few components (§4)."""

from __future__ import annotations

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn


class PCA(ModelMixin, ConfigMixin):
    """An orthonormal basis of z_i around its mean, sorted by eigenvalue, largest first; saved and loaded as a folder.

    Buffers: `mean` (d,), `components` (k, d), `eigenvalues` (k,), the variances along them. `PCA.fit` makes one; a
    fresh one is the identity. It stays in float32 whatever dtype a model is loaded in.
    """

    _keep_in_fp32_modules = ["mean", "components", "eigenvalues"]  # noqa: RUF012

    mean: Tensor
    components: Tensor
    eigenvalues: Tensor

    @register_to_config
    def __init__(self, embedding_dim: int = 768, count: int | None = None):
        """count: k, the components kept, 1 … embedding_dim; None: all."""
        super().__init__()
        count = embedding_dim if count is None else count
        if not 1 <= count <= embedding_dim:
            raise ValueError(f"{count} components of {embedding_dim} dimensions; keep 1 to {embedding_dim}.")
        self.register_buffer("mean", torch.zeros(embedding_dim))
        self.register_buffer("components", torch.eye(count, embedding_dim))
        self.register_buffer("eigenvalues", torch.ones(count))

    @classmethod
    @torch.no_grad()
    def fit(cls, z_i: Tensor) -> PCA:
        """All d components of embeddings z_i (n, d), by the eigenvectors of their covariance, in float64.

        Where there is no variance left (fewer samples than dimensions, equal vectors) the eigenvalues are 0 and the
        components complete the basis. The sign of each is such that its largest entry is positive. Raises ValueError.
        """
        if z_i.ndim != 2 or 0 in z_i.shape or not bool(z_i.isfinite().all()):
            raise ValueError(f"z_i is {tuple(z_i.shape)}, expected finite embeddings (n, d), at least one.")
        z = z_i.detach().cpu().double()
        mean = z.mean(0)
        z = z - mean
        eigenvalues, vectors = torch.linalg.eigh(z.mT @ z / len(z))  # rising
        components = vectors.mT.flip(0)
        largest = components.gather(1, components.abs().argmax(1, keepdim=True))
        basis = cls(z.shape[1])
        basis.mean.copy_(mean)
        basis.components.copy_(components * largest.sign())
        basis.eigenvalues.copy_(eigenvalues.flip(0).clamp(min=0))
        return basis

    def components_for(self, error: float = 0.01) -> int:
        """The fewest components, at least one, whose mean squared error is at most `error` of the variance of z_i.

        §2.2 keeps 319 of 1,024 "with less than 1% average mean-squared error"; of what, it does not say. Of the
        variance is the stricter reading. Reckoned on the samples of `fit`, over the components that are here.
        """
        if not 0 <= error < 1:
            raise ValueError(f"error {error} is no part of the variance; give one from 0 up to 1, 0.01 for 1 %.")
        lost = self.eigenvalues.double().flip(0).cumsum(0).flip(0)  # k: of what is kept before component k
        return max(1, int((lost > error * lost[0]).sum()))

    def kept(self, k: int) -> PCA:
        """The basis of the first k components."""
        self._check_count(k, least=1)
        basis = PCA(len(self.mean), k)
        basis.mean.copy_(self.mean)
        basis.components.copy_(self.components[:k])
        basis.eigenvalues.copy_(self.eigenvalues[:k])
        nn.Module.to(basis, self.mean.device)  # diffusers' own `to` confuses pyright
        return basis

    def encode(self, z_i: Tensor) -> Tensor:
        """z_i (…, d) to its coordinates (…, k), whose variances are the eigenvalues."""
        if z_i.shape[-1] != len(self.mean):
            raise ValueError(f"z_i is {tuple(z_i.shape)}, expected (…, {len(self.mean)}).")
        return (z_i.to(self.mean.dtype) - self.mean) @ self.components.mT

    def decode(self, coordinates: Tensor) -> Tensor:
        """The first j ≤ k coordinates (…, j) back to (…, d), the others being 0. The norm is not made 1."""
        j = coordinates.shape[-1]
        self._check_count(j)
        return coordinates.to(self.mean.dtype) @ self.components[:j] + self.mean

    def project(self, z_i: Tensor, k: int) -> Tensor:
        """z_i (…, d) with its first k coordinates alone (§4, figure 7), 0 … all. The norm is not made 1."""
        self._check_count(k)
        return self.decode(self.encode(z_i)[..., :k])

    def _check_count(self, k: int, least: int = 0) -> None:
        if not least <= k <= len(self.components):
            raise ValueError(f"{k} components asked for; this basis has {len(self.components)}, give {least} to that.")
