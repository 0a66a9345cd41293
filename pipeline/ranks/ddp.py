"""Engine over torch's DistributedDataParallel, through Accelerate."""

from contextlib import AbstractContextManager
from typing import Any

from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from pipeline.ranks.engine import Engine


class DdpEngine(Engine):
    """Gradients are averaged during the backward pass; on one rank nothing is.

    Args:
        network: whose parameters move.
        optimizer: of all of them.
        accelerator: of the run.
    """

    recordable = False

    def __init__(self, network: nn.Module, optimizer: Optimizer, accelerator: Accelerator) -> None:
        module, prepared = accelerator.prepare(network, optimizer)
        super().__init__(network, prepared)
        self.module = module
        self._accelerator = accelerator

    def backward(self, loss: Tensor) -> None:
        self._accelerator.backward(loss)

    def accumulating(self) -> AbstractContextManager[Any]:
        context: AbstractContextManager[Any] = self._accelerator.no_sync(self.module)
        return context
