"""Batches and the interface of a loader: endless, identical for DALI and webdataset, resumable at any step."""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from data_shards.errors import UserError
from data_shards.reading.order import BatchOrder
from data_shards.reading.shard_set import ALPHA_EXTENSION, ShardSet

BATCHES_AHEAD = 3  # in progress while the caller uses the one before

Work = TypeVar("Work")
"""A batch in progress, as a loader keeps it."""


@dataclass(frozen=True, eq=False)
class EncodedBatch:
    """The files of one rank's images of one step.

    Attributes:
        images: encoded.
        alphas: encoded, 8-bit grey PNG; none where the loader was made without.
        flips: ``[B]`` bool, which to flip.
        indices: ``[B]`` int64, the samples' numbers in the shard set.
    """

    images: list[bytes]
    alphas: list[bytes]
    flips: NDArray[np.bool_]
    indices: NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Batch:
    """One rank's images of one step, the caller's to keep.

    Attributes:
        images: ``[B, 3, R, R]`` float32 in [-1, 1], on the loader's device.
        alphas: ``[B, 1, R, R]`` float32 in [0, 1], on the loader's device, flipped as the images are; None where the
            loader was made without.
        indices: ``[B]`` int64 on the CPU, the samples' numbers in the shard set.
    """

    images: torch.Tensor
    alphas: torch.Tensor | None
    indices: torch.Tensor


class Loader(Protocol):
    """Endless batches of one rank; the state is the step of the batch to be delivered next, exactly."""

    steps_per_epoch: int

    def __iter__(self) -> Iterator[Batch]: ...

    def __next__(self) -> Batch: ...

    def state_dict(self) -> dict[str, Any]:
        """``step``, and what tells the data and its order apart; the same for any rank and world size."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on so that the next batch is the one that would have come.

        Raises:
            UserError: the state is of other data or another order.
        """
        ...

    def close(self) -> None:
        """Release the threads; the loader cannot be used after. The shard set stays open."""
        ...


class OrderedLoader(ABC, Generic[Work]):
    """What the loaders share: counting steps, and reading ahead. A subclass decodes."""

    def __init__(
        self,
        shard_set: ShardSet,
        order: BatchOrder,
        *,
        with_alpha: bool,
        device: torch.device,
        batches_ahead: int = BATCHES_AHEAD,
    ) -> None:
        self.steps_per_epoch = order.steps_per_epoch
        self._shard_set = shard_set
        self._order = order
        self._with_alpha = with_alpha
        self._device = device
        self._batches_ahead = batches_ahead
        self._next_step = 0
        self._ahead: Generator[Work] | None = None
        self._batches: Iterator[Batch] | None = None
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._batches is None:
            self._ahead = self._begun(self._next_step)
            self._batches = self._delivered(self._ahead)
        try:
            batch = next(self._batches)
        except Exception:
            self._stop()  # else the next call would see an exhausted iterator instead of the error
            raise
        self._next_step += 1
        return batch

    def state_dict(self) -> dict[str, Any]:
        """See `Loader.state_dict`."""
        return {"step": self._next_step, **self._identity()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Loader.load_state_dict`."""
        for name, value in self._identity().items():
            if state.get(name) != value:
                raise UserError(
                    f"the loader's state is of other data: its {name} is {state.get(name)}, but {value}"
                    f" with {self._shard_set.root}; resume with what the run began with, or start a new run"
                )
        self._stop()
        self._next_step = int(state["step"])

    def close(self) -> None:
        """See `Loader.close`."""
        self._stop()
        self._reader.shutdown(cancel_futures=True)

    def _stop(self) -> None:
        """Drop the batches in progress."""
        self._batches = None
        if self._ahead is not None:
            self._ahead.close()

    def _identity(self) -> dict[str, Any]:
        order = self._order
        return {
            "seed": order.seed,
            "num_samples": order.num_samples,
            "global_batch": order.global_batch,
            "digest": self._shard_set.digest,
            "shards_per_window": order.windows.per_window if order.windows else None,
        }

    def _begun(self, step: int) -> Generator[Work]:
        """The batches of `step` and all after; the next ones are in progress while the caller uses this one."""
        steps = count(step)
        ahead = deque(self._reader.submit(self._begin_step, next(steps)) for _ in range(self._batches_ahead))
        try:
            while True:
                work = ahead.popleft().result()
                ahead.append(self._reader.submit(self._begin_step, next(steps)))
                yield work
        finally:
            for begun in ahead:
                begun.cancel()

    def _begin_step(self, step: int) -> Work:
        return self._begin(self._read(step))

    def _read(self, step: int) -> EncodedBatch:
        if self._order.windows:
            self._shard_set.expect(self._order.shards_at(step))
        indices, flips = self._order.batch_at(step)
        samples = indices.tolist()
        images = self._shard_set.read_many(samples, self._shard_set.image_extension)
        alphas = self._shard_set.read_many(samples, ALPHA_EXTENSION) if self._with_alpha else []
        return EncodedBatch(images, alphas, flips, indices)

    @abstractmethod
    def _begin(self, batch: EncodedBatch) -> Work:
        """Begin to decode a batch. Called in the reader's thread as soon as the batch is read."""

    @abstractmethod
    def _delivered(self, batches: Iterator[Work]) -> Iterator[Batch]:
        """The decoded images of consecutive batches. Runs in the caller's thread, so it only waits and wraps."""


def check_size(shard_set: ShardSet, sample: int, height: int, width: int) -> None:
    """Check a decoded image's size, pixels.

    Raises:
        UserError: it is not that of the set.
    """
    if (height, width) != (shard_set.resolution, shard_set.resolution):
        raise UserError(
            f"{shard_set.location(sample)} is {width}x{height} px in a set of {shard_set.resolution} px;"
            " build a set of one size"
        )
