"""A set of shards in a directory or behind a URL, verified when it is opened, with random access to encoded samples."""

import contextlib
import hashlib
import io
import os
import re
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import numpy as np
from numpy.typing import NDArray

from data_shards.errors import UserError
from data_shards.format.index import BLOCK_BYTES, SampleIndex, check_end, index_path, is_header, read_index, scan_index
from data_shards.format.manifest import MANIFEST_NAME, Manifest, ShardRecord
from data_shards.reading.order import ShardWindows
from data_shards.remote.cache import ShardCache
from data_shards.remote.directory import DamagedError, RemoteDirectory, check_digest
from data_shards.remote.shards import RemoteShards, read_manifest

IMAGE_EXTENSIONS = ("png", "jpg", "jpeg", "webp")
ALPHA_EXTENSION = "alpha.png"

_MAX_OPEN_FILES = 512  # half of the usual limit of a process
_VERIFY_THREADS = 4
_ABSENT = -1

_Columns = dict[str, NDArray[np.int64]]
"""Of one shard: extension -> ``[num_samples, 2]`` of offset and size, bytes; a million samples take 16 MB."""


class ShardSet:
    """An opened shard set. Samples are numbered through all shards, in the order of the shards' names.

    Attributes:
        root: the directory or URL.
        num_samples: images in all shards.
        resolution: side of the images, pixels.
        has_alpha: whether every sample has an alpha.
        image_extension: of the images, without a dot.
        digest: hexadecimal; equal for sets of equal content, wherever they lie.
        windows: how it is to be shuffled where it is larger than the cache it is fetched into; else None.
    """

    def __init__(
        self,
        root: str,
        names: Sequence[str],
        indices: Sequence[Sequence[SampleIndex]] | None,
        *,
        manifest: Manifest | None,
        remote: RemoteShards | None = None,
    ) -> None:
        """Use `ShardSet.open`."""
        self.root = root
        self._names = tuple(names)
        self._manifest = manifest
        self._remote = remote
        self._descriptors: dict[int, int] = {}
        self._expected: tuple[int, ...] = ()
        self._columns: dict[int, _Columns] = {}
        if manifest:
            sizes = [shard.num_samples for shard in manifest.shards]
            self.image_extension, self.has_alpha = manifest.image_extension, manifest.has_alpha
        else:
            assert indices is not None
            sizes = [len(index) for index in indices]
            samples = [sample for index in indices for sample in index]
            self.image_extension = self._guess_image_extension(samples)
            self.has_alpha = all(ALPHA_EXTENSION in sample for sample in samples)
        self._first = np.cumsum([0, *sizes])
        self.num_samples = int(self._first[-1])
        for shard, index in enumerate(indices or ()):
            self._keep(shard, index)
        self.resolution = manifest.resolution if manifest else self._measure()
        self.digest = manifest.digest if manifest else self._digest()
        self.windows = None
        if remote is not None and remote.per_window < len(sizes):
            self.windows = ShardWindows(tuple(sizes), remote.per_window)

    @classmethod
    def open(
        cls, location: str | Path, *, resolution: int | None = None, cache: ShardCache | None = None
    ) -> "ShardSet":
        """Open a set of shards and check all that a training run can check before it starts.

        In a directory, ``manifest.json`` and ``.idx`` files are used where they are. Without them, any directory of
        WebDataset tars will do: its tars are walked, and its resolution is that of its first image. On a URL there
        must be a manifest, which the tars are checked against as they are fetched.

        Args:
            location: directory that holds ``*.tar``, or its URL.
            resolution: the side that the images must have, pixels; None: any.
            cache: where the tars of a URL go; needed for those alone.

        Raises:
            UserError: the directory or a tar is missing, empty, truncated or inconsistent, holds no images, or holds
                images of another resolution; the URL cannot be read.
        """
        directory = local_directory(location)
        if directory is not None:
            shard_set = cls._open_directory(directory)
        else:
            assert cache is not None, f"{location} needs a cache"
            shard_set = cls._open_url(str(location).rstrip("/"), cache)
        if resolution is not None and shard_set.resolution != resolution:
            shard_set.close()
            raise UserError(
                f"{location} holds images of {shard_set.resolution} px, not {resolution} px;"
                " choose another set, or build one of that resolution"
            )
        if shard_set.windows is None:
            shard_set.expect(tuple(range(len(shard_set._names))))
        return shard_set

    @classmethod
    def _open_directory(cls, path: Path) -> "ShardSet":
        if not path.is_dir():
            is_file = path.is_file()
            problem = "is a file, not a directory" if is_file else "does not exist"
            raise UserError(f"{path} {problem}; give the directory that holds the shards")
        tars = sorted(path.glob("*.tar"))
        if not tars:
            raise UserError(f"{path} holds no *.tar; give the directory that holds the shards")
        manifest = Manifest.read(path) if (path / MANIFEST_NAME).exists() else None
        if manifest:
            _check_manifest(manifest, str(path))
            _check_files(path, tars, manifest)
        return cls(str(path), [tar.name for tar in tars], [_index(tar) for tar in tars], manifest=manifest)

    @classmethod
    def _open_url(cls, url: str, cache: ShardCache) -> "ShardSet":
        directory = RemoteDirectory(url)
        manifest = read_manifest(directory)
        _check_manifest(manifest, url)
        remote = RemoteShards(directory, manifest, cache)
        return cls(url, [shard.name for shard in manifest.shards], None, manifest=manifest, remote=remote)

    def verify(self, *, part: int = 0, parts: int = 1) -> None:
        """Check the tars' SHA-256 against the manifest: what is damaged inside a tar need not show otherwise.

        A set without a manifest has none to check, and a fetched tar has been checked.

        Args:
            part: which of `parts` shares of the tars to check, for processes that share the work.
            parts: shares.

        Raises:
            UserError: a tar is not what was built.
        """
        if self._manifest is None or self._remote is not None:
            return
        with ThreadPoolExecutor(_VERIFY_THREADS) as pool:
            for _ in pool.map(self._verify, self._manifest.shards[part::parts]):
                pass

    def _verify(self, shard: ShardRecord) -> None:
        path = Path(self.root, shard.name)
        try:
            check_digest(path, num_bytes=shard.num_bytes, sha256=shard.sha256)
        except DamagedError as error:
            raise UserError(f"{path} is damaged: it {error}; rebuild the set or delete it") from None
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror}); rebuild the set or delete it") from None

    def expect(self, shards: tuple[int, ...]) -> None:
        """Have those shards fetched that are needed next, in this order, and close others; nothing in a directory."""
        if self._remote is None or shards == self._expected:
            return
        self._expected = shards
        for shard in self._descriptors.keys() - set(shards):
            os.close(self._descriptors.pop(shard))
        self._remote.expect(shards)

    def read(self, sample: int, extension: str) -> bytes:
        """The content of one file of a sample.

        Args:
            sample: its number, 0 to ``num_samples - 1``.
            extension: all after the first dot of the file's name.

        Raises:
            UserError: the sample has no such file, or the tar has changed since it was opened.
        """
        return self._content(sample, *self._range(sample, extension))

    def read_many(self, samples: Sequence[int], extension: str) -> list[bytes]:
        """Read one file of each sample, as `read` does. The system is told first, and fetches them all at once."""
        ranges = [self._range(sample, extension) for sample in samples]
        if sys.platform == "linux":
            for shard, offset, size in ranges:
                if shard in self._descriptors:
                    with contextlib.suppress(OSError):  # not every file system takes hints
                        os.posix_fadvise(self._descriptors[shard], offset, size, os.POSIX_FADV_WILLNEED)
        return [self._content(sample, *place) for sample, place in zip(samples, ranges, strict=True)]

    def image_bytes(self, sample: int) -> bytes:
        """The encoded image of a sample."""
        return self.read(sample, self.image_extension)

    def alpha_bytes(self, sample: int) -> bytes:
        """The encoded alpha of a sample, an 8-bit grey PNG."""
        return self.read(sample, ALPHA_EXTENSION)

    def location(self, sample: int) -> str:
        """Where a sample lies, for messages: ``"shards/x/000003.tar: sample 17"``."""
        shard, number = self._place(sample)
        return f"{self._location_of(shard)}: sample {number}"

    def close(self) -> None:
        """Close the tars, and end what is being fetched; a later read opens those of a directory again."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])
        if self._remote is not None:
            self._remote.close()

    def _place(self, sample: int) -> tuple[int, int]:
        """Shard of a sample, and its number in there."""
        shard = int(np.searchsorted(self._first, sample, side="right")) - 1
        return shard, sample - int(self._first[shard])

    def _range(self, sample: int, extension: str) -> tuple[int, int, int]:
        """Shard of a file, and offset and size of its header and content in there."""
        shard, number = self._place(sample)
        columns = self._columns_of(shard)
        offset, size = columns[extension][number] if extension in columns else (_ABSENT, 0)
        if offset == _ABSENT:
            raise UserError(f"{self.location(sample)} has no .{extension}; it has {_extensions(columns, number)}")
        return shard, int(offset) - BLOCK_BYTES, BLOCK_BYTES + int(size)

    def _content(self, sample: int, shard: int, offset: int, size: int) -> bytes:
        """A file's content without its header, which is checked."""
        content = self._pread(shard, offset, size)
        if len(content) != size:
            raise UserError(f"{self._location_of(shard)} has been truncated while in use; rebuild the set")
        if not is_header(content[:BLOCK_BYTES], size - BLOCK_BYTES):
            raise UserError(f"{self.location(sample)} is not where its index says; rebuild the set")
        return content[BLOCK_BYTES:]

    def _location_of(self, shard: int) -> str:
        return f"{self.root}/{self._names[shard]}"

    def _pread(self, shard: int, offset: int, size: int) -> bytes:
        descriptor = self._descriptors.get(shard)
        try:
            if descriptor is None:
                descriptor = self._open_shard(shard)
                if len(self._descriptors) >= _MAX_OPEN_FILES:
                    try:
                        return os.pread(descriptor, size, offset)
                    finally:
                        os.close(descriptor)
                self._descriptors[shard] = descriptor
            return os.pread(descriptor, size, offset)
        except OSError as error:
            raise UserError(
                f"{self._location_of(shard)} cannot be read ({error.strerror}); see that it stays in place while in use"
            ) from None

    def _open_shard(self, shard: int) -> int:
        if self._remote is not None:
            return self._remote.open(shard)
        return os.open(self._location_of(shard), os.O_RDONLY | os.O_CLOEXEC)

    def _columns_of(self, shard: int) -> _Columns:
        if shard not in self._columns:
            assert self._remote is not None
            self._keep(shard, self._remote.index(shard))
        return self._columns[shard]

    def _keep(self, shard: int, index: Sequence[SampleIndex]) -> None:
        """Check a shard's index against what the set is said to hold."""
        expected = int(self._first[shard + 1] - self._first[shard])
        if len(index) != expected:
            raise UserError(
                f"the index of {self._location_of(shard)} lists {len(index)} samples where the manifest says"
                f" {expected}; rebuild the set"
            )
        columns = _columns(index)
        for extension in (self.image_extension, *([ALPHA_EXTENSION] if self.has_alpha else [])):
            absent = columns[extension][:, 0] == _ABSENT if extension in columns else np.ones(expected, np.bool_)
            if absent.any():
                number = int(absent.argmax())
                raise UserError(
                    f"{self._location_of(shard)}: sample {number} has no .{extension},"
                    f" only {_extensions(columns, number)}; rebuild the set"
                )
        self._columns[shard] = columns

    def _guess_image_extension(self, samples: Sequence[SampleIndex]) -> str:
        found = {extension for sample in samples for extension in sample}
        for extension in IMAGE_EXTENSIONS:
            if extension in found:
                return extension
        raise UserError(
            f"{self.root} holds no image .{', .'.join(IMAGE_EXTENSIONS)}, only .{', .'.join(samples[0])};"
            " name the images so, or choose another set"
        )

    def _measure(self) -> int:
        from PIL import Image, UnidentifiedImageError

        try:
            with Image.open(io.BytesIO(self.image_bytes(0))) as image:
                width, height = image.size
        except UnidentifiedImageError:
            raise UserError(f"{self.location(0)}: .{self.image_extension} is no image; rebuild the set") from None
        if width != height:
            raise UserError(f"{self.location(0)} is {width}x{height} px, not square; build a set of square images")
        return width

    def _digest(self) -> str:
        digest = hashlib.sha256()
        for shard in range(len(self._names)):
            for extension, entries in sorted(self._columns[shard].items()):
                digest.update(extension.encode() + entries.tobytes())
        return digest.hexdigest()


def local_directory(location: str | Path) -> Path | None:
    """The directory that a location names; None for a URL of another file system."""
    protocol, path = fsspec.core.split_protocol(str(location))
    if protocol is None:
        return Path(location)
    return Path(path) if protocol in ("file", "local") else None


def _columns(samples: Sequence[SampleIndex]) -> _Columns:
    columns: _Columns = {}
    for number, sample in enumerate(samples):
        for extension, entry in sample.items():
            if extension not in columns:
                columns[extension] = np.full((len(samples), 2), _ABSENT, dtype=np.int64)
            columns[extension][number] = entry
    return columns


def _extensions(columns: _Columns, number: int) -> str:
    return ", ".join(f".{extension}" for extension, entries in columns.items() if entries[number, 0] != _ABSENT)


def _index(tar: Path) -> list[SampleIndex]:
    if not index_path(tar).exists():
        with tar.open("rb") as file:
            return scan_index(file, str(tar))
    check_end(tar)
    samples = read_index(tar)
    if not samples:
        raise UserError(f"{tar} is empty: it holds no sample; rebuild the set or delete it")
    return samples


def _check_manifest(manifest: Manifest, root: str) -> None:
    """What a manifest says must be possible, and its names must lead nowhere else."""
    shards = manifest.shards
    problem = None
    if not shards or sum(shard.num_samples for shard in shards) != manifest.num_samples:
        problem = "its shards do not add up to its number of samples"
    elif any(shard.num_samples < 1 or not re.fullmatch("[0-9a-f]{64}", shard.sha256) for shard in shards):
        problem = "a shard of it has no samples or no sha256"
    elif any(re.fullmatch(r"[^/\\]+\.tar", shard.name) is None for shard in shards):
        problem = "a shard of it is not named *.tar"
    elif [shard.name for shard in shards] != sorted({shard.name for shard in shards}):
        problem = "its shards are not in the order of their names"
    if problem is not None:
        raise UserError(f"{root}/{MANIFEST_NAME} is damaged: {problem}; rebuild the set")


def _check_files(path: Path, tars: Sequence[Path], manifest: Manifest) -> None:
    records = {shard.name: shard for shard in manifest.shards}
    for name in sorted(records.keys() - {tar.name for tar in tars}):
        raise UserError(f"{path / name} is missing, its manifest names it; rebuild the set or delete it")
    for tar in tars:
        if tar.name not in records:
            raise UserError(f"{tar} is not in its manifest; delete it, or rebuild the set")
        num_bytes, expected = tar.stat().st_size, records[tar.name].num_bytes
        if num_bytes != expected:
            problem = "is truncated" if num_bytes < expected else "is not what was built"
            raise UserError(
                f"{tar} {problem}: {num_bytes} bytes where its manifest says {expected}; rebuild the set or delete it"
            )
