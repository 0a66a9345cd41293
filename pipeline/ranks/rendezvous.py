"""Rendezvous of ranks that a launcher has restarted, over a store of keys of their own.

A launcher keeps one store over all restarts, and torch's process groups write to it under the same names each time: a
restarted rank finds the addresses of dead ones (pytorch/pytorch#135712). `TORCHELASTIC_RESTART_COUNT` does not tell
the starts apart, since each machine counts for itself.
"""

import time
import uuid
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import register_rendezvous_handler, rendezvous

from data_shards.errors import UserError

FRESH = "fresh://"
"""`init_method` of `torch.distributed.init_process_group`: as ``env://``, with none of the keys of a former start."""

POLL_S = 0.1


def agree_on_start(store: Store, rank: int, world_size: int, timeout_s: float) -> str:
    """A name for this start of the ranks; what a former start left in `store` misleads nobody.

    Rank 0 names it, every other one signs the name that it finds, and rank 0 publishes the signatures. A rank that does
    not find its own has read an old name, and looks again.

    Raises:
        UserError: a rank did not come in time.
    """
    mine = uuid.uuid4().hex
    deadline = time.monotonic() + timeout_s
    if rank == 0:
        store.set("start", mine)
        signatures = {f"{mine}/{other}": other for other in range(1, world_size)}
        while missing := [other for key, other in signatures.items() if not store.check([key])]:
            if time.monotonic() > deadline:
                names = ", ".join(map(str, missing))
                raise UserError(f"rank {names} of {world_size} did not come within {timeout_s:.0f} s: see its own log")
            time.sleep(POLL_S)
        store.set(f"{mine}/all", " ".join(store.get(key).decode() for key in signatures))
        return mine
    while time.monotonic() < deadline:
        start = store.get("start").decode()
        store.set(f"{start}/{rank}", mine)
        if store.check([f"{start}/all"]) and mine in store.get(f"{start}/all").decode().split():
            return start
        time.sleep(POLL_S)
    raise UserError(f"rank {rank}: rank 0 did not come within {timeout_s:.0f} s: see its own log")


def _meet(url: str, timeout: timedelta, **options: Any) -> Iterator[tuple[Store, int, int]]:
    by_environment = "env:" + url.partition(":")[2]
    store, rank, world_size = next(rendezvous(by_environment, timeout=timeout, **options))
    common = PrefixStore("starts", store)
    yield PrefixStore(agree_on_start(common, rank, world_size, timeout.total_seconds()), store), rank, world_size


register_rendezvous_handler(FRESH.removesuffix("://"), _meet)
