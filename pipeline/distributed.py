"""Sums over the ranks that `accelerate` has no word for."""

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist


class _AllReduceSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        # Every rank's loss depends on every rank's input.
        total = gradients[0].clone()
        dist.all_reduce(total)
        return total


def global_mean(x: Tensor) -> Tensor:
    """Mean of all elements over all ranks, a scalar that carries gradients to each of them; ranks hold equally many."""
    mean = x.mean()
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return mean
    total: Tensor = _AllReduceSum.apply(mean)
    return total / dist.get_world_size()


def global_batch_mean(x: Tensor) -> Tensor:
    """Mean over the first dimension and all ranks, ``[b, D] -> [D]``, without gradients."""
    mean = x.detach().mean(dim=0)
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(mean)
        mean /= dist.get_world_size()
    return mean
