"""The loader on NVIDIA DALI: decodes, flips and normalises in its own threads, or on the GPU.

It is fed through ``fn.external_source`` and not ``fn.readers.webdataset``: that one shuffles in a local buffer over
sequential reads, and its order depends on the rank. Ours must be a function of (seed, step) for any number of ranks,
so that a run can be resumed exactly.

On a CPU the calling thread copies no pixels: torch takes over the memory that DALI's threads have filled.
"""

import io
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from nvidia.dali import Pipeline, fn, types
from nvidia.dali.plugin.pytorch import feed_ndarray
from PIL import Image
from torch.utils.dlpack import from_dlpack

from data_shards.errors import UserError
from data_shards.reading.batches import Batch, EncodedBatch, OrderedLoader, check_size
from data_shards.reading.order import BatchOrder
from data_shards.reading.shard_set import ShardSet

_PREFETCH = 2  # batches
_NVJPEG_BYTES_PER_PIXEL = 12  # of memory for each thread; DALI's own ImageNet example gives it about half of that


@dataclass(frozen=True, eq=False)
class _Input:
    """A batch as DALI takes it: flips, images and, where the loader delivers them, alphas."""

    batch: EncodedBatch
    arrays: tuple[Any, ...]


class DaliLoader(OrderedLoader[_Input]):
    """See `Loader`. JPEG on a GPU is within four grey levels of the CPU's, all else is equal."""

    def __init__(
        self, shard_set: ShardSet, order: BatchOrder, *, with_alpha: bool, device: torch.device, num_threads: int
    ) -> None:
        """See `data_shards.reading.loader.make_loader`."""
        super().__init__(shard_set, order, with_alpha=with_alpha, device=device)
        self._num_threads = num_threads

    def _begin(self, batch: EncodedBatch) -> _Input:
        contents = [batch.images, batch.alphas] if self._with_alpha else [batch.images]
        files = [[np.frombuffer(content, np.uint8) for content in encoded] for encoded in contents]
        return _Input(batch, (batch.flips.astype(np.int32), *files))

    def _delivered(self, batches: Iterator[_Input]) -> Iterator[Batch]:
        in_work: deque[EncodedBatch] = deque()
        pipeline = self._pipeline(self._inputs(batches, in_work))
        while True:
            # On torch's stream, so that DALI too frees its buffers only after the copies below.
            try:
                images, *alphas = pipeline.run(self._stream())
            except RuntimeError as error:
                self._name_broken_picture(in_work)
                if "fn.decoders" not in str(error):
                    raise
                raise UserError(
                    f"DALI cannot decode an image of {self._shard_set.root} that Pillow can;"
                    " rebuild the set, or choose the webdataset loader"
                ) from error
            batch = in_work.popleft()
            yield Batch(
                images=self._to_torch(images, batch),
                alphas=self._to_torch(alphas[0], batch) if alphas else None,
                indices=torch.from_numpy(batch.indices),
            )

    def _inputs(self, batches: Iterator[_Input], in_work: deque[EncodedBatch]) -> Iterator[tuple[Any, ...]]:
        """What the pipeline takes of each batch, which joins those it works on."""
        for work in batches:
            in_work.append(work.batch)
            yield work.arrays

    def _pipeline(self, inputs: Iterator[tuple[Any, ...]]) -> Any:
        on_gpu = self._device.type == "cuda"
        gpu = torch.cuda.current_device() if on_gpu and self._device.index is None else self._device.index
        pipeline = Pipeline(
            batch_size=self._order.batch_size,
            num_threads=self._num_threads,
            device_id=gpu if on_gpu else None,
            prefetch_queue_depth=_PREFETCH,
            exec_dynamic=True,  # whose outputs are the caller's to keep
        )
        with pipeline:
            flips, images, *alphas = fn.external_source(
                source=inputs,
                num_outputs=3 if self._with_alpha else 2,
                dtype=[types.INT32, types.UINT8, types.UINT8][: 3 if self._with_alpha else 2],
            )
            images = fn.decoders.image(images, output_type=types.RGB, **self._decoding(on_gpu, channels=3))
            outputs = [fn.crop_mirror_normalize(images, mirror=flips, mean=127.5, std=127.5)]
            for alpha in alphas:
                alpha = fn.decoders.image(alpha, output_type=types.GRAY, **self._decoding(on_gpu, channels=1))
                outputs.append(fn.crop_mirror_normalize(alpha, mirror=flips, mean=0.0, std=255.0))
            pipeline.set_outputs(*outputs)
        pipeline.build()
        return pipeline

    def _decoding(self, on_gpu: bool, *, channels: int) -> dict[str, Any]:
        """Options of the decoder."""
        # Orientation as stored, as webdataset's decoder has it: shards are built upright.
        options = {"device": "mixed" if on_gpu else "cpu", "adjust_orientation": False}
        if not on_gpu:
            return options
        side = self._shard_set.resolution
        padding = _NVJPEG_BYTES_PER_PIXEL * side * side
        return options | {
            # Memory for images of this size, from the start: else it grows, with a stop, and DALI reserves 24 MB a
            # thread, whatever the size.
            "bytes_per_sample_hint": channels * side * side,
            "device_memory_padding": padding,
            "host_memory_padding": padding,
            "preallocate_width_hint": side,
            "preallocate_height_hint": side,
            "jpeg_fancy_upsampling": True,  # chroma as the CPU's decoder makes it
        }

    def _name_broken_picture(self, batches: Iterable[EncodedBatch]) -> None:
        """Raise the `UserError` that DALI's own message is not: it does not tell which image it cannot decode."""
        for batch in batches:
            for contents in filter(None, (batch.images, batch.alphas)):
                for index, content in zip(batch.indices, contents, strict=True):
                    try:
                        Image.open(io.BytesIO(content)).load()
                    except (OSError, SyntaxError, ValueError) as error:
                        location = self._shard_set.location(int(index))
                        raise UserError(f"{location} cannot be decoded ({error}); rebuild the set") from None

    def _to_torch(self, tensors: Any, batch: EncodedBatch) -> torch.Tensor:
        """DALI's memory on a CPU. On a GPU a copy in torch's own: torch alone knows what its streams still read."""
        for index, (_, height, width) in zip(batch.indices, tensors.shape(), strict=True):
            check_size(self._shard_set, int(index), height, width)
        if self._device.type != "cuda":
            return from_dlpack(tensors.as_tensor())
        copy = torch.empty(len(batch.indices), *tensors.shape()[0], device=self._device)
        feed_ndarray(tensors.as_tensor(), copy, cuda_stream=self._stream())
        return copy

    def _stream(self) -> torch.cuda.Stream | None:
        return torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None
