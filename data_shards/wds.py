"""The loader for machines without DALI: a ``webdataset.DataPipeline`` of the same batches in the same order.

The pictures are read in our order through the shard set's index, decoded by webdataset's own decoder in threads, and
one batch is made ahead while the caller works on the one before.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import webdataset

from data_shards.errors import UserError
from data_shards.loader import Batch, EncodedBatch, OrderedLoader, check_size
from data_shards.order import BatchOrder
from data_shards.shard_set import ALPHA_EXTENSION, ShardSet

_Pixels = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]
"""Images ``[B, 3, R, R]`` and alphas ``[B, 1, R, R]``, uint8, and indices ``[B]``."""


class WebDatasetLoader(OrderedLoader):
    """See `data_shards.loader.Loader`."""

    def __init__(
        self, shard_set: ShardSet, order: BatchOrder, *, with_alpha: bool, device: torch.device, num_threads: int
    ) -> None:
        """See `data_shards.loader.make_loader`."""
        super().__init__(shard_set, order, with_alpha=with_alpha, device=device)
        self._ahead = ThreadPoolExecutor(1, thread_name_prefix="batch-ahead")
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="decode")
        grey = webdataset.imagehandler("torchl8")
        alpha = webdataset.handle_extension(ALPHA_EXTENSION, lambda content: grey(".png", content))
        self._decoder = webdataset.Decoder([alpha, webdataset.imagehandler("torchrgb8")])

    def close(self) -> None:
        """See `data_shards.loader.Loader.close`."""
        super().close()
        self._ahead.shutdown(cancel_futures=True)
        self._threads.shutdown(cancel_futures=True)

    def _decoded(self, batches: Iterator[EncodedBatch]) -> Iterator[Batch]:
        pipeline = webdataset.DataPipeline(
            lambda: map(self._samples, batches), webdataset.map(self._with_pixels), webdataset.map(self._collated)
        )
        decoded = iter(pipeline)
        following = self._ahead.submit(next, decoded)
        while True:
            images, alphas, indices = following.result()
            following = self._ahead.submit(next, decoded)
            yield Batch(
                images=(self._to_device(images) - 127.5) / 127.5,
                alphas=None if alphas is None else self._to_device(alphas) / 255.0,
                indices=indices,
            )

    def _samples(self, batch: EncodedBatch) -> list[dict[str, Any]]:
        samples: list[dict[str, Any]] = [
            {
                "__key__": self._shard_set.location(int(index)),
                "__index__": int(index),
                "__flip__": bool(flip),
                self._shard_set.image_extension: image,
            }
            for index, flip, image in zip(batch.indices, batch.flips, batch.images, strict=True)
        ]
        if self._with_alpha:
            for sample, alpha in zip(samples, batch.alphas, strict=True):
                sample[ALPHA_EXTENSION] = alpha
        return samples

    def _with_pixels(self, samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
        try:
            return list(self._threads.map(self._decoder, samples))
        except webdataset.DecodingError as error:
            raise UserError(f"{error.key}: its .{error.k} cannot be decoded; rebuild the set") from error

    def _collated(self, samples: list[dict[str, Any]]) -> _Pixels:
        images = torch.stack([self._oriented(sample, self._shard_set.image_extension) for sample in samples])
        alphas = None
        if self._with_alpha:
            alphas = torch.stack([self._oriented(sample, ALPHA_EXTENSION)[None] for sample in samples])
        return images, alphas, torch.tensor([sample["__index__"] for sample in samples])

    def _oriented(self, sample: dict[str, Any], extension: str) -> torch.Tensor:
        pixels: torch.Tensor = sample[extension]
        height, width = pixels.shape[-2:]
        check_size(self._shard_set, sample["__index__"], height, width)
        return pixels.flip(-1) if sample["__flip__"] else pixels

    def _to_device(self, pixels: torch.Tensor) -> torch.Tensor:
        if self._device.type == "cuda":
            pixels = pixels.pin_memory()
        return pixels.to(self._device, non_blocking=True).float()
