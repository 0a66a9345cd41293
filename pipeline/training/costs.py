"""Cost of a piece of work: time, floating-point operations, bytes, memory. Needs torch alone."""

import time
import weakref
from collections.abc import Callable
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

MATMUL_SIZES = {"cpu": (1024, 2048), "cuda": (4096, 8192)}
COPIED_BYTES = {"cpu": 2**27, "cuda": 2**30}
"""More than caches hold."""

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
    """What one step takes.

    Attributes:
        device_s: seconds that the device needs, one step after the other.
        host_s: seconds until the call returns; on a CPU those of the step.
        flops: of convolutions and matrix products.
        bytes_moved: read and written by all operators, as if no cache were there and nothing were fused.
        operators: that the host starts where no graph does.
    """

    device_s: float
    host_s: float
    flops: float
    bytes_moved: float
    operators: float

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def times(self, factor: float) -> "Cost":
        """The cost of `factor` such steps."""
        return Cost(*(factor * x for x in astuple(self)))


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


class Operators(Counter):
    """Counts operator by operator, and the most bytes of results that are alive at a time.

    Attributes:
        work: FLOPs and bytes of each operator.
        peak_bytes: of all results since this was entered, the most alive at a time since the last `restart`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.work: list[tuple[int, int]] = []
        self.peak_bytes = 0
        self._alive: dict[int, int] = {}
        self._alive_bytes = 0

    def restart(self) -> None:
        """Count from zero; what is alive stays so."""
        self.work, self.flops, self.bytes_moved, self.peak_bytes = [], 0, 0, self._alive_bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        flops, bytes_moved = self.flops, self.bytes_moved
        out = super().__torch_dispatch__(func, types, args, kwargs)
        # No view; and no question about a tensor, which fakes are asked and kernels are not.
        if func.namespace in ("aten", "furrygan") and self.bytes_moved > bytes_moved:
            self.work.append((self.flops - flops, self.bytes_moved - bytes_moved))
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self._keep(x.untyped_storage())
        return out

    def _keep(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._alive:
            self._alive[key] = storage.nbytes()
            self._alive_bytes += storage.nbytes()
            self.peak_bytes = max(self.peak_bytes, self._alive_bytes)
            weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self._alive_bytes -= self._alive.pop(key)


def _bytes_moved(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    """Bytes of the tensors that an operator reads and writes."""
    if func.is_view or "empty" in func.overloadpacket.__name__:
        return 0
    tensors = tree_leaves((args, kwargs, out))
    if func.overloadpacket is torch.ops.aten.convolution_backward:
        grad, x, weight, *_, (of_input, of_weight, _) = args
        tensors = [grad, *tree_leaves(out)] + [weight] * of_input + [x] * of_weight
    elif not func._schema.returns:  # Adam, and others on lists of tensors: what they write is what they were given
        parameters = zip(func._schema.arguments, args, strict=False)
        tensors += tree_leaves([x for given, x in parameters if given.alias_info and given.alias_info.is_write])
    return sum(x.nbytes for x in tensors if isinstance(x, Tensor))


def seconds_of(work: Callable[[], Any], device: torch.device) -> float:
    """How long `work` takes, until the device has done it."""
    finish(device)
    start = time.perf_counter()
    work()
    finish(device)
    return time.perf_counter() - start


def matmul_flop_per_s(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large square matrix product: the most that this machine does at this moment."""
    best = 0.0
    for n in MATMUL_SIZES[device.type]:
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        best = max(best, *(2 * n**3 / seconds_of(lambda: a @ b, device) for _ in range(3)))  # noqa: B023
    return best


def copy_bytes_per_s(device: torch.device) -> float:
    """Bytes a second, read and written, of a large copy: the most that this machine's memory does at this moment."""
    source = torch.randn(COPIED_BYTES[device.type] // 4, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / min(seconds_of(lambda: target.copy_(source), device) for _ in range(5))


def peak_flop_per_s(device: torch.device) -> float | None:
    """Most FLOP/s that the maker states for a device, in bfloat16; None for a CPU and for a GPU that is not listed."""
    if device.type != "cuda":
        return None
    return peak_of_gpu(torch.cuda.get_device_name(device))


def peak_of_gpu(name: str) -> float | None:
    """`peak_flop_per_s` of a GPU, by its name."""
    return next((peak * 1e12 for part, peak in PEAK_TFLOP_PER_S.items() if part in name), None)


def finish(device: torch.device) -> None:
    """Wait until the device has done all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
