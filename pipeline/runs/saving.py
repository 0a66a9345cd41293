"""Atomic writing of a run's files, with one-line errors."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from data_shards.errors import UserError
from data_shards.files import fsync


class SaveError(UserError):
    """A file cannot be written: the disk is full, read-only or gone."""

    def __init__(self, path: Path, error: OSError) -> None:
        super().__init__(f"{path} cannot be written: {error.strerror or error}")


@contextlib.contextmanager
def saving(path: Path) -> Iterator[Path]:
    """Another name to write to, which becomes `path` at the end.

    Raises:
        SaveError: it could not be written; `path` is as it was, and nothing is left beside it.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # runs that share a cache may write at the same time
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        temporary.replace(path)
        fsync(path.parent)
    except (OSError, SaveError) as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise SaveError(path, error) if isinstance(error, OSError) else error from None


def refuse_file_in_the_way(directory: Path, option: str) -> None:
    """Find out before anything is made that a directory cannot be.

    Args:
        directory: to be, with the directories above it.
        option: of the command line, that named it.

    Raises:
        UserError: one of them is a file.
    """
    for path in (directory, *directory.parents):
        if path.exists() and not path.is_dir():
            raise UserError(f"{option} {directory}: {path} is a file, give a directory")
