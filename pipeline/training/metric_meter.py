"""Running means of what a step measures, kept on the device until they are read."""

import torch
from accelerate import Accelerator
from torch import Tensor


class MetricMeter:
    """Running means of scalars by name, without a host-device transfer until `read`."""

    def __init__(self) -> None:
        self._sums: dict[tuple[str, ...], Tensor] = {}
        self._counts: dict[tuple[str, ...], int] = {}

    def add(self, names: tuple[str, ...], values: Tensor) -> None:
        """Count the scalars in ``values [len(names)]``; the caller may write to it again."""
        self._sums[names] = self._sums[names] + values if names in self._sums else values.detach().clone()
        self._counts[names] = self._counts.get(names, 0) + 1

    def read(self, accelerator: Accelerator) -> dict[str, float]:
        """Means over time and ranks since the last reading; every rank calls it at the same iteration."""
        if not self._sums:
            return {}
        sums = accelerator.reduce(torch.cat(list(self._sums.values())), reduction="mean").tolist()
        totals: dict[str, float] = {}
        counts: dict[str, int] = {}
        for name, number, total in zip(*self._rows(), sums, strict=True):
            totals[name] = totals.get(name, 0.0) + total
            counts[name] = counts.get(name, 0) + number
        self._sums, self._counts = {}, {}
        return {name: total / counts[name] for name, total in totals.items()}

    def _rows(self) -> tuple[list[str], list[int]]:
        """Name and count of each sum."""
        names = [name for row in self._sums for name in row]
        return names, [self._counts[row] for row in self._sums for _ in row]
