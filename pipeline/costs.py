"""What a piece of work costs: time, floating-point operations, bytes, memory. Needs torch alone."""

import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

MATMUL_SIZES = {"cpu": (1024, 2048), "cuda": (4096, 8192)}

PEAK_TFLOP_PER_S = {
    "B200": 2250.0,
    "H200 NVL": 835.0,
    "H200": 989.0,
    "H100 NVL": 835.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "RTX 4090": 165.0,
    "RTX 3090": 71.0,
}
"""Dense bfloat16 matrix products with float32 sums, from NVIDIA's data sheets, by a part of the GPU's name; the first
part that fits counts."""


@dataclass(frozen=True)
class Cost:
    """What one optimizer step takes.

    Attributes:
        seconds: median over the repetitions.
        flops: of convolutions and matrix products.
        bytes_moved: read and written by all operators, as if no cache were there and nothing were fused.
    """

    seconds: float
    flops: int
    bytes_moved: int

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.seconds + other.seconds, self.flops + other.flops, self.bytes_moved + other.bytes_moved)

    def times(self, factor: float) -> "Cost":
        """The cost of `factor` such steps."""
        return Cost(self.seconds * factor, round(self.flops * factor), round(self.bytes_moved * factor))


class Counter(TorchDispatchMode):
    """Counts FLOPs by torch's own formulas, and bytes of the tensors that operators take and give.

    `torch.utils.flop_counter.FlopCounterMode` follows modules too, and cannot do so through R1's double backward.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0
        self.bytes_moved = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func.overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=out)
        self.bytes_moved += _bytes_moved(func, args, kwargs, out)
        return out


def _bytes_moved(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    """Bytes of the tensors that an operator reads and writes."""
    if func.is_view or "empty" in func.overloadpacket.__name__:
        return 0
    tensors = tree_leaves((args, kwargs, out))
    if func.overloadpacket is torch.ops.aten.convolution_backward:
        grad, x, weight, *_, (of_input, of_weight, _) = args
        tensors = [grad, *tree_leaves(out)] + [weight] * of_input + [x] * of_weight
    return sum(x.nbytes for x in tensors if isinstance(x, Tensor))


def seconds_of(work: Callable[[], Any], device: torch.device) -> float:
    """How long `work` takes, until the device has done it."""
    _finish(device)
    start = time.perf_counter()
    work()
    _finish(device)
    return time.perf_counter() - start


def matmul_flop_per_s(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large square matrix product: the most that this machine does at this moment."""
    best = 0.0
    for n in MATMUL_SIZES[device.type]:
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        best = max(best, *(2 * n**3 / seconds_of(lambda: a @ b, device) for _ in range(3)))  # noqa: B023
    return best


def peak_flop_per_s(device: torch.device) -> float | None:
    """Most FLOP/s that the maker states for a device, in bfloat16; None for a CPU and for a GPU that is not listed."""
    if device.type != "cuda":
        return None
    return peak_of_gpu(torch.cuda.get_device_name(device))


def peak_of_gpu(name: str) -> float | None:
    """`peak_flop_per_s` of a GPU, by its name."""
    return next((peak * 1e12 for part, peak in PEAK_TFLOP_PER_S.items() if part in name), None)


def peak_bytes(work: Callable[[], Any], device: torch.device) -> int:
    """The most memory that `work` holds at a time: allocated on a GPU, else resident in a process of its own.

    Args:
        work: without effects that matter, and for a CPU picklable.
        device: where it works.
    """
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        _finish(device)
        return torch.cuda.max_memory_allocated(device) - before
    with ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_peak_resident_bytes, work, torch.get_num_threads()).result()


def _peak_resident_bytes(work: Callable[[], Any], num_threads: int) -> int:
    torch.set_num_threads(num_threads)
    before = _resident_high_water_bytes()
    work()
    return _resident_high_water_bytes() - before


def _resident_high_water_bytes() -> int:
    # Not getrusage's ru_maxrss: it starts with that of the process which this one was forked from.
    status = Path("/proc/self/status").read_text()
    (kilobytes,) = (line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(kilobytes) * 1024


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
