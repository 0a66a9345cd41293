"""Writer of WebDataset shards with DALI indices and a manifest. The same samples give the same bytes."""

import hashlib
import io
import json
import tarfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_shards.errors import UserError
from data_shards.files import check_new, fsync, whole_directory
from data_shards.format.index import write_index
from data_shards.format.manifest import MANIFEST_VERSION, Manifest, ShardRecord
from data_shards.format.sample import Sample

ALPHA_EXTENSION = "alpha.png"
MIN_JPEG_QUALITY = 95

EncodedSample = Mapping[str, bytes]
"""The files of one sample: extension -> content."""

EncodingName = Literal["png", "jpeg", "webp"]


@dataclass(frozen=True)
class Encoding:
    """How images are encoded.

    Attributes:
        extension: of the files, without a dot.
        options: of Pillow's ``Image.save``.
    """

    extension: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, pixels: NDArray[np.uint8]) -> bytes:
        """Encode ``[H, W, 3]`` or ``[H, W]`` uint8."""
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, **self.options)
        return buffer.getvalue()


# Level 1: the default takes three times as long for a file that is 5% smaller.
PNG = Encoding("png", {"format": "png", "compress_level": 1})
# Lossless. More effort takes 30 times as long for a file that is 10% smaller.
WEBP = Encoding("webp", {"format": "webp", "lossless": True, "quality": 0, "method": 0})


def encoding_named(name: EncodingName, jpeg_quality: int = MIN_JPEG_QUALITY) -> Encoding:
    """The encoding of images by its name: PNG and WebP are lossless, JPEG keeps colours at full resolution.

    Raises:
        UserError: the quality is outside 95 to 100: a generator would learn the blocks of less.
    """
    if not MIN_JPEG_QUALITY <= jpeg_quality <= 100:
        raise UserError(f"--jpeg-quality {jpeg_quality} is outside {MIN_JPEG_QUALITY} to 100; give one of these")
    if name == "jpeg":
        return Encoding("jpg", {"format": "jpeg", "quality": jpeg_quality, "subsampling": "4:4:4"})
    return PNG if name == "png" else WEBP


def encode_sample(sample: Sample, *, resolution: int, image_encoding: Encoding = PNG) -> EncodedSample:
    """Encode one sample: the image (RGB), ``json``, and ``alpha.png`` (8-bit grey) where it has an alpha.

    Raises:
        UserError: image or alpha is not 8-bit of side `resolution`, pixels.
    """
    square = (resolution, resolution)
    _check("image", sample.image, (*square, 3))
    files = {
        image_encoding.extension: image_encoding(sample.image),
        "json": json.dumps(dict(sample.metadata), sort_keys=True).encode(),
    }
    if sample.alpha is not None:
        _check("alpha", sample.alpha, square)
        files[ALPHA_EXTENSION] = PNG(sample.alpha)
    return files


class ShardWriter:
    """One tar in the making, as a context: it gets its name when it is whole and on the disk, or never.

    Attributes:
        num_samples: images in it so far.
        num_bytes: size of these in the tar.
    """

    def __init__(self, path: Path) -> None:
        """Begin the tar `path`."""
        self.num_samples = 0
        self.num_bytes = 0
        self._path = path
        self._unfinished = path.with_suffix(".unfinished")
        self._file = self._unfinished.open("wb")
        self._tar = tarfile.open(fileobj=self._file, mode="w")  # noqa: SIM115  closed in finish

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._file.close()
        self._unfinished.unlink(missing_ok=True)

    def add(self, number: int, files: EncodedSample) -> None:
        """Add the sample that is `number` of the whole set."""
        for extension, content in sorted(files.items()):
            member = tarfile.TarInfo(f"{number:08d}.{extension}")
            member.size = len(content)
            member.mode = 0o644
            self._tar.addfile(member, io.BytesIO(content))
        self.num_samples += 1
        self.num_bytes += size_in_tar(files)

    def finish(self) -> ShardRecord:
        """End the tar, write its index beside it, and give it its name."""
        self._tar.close()
        self._file.close()
        fsync(self._unfinished)
        fsync(write_index(self._unfinished))
        with self._unfinished.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        self._unfinished.replace(self._path)
        fsync(self._path.parent)
        return ShardRecord(self._path.name, self.num_samples, self._path.stat().st_size, sha256)


def size_in_tar(files: EncodedSample) -> int:
    """Bytes that a sample takes in a tar: of each file a header, and its content in blocks of 512."""
    return sum(512 + -(-len(content) // 512) * 512 for content in files.values())


def shard_name(number: int) -> str:
    """File name of a shard."""
    return f"{number:06d}.tar"


def write_shards(
    samples: Iterable[Sample], out: Path, *, resolution: int, source: Mapping[str, Any], samples_per_shard: int = 1024
) -> Manifest:
    """Write samples as the shard set `out`: whole, or not at all.

    Args:
        samples: images of one size, all with an alpha or all without.
        out: directory to make; its parents are made too.
        resolution: side of every image, pixels.
        source: JSON-serialisable facts on how the set is made, for the manifest.
        samples_per_shard: images per tar; the last one may hold fewer.

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
    check_new(out)
    numbered = enumerate(samples)
    shards: list[ShardRecord] = []
    has_alpha = False
    with whole_directory(out) as partial:
        while first := next(numbered, None):
            if not shards:
                has_alpha = ALPHA_EXTENSION in first[1]
            with ShardWriter(partial / shard_name(len(shards))) as shard:
                for number, files in chain([first], islice(numbered, samples_per_shard - 1)):
                    if (ALPHA_EXTENSION in files) != has_alpha:
                        has, other = ("no alpha", "has one") if has_alpha else ("an alpha", "has none")
                        raise UserError(f"image {number} has {has} where image 0 {other}; give all one, or none")
                    shard.add(number, files)
                shards.append(shard.finish())
        if not shards:
            raise UserError(f"no images for {out}: the source yields none; choose another source")
        num_samples = sum(shard.num_samples for shard in shards)
        manifest = Manifest(
            version=MANIFEST_VERSION,
            num_samples=num_samples,
            resolution=resolution,
            image_extension=PNG.extension,
            has_alpha=has_alpha,
            source=dict(source),
            shards=tuple(shards),
            num_alphas=num_samples if has_alpha else 0,
        )
        manifest.write(partial)
    return manifest


def _check(what: str, array: NDArray[np.uint8], shape: tuple[int, ...]) -> None:
    if array.shape != shape or array.dtype != np.uint8:
        raise UserError(
            f"an image's {what} is {array.dtype} {list(array.shape)} in a set of uint8 {list(shape)};"
            " resize it or leave it out"
        )
