"""What `test_deepspeed.py` lets each of two ranks do, all in one pair of processes.

python -m torch.distributed.run --nproc-per-node 2 tests/ranks/zero_worker.py OUT RUN
"""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch import distributed as dist

from data_shards.reading.order import rank_slots
from pipeline.config import Config, preset
from pipeline.config.files import config_from_dict, load_config
from pipeline.methods.furrygan import losses
from pipeline.ranks.ddp import DdpEngine
from pipeline.ranks.engine import Engine
from pipeline.ranks.zero import PartitionedEngine, ReplicatedEngine, zero_engine
from pipeline.runs.checkpoints import copy_to_host
from pipeline.training.finite_guard import NonFiniteLossError
from pipeline.training.interrupt import Interrupt
from pipeline.training.learner import Learner
from pipeline.training.run import train as run_training
from pipeline.training.trainer import make_accelerator

STEPS, HALF = 20, 10  # R1 at every third
BACKENDS: dict[str, dict[str, Any]] = {"ddp": {}}
BACKENDS |= {f"zero{stage}": {"backend": "deepspeed", "zero_stage": stage} for stage in (0, 1, 2)}
HANDED = ("ddp", "zero2", "zero1", "zero0", "ddp")
MODEL = {"channel_base": 512, "channel_max": 24, "z_dim": 16, "z_dim_background": 8}
LOSS = {"r1_interval": 3, "area_over_batch": True, "fade_in_iterations": 10, "binarization_iterations": 10}


def config_of(backend: str, **overrides: Any) -> Config:
    common = {"batch": 8, "precision": "fp32", "model": MODEL, "loss": LOSS, "num_threads": 1}
    return preset("furballs", **common | BACKENDS[backend] | overrides)


def make_learner(config: Config, accelerator: Accelerator) -> Learner:
    """As the trainer does."""
    learner = Learner(config, accelerator.device)

    def make_engine(network: nn.Module, optimizer: torch.optim.Optimizer) -> Engine:
        if config.backend == "deepspeed":
            return zero_engine(network, optimizer, config, accelerator.device)
        return DdpEngine(network, optimizer, accelerator)

    learner.synchronise(make_engine)
    return learner


def rounding_alike(learner: Learner) -> Learner:
    """Torch's fused Adam rounds a tensor's last elements otherwise on a CPU: it would matter which tensor one is in."""
    for optimizer in learner.optimizers.values():
        del optimizer.found_inf  # type: ignore[attr-defined]
        optimizer.param_groups[0]["fused"] = False
    return learner


def train(learner: Learner, config: Config, iterations: range) -> None:
    slots = rank_slots(config.batch, dist.get_rank(), dist.get_world_size())
    for iteration in iterations:
        generator = torch.Generator().manual_seed(iteration)
        images = torch.rand(config.batch, 3, config.resolution, config.resolution, generator=generator) * 2.0 - 1.0
        for phase in learner.phases:
            if iteration % phase.interval == 0:
                learner.run(phase, iteration, images[slots], slots)
        learner.update_ema((iteration + 1) * config.batch)


def storage_bytes(tensors: list[Tensor]) -> int:
    """Of the memory behind tensors, which may share it."""
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())


def measure(learner: Learner, config: Config) -> dict[str, int]:
    """Bytes that this rank really holds, in an iteration after the first; as in `pipeline.benchmarks.memory.Held`."""
    train(learner, config, range(1))
    networks = learner.generator, learner.discriminator
    parameters = [p for network in networks for p in network.parameters()]
    most = {"gradients": 0, "buckets": 0}
    zeros = [engine._engine.optimizer for engine in learner.engines.values() if isinstance(engine, PartitionedEngine)]

    def look(*more: Tensor) -> None:
        """At the gradients and at what they are gathered in."""
        buckets, gradients = [], [*more, *(p.grad for p in parameters if p.grad is not None)]
        for zero in zeros:
            buckets += [buffer for bucket in zero.ipg_buckets.values() for buffer in bucket.buffer]
            gradients += [x for part in zero.averaged_gradients.values() for x in part or ()]
        shared = {x.untyped_storage().data_ptr() for x in buckets}
        gradients = [x for x in gradients if x.untyped_storage().data_ptr() not in shared]
        for name, tensors in (("gradients", gradients), ("buckets", buckets)):
            most[name] = max(most[name], storage_bytes(tensors))

    for p in parameters:
        p.requires_grad_().register_post_accumulate_grad_hook(lambda _: look())
    for zero in zeros:

        def flattened(tensors: list[Tensor], flatten: Any = zero.flatten) -> Tensor:
            flat: Tensor = flatten(tensors)
            look(flat)
            return flat

        zero.flatten = flattened
    for engine in learner.engines.values():
        if isinstance(engine.module, nn.parallel.DistributedDataParallel):
            sizes = engine.module._get_ddp_logging_data()["bucket_sizes"]
            most["buckets"] += sum(map(int, sizes.split(", ")))
        elif type(engine) is ReplicatedEngine:
            deepspeed, reduce = engine._engine, engine._engine.allreduce_bucket

            def reduced(bucket: list[Tensor], *args: Any, reduce: Any = reduce, **kwargs: Any) -> Any:
                flat = reduce(bucket, *args, **kwargs)
                most["buckets"] = max(most["buckets"], flat.untyped_storage().nbytes())
                return flat

            deepspeed.allreduce_bucket = reduced
    train(learner, config, range(1, 2))
    optimizers = learner.optimizers.values()
    moving = [p for optimizer in optimizers for p in optimizer.param_groups[0]["params"]]
    settled = [x for network in (*networks, learner.ema) for x in (*network.parameters(), *network.buffers())]
    moments = [x for o in optimizers for state in o.state.values() for name, x in state.items() if name != "step"]
    return {"weights": storage_bytes(settled + moving), "optimizer": storage_bytes(moments)} | most


def go_on(run_dir: Path, accelerator: Accelerator) -> None:
    """With a run, for two steps of stage 2."""
    config = config_from_dict(load_config(run_dir / "config.yaml"))
    further = replace(config, steps=config.steps + 2, backend="deepspeed", zero_stage=2)
    with Interrupt() as interrupt:
        run_training(further, accelerator, interrupt)


def main() -> None:
    out, run_dir, accelerator = Path(sys.argv[1]), Path(sys.argv[2]), make_accelerator(60.0)
    rank = dist.get_rank()
    torch.set_num_threads(1)

    def save(learner: Learner, name: str) -> dict[str, Any]:
        """Written by rank 0, read by all."""
        state = copy_to_host(learner.state_dict())
        if rank == 0:
            torch.save(state, out / f"{name}.pt")
        dist.barrier()
        return torch.load(out / f"{name}.pt", weights_only=True)

    def say(name: str, what: Any) -> None:
        (out / f"{name}-{rank}.json").write_text(json.dumps(what))

    for backend in BACKENDS:
        config = config_of(backend)
        learner = rounding_alike(make_learner(config, accelerator))
        for steps in (range(HALF), range(HALF, STEPS)):
            train(learner, config, steps)
            save(learner, f"{backend}-{steps.stop}")

    state = None
    for i, backend in enumerate(HANDED):
        config = config_of(backend)
        learner = make_learner(config, accelerator)
        if state is not None:
            learner.load_state_dict(state)
        rounding_alike(learner)
        train(learner, config, range(i * HALF // len(HANDED), (i + 1) * HALF // len(HANDED)))
        state = save(learner, f"handed-{i}")

    for backend in BACKENDS:
        config = config_of(backend, batch=16, accumulate=2)
        learner = rounding_alike(make_learner(config, accelerator))
        train(learner, config, range(2))
        save(learner, f"accumulated-{backend}")

    for backend in BACKENDS:
        config = config_of(backend)
        say(f"held-{backend}", measure(make_learner(config, accelerator), config))

    go_on(run_dir, accelerator)

    binarization = losses.binarization
    if rank == 1:
        losses.binarization = lambda mask: binarization(mask) * math.nan
    for backend in BACKENDS:
        config = config_of(backend)
        learner = make_learner(config, accelerator)
        before = copy_to_host(dict(learner.generator.named_parameters()))
        try:
            train(learner, config, range(1))
            told = "nothing"
        except NonFiniteLossError as error:
            told = str(error)
        same = all(torch.equal(before[name], p) for name, p in learner.generator.named_parameters())
        say(f"broken-{backend}", {"told": told, "moved": not same})
    accelerator.end_training()


if __name__ == "__main__":
    main()
