"""How fast a training step is, and how much of what the arithmetic allows.

python pipeline/bench.py                                             # the default run, on this machine
python pipeline/bench.py --dataset ffhq --resolution 64 --batch 4    # the paper's networks, small pictures
python pipeline/bench.py --dataset ffhq --batch 16 64 --precision fp32 bf16 --json bench.json       # on a GPU

Times each phase of training beside a plain reading of the papers (`tests/reference.py`) in the same run, one after the
other and over again, with the matrix product of this machine in between: noise slows all alike. Needs torch alone, and
a loader's packages for --data.
"""

import argparse
import contextlib
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from data_shards.command import run_command
from data_shards.errors import UserError
from pipeline.bench_variants import Ours, Plain, Variant
from pipeline.checkpoints import copy_to_host, save_checkpoint
from pipeline.config import PRESETS, Config, preset
from pipeline.costs import Cost, Counter, matmul_flop_per_s, peak_bytes, seconds_of
from pipeline.learner import uses_bfloat16
from pipeline.randomness import Stream, draw
from pipeline.schedules import is_due


@dataclass(frozen=True)
class Measurement:
    """One variant: cost of a step of each phase, and of a mean iteration.

    Attributes:
        phases: by name.
        iteration: with the lazy phase's share.
        batch: real images an iteration.
        peak_bytes: most memory held at a time, of a process that does nothing else.
        matmul_share: FLOP/s of the iteration over that of a matrix product in the same precision.
    """

    phases: dict[str, Cost]
    iteration: Cost
    batch: int
    peak_bytes: int
    matmul_share: float

    @property
    def img_per_s(self) -> float:
        """Real images a second."""
        return self.batch / self.iteration.seconds

    @property
    def flop_per_s(self) -> float:
        """Counted floating-point operations a second."""
        return self.iteration.flops / self.iteration.seconds


def measure(variants: Sequence[Variant], device: torch.device, repetitions: int) -> dict[str, Measurement]:
    """Time the phases of all variants in turn, and count what they do; one that is out of memory is left out."""
    peaks: dict[str, int] = {}
    for variant in variants:
        try:
            peaks[variant.name] = peak_bytes(partial(_first_iteration, variant, device), device)
        except torch.OutOfMemoryError:
            print(f"{variant.name}: out of memory at batch {variant.config.batch}")
        _free(device)
    variants = [variant for variant in variants if variant.name in peaks]
    made = {variant.name: variant.make(device) for variant in variants}
    counts = {name: _count(implementation) for name, implementation in made.items()}

    seconds: dict[str, dict[str, list[float]]] = {name: {} for name in made}
    dtypes = {v.name: _dtype(v, device) for v in variants}
    matmul: dict[torch.dtype, list[float]] = {dtype: [] for dtype in dtypes.values()}
    for _ in range(repetitions):
        for dtype, rates in matmul.items():
            rates.append(matmul_flop_per_s(device, dtype))
        for name, implementation in made.items():
            for phase, step in implementation.steps():
                seconds[name].setdefault(phase, []).append(seconds_of(step, device))

    measured = {}
    for variant in variants:
        name = variant.name
        phases = {phase: Cost(statistics.median(seconds[name][phase]), *counts[name][phase]) for phase in counts[name]}
        iteration = Cost(0.0, 0, 0)
        for phase, cost in phases.items():
            iteration += cost.times(1 / variant.config.loss.r1_interval if phase == "d_r1" else 1.0)
        share = iteration.flops / iteration.seconds / statistics.median(matmul[dtypes[name]])
        measured[name] = Measurement(phases, iteration, variant.config.batch, peaks[name], share)
    return measured


def _first_iteration(variant: Variant, device: torch.device) -> None:
    """The one in which everything is due."""
    for _, step in variant.make(device).steps([0]):
        step()


def _count(implementation: Ours) -> dict[str, tuple[int, int]]:
    """FLOPs and bytes of a step of each phase, the mean over `steps`; also warms up."""
    counted: dict[str, list[tuple[int, int]]] = {}
    for phase, step in implementation.steps():
        with Counter() as counter:
            step()
        counted.setdefault(phase, []).append((counter.flops, counter.bytes_moved))
    return {
        phase: (round(statistics.mean(f for f, _ in pairs)), round(statistics.mean(b for _, b in pairs)))
        for phase, pairs in counted.items()
    }


def _dtype(variant: Variant, device: torch.device) -> torch.dtype:
    bfloat16 = not variant.plain and uses_bfloat16(variant.config.precision, device)
    return torch.bfloat16 if bfloat16 else torch.float32


def agreement(config: Config, device: torch.device) -> float:
    """Greatest relative difference between a loss term of ours and of the plain reading, before any step."""
    worst = 0.0
    for phase in Ours(config, device).learner.phases:
        ours, plain = Ours(config, device), Plain(config, device)  # anew: a step moves what the next one sees
        images = ours.images()
        mine = ours.run(phase, 0, images)
        for name, value in plain.run(phase, 0, images).items():
            difference = (mine[name] - value).abs() / value.abs().clamp(min=1e-3)
            worst = max(worst, float(difference.detach()))
    return worst


@dataclass(frozen=True)
class CheckpointCost:
    """What a checkpoint costs: training waits for the stall alone."""

    stall_seconds: float
    write_seconds: float
    bytes: int


def checkpoint_cost(variant: Variant, device: torch.device) -> CheckpointCost:
    """Time one checkpoint of networks and optimizers, to a temporary file."""
    ours = variant.make(device)
    for _, step in ours.steps():
        step()
    copies: list[dict[str, Any]] = []
    stall = min(seconds_of(lambda: copies.append(copy_to_host(ours.learner.state_dict())), device) for _ in range(3))
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "checkpoint.pt"
        write = seconds_of(lambda: save_checkpoint(copies[-1], path), device)
        return CheckpointCost(stall, write, path.stat().st_size)


def drawing_share(variant: Variant, device: torch.device, iteration_seconds: float, repetitions: int) -> float:
    """Share of an iteration's time that goes into its latents and noise, each sample's by its place in the run."""
    config, generator = variant.config, variant.make(device).learner.generator
    sizes = {"z_dim": generator.z_dim, "num_noise": generator.num_noise}

    def draw_all() -> None:
        for stream in (Stream.D_MAIN, Stream.G_MAIN):
            draw(config.seed, stream, 0, range(config.batch), **sizes, device=device)

    draw_all()
    return statistics.median(seconds_of(draw_all, device) for _ in range(repetitions)) / iteration_seconds


def waiting_share(variant: Variant, device: torch.device, data: Path, kind: Any, iterations: int) -> float:
    """Share of the time of training on the shards in `data` that the host waits for the loader."""
    from data_shards.loader import make_loader
    from data_shards.shard_set import ShardSet

    config, ours = variant.config, variant.make(device)
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


def report(measured: dict[str, Measurement]) -> str:
    """The measurements as a table in Markdown."""
    lines = [
        "| | img/s | GFLOP/img | GB moved/img | GFLOP/s | of matmul | peak GB | d_main ms | d_r1 ms | g_main ms | "
        "ema ms | speed against plain |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, m in measured.items():
        times = " | ".join(f"{cost.seconds * 1e3:.1f}" for cost in m.phases.values())
        speedup = f"{_speedup(measured, name):.2f}x" if "plain" in measured else "-"
        lines.append(
            f"| {name} | {m.img_per_s:.1f} | {m.iteration.flops / m.batch / 1e9:.2f} | "
            f"{m.iteration.bytes_moved / m.batch / 1e9:.3f} | {m.flop_per_s / 1e9:.0f} | {m.matmul_share:.0%} | "
            f"{m.peak_bytes / 1e9:.2f} | {times} | {speedup} |"
        )
    return "\n".join(lines)


def profile_table(variant: Variant, device: torch.device, num_operators: int = 6) -> str:
    """Where an iteration's time goes, by operator, as a table in Markdown; all of its phases count once."""
    implementation = variant.make(device)
    for _, step in implementation.steps([0]):
        step()
    activities = [ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU]
    with profile(activities=activities) as profiler:
        for _, step in implementation.steps([0]):
            step()
    key = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    events = sorted(profiler.key_averages(), key=lambda event: -getattr(event, key))
    total = sum(getattr(event, key) for event in events)
    lines = [f"| {variant.name}: operator | calls | share of time |", "| --- | --- | --- |"]
    lines += [
        f"| `{event.key[:60]}` | {event.count} | {getattr(event, key) / total:.1%} |"
        for event in events[:num_operators]
    ]
    convolutions = sum(getattr(event, key) for event in events if "conv" in event.key)
    return "\n".join([*lines, f"| all convolutions | | {convolutions / total:.1%} |"])


def _speedup(measured: dict[str, Measurement], name: str) -> float:
    return measured["plain"].iteration.seconds / measured[name].iteration.seconds


def _figures(measured: dict[str, Measurement]) -> dict[str, Any]:
    """The measurements as plain types."""
    return {
        name: {
            "img_per_s": m.img_per_s,
            "peak_bytes": m.peak_bytes,
            "share_of_matmul": m.matmul_share,
            "speedup": _speedup(measured, name) if "plain" in measured else None,
            "iteration": vars(m.iteration),
            "phases": {phase: vars(cost) for phase, cost in m.phases.items()},
        }
        for name, m in measured.items()
    }


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _variants(config: Config, arguments: argparse.Namespace) -> list[Variant]:
    named = [(f"ours {precision}", replace(config, precision=precision)) for precision in arguments.precision]
    if arguments.recompute:
        named += [(f"{name} recomputing", replace(config, recompute=True)) for name, config in named]
    variants = [Variant(name, config) for name, config in named]
    if arguments.reference:
        variants.append(Variant("plain", config, plain=True))
    return variants


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time training steps against a plain reading of the papers.")
    parser.add_argument("--dataset", default="furballs", choices=PRESETS, help="preset whose networks to time")
    parser.add_argument("--resolution", type=int, help="side of the pictures in pixels; the preset's by default")
    parser.add_argument("--batch", type=int, nargs="+", help="batch sizes; the preset's by default")
    parser.add_argument(
        "--precision", nargs="+", default=["auto"], choices=("auto", "fp32", "bf16"), help="of our convolutions"
    )
    parser.add_argument("--recompute", action="store_true", help="also time ours with activations computed twice")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="cuda where there is one, by default")
    parser.add_argument("--repetitions", type=int, default=5, help="times that every step is timed")
    parser.add_argument("--threads", type=int, help="CPU threads; all cores by default")
    parser.add_argument("--no-reference", dest="reference", action="store_false", help="time ours alone")
    parser.add_argument("--data", type=Path, help="shards to train on, to see how long a step waits for them")
    parser.add_argument("--loader", default="auto", choices=("auto", "dali", "webdataset"), help="that reads --data")
    parser.add_argument("--profile", action="store_true", help="also show which operators the time goes to")
    parser.add_argument("--json", type=Path, help="file for the figures")
    arguments = parser.parse_args()
    for name in ("batch", "repetitions", "threads"):
        given = getattr(arguments, name)
        for number in given if isinstance(given, list) else [given]:
            if number is not None and number < 1:
                raise UserError(f"--{name} {number} is impossible: give 1 or more")
    if arguments.device is None:
        arguments.device = "cuda" if torch.cuda.is_available() else "cpu"
    elif arguments.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU here, give --device cpu")
    return arguments


def main() -> None:
    """Measure as the command line says."""
    arguments = _parse()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"

    base = preset(arguments.dataset, data="none")
    if arguments.resolution:
        base = replace(base, resolution=arguments.resolution)
    batches = arguments.batch or [base.batch]
    if arguments.reference:
        difference = agreement(replace(base, batch=min(batches), precision="fp32"), device)
        print(f"greatest relative difference of a loss term between ours, fp32, and plain: {difference:.1e}\n")
    results = []
    for batch in batches:
        config = replace(base, batch=batch)
        print(f"{config.dataset}, {config.resolution} px, batch {batch}; {machine}; torch {torch.__version__}\n")
        variants = _variants(config, arguments)
        measured = measure(variants, device, arguments.repetitions)
        print(report(measured), flush=True)
        if arguments.profile:
            for variant in variants:
                print(f"\n{profile_table(variant, device)}", flush=True)
        checkpoint = checkpoint_cost(variants[0], device)
        print(
            f"\ncheckpoint of {checkpoint.bytes / 1e6:.0f} MB: training stalls for {checkpoint.stall_seconds:.2f} s, "
            f"writing in the background takes {checkpoint.write_seconds:.2f} s"
        )
        drawing = drawing_share(
            variants[0], device, measured[variants[0].name].iteration.seconds, 5 * arguments.repetitions
        )
        print(f"latents and noise, drawn sample by sample: {drawing:.2%} of an iteration")
        figures = {
            "dataset": config.dataset,
            "resolution": config.resolution,
            "batch": batch,
            "machine": machine,
            "torch": torch.__version__,
            "variants": _figures(measured),
            "checkpoint": vars(checkpoint),
            "drawing_share": drawing,
        }
        if arguments.data:
            share = waiting_share(variants[0], device, arguments.data, arguments.loader, 20)
            figures["waiting_share"] = share
            print(f"waiting for data: {share:.2%} of the time")
        print(flush=True)
        results.append(figures)
        _free(device)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    run_command(main, memory_remedy="give a smaller --batch")
