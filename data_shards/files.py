"""Atomic writing of files and directories."""

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from data_shards.errors import UserError


def fsync(path: Path) -> None:
    """Wait until a file's content, or a directory's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, text: str) -> None:
    """Write a file under another name and give it its own when it is whole."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.write_text(text, encoding="utf-8")
    fsync(unfinished)
    unfinished.replace(path)
    fsync(path.parent)


def check_new(out: Path) -> None:
    """Whether a name is free.

    Raises:
        UserError: it is not.
    """
    if out.exists():
        raise UserError(f"{out} exists already; delete it or choose another name")


@contextmanager
def whole_directory(out: Path) -> Iterator[Path]:
    """A sibling of `out` to fill, renamed to `out` at the end, so that no half-written set ever bears its name.

    Raises:
        UserError: `out` was made by another process meanwhile, or cannot be made.
    """
    partial = out.parent / f".{out.name}.{uuid.uuid4().hex[:8]}.partial"
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{out} cannot be made ({error.strerror}); choose another name") from None
    try:
        yield partial
        fsync(partial)
        try:
            partial.rename(out)
        except OSError:
            raise UserError(f"{out} was made by another process meanwhile; use that, or delete it") from None
        fsync(out.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def whole_file(out: Path) -> Iterator[Path]:
    """A sibling of `out` to write, with the same suffix, renamed to `out` at the end.

    Raises:
        UserError: it cannot be written.
    """
    partial = out.with_name(f".{out.stem}.{uuid.uuid4().hex[:8]}{out.suffix}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        fsync(partial)
        partial.replace(out)
        fsync(out.parent)
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror or error}); choose another name") from None
    finally:
        with suppress(OSError):  # where a directory of its path is a file, say
            partial.unlink(missing_ok=True)
