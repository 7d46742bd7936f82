"""What the machine can do, and what a piece of work takes of it: seconds, memory, floating-point operations."""

from __future__ import annotations

import ctypes
import math
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from unclip.core.files import write_json

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Run(NamedTuple):
    """One run: its seconds and its result."""

    seconds: float
    output: Tensor


def describe(device: torch.device) -> dict[str, Any]:
    """Of a results file: which machine, how many threads, which torch."""
    names = [line for line in _lines(Path("/proc/cpuinfo")) if line.startswith("model name")]
    processor = names[0].partition(": ")[2] if names else platform.processor() or platform.machine()
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "processor": processor,
        "cores": cores,
        "gpu": gpu,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def write(path: Path, result: Mapping[str, Any]) -> None:
    """A results file, whole or not at all; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    plain = {**result, "options": {name: value for name, value in result["options"].items() if name != "json"}}
    write_json(plain, path)


def timed(work: Callable[[], Tensor], device: torch.device) -> Run:
    """Runs the work once, alone."""
    _wait(device)
    start = time.perf_counter()
    output = work()
    _wait(device)
    return Run(time.perf_counter() - start, output)


def memory_mb(work: Callable[[], Any], device: torch.device) -> float | None:
    """The most memory in MB that the work takes beyond what there was before; None where that is not to be known.

    On a CPU, what the process has freed is given back first: hence not a run whose seconds count.
    """
    if device.type == "cuda":
        _wait(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    try:
        ctypes.CDLL(None).malloc_trim(0)
        CLEAR.write_text("5")  # the most is noted anew
    except (OSError, AttributeError):  # not Linux with glibc, or not allowed
        work()
        return None
    before = _status("VmRSS")
    work()
    return (_status("VmHWM") - before) / 2**20


def _linear_flop(x: Sequence[int], weight: Sequence[int], *_: Any, **__: Any) -> int:
    """Of oneDNN's product, which torch does not count; of the shapes of its arguments."""
    return 2 * math.prod(x) * weight[0]


def gflop(work: Callable[[], Any]) -> float:
    """Floating-point operations of matrix products and convolutions, in 10⁹; attention counted as its products."""
    known = {torch.ops.mkldnn._linear_pointwise: _linear_flop} if torch.backends.mkldnn.is_available() else {}
    with FlopCounterMode(display=False, custom_mapping=known) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        work()
    return counter.get_total_flops() / 1e9


@torch.no_grad()
def peak(dtype: torch.dtype, device: torch.device, side: int = 2048, repeats: int = 5) -> dict[str, float]:
    """GFLOP/s of a large matrix product and of a 3×3 convolution, the best of several runs.

    The product is of side × side; the convolution of side/8 channels in channels_last, on a grid of side/16.
    """
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    channels, grid = side // 8, side // 16
    x, w = torch.randn(1, channels, grid, grid, device=device), torch.randn(channels, channels, 3, 3, device=device)
    x, w = (part.to(dtype).contiguous(memory_format=torch.channels_last) for part in (x, w))
    works = {
        "matmul": (lambda: a @ b, 2 * side**3),
        "conv": (lambda: F.conv2d(x, w, padding=1), 2 * 9 * channels**2 * grid**2),
    }
    best = {}
    for name, (work, flop) in works.items():
        timed(work, device)
        best[name] = flop / 1e9 / min(timed(work, device).seconds for _ in range(repeats))
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _status(name: str) -> int:
    line = next(line for line in _lines(STATUS) if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.is_file() else []
