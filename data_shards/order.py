"""Which pictures each rank sees at each step: pure functions of seed, step, rank and world size.

Nothing is shuffled in a buffer and nothing depends on what was read before, so that a run can be resumed at any step,
on any number of ranks, and sees the same pictures.
"""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from data_shards.errors import UserError

GROUP_SIZE = 4  # pictures per minibatch-stddev group


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


@lru_cache(maxsize=2)
def epoch_order(num_samples: int, seed: int, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """The order of one epoch: a permutation of the samples, and whether each position is flipped.

    Both are ``[num_samples]`` and read-only. Philox is keyed by seed and epoch, so that no epoch needs the one before.
    """
    generator = np.random.Generator(np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)))
    permutation = generator.permutation(num_samples)
    flips = generator.integers(2, size=num_samples, dtype=np.uint8).astype(np.bool_)
    permutation.flags.writeable = False
    flips.flags.writeable = False
    return permutation, flips


class BatchOrder:
    """The batches of one rank.

    An epoch is ``num_samples // global_batch`` steps; the remainder of its order is dropped, other samples in each
    epoch.
    """

    def __init__(
        self, num_samples: int, *, global_batch: int, rank: int = 0, world_size: int = 1, seed: int, flip: bool
    ) -> None:
        """Fix the order.

        Args:
            num_samples: in the set.
            global_batch: pictures per step, over all ranks.
            rank: 0 to ``world_size - 1``.
            world_size: ranks.
            seed: of order and flips, non-negative.
            flip: whether to flip horizontally, each picture with probability 1/2 in each epoch.

        Raises:
            ValueError: the global batch is not divisible by 4 times the world size.
            UserError: the set is smaller than one global batch.
        """
        self._slots = rank_slots(global_batch, rank, world_size)
        if num_samples < global_batch:
            raise UserError(
                f"the set has {num_samples} pictures, fewer than one global batch of {global_batch};"
                " choose a smaller batch or a larger set"
            )
        self.num_samples = num_samples
        self.global_batch = global_batch
        self.seed = seed
        self.flip = flip
        self.batch_size = len(self._slots)
        self.steps_per_epoch = num_samples // global_batch

    def batch_at(self, step: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Sample numbers and flips, ``[batch_size]`` each, of a step counted from the beginning of the run."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        permutation, flips = epoch_order(self.num_samples, self.seed, epoch)
        positions = step_in_epoch * self.global_batch + self._slots
        return permutation[positions], flips[positions] & self.flip
