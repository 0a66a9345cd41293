"""Benchmark of what training does besides its steps: checkpoints, random numbers, waiting for data."""

import contextlib
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.benchmarks.variants import Ours
from pipeline.methods.randomness import Stream, draw
from pipeline.methods.schedules import is_due
from pipeline.runs.checkpoints import copy_to_host, save_checkpoint
from pipeline.training.costs import seconds_of


@dataclass(frozen=True)
class CheckpointCost:
    """What a checkpoint costs: training waits for the stall alone."""

    stall_s: float
    write_s: float
    bytes: int


def checkpoint_cost(ours: Ours, device: torch.device) -> CheckpointCost:
    """Time one checkpoint of networks and optimizers that have made a step, to a temporary file."""
    copies: list[dict[str, Any]] = []
    stall = min(seconds_of(lambda: copies.append(copy_to_host(ours.learner.state_dict())), device) for _ in range(3))
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "checkpoint.pt"
        write = seconds_of(lambda: save_checkpoint(copies[-1], path), device)
        return CheckpointCost(stall, write, path.stat().st_size)


def drawing_seconds(ours: Ours, device: torch.device, repetitions: int) -> float:
    """Of an iteration's latents and noise, each sample's by its place in the run."""
    config, generator = ours.config, ours.learner.generator
    sizes = {"z_dim": generator.z_dim, "num_noise": generator.num_noise}

    def draw_all() -> None:
        for stream in (Stream.D_MAIN, Stream.G_MAIN):
            draw(config.seed, stream, 0, range(config.batch), **sizes, device=device)

    draw_all()
    return statistics.median(seconds_of(draw_all, device) for _ in range(repetitions))


def waiting_share(ours: Ours, device: torch.device, data: Path, kind: Any, iterations: int) -> float:
    """Share of the time of training on the shards in `data` that the host waits for the loader."""
    from data_shards.reading.loader import make_loader
    from data_shards.reading.shard_set import ShardSet

    config = ours.config
    shard_set = ShardSet.open(data, resolution=config.resolution)
    loader = make_loader(
        kind,
        shard_set,
        global_batch=config.batch,
        rank=0,
        world_size=1,
        seed=config.seed,
        flip=config.flip,
        with_alpha=False,
        device=device,
        num_threads=torch.get_num_threads(),
    )
    waits: list[float] = []

    def train() -> None:
        for iteration in range(iterations):
            # As in training, a GPU still works on the last step while the host gets the next batch.
            start = time.perf_counter()
            images = next(loader).images
            waits.append(time.perf_counter() - start)
            for phase in ours.learner.phases:
                if is_due(iteration, phase.interval):
                    ours.run(phase, iteration, images)

    with contextlib.closing(loader), contextlib.closing(shard_set):
        train()  # warms up
        waits.clear()
        seconds = seconds_of(train, device)
    return sum(waits) / seconds
