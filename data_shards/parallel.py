"""A map over processes: in order, with no more results waiting than a bound, and nothing left behind when it is killed.

`ProcessPoolExecutor.map` alone starts on all items at once, so a consumer that is slower than the workers would end
with all results in memory; and its workers outlive a parent that was killed, waiting for ever.
"""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from itertools import islice
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

_CHUNK = 8  # items that a worker takes at a time
_CHUNKS_AHEAD = 3  # for each worker: one in work, one next, one waiting to be fetched

_function: Callable[[Any], Any]  # of a worker: sent once, so that the files it opens stay open


@contextmanager
def ordered_map(
    function: Callable[[Item], Result], items: Iterable[Item], *, num_workers: int
) -> Iterator[Iterator[Result]]:
    """The results for all items in their order, whatever the number of workers.

    Called with several workers from a script, the script's own code must stand under ``if __name__ == "__main__"``,
    as its workers are spawned.

    Args:
        function: to call; it is pickled once for each worker.
        items: its arguments, read as they are needed.
        num_workers: processes; 1: all is done in this one.

    Raises:
        concurrent.futures.process.BrokenProcessPool: from the iterator, when a worker was killed.
    """
    if num_workers <= 1:
        yield map(function, items)
        return
    # Spawned, not forked: the caller may have torch's, DALI's or CUDA's threads, whose locks a fork would copy.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(num_workers, mp_context=context, initializer=_start, initargs=(function,))
    try:
        yield _results(pool, iter(items), num_workers * _CHUNKS_AHEAD)
    finally:
        pool.shutdown(cancel_futures=True)


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _results(pool: ProcessPoolExecutor, items: Iterator[Item], num_ahead: int) -> Iterator[Any]:
    pending: deque[Future[list[Any]]] = deque()
    while chunk := list(islice(items, _CHUNK)):
        pending.append(pool.submit(_run, chunk))
        if len(pending) >= num_ahead:
            yield from pending.popleft().result()
    while pending:
        yield from pending.popleft().result()


def _start(function: Callable[[Any], Any]) -> None:
    global _function
    _function = function
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent ends the workers
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    """End this worker when its parent is no more, even by SIGKILL: the pool's own pipe would stay open."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _run(chunk: Sequence[Any]) -> list[Any]:
    return [_function(item) for item in chunk]
