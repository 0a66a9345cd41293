"""The loader for machines without DALI: webdataset's decoder in threads, with the same batches in the same order.

The images are read in our order through the shard set's index. A task decodes a few images and writes them, normalised,
into their places in the batch, so that nothing is left to do after the last one. Several batches are in progress at a
time, so that no thread waits for the others at the end of a batch. Threads are used and not processes because Pillow
and NumPy release Python's lock for most of an image's time (docs/benchmarks.md, "Loaders").
"""

import weakref
from collections import deque
from collections.abc import Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import webdataset
from numpy.typing import NDArray

from data_shards.errors import UserError
from data_shards.reading.batches import BATCHES_AHEAD, Batch, EncodedBatch, OrderedLoader, check_size
from data_shards.reading.decode import decode
from data_shards.reading.order import BatchOrder
from data_shards.reading.shard_set import ALPHA_EXTENSION, IMAGE_EXTENSIONS, ShardSet

_IMAGES_PER_TASK = 4  # a task itself costs about 20 us of Python's time, an image 60


@dataclass(frozen=True)
class _Levels:
    """How 8-bit levels become floats: ``(level - offset) / scale``."""

    offset: float
    scale: float


_IMAGE_LEVELS = _Levels(127.5, 127.5)
_ALPHA_LEVELS = _Levels(0.0, 255.0)


@dataclass(frozen=True, eq=False)
class _Decoding:
    """A batch that is being decoded.

    Attributes:
        images: ``[B, 3, R, R]``, complete when all tasks are done: float32 in [-1, 1] for a batch on the CPU, uint8 in
            pinned memory for one on a GPU.
        alphas: ``[B, 1, R, R]``, likewise; None where the loader was made without.
        indices: ``[B]`` int64.
        tasks: what fills the memory.
    """

    images: torch.Tensor
    alphas: torch.Tensor | None
    indices: torch.Tensor
    tasks: list[Future[None]]


class WebDatasetLoader(OrderedLoader[_Decoding]):
    """See `data_shards.reading.batches.Loader`."""

    def __init__(
        self, shard_set: ShardSet, order: BatchOrder, *, with_alpha: bool, device: torch.device, num_threads: int
    ) -> None:
        """See `data_shards.reading.loader.make_loader`."""
        # With small batches more of them are in progress: two tasks for each thread.
        batches_ahead = max(BATCHES_AHEAD, -(-2 * num_threads * _IMAGES_PER_TASK // order.batch_size))
        super().__init__(shard_set, order, with_alpha=with_alpha, device=device, batches_ahead=batches_ahead)
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="decode")
        self._decoder = webdataset.Decoder(
            [
                webdataset.handle_extension(ALPHA_EXTENSION, lambda content: decode(content, "L")),
                webdataset.handle_extension(" ".join(IMAGE_EXTENSIONS), lambda content: decode(content, "RGB")),
            ]
        )
        side = shard_set.resolution
        self._image_memory = BatchMemory((order.batch_size, 3, side, side), num_kept=batches_ahead)
        self._alpha_memory = BatchMemory((order.batch_size, 1, side, side), num_kept=batches_ahead)

    def close(self) -> None:
        """See `data_shards.reading.loader.Loader.close`."""
        super().close()
        self._threads.shutdown(cancel_futures=True)

    def _begin(self, batch: EncodedBatch) -> _Decoding:
        images = self._memory(self._image_memory)
        alphas = self._memory(self._alpha_memory) if self._with_alpha else None
        into = images.numpy(), None if alphas is None else alphas.numpy()
        positions = range(len(batch.indices))
        tasks = [
            self._threads.submit(self._decode, batch, positions[start : start + _IMAGES_PER_TASK], *into)
            for start in positions[::_IMAGES_PER_TASK]
        ]
        return _Decoding(images, alphas, torch.from_numpy(batch.indices), tasks)

    def _delivered(self, batches: Iterator[_Decoding]) -> Iterator[Batch]:
        for batch in batches:
            wait(batch.tasks, return_when=FIRST_EXCEPTION)  # wakes this thread once, not after each task
            for task in batch.tasks:
                task.result()
            yield Batch(
                images=self._to_device(batch.images, _IMAGE_LEVELS),
                alphas=None if batch.alphas is None else self._to_device(batch.alphas, _ALPHA_LEVELS),
                indices=batch.indices,
            )

    def _decode(self, batch: EncodedBatch, positions: range, images: NDArray[Any], alphas: NDArray[Any] | None) -> None:
        """Fill a batch's `positions`."""
        extension = self._shard_set.image_extension
        for position in positions:
            index = int(batch.indices[position])
            sample: dict[str, Any] = {"__key__": str(index), extension: batch.images[position]}
            if alphas is not None:
                sample[ALPHA_EXTENSION] = batch.alphas[position]
            try:
                sample = self._decoder(sample)
            except webdataset.DecodingError as error:
                location = self._shard_set.location(index)
                raise UserError(f"{location}: its .{error.k} cannot be decoded; rebuild the set") from error
            flip = bool(batch.flips[position])
            self._write(sample[extension], images[position], _IMAGE_LEVELS, index=index, flip=flip)
            if alphas is not None:
                self._write(sample[ALPHA_EXTENSION], alphas[position], _ALPHA_LEVELS, index=index, flip=flip)

    def _write(self, pixels: NDArray[np.uint8], out: NDArray[Any], levels: _Levels, *, index: int, flip: bool) -> None:
        """Write ``[C, R, R]`` to its place in the batch; by NumPy, whose operators start no threads of their own."""
        check_size(self._shard_set, index, *pixels.shape[1:])
        out[...] = pixels[..., ::-1] if flip else pixels
        if out.dtype == np.float32:
            np.subtract(out, levels.offset, out=out)
            np.divide(out, levels.scale, out=out)

    def _memory(self, of_cpu: "BatchMemory") -> torch.Tensor:
        if self._device.type != "cuda":
            return torch.from_numpy(of_cpu.take())
        with torch.cuda.device(self._device):  # this thread's own device may be another one
            return torch.empty(of_cpu.shape, dtype=torch.uint8, pin_memory=True)  # torch itself reuses this memory

    def _to_device(self, pixels: torch.Tensor, levels: _Levels) -> torch.Tensor:
        if self._device.type == "cuda":
            return pixels.to(self._device, non_blocking=True).float().sub_(levels.offset).div_(levels.scale)
        return pixels.to(self._device)


class BatchMemory:
    """Float32 memory for batches, reused when a batch is no longer referenced.

    New memory of that size comes from the system a page at a time, and the page faults of a batch take about as long as
    decoding it.

    Attributes:
        shape: of a batch.
    """

    def __init__(self, shape: tuple[int, ...], *, num_kept: int) -> None:
        """Keep the memory of up to `num_kept` batches that are no longer referenced."""
        self.shape = shape
        self._free: deque[NDArray[np.float32]] = deque(maxlen=num_kept)

    def take(self) -> NDArray[np.float32]:
        """Memory of undefined content; the caller's while this array or a tensor made from it exists."""
        try:
            memory = self._free.pop()
        except IndexError:
            memory = np.empty(self.shape, np.float32)
        lent = memory[:]
        weakref.finalize(lent, self._free.append, memory).atexit = False
        return lent
