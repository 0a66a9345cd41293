"""Engine that trains one network: from a loss to a step of its optimizer. Needs torch alone."""

import contextlib
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


class Engine:
    """Trains a network on one rank.

    `ddp.py` and `zero.py` beside it let many ranks train it alike: gradients are means over all of them.

    Attributes:
        module: what a forward pass goes through whose gradients are wanted.
        recordable: whether a CUDA graph can record what it does.

    Args:
        network: whose parameters move.
        optimizer: of all of them.
    """

    recordable = True

    def __init__(self, network: nn.Module, optimizer: Optimizer) -> None:
        self.module = network
        self._network = network
        self._optimizer = optimizer

    def zero_grad(self) -> None:
        """Forget the gradients."""
        self._optimizer.zero_grad()

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a scalar."""
        loss.backward()

    def accumulating(self) -> AbstractContextManager[Any]:
        """For forward and backward passes that another one follows before the step."""
        return contextlib.nullcontext()

    def gradient_norm(self) -> Tensor:
        """Norm of the gradient, a scalar, the same on all ranks; between `backward` and `step`."""
        return torch.nn.utils.get_total_norm([p.grad for p in self._network.parameters() if p.grad is not None])

    def step(self) -> None:
        """Move the parameters."""
        self._optimizer.step()

    def optimizer_state(self) -> dict[str, Any]:
        """`Optimizer.state_dict` of the whole network, not a copy. All ranks call it; rank 0's is complete."""
        return self._optimizer.state_dict()

    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        """Go on where a state was taken, by any engine on any number of ranks; the weights were loaded before."""
        self._optimizer.load_state_dict(state)
