"""Collectives that Accelerate does not provide."""

import itertools
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

T = TypeVar("T")


def num_ranks() -> int:
    """Processes of the run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if num_ranks() > 1 else 0


def share(work: Sequence[T]) -> Sequence[T]:
    """What this rank takes of a list of pieces of work that is the same on all ranks."""
    return work[rank() :: num_ranks()]


class Agreement:
    """Lets all ranks learn at the same step what one of them has to say.

    The hosts talk over gloo: no GPU is waited for. Nor is a rank: what is said at one step is read at the next.

    Args:
        timeout_s: seconds to wait for a rank that does not answer.
    """

    def __init__(self, timeout_s: float) -> None:
        self._group: Any = None
        if num_ranks() > 1:
            self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
        self._said: tuple[Tensor, Any] | None = None

    def greatest(self, value: int) -> int:
        """The greatest value over the ranks in the former call, 0 in the first; on one rank `value` itself."""
        if self._group is None:
            return value
        former = self.last()
        said = torch.tensor(value)
        self._said = (said, dist.all_reduce(said, dist.ReduceOp.MAX, self._group, async_op=True))
        return former

    def last(self) -> int:
        """The greatest value of the last call, 0 if there was none."""
        if self._said is None:
            return 0
        said, work = self._said
        self._said = None
        work.wait()
        return int(said)

    def gather(self, x: Tensor) -> list[Tensor]:
        """`x` of every rank, on the CPU. This one waits for the ranks, and for their GPUs."""
        x = x.cpu()
        if self._group is None:
            return [x]
        gathered = [torch.empty_like(x) for _ in range(num_ranks())]
        dist.all_gather(gathered, x, self._group)
        return gathered


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
    if num_ranks() == 1:
        return mean
    total: Tensor = _AllReduceSum.apply(mean)
    return total / num_ranks()


def global_batch_mean(x: Tensor) -> Tensor:
    """Mean over the first dimension and all ranks, ``[b, D] -> [D]``, without gradients."""
    mean = x.detach().mean(dim=0)
    if num_ranks() > 1:
        dist.all_reduce(mean)
        mean /= num_ranks()
    return mean


def global_sum(x: Tensor) -> Tensor:
    """Sum over all ranks of each element, without gradients; integers add up exactly, in whatever order."""
    total = x.detach().clone()
    if num_ranks() > 1:
        dist.all_reduce(total)
    return total


_CALLS = itertools.count()


def on_first_rank(work: Callable[[], T]) -> T:
    """Do `work` on rank 0 and give its result to all ranks; every rank must call.

    The others wait for as long as it takes: a collective, which would time out, begins only when it has ended.

    Args:
        work: its result can be pickled and lives on no GPU.
    """
    call = next(_CALLS)
    if num_ranks() == 1:
        return work()
    store, done = dist.distributed_c10d._get_default_store(), f"on-first-rank/{call}"
    result: list[Any] = [None]
    if rank() == 0:
        try:
            result = [work()]
        finally:  # where it fails, the others are to meet a lost rank soon
            store.set(done, "")
    else:
        while not store.check([done]):
            time.sleep(0.1)
    dist.broadcast_object_list(result, src=0)
    outcome: T = result[0]
    return outcome
