"""The manifest of a shard set, ``manifest.json``."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from data_shards.errors import UserError
from data_shards.files import write_atomically

MANIFEST_NAME = "manifest.json"
MANIFEST_VERSION = 1


@dataclass(frozen=True)
class ShardRecord:
    """One tar of a shard set.

    Attributes:
        name: file name, without a directory.
        num_samples: images in it.
        num_bytes: size of the tar.
        sha256: of the whole tar, hexadecimal.
    """

    name: str
    num_samples: int
    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class SkippedPicture:
    """One image of the source that is in no shard.

    Attributes:
        reference: its name in the source.
        reason: why, one line.
    """

    reference: str
    reason: str


@dataclass(frozen=True)
class Manifest:
    """A shard set's counts, resolution, checksums and origin.

    Attributes:
        version: of this format; `MANIFEST_VERSION` is the only one understood.
        num_samples: images in all shards.
        resolution: side of every image, pixels.
        image_extension: of the images, without a dot: ``"png"``, ``"jpg"`` or ``"webp"``.
        has_alpha: whether every sample has an ``alpha.png``.
        source: JSON-serialisable facts on where the images are from.
        shards: the tars in reading order.
        channels: of every image.
        preparation: JSON-serialisable facts on how the images were cropped, resized and encoded.
        num_alphas: samples that have an ``alpha.png``.
        num_upsampled: images that had to be enlarged.
        skipped: images of the source that are in no shard.
    """

    version: int
    num_samples: int
    resolution: int
    image_extension: str
    has_alpha: bool
    source: Mapping[str, Any]
    shards: tuple[ShardRecord, ...]
    channels: int = 3
    preparation: Mapping[str, Any] = field(default_factory=dict)
    num_alphas: int = 0
    num_upsampled: int = 0
    skipped: tuple[SkippedPicture, ...] = ()

    @property
    def digest(self) -> str:
        """Hexadecimal SHA-256 over the shards' own: equal for sets of equal content, wherever they lie."""
        return hashlib.sha256("".join(shard.sha256 for shard in self.shards).encode()).hexdigest()

    def write(self, directory: Path) -> Path:
        """Write ``manifest.json`` into `directory`, whole or not at all, and return its path."""
        path = directory / MANIFEST_NAME
        write_atomically(path, json.dumps(asdict(self), indent=2, sort_keys=True) + "\n")
        return path

    @classmethod
    def read(cls, directory: Path) -> "Manifest":
        """Read ``manifest.json`` of `directory`.

        Raises:
            UserError: the file cannot be read, is no JSON, is of another version, or lacks a field.
        """
        path = directory / MANIFEST_NAME
        try:
            content = path.read_bytes()
        except OSError as error:
            raise UserError(f"{path} cannot be read ({_one_line(error)}); rebuild the set or delete the file") from None
        return cls.parse(content, str(path))

    @classmethod
    def parse(cls, content: bytes, path: str) -> "Manifest":
        """Read a manifest's content.

        Args:
            content: of the file.
            path: its name, for messages.

        Raises:
            UserError: the content is no JSON, is of another version, or lacks a field.
        """
        try:
            fields = json.loads(content)
        except ValueError as error:
            raise UserError(f"{path} cannot be read ({_one_line(error)}); rebuild the set or delete the file") from None
        version = _field(fields, "version", int, path)
        if version != MANIFEST_VERSION:
            raise UserError(f"{path} is version {version}, not {MANIFEST_VERSION}; rebuild the set or delete the file")
        return cls(
            version=version,
            num_samples=_field(fields, "num_samples", int, path),
            resolution=_field(fields, "resolution", int, path),
            image_extension=_field(fields, "image_extension", str, path),
            has_alpha=_field(fields, "has_alpha", bool, path),
            source=_field(fields, "source", dict, path),
            shards=tuple(_shard_record(shard, path) for shard in _field(fields, "shards", list, path)),
            # A set written from arrays may have no more than these.
            **{name: _field(fields, name, kind, path) for name, kind in _OPTIONAL.items() if name in fields},
            skipped=tuple(_skipped_picture(picture, path) for picture in fields.get("skipped", ())),
        )


_OPTIONAL = {"channels": int, "preparation": dict, "num_alphas": int, "num_upsampled": int}


def _skipped_picture(fields: Any, path: str) -> SkippedPicture:
    return SkippedPicture(_field(fields, "reference", str, path), _field(fields, "reason", str, path))


def _shard_record(fields: Any, path: str) -> ShardRecord:
    return ShardRecord(
        name=_field(fields, "name", str, path),
        num_samples=_field(fields, "num_samples", int, path),
        num_bytes=_field(fields, "num_bytes", int, path),
        sha256=_field(fields, "sha256", str, path),
    )


def _field(fields: Any, name: str, kind: type, path: str) -> Any:
    if not isinstance(fields, dict) or not isinstance(fields.get(name), kind):
        raise UserError(f"{path} has no valid field '{name}'; rebuild the set or delete the file")
    return fields[name]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
