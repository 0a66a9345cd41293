"""One command at a time in a directory."""

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path

from data_shards.errors import UserError


@contextlib.contextmanager
def locked(directory: Path, what: str) -> Iterator[None]:
    """Make a directory, and keep a second command out of it.

    Args:
        directory: to be.
        what: it is the directory of, for people.

    Raises:
        UserError: another process is at work in it, or it cannot be made.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = (directory / f"{what}.lock").open("w")
    except OSError as error:
        raise UserError(f"{directory} cannot be made ({error.strerror}): choose another --out") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{directory} is in use by another {what}: wait for it, or choose another --out") from None
        yield
