"""Benchmark of the builder: images per second and memory, beside a plain Pillow loop in one process.

    python data_shards/bench_build.py --num-images 20000

The images are drawn textures, stored as JPEG: 200 different ones under as many names as asked for. Both sides
decode, crop, resize and encode alike; the plain loop does not even keep what it made. It is timed before and after the
build, as a machine's speed drifts.
"""

import io
import os
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from data_shards.command import parse_options, run_command

import numpy as np
import psutil
import tyro
from PIL import Image

from data_shards.building.builder import BuildOptions, build
from data_shards.building.writer import Encoding, encoding_named
from data_shards.errors import UserError
from data_shards.parallel import num_cores
from data_shards.sources.folder import Folder
from data_shards.sources.textures import draw_background

_NUM_DIFFERENT = 200
_SAMPLE_SECONDS = 0.1


@dataclass(frozen=True)
class Arguments:
    """What to measure."""

    num_images: int = 20_000
    """Images to build."""
    resolution: int = 256
    """Of the shards, pixels."""
    width: int = 512
    """Of the images to build from, pixels."""
    height: int = 384
    """Of the images to build from, pixels."""
    options: Annotated[BuildOptions, tyro.conf.arg(name="")] = field(default_factory=BuildOptions)
    """Of the build."""


def main() -> None:
    """Measure and print."""
    arguments: Arguments = parse_options(Arguments, __doc__)
    if min(arguments.num_images, arguments.resolution, arguments.width, arguments.height) < 1:
        raise UserError("--num-images, --resolution, --width and --height must be 1 or more")
    with tempfile.TemporaryDirectory() as directory:
        pictures = Path(directory) / "pictures"
        _draw(pictures, arguments)
        paths = sorted(pictures.iterdir())
        encoding = encoding_named(arguments.options.encoding, arguments.options.jpeg_quality)
        share = paths[: max(1, len(paths) // 20)]
        _plain(share[:20], arguments.resolution, encoding)  # the first calls load codecs
        before = _plain(share, arguments.resolution, encoding)
        with _peak_memory() as peak:
            start = time.perf_counter()
            source = Folder(source=pictures, resolution=arguments.resolution)
            build(source, Path(directory) / "shards", arguments.options, progress=True)
            built = len(paths) / (time.perf_counter() - start)
        after = _plain(share, arguments.resolution, encoding)
    plain = 2 / (1 / before + 1 / after)
    workers = arguments.options.workers or num_cores()
    print(f"{len(paths):,} images, {arguments.width}x{arguments.height} JPEG to {arguments.resolution} px", end=" ")
    print(f"{arguments.options.encoding}, {workers} workers on {num_cores()} cores")
    print(f"build       {built:8.1f} img/s, all of it: listing, workers' start, tars, checksums, fsync")
    print(f"plain loop  {plain:8.1f} img/s ({before:.1f} before, {after:.1f} after)")
    print(f"ratio       {built / plain:8.2f}")
    print(f"peak memory {max(peak) / 2**20:8.0f} MiB, resident, all processes (what they share is counted in each)")


def _draw(folder: Path, arguments: Arguments) -> None:
    folder.mkdir()
    side = max(arguments.width, arguments.height)
    for number in range(arguments.num_images):
        path = folder / f"{number:06d}.jpg"
        if number < _NUM_DIFFERENT:
            pixels, _ = draw_background(np.random.default_rng(number), side)
            picture = Image.fromarray(pixels).crop((0, 0, arguments.width, arguments.height))
            picture.save(path, quality=92)
        else:
            os.link(folder / f"{number % _NUM_DIFFERENT:06d}.jpg", path)


def _plain(paths: Sequence[Path], resolution: int, encoding: Encoding) -> float:
    """Images a second of a loop as one would write it."""
    start = time.perf_counter()
    for path in paths:
        image = Image.open(path).convert("RGB")
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side))
        image = image.resize((resolution, resolution), Image.Resampling.LANCZOS)
        image.save(io.BytesIO(), **encoding.options)
    return len(paths) / (time.perf_counter() - start)


@contextmanager
def _peak_memory() -> Iterator[list[int]]:
    """Bytes resident in this process and its children, several times a second."""
    peak = [0]
    done = threading.Event()
    this = psutil.Process()

    def sample() -> None:
        while not done.wait(_SAMPLE_SECONDS):
            total = 0
            for process in (this, *this.children(recursive=True)):
                try:
                    total += process.memory_info().rss
                except psutil.NoSuchProcess:
                    continue
            peak.append(total)

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


if __name__ == "__main__":
    run_command(main)
