"""Benchmark of the loaders.

python data_shards/bench.py                                 # furballs at 256 px, drawn first
python data_shards/bench.py --data shards/mine --batch 64   # your own images
python data_shards/bench.py --resolution 8                  # almost nothing to decode: what is serial remains

All read the same shards in the same order, in turn and over again, so that what else the machine does slows all alike.
"Pillow + DataLoader" is the straightforward way: a `torch.utils.data.Dataset` of the same files in worker processes.
The last column is the CPU time of the thread that asks for batches, which cannot train meanwhile, however many cores
there are.
"""

import contextlib
import io
import os
import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from data_shards.command import parse_options, run_command

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data_shards.building.builtin import furballs_shards
from data_shards.errors import UserError
from data_shards.reading.loader import LoaderKind, has_dali, make_loader
from data_shards.reading.order import GROUP_SIZE, BatchOrder
from data_shards.reading.shard_set import ShardSet

_PREFETCH = 2  # batches that each process of a `DataLoader` makes ahead, by default
PLAIN = "Pillow + DataLoader"


@dataclass(frozen=True)
class Arguments:
    """What to measure."""

    data: Path | None = None
    """Directory of shards; furballs by default."""
    resolution: int = 256
    """Side of the furballs in pixels."""
    num_images: int = 1024
    """How many furballs to draw."""
    cache_dir: Path = Path("shards")
    """Where the furballs are kept."""
    batch: int = 32
    """Images a batch; a multiple of 4."""
    batches: int = 20
    """Batches a loader is timed for, each time."""
    repetitions: int = 5
    """Times that each loader is timed."""
    threads: int = 0
    """Threads, or processes, that decode; 0: one per core."""
    alpha: bool = False
    """Read the alphas too."""


class _Pictures(Dataset[tuple[Tensor, ...]]):
    """The straightforward way to read an image."""

    def __init__(self, root: str, *, with_alpha: bool) -> None:
        self._root = root
        self._with_alpha = with_alpha
        self._shard_set: ShardSet | None = None

    def __getitem__(self, position: tuple[int, bool]) -> tuple[Tensor, ...]:
        index, flip = position
        if self._shard_set is None:  # each process opens its own
            torch.set_num_threads(1)
            self._shard_set = ShardSet.open(self._root)
        image = _decoded(self._shard_set.image_bytes(index), "RGB", flip)
        if not self._with_alpha:
            return (image / 127.5 - 1.0,)
        return image / 127.5 - 1.0, _decoded(self._shard_set.alpha_bytes(index), "L", flip) / 255.0


def _decoded(content: bytes, mode: str, flip: bool) -> Tensor:
    with Image.open(io.BytesIO(content)) as picture:
        pixels = np.array(picture.convert(mode), dtype=np.uint8)
    pixels = np.atleast_3d(pixels[:, ::-1] if flip else pixels)
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))).float()


class _Positions:
    """The batches of an order, for a `DataLoader`."""

    def __init__(self, order: BatchOrder) -> None:
        self._order = order

    def __iter__(self) -> Iterator[list[tuple[int, bool]]]:
        step = 0
        while True:
            indices, flips = self._order.batch_at(step)
            yield list(zip(indices.tolist(), flips.tolist(), strict=True))
            step += 1


def _plain(shard_set: ShardSet, arguments: Arguments, num_workers: int) -> Iterator[Tensor]:
    order = BatchOrder(shard_set.num_samples, global_batch=arguments.batch, seed=0, flip=True)
    loader = DataLoader(
        _Pictures(shard_set.root, with_alpha=arguments.alpha),
        batch_sampler=_Positions(order),
        num_workers=num_workers,
        multiprocessing_context="spawn",  # a fork would copy the locks of DALI's threads
        prefetch_factor=_PREFETCH,
    )
    return (images for images, *_ in loader)


def _ours(
    kind: LoaderKind, device: str, shard_set: ShardSet, arguments: Arguments, num_threads: int
) -> Iterator[Tensor]:
    loader = make_loader(
        kind,
        shard_set,
        global_batch=arguments.batch,
        rank=0,
        world_size=1,
        seed=0,
        flip=True,
        with_alpha=arguments.alpha,
        device=torch.device(device),
        num_threads=num_threads,
    )
    return (batch.images for batch in loader)


@dataclass(frozen=True)
class Timing:
    """How fast a loader delivered some batches.

    Attributes:
        rate: images a second.
        caller_us: CPU time of the calling thread, microseconds an image.
    """

    rate: float
    caller_us: float


def measure(
    loaders: Mapping[str, Iterator[Tensor]], *, batch: int, num_batches: int, num_drained: int, repetitions: int
) -> dict[str, list[Timing]]:
    """Time each loader in turn, once each repetition.

    Args:
        loaders: batches of images, by the loaders' names.
        batch: images a batch.
        num_batches: timed, each time.
        num_drained: taken before without timing: as many as a loader may have made while another one was timed.
        repetitions: how often.
    """
    timings: dict[str, list[Timing]] = {name: [] for name in loaders}
    for repetition in range(repetitions + 1):
        for name, images in loaders.items():
            for _ in range(num_drained):
                next(images)
            timing = _timed(images, batch, num_batches)
            if repetition > 0:  # the first one warms up
                timings[name].append(timing)
    return timings


def max_prepared(threads: int) -> int:
    """How many batches a loader with that many threads, or processes, may have ready or in progress."""
    return _PREFETCH * threads + 6  # ours: 5 at most, or two for each thread where batches are small


def _timed(stream: Iterator[Tensor], batch: int, num_batches: int) -> Timing:
    start, start_cpu = time.perf_counter(), time.thread_time()
    for _ in range(num_batches):
        images = next(stream)
    caller = time.thread_time() - start_cpu
    if images.is_cuda:
        torch.cuda.synchronize()
    num_images = batch * num_batches
    return Timing(num_images / (time.perf_counter() - start), 1e6 * caller / num_images)


def report(timings: Mapping[str, list[Timing]], skipped: Mapping[str, str]) -> str:
    """A table in Markdown."""
    plain = statistics.median(timing.rate for timing in timings[PLAIN])
    lines = [
        f"| loader | img/s, median | least | most | against {PLAIN} | calling thread, us/img |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, taken in timings.items():
        rates = [timing.rate for timing in taken]
        median, caller = statistics.median(rates), statistics.median(timing.caller_us for timing in taken)
        spread = f"{min(rates):.0f} | {max(rates):.0f}"
        lines.append(f"| {name} | {median:.0f} | {spread} | {median / plain:.2f}x | {caller:.0f} |")
    lines += [f"| {name} | skipped: {reason} | | | | |" for name, reason in skipped.items()]
    return "\n".join(lines)


def main() -> None:
    """Measure as the command line says."""
    arguments: Arguments = parse_options(Arguments, "Time the loaders on the same shards.")
    for name in ("batch", "batches", "repetitions"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name} {getattr(arguments, name)} is invalid: give 1 or more")
    if arguments.batch % GROUP_SIZE:
        raise UserError(f"--batch {arguments.batch} is invalid: give a multiple of {GROUP_SIZE}")
    threads = arguments.threads or os.cpu_count() or 1
    torch.set_num_threads(threads)
    data = arguments.data or furballs_shards(
        arguments.cache_dir, resolution=arguments.resolution, num_images=arguments.num_images, seed=0, progress=True
    )
    with contextlib.closing(ShardSet.open(data)) as shard_set:
        loaders, skipped = _loaders(shard_set, arguments, threads)
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
        print(
            f"{shard_set.root}: {shard_set.num_samples} images of {shard_set.resolution} px, "
            f".{shard_set.image_extension}{' with alpha' if arguments.alpha else ''}; batch {arguments.batch}, "
            f"{threads} threads, {gpu}\n"
        )
        timings = measure(
            loaders,
            batch=arguments.batch,
            num_batches=arguments.batches,
            num_drained=max_prepared(threads),
            repetitions=arguments.repetitions,
        )
        print(report(timings, skipped))


def _loaders(
    shard_set: ShardSet, arguments: Arguments, threads: int
) -> tuple[dict[str, Iterator[Tensor]], dict[str, str]]:
    """By name, and why some cannot be had."""
    loaders: dict[str, Iterator[Tensor]] = {}
    skipped: dict[str, str] = {}
    ours: dict[str, tuple[LoaderKind, str]] = {
        "DALI, CPU": ("dali", "cpu"),
        "DALI, GPU": ("dali", "cuda"),
        "webdataset, CPU": ("webdataset", "cpu"),
        "webdataset, GPU": ("webdataset", "cuda"),
    }
    for name, (kind, device) in ours.items():
        if device == "cuda" and not torch.cuda.is_available():
            skipped[name] = "torch sees no GPU"
        elif kind == "dali" and not has_dali():
            skipped[name] = "DALI is not installed"
        else:
            loaders[name] = _ours(kind, device, shard_set, arguments, threads)
    loaders[PLAIN] = _plain(shard_set, arguments, threads)
    return loaders, skipped


if __name__ == "__main__":
    run_command(main, memory_remedy="give a smaller --batch, or fewer --threads")
