"""Matrix products: in which dtype, and without gradient by the faster of the two libraries that torch has for a CPU.

In fp32 torch multiplies by MKL, which on AMD's processors with AVX-512 uses half of a vector; its other library,
oneDNN, uses all of it, and torch takes that for convolutions and for bf16. The results differ by rounding.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WORTH = 2**20  # multiplications of one product, below which the call outweighs it


class Linear(nn.Linear):
    """torch's, by `linear`."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x·weightᵀ + bias. x: (…, i); weight: (o, i); bias: (o,). Returns (…, o)."""
    x = x.contiguous()  # of a slice torch would copy the weights once a row
    if x.numel() * len(weight) < WORTH or not by_onednn(x) or weight.dtype != x.dtype:
        return F.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def by_onednn(x: Tensor) -> bool:
    """Whether products of x are to be oneDNN's."""
    return bool(
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
    )


def computes_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bf16 natively. A CPU that does not takes many times as long as for fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(False)
    # the CPU's flags have no public name in torch 2.6 to 2.13
    probe = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(device.type == "cpu" and probe and probe())
