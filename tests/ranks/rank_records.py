"""A script that trains on 1, 2 and 4 ranks, and records what each of them did and holds.

python tests/ranks/rank_records.py SHARD_CACHE OUT

Its ranks are processes forked after the imports, which take longer than the training.
"""

import copy
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # the optimizers want it
import torch.multiprocessing
from helpers import BATCH, ON_CPU, TINY, furballs

from data_shards.reading.batches import Batch, Loader
from data_shards.reading.loader import make_loader
from data_shards.reading.shard_set import ShardSet
from pipeline.config import Config
from pipeline.config.files import config_from_dict, merge
from pipeline.evaluation.in_training import generated_mask_metrics, prepare_pseudo_truth, real_mask_prediction_metrics
from pipeline.evaluation.ranks import in_order
from pipeline.generation.sample_grid import sample_column
from pipeline.methods.randomness import Draw
from pipeline.ranks.collectives import num_ranks, rank
from pipeline.training import learner
from pipeline.training.trainer import Trainer, make_accelerator

RANKS = (1, 2, 4)
STEPS, GLOBAL_BATCH = 40, 2 * BATCH
PHI1 = 0.345
"""Close to the mean area of the coarse masks: in most steps, some ranks alone would be above it and some below."""

# Every difference of a rounding grows from step to step, and the faster the larger the steps are: see test_world_size.
COMMON = merge(
    TINY,
    {"loader": "webdataset", "batch": GLOBAL_BATCH, "optimizer": {"learning_rate": 3e-5}, "loss": {"r1_interval": 4}},
)
RECIPES: dict[str, dict[str, Any]] = {
    "aligned": {},
    "unaligned": {"loss": {"area_over_batch": True, "phi1": PHI1, "consistency_start": 5, "binarization_end": 2.0}},
}


def record(cache: Path, out: Path) -> None:
    """Train by each recipe, and leave what this rank has seen in ``out/RECIPE-RANK.pt``."""
    accelerator = make_accelerator(300.0)
    for recipe, overrides in RECIPES.items():
        config = config_from_dict(merge(COMMON | {"cache_dir": cache}, overrides))
        shard_set = ShardSet.open(furballs(cache), resolution=config.resolution)
        loader = _Recording(_loader(config, shard_set))
        trainer = Trainer(config, accelerator, loader)
        drawn: list[Draw] = []
        learner.draw_from = _recording(drawn)
        before = {f"{name}_before": copy.deepcopy(state) for name, state in _states(trainer).items()}
        measured = _measure(trainer, shard_set) if recipe == "aligned" else {}
        areas = []
        for _ in range(STEPS):
            trainer.step()
            rows = trainer.meter._sums.items()
            areas.append(sum(float(x[i]) for names, x in rows for i, n in enumerate(names) if n == "mask/area_coarse"))
        torch.save(
            {
                "pictures": loader.seen,
                "latents": [torch.cat([given.z, given.noise], dim=1) for given in drawn],
                "areas": torch.tensor(areas).diff(prepend=torch.zeros(1)),
                **_states(trainer),
                **before,
                **measured,
            },
            out / f"{recipe}-{rank()}.pt",
        )
        loader.close()
        shard_set.close()


def _states(trainer: Trainer) -> dict[str, Any]:
    return {name: getattr(trainer, name).state_dict() for name in ("generator", "discriminator", "ema")}


def _measure(trainer: Trainer, shard_set: ShardSet) -> dict[str, Any]:
    """Mask metrics and sample grid, of weights that are the same on any number of ranks: those before training."""
    truth = prepare_pseudo_truth(shard_set, trainer.config, trainer.accelerator.device, progress=False)
    made: list[int] = []
    hook = trainer.ema.register_forward_hook(lambda _module, inputs, _out: made.append(len(inputs[0])))
    generated = generated_mask_metrics(trainer.ema, truth.segmenter, num_samples=70, seed=0, fade_in=1.0, threshold=0.5)
    num_generated = sum(made)
    made.clear()
    real = real_mask_prediction_metrics(trainer.discriminator, truth.real, threshold=0.5)
    latents = torch.randn(5, trainer.ema.z_dim), torch.randn(5, trainer.ema.num_noise)
    columns = list(
        in_order(
            5,
            1,
            lambda at: sample_column(trainer.ema, *(x[at.start : at.stop] for x in latents), fade_in=1.0),
            trainer.accelerator,
            label=None,
        )
    )
    hook.remove()
    return {
        "mask_metrics": [vars(generated), vars(real)],
        "columns": columns,
        "num_generated": num_generated,
        "num_columns": len(made) // 2,
        "num_real": sum(len(images) for images, _ in truth.real),
    }


def _loader(config: Config, shard_set: ShardSet) -> Loader:
    return make_loader(
        config.loader,
        shard_set,
        global_batch=config.batch,
        rank=rank(),
        world_size=num_ranks(),
        seed=config.seed,
        flip=config.flip,
        with_alpha=False,
        device=torch.device("cpu"),
        num_threads=1,
    )


class _Recording:
    """A loader that remembers the numbers of the images that it gave."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader
        self.seen: list[torch.Tensor] = []
        self.steps_per_epoch, self.close = loader.steps_per_epoch, loader.close
        self.state_dict, self.load_state_dict = loader.state_dict, loader.load_state_dict

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        batch = next(self._loader)
        self.seen.append(batch.indices)
        return batch


_draw = learner.draw_from


def _recording(drawn: list[Draw]) -> Any:
    def draw(*args: Any, **kwargs: Any) -> Draw:
        drawn.append(_draw(*args, **kwargs))
        return drawn[-1]

    return draw


def _rank(number: int, num: int, port: int, cache: Path, out: Path) -> None:
    os.environ.update(ON_CPU)
    if num > 1:
        group = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": num, "LOCAL_WORLD_SIZE": num}
        os.environ.update({key: str(value) for key, value in group.items()})
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    record(cache, out)


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


if __name__ == "__main__":
    for num in RANKS:
        out = Path(sys.argv[2], str(num))
        out.mkdir()
        arguments = (num, _free_port(), Path(sys.argv[1]), out)
        torch.multiprocessing.start_processes(_rank, arguments, nprocs=num, start_method="fork")
