"""How long the phases of training take on their device, and how much they compute. Needs torch alone."""

import contextlib
import time
from collections import deque
from collections.abc import Iterator

import torch

from pipeline.costs import Counter


class PhaseClock:
    """Times phases without waiting for the device.

    On a GPU, events mark where a phase begins and ends; they are read once the GPU has passed them.

    Args:
        device: of the phases.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: deque[tuple[str, torch.cuda.Event, torch.cuda.Event]] = deque()
        self._seconds: dict[str, list[float]] = {}
        self._flops: dict[str, int] = {}

    @contextlib.contextmanager
    def timing(self, phase: str) -> Iterator[None]:
        """Time what is inside; the first time of a phase is not kept, but what it computes is counted."""
        if phase not in self._flops:
            with Counter() as counter:
                yield
            self._flops[phase] = counter.flops
            return
        if not self._cuda:
            start = time.perf_counter()
            yield
            self._seconds.setdefault(phase, []).append(time.perf_counter() - start)
            return
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        yield
        end.record()
        self._marks.append((phase, begin, end))

    def read(self) -> dict[str, tuple[int, float, int]]:
        """Steps, seconds and FLOPs by phase since the last reading; steps that a GPU has not ended yet come later."""
        while self._marks and self._marks[0][2].query():
            phase, begin, end = self._marks.popleft()
            self._seconds.setdefault(phase, []).append(begin.elapsed_time(end) / 1e3)
        read = {p: (len(s), sum(s), len(s) * self._flops[p]) for p, s in self._seconds.items()}
        self._seconds = {}
        return read
