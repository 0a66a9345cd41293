"""Locks that admit one command at a time to a directory."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from data_shards.errors import UserError


@contextlib.contextmanager
def locked(directory: Path, what: str) -> Iterator[None]:
    """Make a directory, and keep a second command out of it.

    Args:
        directory: to make.
        what: the kind of thing it holds, for the error line.

    Raises:
        UserError: another process writes into it, or it cannot be made.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = FileLock(directory / f"{what}.lock").acquire(timeout=0)
    except Timeout:
        raise UserError(f"{directory} is in use by another {what}: wait for it, or choose another --out") from None
    except OSError as error:
        raise UserError(f"{directory} cannot be made ({error.strerror}): choose another --out") from None
    with lock:
        yield
