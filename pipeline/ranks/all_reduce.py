"""Engine for many ranks that a CUDA graph can record: one all-reduce for all gradients."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.optim import Optimizer

from pipeline.ranks.collectives import num_ranks
from pipeline.ranks.engine import Engine


class AllReduceEngine(Engine):
    """Gradients are averaged by one all-reduce after the backward pass.

    DDP does it during the backward pass, from hooks on the host that a CUDA graph does not replay. On eight H100
    the all-reduce takes 2 % of a step of 16 images each (docs/scaling.md).

    Args:
        network: whose parameters move.
        optimizer: of all of them.
    """

    def __init__(self, network: nn.Module, optimizer: Optimizer) -> None:
        super().__init__(network, optimizer)
        self._last = True

    def backward(self, loss: Tensor) -> None:
        super().backward(loss)
        if self._last:
            self._average()

    @contextlib.contextmanager
    def accumulating(self) -> Iterator[None]:
        self._last = False
        yield
        self._last = True

    def _average(self) -> None:
        # Rows of channels, whatever the memory format: all ranks must send the same order.
        rows = [_channels_last(p.grad) for p in self._network.parameters() if p.grad is not None]
        flat = torch.cat([x.flatten() for x in rows])
        dist.all_reduce(flat)
        flat /= num_ranks()
        parts = [part.view(x.shape) for part, x in zip(flat.split([x.numel() for x in rows]), rows, strict=True)]
        torch._foreach_copy_(rows, parts)


def _channels_last(x: Tensor) -> Tensor:
    """A view with the channels as its last dimension."""
    return x.permute(0, 2, 3, 1) if x.ndim == 4 else x
