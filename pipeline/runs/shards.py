"""Opening of the shards that a configuration names, or of the built-in ones."""

import os

from accelerate import Accelerator

from data_shards.building.builtin import furballs_shards
from data_shards.reading.shard_set import ShardSet
from data_shards.remote.cache import ShardCache
from pipeline.config import Config


def open_shards(config: Config, accelerator: Accelerator) -> ShardSet:
    """Open them on every rank, the caller's to close; furballs are drawn where they are not there.

    Raises:
        UserError: they are missing, damaged, or of another resolution.
    """
    if config.data is not None:
        cache = ShardCache(config.cache_dir / "fetched", max_bytes=int(config.fetched_gb * 1e9))
        shard_set = ShardSet.open(config.data, resolution=config.resolution, cache=cache)
        if config.verify_data:
            shard_set.verify(part=accelerator.local_process_index, parts=int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
        return shard_set
    with accelerator.main_process_first():
        path = furballs_shards(
            config.cache_dir,
            resolution=config.resolution,
            num_images=config.num_images,
            seed=0,
            progress=accelerator.is_main_process,
        )
    return ShardSet.open(path, resolution=config.resolution)
