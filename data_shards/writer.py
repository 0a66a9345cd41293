"""Writes samples as WebDataset shards with DALI indices and a manifest: the same samples give the same bytes."""

import hashlib
import io
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_shards.errors import UserError
from data_shards.index import write_index
from data_shards.manifest import MANIFEST_VERSION, Manifest, ShardRecord
from data_shards.sample import Sample

IMAGE_EXTENSION = "png"
ALPHA_EXTENSION = "alpha.png"

EncodedSample = Mapping[str, bytes]
"""The files of one sample: extension -> content."""


def encode_sample(sample: Sample, *, resolution: int) -> EncodedSample:
    """Encode one sample: ``png`` (RGB), ``json``, and ``alpha.png`` (8-bit grey) where it has an alpha.

    Raises:
        UserError: image or alpha is not 8-bit of side `resolution`, pixels.
    """
    square = (resolution, resolution)
    _check("image", sample.image, (*square, 3))
    files = {
        IMAGE_EXTENSION: _png(sample.image),
        "json": json.dumps(dict(sample.metadata), sort_keys=True).encode(),
    }
    if sample.alpha is not None:
        _check("alpha", sample.alpha, square)
        files[ALPHA_EXTENSION] = _png(sample.alpha)
    return files


def write_shards(
    samples: Iterable[Sample], out: Path, *, resolution: int, source: Mapping[str, Any], samples_per_shard: int = 1024
) -> Manifest:
    """Write samples as the shard set `out`: whole, or not at all.

    Args:
        samples: pictures of one size, all with an alpha or all without.
        out: directory to make; its parents are made too.
        resolution: side of every picture, pixels.
        source: JSON-serialisable facts on how the set is made, for the manifest.
        samples_per_shard: pictures per tar; the last one may hold fewer.

    Raises:
        UserError: `out` exists, there are no samples, or they are inconsistent.
    """
    encoded = (encode_sample(sample, resolution=resolution) for sample in samples)
    return write_encoded_shards(encoded, out, resolution=resolution, source=source, samples_per_shard=samples_per_shard)


def write_encoded_shards(
    samples: Iterable[EncodedSample],
    out: Path,
    *,
    resolution: int,
    source: Mapping[str, Any],
    samples_per_shard: int = 1024,
) -> Manifest:
    """`write_shards` of what `encode_sample` made, for callers that encode in several processes."""
    if out.exists():
        raise UserError(f"{out} exists already; delete it or choose another name")
    numbered = enumerate(samples)
    shards: list[ShardRecord] = []
    has_alpha = False
    with _whole_directory(out) as partial:
        while first := next(numbered, None):
            if not shards:
                has_alpha = ALPHA_EXTENSION in first[1]
            path = partial / f"{len(shards):06d}.tar"
            rest = islice(numbered, samples_per_shard - 1)
            num_samples = _write_tar(path, chain([first], rest), has_alpha=has_alpha)
            shards.append(_record(path, num_samples))
        if not shards:
            raise UserError(f"no pictures for {out}: the source yields none; choose another source")
        manifest = Manifest(
            version=MANIFEST_VERSION,
            num_samples=sum(shard.num_samples for shard in shards),
            resolution=resolution,
            image_extension=IMAGE_EXTENSION,
            has_alpha=has_alpha,
            source=dict(source),
            shards=tuple(shards),
        )
        _fsync(manifest.write(partial))
    return manifest


def _write_tar(path: Path, samples: Iterable[tuple[int, EncodedSample]], *, has_alpha: bool) -> int:
    import webdataset  # here, as it imports torch, which workers that only encode do not need

    num_samples = 0
    # An integer mtime: tarfile gives a float one an extended header, 1 KiB per file.
    with (
        path.open("wb") as file,
        webdataset.TarWriter(file, user="", group="", mode=0o644, mtime=0, encoder=False) as tar,
    ):
        for number, files in samples:
            if (ALPHA_EXTENSION in files) != has_alpha:
                has, first = ("no alpha", "has one") if has_alpha else ("an alpha", "has none")
                raise UserError(f"picture {number} has {has} where picture 0 {first}; give all an alpha, or none")
            tar.write({"__key__": f"{number:08d}", **files})
            num_samples += 1
    _fsync(path)
    _fsync(write_index(path))
    return num_samples


def _record(path: Path, num_samples: int) -> ShardRecord:
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return ShardRecord(path.name, num_samples, path.stat().st_size, sha256)


@contextmanager
def _whole_directory(out: Path) -> Iterator[Path]:
    """A sibling of `out` to fill, renamed to `out` at the end, so that no half-written set ever bears its name."""
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.parent / f".{out.name}.{uuid.uuid4().hex[:8]}.partial"
    partial.mkdir()
    try:
        yield partial
        _fsync(partial)
        try:
            partial.rename(out)
        except OSError:
            raise UserError(f"{out} was made by another process meanwhile; use that, or delete it") from None
        _fsync(out.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _check(what: str, array: NDArray[np.uint8], shape: tuple[int, ...]) -> None:
    if array.shape != shape or array.dtype != np.uint8:
        raise UserError(
            f"a picture's {what} is {array.dtype} {list(array.shape)} in a set of uint8 {list(shape)};"
            " resize it or leave it out"
        )


def _png(array: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="png")
    return buffer.getvalue()
