"""A directory of shards, opened and checked at once; gives the encoded bytes of any sample."""

import hashlib
import io
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_shards.errors import UserError
from data_shards.index import SampleIndex, check_end, index_path, read_index, scan_index
from data_shards.manifest import MANIFEST_NAME, Manifest

IMAGE_EXTENSIONS = ("png", "jpg", "jpeg", "webp")
ALPHA_EXTENSION = "alpha.png"

_MAX_OPEN_FILES = 512  # half of the usual limit of a process
_ABSENT = -1


class ShardSet:
    """An opened shard set. Samples are numbered through all shards, in the order of the shards' names.

    Attributes:
        path: the directory.
        num_samples: pictures in all shards.
        resolution: side of the pictures, pixels.
        has_alpha: whether every sample has an alpha.
        image_extension: of the pictures, without a dot.
        digest: hexadecimal; equal for sets of equal content, wherever they lie.
    """

    def __init__(
        self,
        path: Path,
        shards: Sequence[Path],
        samples: Sequence[Sequence[SampleIndex]],
        *,
        manifest: Manifest | None,
    ) -> None:
        """Use `ShardSet.open`."""
        self.path = path
        self._shards = tuple(shards)
        self._descriptors: dict[int, int] = {}
        self._first = np.cumsum([0, *map(len, samples)])
        self._entries = _columns([sample for shard in samples for sample in shard])
        self.num_samples = int(self._first[-1])
        self.image_extension = self._find_image_extension(manifest)
        self.has_alpha = self._first_without(ALPHA_EXTENSION) is None
        self.resolution = manifest.resolution if manifest else self._measure()
        self.digest = manifest.digest if manifest else self._digest()

    @classmethod
    def open(cls, path: Path, *, resolution: int | None = None) -> "ShardSet":
        """Open a directory of shards and check all that a training run can check before it starts.

        ``manifest.json`` and ``.idx`` files are used where they are. Without them, any directory of WebDataset tars
        will do: its tars are walked, and its resolution is that of its first picture.

        Args:
            path: directory that holds ``*.tar``.
            resolution: the side that the pictures must have, pixels; None: any.

        Raises:
            UserError: the directory or a tar is missing, empty, truncated or inconsistent, holds no pictures, or holds
                pictures of another resolution.
        """
        if not path.is_dir():
            is_file = path.is_file()
            problem = "is a file, not a directory" if is_file else "does not exist"
            raise UserError(f"{path} {problem}; give the directory that holds the shards")
        tars = sorted(path.glob("*.tar"))
        if not tars:
            raise UserError(f"{path} holds no *.tar; give the directory that holds the shards")
        manifest = Manifest.read(path) if (path / MANIFEST_NAME).exists() else None
        if manifest:
            _check_files(path, tars, manifest)
        samples = [_samples(tar) for tar in tars]
        if manifest:
            _check_counts(tars, samples, manifest)
        shard_set = cls(path, tars, samples, manifest=manifest)
        if resolution is not None and shard_set.resolution != resolution:
            raise UserError(
                f"{path} holds pictures of {shard_set.resolution} px, not {resolution} px;"
                " choose another set, or build one of that resolution"
            )
        return shard_set

    def read(self, sample: int, extension: str) -> bytes:
        """The content of one file of a sample.

        Args:
            sample: its number, 0 to ``num_samples - 1``.
            extension: all after the first dot of the file's name.

        Raises:
            UserError: the sample has no such file, or the tar has shrunk since it was opened.
        """
        shard = int(np.searchsorted(self._first, sample, side="right")) - 1
        offset, size = self._entries[extension][sample] if extension in self._entries else (_ABSENT, 0)
        if offset == _ABSENT:
            raise UserError(f"{self.location(sample)} has no .{extension}; it has {self._extensions(sample)}")
        content = self._pread(shard, int(offset), int(size))
        if len(content) != size:
            raise UserError(f"{self._shards[shard]} has been truncated while in use; rebuild the set")
        return content

    def image_bytes(self, sample: int) -> bytes:
        """The encoded picture of a sample."""
        return self.read(sample, self.image_extension)

    def alpha_bytes(self, sample: int) -> bytes:
        """The encoded alpha of a sample, an 8-bit grey PNG."""
        return self.read(sample, ALPHA_EXTENSION)

    def location(self, sample: int) -> str:
        """Where a sample lies, for messages: ``"shards/x/000003.tar: sample 17"``."""
        shard = int(np.searchsorted(self._first, sample, side="right")) - 1
        return f"{self._shards[shard]}: sample {sample - int(self._first[shard])}"

    def close(self) -> None:
        """Close the tars; a later read opens them again."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def _pread(self, shard: int, offset: int, size: int) -> bytes:
        descriptor = self._descriptors.get(shard)
        if descriptor is None:
            descriptor = os.open(self._shards[shard], os.O_RDONLY | os.O_CLOEXEC)
            if len(self._descriptors) >= _MAX_OPEN_FILES:
                try:
                    return os.pread(descriptor, size, offset)
                finally:
                    os.close(descriptor)
            self._descriptors[shard] = descriptor
        return os.pread(descriptor, size, offset)

    def _find_image_extension(self, manifest: Manifest | None) -> str:
        wanted = (manifest.image_extension,) if manifest else IMAGE_EXTENSIONS
        extension = next((extension for extension in wanted if extension in self._entries), None)
        if extension is None:
            raise UserError(
                f"{self.path} holds no picture .{', .'.join(wanted)}, only {self._extensions(0)};"
                " name the pictures so, or choose another set"
            )
        missing = self._first_without(extension)
        if missing is not None:
            raise UserError(
                f"{self.location(missing)} has no .{extension}, only {self._extensions(missing)}; rebuild the set"
            )
        return extension

    def _first_without(self, extension: str) -> int | None:
        """The first sample without such a file; None where all have one."""
        if extension not in self._entries:
            return 0
        absent = self._entries[extension][:, 0] == _ABSENT
        return int(absent.argmax()) if absent.any() else None

    def _extensions(self, sample: int) -> str:
        return ", ".join(f".{ext}" for ext, entries in self._entries.items() if entries[sample, 0] != _ABSENT)

    def _measure(self) -> int:
        from PIL import Image, UnidentifiedImageError

        try:
            with Image.open(io.BytesIO(self.image_bytes(0))) as image:
                width, height = image.size
        except UnidentifiedImageError:
            raise UserError(f"{self.location(0)}: .{self.image_extension} is no picture; rebuild the set") from None
        if width != height:
            raise UserError(f"{self.location(0)} is {width}x{height} px, not square; build a set of square pictures")
        return width

    def _digest(self) -> str:
        digest = hashlib.sha256()
        for extension, entries in sorted(self._entries.items()):
            digest.update(extension.encode() + entries.tobytes())
        return digest.hexdigest()


def _columns(samples: Sequence[SampleIndex]) -> dict[str, NDArray[np.int64]]:
    """Per extension ``[num_samples, 2]`` of offset and size, bytes: an array holds a million samples in 16 MB."""
    columns: dict[str, NDArray[np.int64]] = {}
    for number, sample in enumerate(samples):
        for extension, entry in sample.items():
            if extension not in columns:
                columns[extension] = np.full((len(samples), 2), _ABSENT, dtype=np.int64)
            columns[extension][number] = entry
    return columns


def _samples(tar: Path) -> list[SampleIndex]:
    check_end(tar)
    if not index_path(tar).exists():
        return scan_index(tar)
    samples = read_index(tar)
    if not samples:
        raise UserError(f"{tar} is empty: it holds no sample; rebuild the set or delete it")
    return samples


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


def _check_counts(tars: Sequence[Path], samples: Sequence[Sequence[SampleIndex]], manifest: Manifest) -> None:
    records = {shard.name: shard for shard in manifest.shards}
    for tar, found in zip(tars, samples, strict=True):
        expected = records[tar.name].num_samples
        if len(found) != expected:
            raise UserError(
                f"{index_path(tar)} lists {len(found)} samples where the manifest says {expected}; rebuild the set"
            )
