"""Choice of a loader."""

import importlib.util
from typing import Literal

import torch

from data_shards.errors import UserError
from data_shards.reading.batches import Loader
from data_shards.reading.order import BatchOrder
from data_shards.reading.shard_set import ShardSet

LoaderKind = Literal["auto", "dali", "webdataset"]


def make_loader(
    kind: LoaderKind,
    shard_set: ShardSet,
    *,
    global_batch: int,
    rank: int,
    world_size: int,
    seed: int,
    flip: bool,
    with_alpha: bool,
    device: torch.device,
    num_threads: int,
) -> Loader:
    """A loader of one rank's batches.

    Args:
        kind: ``"auto"`` is DALI where it is installed, else webdataset.
        shard_set: what to read; stays the caller's to close.
        global_batch: images per step over all ranks, a multiple of ``4 * world_size``.
        rank: 0 to ``world_size - 1``.
        world_size: ranks.
        seed: of order and flips, the same on all ranks.
        flip: whether to flip each image horizontally with probability 1/2.
        with_alpha: whether to deliver the ground-truth alphas.
        device: where the batches go.
        num_threads: that decode.

    Raises:
        ValueError: the global batch does not divide.
        UserError: DALI was asked for and is not installed, alphas were asked for and the set has none, or the set is
            smaller than one global batch.
    """
    if with_alpha and not shard_set.has_alpha:
        raise UserError(f"{shard_set.root} has no alphas; choose a set with ground-truth alphas, or load it without")
    order = BatchOrder(
        shard_set.num_samples,
        global_batch=global_batch,
        rank=rank,
        world_size=world_size,
        seed=seed,
        flip=flip,
        windows=shard_set.windows,
    )
    if kind == "dali" and not has_dali():
        raise UserError("DALI is not installed; install nvidia-dali-cuda130 (Linux), or choose the webdataset loader")
    if kind == "dali" or (kind == "auto" and has_dali()):
        from data_shards.reading.dali import DaliLoader

        return DaliLoader(shard_set, order, with_alpha=with_alpha, device=device, num_threads=num_threads)
    from data_shards.reading.wds import WebDatasetLoader

    return WebDatasetLoader(shard_set, order, with_alpha=with_alpha, device=device, num_threads=num_threads)


def has_dali() -> bool:
    """Whether DALI is installed."""
    try:
        return importlib.util.find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:  # there is no package nvidia at all
        return False
