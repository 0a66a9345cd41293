"""A directory of fetched tars, bounded in size, which the ranks of a machine and the runs of a user share.

A tar is named by its SHA-256 and gets that name once it has been checked, so that what is there is whole and right,
whichever set it came from. Each is fetched by one process while the others wait for it.
"""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from data_shards.errors import UserError
from data_shards.format.manifest import ShardRecord

_WAIT_FOR_ROOM_SECONDS = 0.1


class ShardCache:
    """See the module.

    Args:
        directory: made where it is not there yet.
        max_bytes: of all tars in it, those that are being fetched included. The least recently used go first; one that
            a process has open can still be read there.
    """

    def __init__(self, directory: Path, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._directory = directory

    def open(self, shard: ShardRecord, fetch: Callable[[Path], None], closed: threading.Event) -> int:
        """A descriptor to read a tar with, the caller's to close.

        Args:
            shard: which, of at most `max_bytes`.
            fetch: brings it to the path it is given, checked, where it is not there yet.
            closed: ends the waiting for others.

        Raises:
            UserError: the directory cannot be made.
            InterruptedError: closed.
            Exception: what `fetch` raises.
        """
        self._make_directory()
        path = self._directory / f"{shard.sha256}.tar"
        while True:
            try:
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                with _held(self._lock(path), closed):
                    if not path.exists():
                        self._fetch(shard, path, fetch, closed)
            else:
                os.utime(descriptor)  # the order of use
                return descriptor

    def _make_directory(self) -> None:
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{self._directory} cannot be made ({error.strerror}); choose another cache") from None

    def _fetch(self, shard: ShardRecord, path: Path, fetch: Callable[[Path], None], closed: threading.Event) -> None:
        partial = path.with_name(f"{shard.sha256}-{shard.num_bytes}.partial")  # its size when it will be whole
        while not self._reserve(shard.num_bytes, partial):
            # Others are fetching: what they have fetched may be removed.
            if closed.wait(_WAIT_FOR_ROOM_SECONDS):
                raise InterruptedError
        try:
            fetch(partial)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    def _reserve(self, num_bytes: int, partial: Path) -> bool:
        """Remove tars until there is room, and take it; False where there is none."""
        with FileLock(self._directory / "room.lock"):
            reserved = sum(_reserved_bytes(other) for other in self._partials_of_others(partial))
            room = self.max_bytes - num_bytes - reserved
            states = [(tar.stat(), tar) for tar in self._directory.glob("*.tar")]
            room -= sum(state.st_size for state, _ in states)
            for state, tar in sorted(states, key=lambda pair: pair[0].st_mtime_ns):
                if room >= 0:
                    break
                tar.unlink()
                room += state.st_size
            if room >= 0:
                partial.touch()
            return room >= 0

    def _partials_of_others(self, own: Path) -> list[Path]:
        """Those being fetched; what a killed process left is removed."""
        partials = []
        for partial in self._directory.glob("*.partial"):
            if partial == own:
                continue
            try:
                with FileLock(self._lock(partial), timeout=0):
                    partial.unlink(missing_ok=True)
            except Timeout:
                partials.append(partial)
        return partials

    def _lock(self, path: Path) -> Path:
        """The lock of whoever fetches a tar."""
        return self._directory / f"{path.stem.partition('-')[0]}.lock"


@contextmanager
def _held(lock: Path, closed: threading.Event) -> Iterator[None]:
    file_lock = FileLock(lock)
    try:
        file_lock.acquire(cancel_check=closed.is_set)
    except Timeout:
        raise InterruptedError from None
    try:
        yield
    finally:
        file_lock.release()


def _reserved_bytes(partial: Path) -> int:
    return int(partial.stem.rpartition("-")[2])
