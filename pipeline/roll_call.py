"""When a rank fails, every rank ends soon, with one line that says which one failed and why, if that is known."""

import contextlib
import time
from collections.abc import Iterator

from torch import distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store

from data_shards.errors import UserError
from pipeline.distributed import num_ranks

WAIT_S = 10.0
"""For the other ranks to notice that one is gone, seconds."""


class LostRankError(UserError):
    """Other ranks failed, or do not answer."""


@contextlib.contextmanager
def ranks_named() -> Iterator[None]:
    """Let errors name their rank, and let the other ranks name it too.

    Raises:
        LostRankError: another rank is gone.
        UserError: what was raised inside, beginning with the rank.
    """
    if num_ranks() == 1:
        yield
        return
    rank = dist.get_rank()
    # Not through the group, which a lost rank breaks. The launcher keeps the store, or rank 0.
    store = PrefixStore("roll-call", dist.distributed_c10d._get_default_store())
    try:
        yield
    except Exception as error:
        if _is_of_another_rank(error):
            raise LostRankError(f"rank {rank}: {_what_happened(store, rank, error)}") from error
        reason = " ".join(str(error).split()) or type(error).__name__
        with contextlib.suppress(RuntimeError):
            store.set(f"failed/{rank}", reason)
        if isinstance(error, UserError):
            error.args = (f"rank {rank}: {error}",)
        raise


def _is_of_another_rank(error: Exception) -> bool:
    # gloo raises a bare RuntimeError with the place in its sources.
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def _what_happened(store: Store, rank: int, error: Exception) -> str:
    """Ask who is still there; names those that are not."""
    advice = "every rank ends, and the last checkpoint is whole: go on from there"
    others = [r for r in range(num_ranks()) if r != rank]
    try:
        store.set(f"here/{rank}", "")
        deadline = time.monotonic() + WAIT_S
        while True:
            failed = [r for r in others if store.check([f"failed/{r}"])]
            silent = [r for r in others if r not in failed and not store.check([f"here/{r}"])]
            if not silent or failed or time.monotonic() > deadline:
                break
            time.sleep(0.1)
        if failed:
            return "; ".join(f"rank {r} failed ({store.get(f'failed/{r}').decode()})" for r in failed)
    except RuntimeError:  # dist.DistError is one
        return f"lost the connection to where the ranks meet, the launcher of rank 0; {advice}"
    if silent:
        names = " and ".join(f"rank {r}" for r in silent)
        return f"{names} lost: killed, out of memory, or without a network; {advice}"
    return f"the ranks lost each other, though all are there ({' '.join(str(error).split())}); {advice}"
