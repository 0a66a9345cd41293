"""The loader on NVIDIA DALI: decodes, flips and normalises in its own threads, or on the GPU.

It is fed through ``fn.external_source`` and not ``fn.readers.webdataset``: that one shuffles in a local buffer over
sequential reads, and its order depends on the rank. Ours must be a function of (seed, step) for any number of ranks,
so that a run can be resumed exactly.
"""

import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali import Pipeline, fn, types
from nvidia.dali.plugin.pytorch import feed_ndarray
from PIL import Image

from data_shards.errors import UserError
from data_shards.loader import Batch, OrderedLoader, check_size
from data_shards.order import BatchOrder
from data_shards.shard_set import ShardSet

_PREFETCH = 2  # batches


class DaliLoader(OrderedLoader):
    """See `data_shards.loader.Loader`. JPEG on a GPU may differ from the CPU's by a few grey levels; PNG is equal."""

    def __init__(
        self, shard_set: ShardSet, order: BatchOrder, *, with_alpha: bool, device: torch.device, num_threads: int
    ) -> None:
        """See `data_shards.loader.make_loader`."""
        super().__init__(shard_set, order, with_alpha=with_alpha, device=device)
        self._num_threads = num_threads

    def _batches_from(self, step: int) -> Iterator[Batch]:
        pipeline = self._pipeline(step)
        while True:
            indices, _ = self._order.batch_at(step)
            # On torch's stream, so that DALI too frees its buffers only after the copies below.
            try:
                images, *alphas = pipeline.run(self._stream())
            except RuntimeError:
                self._name_broken_picture(indices)
                raise
            yield Batch(
                images=self._to_torch(images, indices),
                alphas=self._to_torch(alphas[0], indices) if alphas else None,
                indices=torch.from_numpy(indices),
            )
            step += 1

    def _pipeline(self, first_step: int) -> Any:
        on_gpu = self._device.type == "cuda"
        gpu = torch.cuda.current_device() if on_gpu and self._device.index is None else self._device.index
        pipeline = Pipeline(
            batch_size=self._order.batch_size,
            num_threads=self._num_threads,
            device_id=gpu if on_gpu else None,
            prefetch_queue_depth=_PREFETCH,
        )
        decoder = "mixed" if on_gpu else "cpu"
        with pipeline:
            flips, images, *alphas = fn.external_source(
                source=lambda iteration: self._encoded(first_step + iteration),
                num_outputs=3 if self._with_alpha else 2,
                dtype=[types.INT32, types.UINT8, types.UINT8][: 3 if self._with_alpha else 2],
            )
            # Orientation as stored, as webdataset's decoder has it: shards are built upright.
            images = fn.decoders.image(images, device=decoder, output_type=types.RGB, adjust_orientation=False)
            outputs = [fn.crop_mirror_normalize(images, mirror=flips, mean=127.5, std=127.5)]
            for alpha in alphas:
                alpha = fn.decoders.image(alpha, device=decoder, output_type=types.GRAY, adjust_orientation=False)
                outputs.append(fn.crop_mirror_normalize(alpha, mirror=flips, mean=0.0, std=255.0))
            pipeline.set_outputs(*outputs)
        pipeline.build()
        return pipeline

    def _encoded(self, step: int) -> tuple[Any, ...]:
        indices, flips = self._order.batch_at(step)
        outputs = [flips.astype(np.int32), [_array(self._shard_set.image_bytes(int(i))) for i in indices]]
        if self._with_alpha:
            outputs.append([_array(self._shard_set.alpha_bytes(int(i))) for i in indices])
        return tuple(outputs)

    def _name_broken_picture(self, indices: NDArray[np.int64]) -> None:
        """Raise the `UserError` that DALI's own message is not: it does not tell which picture it cannot decode."""
        for index in map(int, indices):
            try:
                contents = [self._shard_set.image_bytes(index)]
                if self._with_alpha:
                    contents.append(self._shard_set.alpha_bytes(index))
                for content in contents:
                    Image.open(io.BytesIO(content)).load()
            except (OSError, SyntaxError, ValueError) as error:
                location = self._shard_set.location(index)
                raise UserError(f"{location} cannot be decoded ({error}); rebuild the set") from None

    def _to_torch(self, tensors: Any, indices: NDArray[np.int64]) -> torch.Tensor:
        """A copy in torch's own memory, as DALI may use its buffer again."""
        for index, (_, height, width) in zip(indices, tensors.shape(), strict=True):
            check_size(self._shard_set, int(index), height, width)
        copy = torch.empty(len(indices), *tensors.shape()[0], device=self._device)
        feed_ndarray(tensors.as_tensor(), copy, cuda_stream=self._stream())
        return copy

    def _stream(self) -> torch.cuda.Stream | None:
        return torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None


def _array(content: bytes) -> NDArray[np.uint8]:
    return np.frombuffer(content, dtype=np.uint8)
