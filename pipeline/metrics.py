"""Means of what a step measures, kept on the device until they are read."""

import torch
from accelerate import Accelerator
from torch import Tensor


class MetricMeter:
    """Running means of scalars by name, without a host-device transfer until `read`."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, name: str, value: Tensor) -> None:
        """Count a scalar tensor."""
        value = value.detach().float()
        self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._counts[name] = self._counts.get(name, 0) + 1

    def read(self, accelerator: Accelerator) -> dict[str, float]:
        """Means over time and ranks since the last reading; every rank calls it at the same iteration."""
        if not self._sums:
            return {}
        means = torch.stack([total / self._counts[name] for name, total in self._sums.items()])
        values: list[float] = accelerator.reduce(means, reduction="mean").tolist()
        names = list(self._sums)
        self._sums, self._counts = {}, {}
        return dict(zip(names, values, strict=True))
