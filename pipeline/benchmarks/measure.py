"""Timing and counting of the steps of a variant. Needs torch alone."""

import gc
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from data_shards.errors import shortage_of_memory
from pipeline.benchmarks.variants import Step, Variant
from pipeline.training.costs import Cost, Operators, copy_bytes_per_s, finish, matmul_flop_per_s, peak_flop_per_s

WARM_UP = {"cpu": 1, "cuda": 3}
"""Calls of a step before it is timed: on a GPU one as it is, one that is recorded as a graph, and a replay."""

LAUNCH = re.compile(r"cu(da)?(Launch|GraphLaunch|Memcpy|Memset)")
"""Names of the calls by which a host starts work on a GPU."""


@dataclass(frozen=True)
class Limits:
    """The most that a device does.

    Attributes:
        matmul_flop_per_s: of a large matrix product, measured.
        copy_bytes_per_s: read and written by a large copy, measured.
        stated_flop_per_s: by the maker; None where it is not known.
    """

    matmul_flop_per_s: float
    copy_bytes_per_s: float
    stated_flop_per_s: float | None

    @property
    def flop_per_s(self) -> float:
        """What the model FLOP/s utilisation (MFU) is a share of."""
        return self.stated_flop_per_s or self.matmul_flop_per_s


def limits(device: torch.device, dtype: torch.dtype) -> Limits:
    """Measure a device. What its maker states is of bfloat16."""
    stated = peak_flop_per_s(device) if dtype == torch.bfloat16 else None
    return Limits(matmul_flop_per_s(device, dtype), copy_bytes_per_s(device), stated)


class Runner:
    """A variant on a device, warmed up.

    Attributes:
        variant: what it is.
        implementation: what runs.
        steps: by phase, one of each kind.
        first_iteration_s: until the device had done the first iteration, from nothing.
        warm_up_s: until all steps were warmed up.
        peak_bytes: by phase, the most memory at a time in the first steps: on a GPU what torch's allocator gave, else
            that of tensors.
        reserved_bytes: the most memory of a GPU that torch's allocator held so far, else 0.
        failures: why a phase cannot run, by its name: there is not enough memory.

    Args:
        variant: to make.
        device: where.
    """

    def __init__(self, variant: Variant, device: torch.device) -> None:
        free(device)
        self.variant, self._device = variant, device
        self.peak_bytes: dict[str, int] = {}
        self.reserved_bytes = 0
        self.failures: dict[str, str] = {}
        self._counted: dict[str, list[tuple[int, int, int]]] = {}
        self._operators = Operators()
        begin = time.perf_counter()
        with self._operators:
            self.implementation = variant.make(device)
        self.steps = self.implementation.steps()
        for phase, steps in self.steps.items():
            self.attempt(phase, lambda: self._first(phase, steps[0]))  # noqa: B023
        self.first_iteration_s = time.perf_counter() - begin
        for phase, steps in self.steps.items():
            for step in steps[1:]:
                self.attempt(phase, lambda: self._first(phase, step))  # noqa: B023
            for step in steps * (WARM_UP[device.type] - 1):
                self.attempt(phase, step)
        finish(device)
        self.warm_up_s = time.perf_counter() - begin
        self._note_memory()

    def attempt(self, phase: str, work: Callable[[], Any]) -> Any:
        """Do what is of a phase, unless it has failed; None where it fails now, for want of memory."""
        if phase in self.failures:
            return None
        try:
            return work()
        except Exception as error:
            if (shortage := shortage_of_memory(error)) is None:
                raise
            self.failures[phase] = f"out of memory ({shortage})"
        free(self._device)  # now that nothing keeps the frames of the error
        return None

    def counted(self, phase: str) -> tuple[float, float, float]:
        """FLOPs, bytes and operators of a phase, the mean over its kinds."""
        flops, bytes_moved, operators = (statistics.mean(x) for x in zip(*self._counted[phase], strict=True))
        return flops, bytes_moved, operators

    def _first(self, phase: str, step: Step) -> None:
        """Count during a first call, which is slow anyway."""
        self._operators.restart()
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        with self._operators:
            step()
        finish(self._device)
        counted = self._operators
        self._counted.setdefault(phase, []).append((counted.flops, counted.bytes_moved, len(counted.work)))
        peak = counted.peak_bytes if self._device.type == "cpu" else torch.cuda.max_memory_allocated(self._device)
        self.peak_bytes[phase] = max(peak, self.peak_bytes.get(phase, 0))
        self._note_memory()

    def _note_memory(self) -> None:
        if self._device.type == "cuda":
            self.reserved_bytes = max(self.reserved_bytes, torch.cuda.max_memory_reserved(self._device))


def costs(runners: Sequence[Runner], phase: str, device: torch.device, repetitions: int) -> list[Cost]:
    """What a step of a phase takes each of some variants, which take turns; the mean over its kinds."""
    kinds = [runner.steps[phase] for runner in runners]
    steps = [step for each in kinds for step in each]
    host, on_device = _host_seconds(steps, device, repetitions), None
    if device.type == "cuda":
        on_device = _device_seconds(steps, device, repetitions)
    taken = list(zip(on_device or host, host, strict=True))
    made = []
    for runner, each in zip(runners, kinds, strict=True):
        own, taken = taken[: len(each)], taken[len(each) :]
        device_s, host_s = (statistics.mean(x) for x in zip(*own, strict=True))
        made.append(Cost(device_s, host_s, *runner.counted(phase)))
    return made


def _host_seconds(steps: Sequence[Step], device: torch.device, repetitions: int) -> list[float]:
    """Until the call of each step returns, on a device that has nothing else to do."""
    seconds: list[list[float]] = [[] for _ in steps]
    for _ in range(repetitions):
        for step, own in zip(steps, seconds, strict=True):
            finish(device)
            start = time.perf_counter()
            step()
            own.append(time.perf_counter() - start)
    finish(device)
    return [statistics.median(own) for own in seconds]


def _device_seconds(steps: Sequence[Step], device: torch.device, repetitions: int) -> list[float]:
    """On a GPU, one step after the other without a pause. Where the host is slower than the GPU, its time counts."""
    marks: list[list[tuple[torch.cuda.Event, torch.cuda.Event]]] = [[] for _ in steps]
    for _ in range(repetitions):
        for step, own in zip(steps, marks, strict=True):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            step()
            end.record()
            own.append((begin, end))
    finish(device)
    return [statistics.median(begin.elapsed_time(end) / 1e3 for begin, end in own) for own in marks]


@dataclass(frozen=True)
class Kernel:
    """What a device did under one name in a step: a kernel or a copy on a GPU, an operator on a CPU."""

    name: str
    calls: float
    seconds: float


@dataclass(frozen=True)
class Profile:
    """What a device did in a step.

    Attributes:
        kernels: by name, those that took longest first.
        launches: calls by which the host started it; 0 on a CPU.
    """

    kernels: list[Kernel]
    launches: float

    @property
    def calls(self) -> float:
        """How many kernels ran."""
        return sum(kernel.calls for kernel in self.kernels)

    @property
    def seconds(self) -> float:
        """How long kernels ran."""
        return sum(kernel.seconds for kernel in self.kernels)


def profiled(steps: Sequence[Step], device: torch.device) -> Profile:
    """Profile each step of a phase once; the mean over its kinds."""
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as profiler:
        for step in steps:
            step()
        finish(device)
    found: dict[str, tuple[int, float]] = {}
    launches = 0
    for event in profiler.events() or ():
        launches += event.device_type == DeviceType.CPU and LAUNCH.match(event.name) is not None
        of_device = event.device_type == (DeviceType.CUDA if cuda else DeviceType.CPU)
        if not of_device or event.is_user_annotation:
            continue
        microseconds = event.time_range.elapsed_us() if cuda else event.self_cpu_time_total
        calls, seconds = found.get(event.name, (0, 0.0))
        found[event.name] = calls + 1, seconds + microseconds / 1e6
    num = len(steps)
    kernels = [Kernel(name, calls / num, seconds / num) for name, (calls, seconds) in found.items()]
    return Profile(sorted(kernels, key=lambda kernel: -kernel.seconds), launches / num)


def free(device: torch.device) -> None:
    """Give a GPU back what no tensor holds any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
