"""Order of the images: pure functions of seed, step, rank and world size.

The whole set is shuffled at once. One that is too large to be available whole is shuffled by windows: its shards, and
then the samples of a few shards together, before those of the next few. Images of different windows do not meet in
that epoch, which matters little where the shards themselves were filled in random order.

Nothing is shuffled in a buffer and nothing depends on what was read before, so that a run can be resumed at any step,
on any number of ranks, and sees the same images.
"""

from dataclasses import dataclass
from functools import lru_cache
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from data_shards.errors import UserError

GROUP_SIZE = 4  # images per minibatch-stddev group


def rank_slots(global_batch: int, rank: int, world_size: int) -> NDArray[np.int64]:
    """The positions of the global batch that a rank takes, ``[global_batch / world_size]``.

    Viewed as ``(4, n / 4)``, row-major, the columns of a batch of n are its minibatch-stddev groups (group g holds the
    samples g, g + n/4, g + 2n/4 and g + 3n/4), and the first two rows are the half that becomes composites. A rank
    takes whole columns, as a batch that is again viewed so: with any number of ranks, groups and halves are the same.

    Raises:
        ValueError: the global batch is not divisible by 4 times the world size.
    """
    if global_batch <= 0 or global_batch % (GROUP_SIZE * world_size):
        raise ValueError(
            f"a global batch of {global_batch} is not a multiple of {GROUP_SIZE} x {world_size} ranks; choose one"
        )
    num_columns = global_batch // (GROUP_SIZE * world_size)
    positions = np.arange(global_batch, dtype=np.int64).reshape(GROUP_SIZE, -1)
    return positions[:, rank * num_columns : (rank + 1) * num_columns].reshape(-1)


@dataclass(frozen=True)
class ShardWindows:
    """How a set is shuffled that is too large to be available whole: its shards, then the samples of a few of them.

    Attributes:
        sizes: samples of each shard.
        per_window: how many shards' samples are shuffled together.
    """

    sizes: tuple[int, ...]
    per_window: int


@dataclass(frozen=True)
class EpochOrder:
    """The order of one epoch; arrays are read-only.

    Attributes:
        permutation: ``[num_samples]``, the samples' numbers by position.
        flips: ``[num_samples]``, whether the image at a position is flipped.
        windows: the shards of each window, in turn; none where the whole set is shuffled at once.
        ends: ``[num_windows]``, the position after each window's last.
    """

    permutation: NDArray[np.int64]
    flips: NDArray[np.bool_]
    windows: tuple[tuple[int, ...], ...]
    ends: NDArray[np.int64]


@lru_cache(maxsize=2)
def epoch_order(num_samples: int, seed: int, epoch: int, windows: ShardWindows | None = None) -> EpochOrder:
    """The order of one epoch. Philox is keyed by seed and epoch, so that no epoch needs the one before."""
    generator = np.random.Generator(np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)))
    shards: list[NDArray[np.int64]] = []
    if windows is None:
        permutation = generator.permutation(num_samples)
    else:
        samples = np.split(np.arange(num_samples), np.cumsum(windows.sizes)[:-1])
        shuffled = generator.permutation(len(windows.sizes))
        shards = [shuffled[i : i + windows.per_window] for i in range(0, len(shuffled), windows.per_window)]
        within = [generator.permutation(np.concatenate([samples[shard] for shard in window])) for window in shards]
        permutation = np.concatenate(within)
    flips = generator.integers(2, size=num_samples, dtype=np.uint8).astype(np.bool_)
    permutation.flags.writeable = False
    flips.flags.writeable = False
    ends = np.cumsum([sum(windows.sizes[shard] for shard in window) for window in shards] if windows else [])
    return EpochOrder(permutation, flips, tuple(tuple(map(int, window)) for window in shards), ends)


class BatchOrder:
    """The batches of one rank.

    An epoch is ``num_samples // global_batch`` steps on every rank; the remainder of its order, fewer samples than a
    global batch, is dropped, other ones in each epoch.
    """

    def __init__(
        self,
        num_samples: int,
        *,
        global_batch: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int,
        flip: bool,
        windows: ShardWindows | None = None,
    ) -> None:
        """Fix the order.

        Args:
            num_samples: in the set.
            global_batch: images per step, over all ranks.
            rank: 0 to ``world_size - 1``.
            world_size: ranks.
            seed: of order and flips, non-negative.
            flip: whether to flip horizontally, each image with probability 1/2 in each epoch.
            windows: of the shuffle; None: the whole set at once.

        Raises:
            ValueError: the global batch is not divisible by 4 times the world size.
            UserError: the set is smaller than one global batch.
        """
        self._slots = rank_slots(global_batch, rank, world_size)
        if num_samples < global_batch:
            raise UserError(
                f"the set has {num_samples} images, fewer than one global batch of {global_batch};"
                " choose a smaller batch or a larger set"
            )
        self.num_samples = num_samples
        self.global_batch = global_batch
        self.seed = seed
        self.flip = flip
        self.windows = windows
        self.batch_size = len(self._slots)
        self.steps_per_epoch = num_samples // global_batch

    def batch_at(self, step: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Sample numbers and flips, ``[batch_size]`` each, of a step counted from the beginning of the run."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        order = self._epoch(epoch)
        positions = step_in_epoch * self.global_batch + self._slots
        return order.permutation[positions], order.flips[positions] & self.flip

    def shards_at(self, step: int) -> tuple[int, ...]:
        """The shards of a step's window, and then those of the window after; none without windows."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        order = self._epoch(epoch)
        first, last = step_in_epoch * self.global_batch, (step_in_epoch + 1) * self.global_batch - 1
        current, following = np.searchsorted(order.ends, (first, last), side="right")
        windows = order.windows[current : max(current + 1, following) + 1]
        if current + 1 == len(order.windows):
            windows += self._epoch(epoch + 1).windows[:1]
        return tuple(dict.fromkeys(chain.from_iterable(windows)))

    def _epoch(self, epoch: int) -> EpochOrder:
        return epoch_order(self.num_samples, self.seed, epoch, self.windows)
