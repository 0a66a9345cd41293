"""What a shard set is, in one ``manifest.json`` beside its shards."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_shards.errors import UserError

MANIFEST_NAME = "manifest.json"
MANIFEST_VERSION = 1


@dataclass(frozen=True)
class ShardRecord:
    """One tar of a shard set.

    Attributes:
        name: file name, without a directory.
        num_samples: pictures in it.
        num_bytes: size of the tar.
        sha256: of the whole tar, hexadecimal.
    """

    name: str
    num_samples: int
    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """A shard set's counts, resolution, checksums and origin.

    Attributes:
        version: of this format; `MANIFEST_VERSION` is the only one understood.
        num_samples: pictures in all shards.
        resolution: side of every picture, pixels.
        image_extension: of the pictures, without a dot: ``"png"``.
        has_alpha: whether every sample has an ``alpha.png``.
        source: JSON-serialisable facts on how the set was made.
        shards: the tars in reading order.
    """

    version: int
    num_samples: int
    resolution: int
    image_extension: str
    has_alpha: bool
    source: Mapping[str, Any]
    shards: tuple[ShardRecord, ...]

    @property
    def digest(self) -> str:
        """Hexadecimal SHA-256 over the shards' own: equal for sets of equal content, wherever they lie."""
        return hashlib.sha256("".join(shard.sha256 for shard in self.shards).encode()).hexdigest()

    def write(self, directory: Path) -> Path:
        """Write ``manifest.json`` into `directory` and return its path."""
        path = directory / MANIFEST_NAME
        path.write_text(json.dumps(asdict(self), indent=2, sort_keys=True) + "\n", encoding="utf-8")
        return path

    @classmethod
    def read(cls, directory: Path) -> "Manifest":
        """Read ``manifest.json`` of `directory`.

        Raises:
            UserError: the file cannot be read, is no JSON, is of another version, or lacks a field.
        """
        path = directory / MANIFEST_NAME
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
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
        )


def _shard_record(fields: Any, path: Path) -> ShardRecord:
    return ShardRecord(
        name=_field(fields, "name", str, path),
        num_samples=_field(fields, "num_samples", int, path),
        num_bytes=_field(fields, "num_bytes", int, path),
        sha256=_field(fields, "sha256", str, path),
    )


def _field(fields: Any, name: str, kind: type, path: Path) -> Any:
    if not isinstance(fields, dict) or not isinstance(fields.get(name), kind):
        raise UserError(f"{path} has no valid field '{name}'; rebuild the set or delete the file")
    return fields[name]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
