"""Device time and FLOPs of each training phase. Needs torch alone."""

import contextlib
import time
from collections import deque
from collections.abc import Hashable, Iterator
from dataclasses import dataclass

import torch

from pipeline.training.costs import Counter
from pipeline.training.trace import named


@dataclass(frozen=True)
class Reading:
    """What happened on this rank since the last reading.

    Attributes:
        seconds: mean time of a step on the device, by phase; those that a GPU has not finished yet come later.
        flops: of convolutions and matrix products, in all steps. What `--recompute` computes twice counts twice.
    """

    seconds: dict[str, float]
    flops: int


class PhaseClock:
    """Times phases without waiting for the device, and counts their FLOPs.

    On a GPU, events mark where a phase begins and ends; they are read once the GPU has passed them.

    Args:
        device: of the phases.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        # The first step of a kind is counted, which takes longer; on a GPU the second one may be recorded as a graph.
        self._num_untimed = 2 if self._cuda else 1
        self._marks: deque[tuple[str, torch.cuda.Event, torch.cuda.Event]] = deque()
        self._calls: dict[Hashable, int] = {}
        self._flops_of: dict[Hashable, int] = {}
        self._timed: dict[str, tuple[int, float]] = {}
        self._flops = 0

    @contextlib.contextmanager
    def timing(self, phase: str, kind: Hashable = None) -> Iterator[None]:
        """Time a step, count its FLOPs, and name it in a trace.

        Args:
            phase: its name.
            kind: what else decides how much it computes: all steps of a kind of a phase count as its first one does.
        """
        with named(phase), self._timing(phase, (phase, kind)):
            yield

    @contextlib.contextmanager
    def _timing(self, phase: str, kind: Hashable) -> Iterator[None]:
        calls = self._calls.get(kind, 0)
        if calls == 0:
            with Counter() as counter:
                yield
            self._flops_of[kind] = counter.flops
        elif calls < self._num_untimed:
            yield
        elif self._cuda:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self._marks.append((phase, begin, end))
            self._read_marks()
        else:
            start = time.perf_counter()
            yield
            self._add(phase, time.perf_counter() - start)
        self._calls[kind] = calls + 1
        self._flops += self._flops_of[kind]

    def read(self) -> Reading:
        """Begin a new interval."""
        self._read_marks()
        reading = Reading({phase: seconds / steps for phase, (steps, seconds) in self._timed.items()}, self._flops)
        self._timed, self._flops = {}, 0
        return reading

    def _read_marks(self) -> None:
        while self._marks and self._marks[0][2].query():
            phase, begin, end = self._marks.popleft()
            self._add(phase, begin.elapsed_time(end) / 1e3)

    def _add(self, phase: str, seconds: float) -> None:
        steps, before = self._timed.get(phase, (0, 0.0))
        self._timed[phase] = steps + 1, before + seconds
