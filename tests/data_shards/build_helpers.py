"""What the tests of the builder share: small sources, what was built from them, and a plain resampler.

Without torch, which processes that are spawned from here would otherwise import.
"""

import fcntl
import io
import json
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_shards.building.builder import BuildOptions, build
from data_shards.reading.shard_set import ShardSet
from data_shards.sources.folder import Folder
from data_shards.sources.images import Picture
from data_shards.sources.source import Source

RESOLUTION = 16
Pixels = NDArray[np.uint8]


class Built(NamedTuple):
    image: Pixels
    alpha: Pixels | None
    metadata: dict[str, Any]


def noise(seed: int, height: int, width: int, channels: int = 3) -> Pixels:
    """Smooth in places and rough in others, so that a wrong filter or a shift of a pixel shows."""
    rng = np.random.default_rng(seed)
    rough = rng.integers(256, size=(height, width, channels))
    ramp = np.linspace(0, 255, width)[None, :, None] + np.linspace(-80, 80, height)[:, None, None]
    pixels = np.where(rng.random((height, width, 1)) < 0.2, rough, ramp).clip(0, 255).astype(np.uint8)
    return pixels[..., 0] if channels == 1 else pixels


def save(path: Path, pixels: Pixels, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path


def build_and_read(source: Source, out: Path, **options: Any) -> dict[str, Built]:
    """All samples of a new set by the names of their images."""
    build(source, out, BuildOptions(**options))
    return read(out)


def read(out: Path) -> dict[str, Built]:
    shard_set = ShardSet.open(out)
    samples = {}
    for number in range(shard_set.num_samples):
        metadata = json.loads(shard_set.read(number, "json"))
        image = Image.open(io.BytesIO(shard_set.image_bytes(number)))
        alpha = Image.open(io.BytesIO(shard_set.alpha_bytes(number))) if shard_set.has_alpha else None
        assert image.mode == "RGB" and (alpha is None or alpha.mode == "L")
        samples[metadata["reference"]] = Built(
            np.asarray(image), None if alpha is None else np.asarray(alpha), metadata
        )
    shard_set.close()
    return samples


def lanczos(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.where(np.abs(x) < 3, np.sinc(x) * np.sinc(x / 3), 0)


def cubic(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Keys's, a = -1/2."""
    x = np.abs(x)
    return np.where(x < 1, 1.5 * x**3 - 2.5 * x**2 + 1, np.where(x < 2, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2, 0))


def triangle(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.maximum(0, 1 - np.abs(x))


Kernel = Callable[[NDArray[np.float64]], NDArray[np.float64]]


def resampled(pixels: Pixels, resolution: int, kernel: Kernel) -> NDArray[np.float64]:
    """A square resized by a kernel that is stretched when it gets smaller: as matrices, in float64."""
    side = len(pixels)
    scale = side / resolution
    centres = (np.arange(resolution) + 0.5) * scale - 0.5
    weights = kernel((np.arange(side) - centres[:, None]) / max(scale, 1))
    weights /= weights.sum(1, keepdims=True)
    values = pixels.astype(np.float64).reshape(side, side, -1)
    for axis in (1, 0):  # what lies outside of 0 to 255 is cut off after each
        values = np.moveaxis(np.tensordot(weights, values, (1, axis)), 0, axis).clip(0, 255)
    return values.reshape(resolution, resolution, *pixels.shape[2:])


def assert_resampled(actual: Pixels | None, square: Pixels, kernel: Kernel) -> None:
    """Within the rounding to 8 bits after each of the two passes, the first of which the second's weights enlarge."""
    assert actual is not None
    difference = np.abs(actual - resampled(square, len(actual), kernel))
    assert difference.max() <= 1.5, difference.max()


@dataclass(frozen=True, kw_only=True)
class Deadly(Folder):
    """A source with an image that ends the process, as one does that needs more memory than there is."""

    def read(self, reference: str) -> Picture:
        if reference == "0/003.png":
            os.kill(os.getpid(), signal.SIGKILL)
        return super().read(reference)


def hold(directory: Path, held: object, done: object) -> None:
    directory.mkdir()
    descriptor = os.open(directory, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    held.set()  # type: ignore[attr-defined]
    done.wait(60)  # type: ignore[attr-defined]
