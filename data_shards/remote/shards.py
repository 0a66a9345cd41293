"""The tars of a shard set behind a URL, which threads fetch into the cache before they are needed."""

import logging
import os
import tempfile
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

from data_shards.errors import UserError
from data_shards.format.index import SampleIndex, scan_index
from data_shards.format.manifest import MANIFEST_NAME, Manifest
from data_shards.remote.cache import ShardCache
from data_shards.remote.directory import RemoteDirectory, check_digest

logger = logging.getLogger(__name__)

_THREADS = 4  # transfers at a time


class RemoteShards:
    """The tars that a manifest on a URL names.

    No index is fetched: the manifest vouches for a tar's bytes, not for its index's, and to walk a tar takes less time
    than to fetch it.

    Attributes:
        per_window: how many tars may be in use at a time, so that the cache has room for as many again that are
            fetched meanwhile; all of them where it holds the whole set.

    Args:
        directory: of the set.
        manifest: of the set, checked.
        cache: where the tars go.

    Raises:
        UserError: the cache has no room for two of the tars.
    """

    def __init__(self, directory: RemoteDirectory, manifest: Manifest, cache: ShardCache) -> None:
        self._directory = directory
        self._shards = manifest.shards
        self._cache = cache
        sizes = [shard.num_bytes for shard in self._shards]
        self.per_window = len(sizes) if sum(sizes) <= cache.max_bytes else cache.max_bytes // (2 * max(sizes))
        if self.per_window == 0:
            raise UserError(
                f"{directory.url} has tars of {max(sizes) / 1e9:.3g} GB, and the cache of"
                f" {cache.max_bytes / 1e9:.3g} GB has no room for two; give it more"
            )
        shuffle = "whole" if self.per_window == len(sizes) else f"by windows of {self.per_window}"
        logger.info("%s: %.3g GB in %d tars, shuffled %s", directory.url, sum(sizes) / 1e9, len(sizes), shuffle)
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="fetch")
        self._indices: dict[int, list[SampleIndex]] = {}
        self._fetched: dict[int, Future[None]] = {}

    def expect(self, shards: Sequence[int]) -> None:
        """Have those tars fetched that are needed next, in this order, and no others."""
        for shard in self._fetched.keys() - set(shards):
            self._fetched.pop(shard).cancel()
        for shard in shards:
            if shard not in self._fetched:
                self._fetched[shard] = self._pool.submit(self._fetch, shard)

    def index(self, shard: int) -> list[SampleIndex]:
        """The samples of a tar; waits until it has been fetched.

        Raises:
            UserError: it cannot be fetched.
        """
        self._wait(shard)
        return self._indices[shard]

    def open(self, shard: int) -> int:
        """A descriptor of a tar, the caller's to close; waits and raises as `index` does."""
        self._wait(shard)
        return self._open(shard)

    def close(self) -> None:
        """End what is being fetched."""
        self._directory.close()
        self._pool.shutdown(cancel_futures=True)

    def _wait(self, shard: int) -> None:
        fetched = self._fetched.get(shard) or self._pool.submit(self._fetch, shard)
        fetched.result()

    def _fetch(self, shard: int) -> None:
        with os.fdopen(self._open(shard), "rb") as file:
            if shard not in self._indices:
                self._indices[shard] = scan_index(file, f"{self._directory.url}/{self._shards[shard].name}")

    def _open(self, shard: int) -> int:
        record = self._shards[shard]
        check = partial(check_digest, num_bytes=record.num_bytes, sha256=record.sha256)
        fetch = partial(self._directory.fetch, record.name, check=check)
        return self._cache.open(record, fetch, self._directory.closed)


def read_manifest(directory: RemoteDirectory) -> Manifest:
    """The manifest on a URL.

    Raises:
        UserError: it cannot be fetched or read.
    """
    with tempfile.TemporaryDirectory() as copy:
        directory.fetch(MANIFEST_NAME, Path(copy, MANIFEST_NAME))
        try:
            return Manifest.read(Path(copy))
        except UserError as error:
            raise UserError(str(error).replace(copy, directory.url)) from None
