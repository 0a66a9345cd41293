"""A background thread for work that training does not wait for."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any


class Background:
    """A thread that does what it is given, in order. What fails there is raised by the next call here.

    Args:
        name: of the thread.
    """

    def __init__(self, name: str) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)
        self._unfinished: deque[Future[Any]] = deque()

    def submit(self, task: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """Have `task` done some time."""
        self.check()
        self._unfinished.append(self._pool.submit(task, *args, **kwargs))

    def check(self) -> None:
        """Raise what has failed, without waiting."""
        while self._unfinished and self._unfinished[0].done():
            self._unfinished.popleft().result()

    def wait(self) -> None:
        """Until everything is done."""
        while self._unfinished:
            self._unfinished.popleft().result()

    def close(self) -> None:
        """Finish, and end the thread."""
        try:
            self.wait()
        finally:
            self._pool.shutdown()
