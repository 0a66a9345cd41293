"""Scaling over ranks: measured over gloo, and modelled for GPUs.

python pipeline/benchmarks/ranks.py             # 1, 2 and 4 ranks, the default run; then paper
python pipeline/benchmarks/ranks.py --ranks     # paper alone
unshare --map-root-user --net sh -c 'ip link set lo up && python pipeline/benchmarks/ranks.py'

The last line gives the ranks a loopback of their own, so that its counter counts their bytes and no one else's. All
ranks are on this machine, with a thread each; the same global batch is trained with and without synchronisation, in
turn. The model on paper is `pipeline/benchmarks/scaling_model.py`. Prints Markdown. Needs torch alone.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from data_shards.command import run_command

import torch
import torch.multiprocessing as mp
from torch import distributed as dist
from torch._C._distributed_c10d import FileStore
from torch.multiprocessing.spawn import start_processes
from torch.nn.parallel import DistributedDataParallel

from data_shards.errors import UserError
from data_shards.reading.order import GROUP_SIZE, rank_slots
from pipeline.benchmarks.scaling_model import Cluster, PhaseWork, count, iteration, num_small_reductions, ring_bytes
from pipeline.config import PRESETS, Config, preset
from pipeline.methods.furrygan.phases import Networks
from pipeline.methods.schedules import is_due
from pipeline.training.learner import Learner

NETWORK_COUNTERS = Path("/proc/net/dev")
PAPER_RESOLUTIONS = (256, 1024)
PAPER_GPUS = (1, 8, 16, 32, 64, 128, 256)
IMAGES_A_GPU = (4, 16, 64)
GLOBAL_BATCHES = (16, 32, 64, 256, 1024)
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Measured:
    """Some ranks on this machine.

    Attributes:
        ranks: how many.
        seconds: of an iteration, the median over the repetitions.
        seconds_alone: of the same, with nothing synchronised: every rank keeps its own gradients.
        counted_bytes: that a rank sends in an iteration, by the sizes of what is reduced.
        loopback_bytes: likewise, by the kernel's counter, headers and all; nan where there is none.
    """

    ranks: int
    seconds: float
    seconds_alone: float
    counted_bytes: float
    loopback_bytes: float

    @property
    def share(self) -> float:
        """Of the time of an iteration that synchronisation takes: sending, and waiting for the slowest."""
        return 1.0 - self.seconds_alone / self.seconds


def measure(config: Config, ranks: Sequence[int], repetitions: int) -> list[Measured]:
    """Train on this machine with each number of ranks, and without synchronisation beside it."""
    measured = []
    for num in ranks:
        context = mp.get_context("spawn")
        results, barrier = context.SimpleQueue(), context.Barrier(num)
        with tempfile.TemporaryDirectory() as directory:
            start_processes(_rank, (num, config, repetitions, directory, barrier, results), nprocs=num)
        alone, together, loopback = results.get()
        measured.append(
            Measured(
                num,
                statistics.median(together),
                statistics.median(alone),
                counted_bytes(config, num),
                statistics.median(loopback),
            )
        )
    return measured


def counted_bytes(config: Config, num_ranks: int) -> float:
    """What a rank sends in a mean iteration: gradients, the means of w, and what the area hinge asks for."""
    learner = Learner(config, CPU)
    total = 0.0
    for phase in learner.phases:
        size = sum(p.nbytes for p in getattr(learner, phase.trains).parameters())
        if phase.trains == "generator":
            size += 4 * (config.model.z_dim + config.model.z_dim_background)
            size += 4 * (num_small_reductions(phase, config) - 2)
        total += size / phase.interval
    return ring_bytes(total, num_ranks)


def _rank(rank: int, num: int, config: Config, repetitions: int, directory: str, barrier: Any, results: Any) -> None:
    """What each process does; the first one tells."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    alone, together, loopback = [], [], []
    for repetition in range(repetitions):
        alone.append(_seconds(Learner(config, CPU), config, rank, num, barrier)[0])
        store = FileStore(f"{directory}/{repetition}", num)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=num)
        seconds, sent = _seconds(_synchronised(config) if num > 1 else Learner(config, CPU), config, rank, num, barrier)
        together.append(seconds)
        loopback.append(sent)
        barrier.wait()
        dist.destroy_process_group()
    if rank == 0:
        results.put((alone, together, loopback))


def _synchronised(config: Config) -> Learner:
    """As the trainer has accelerate do it."""
    warnings.filterwarnings("ignore", "Grad strides do not match", UserWarning)  # in dimensions of size 1 alone
    learner = Learner(config, CPU)
    wrapped = [
        DistributedDataParallel(network, forward_sync_buffers=False)
        for network in (learner.generator, learner.discriminator)
    ]
    learner.networks = Networks(learner.generator, learner.discriminator, *wrapped)
    return learner


def _seconds(learner: Learner, config: Config, rank: int, num: int, barrier: Any) -> tuple[float, float]:
    """Seconds and bytes that a rank sends, of an iteration: the mean over one interval of R1."""
    slots = rank_slots(config.batch, rank, num)
    images = torch.rand(len(slots), 3, config.resolution, config.resolution) * 2.0 - 1.0

    def train(iterations: range) -> None:
        for i in iterations:
            for phase in learner.phases:
                if is_due(i, phase.interval):
                    learner.run(phase, i, images, slots)
            learner.update_ema(i * config.batch)

    interval = config.loss.r1_interval
    train(range(2))  # DDP sorts its buckets after the first
    barrier.wait()
    start, sent = time.perf_counter(), _loopback_bytes()
    barrier.wait()
    train(range(interval, 2 * interval))
    barrier.wait()
    return (time.perf_counter() - start) / interval, (_loopback_bytes() - sent) / interval / num


def _loopback_bytes() -> float:
    """Sent over the loopback since the machine started."""
    if not NETWORK_COUNTERS.is_file():
        return float("nan")
    fields = next(line.split(":")[1].split() for line in NETWORK_COUNTERS.read_text().splitlines() if " lo:" in line)
    return float(fields[8])


def measured_table(measured: Sequence[Measured], config: Config) -> str:
    """In Markdown."""
    rows = []
    for m in measured:
        ratio = f"{m.loopback_bytes / m.counted_bytes:.3f}" if m.counted_bytes else "-"
        rows.append(
            [
                *(str(m.ranks), str(config.batch // m.ranks)),
                *(f"{1e3 * m.seconds:.1f}", f"{1e3 * m.seconds_alone:.1f}", f"{m.share:.1%}"),
                *(f"{m.counted_bytes / 1e6:.3f}", f"{m.loopback_bytes / 1e6:.3f}", ratio),
            ]
        )
    head = (
        "ranks | images a rank | ms an iteration | without synchronisation | synchronising | MB sent by a rank, counted"
    )
    return _table(f"{head} | by the loopback's counter | ratio".split(" | "), rows)


def paper(config: Config, cluster: Cluster, work: Mapping[int, list[PhaseWork]]) -> Iterator[str]:
    """The model's tables in Markdown; `work` by resolution."""
    yield "Measured on one H100, or assumed (see `pipeline/benchmarks/scaling_model.py`):"
    yield _table(["", ""], [[f"`{name}`", f"{value:.4g}"] for name, value in asdict(cluster).items()])
    yield f"Counted, the networks of `{config.dataset}`, of a step, and its time on one GPU by these rates:"
    yield _counted(work, cluster)
    for resolution, phases in work.items():
        yield f"{resolution} px, the same number of images on each GPU (the global batch grows):"
        yield _weak(phases, cluster)
        yield f"{resolution} px, a fixed global batch, img/s and the share of the time spent waiting for gradients:"
        yield _strong(phases, cluster)
        yield f"{resolution} px, one setting changed, 4 images on each of 64 GPUs:"
        yield _settings(phases, cluster)


def _counted(work: Mapping[int, list[PhaseWork]], cluster: Cluster) -> str:
    rows = []
    for resolution, phases in work.items():
        for phase in phases:
            times = (f"{1e3 * phase.compute_s(batch, cluster):.1f}" for batch in IMAGES_A_GPU)
            gradients = f"{4 * phase.num_parameters / 1e6:.1f}"
            moved = float((phase.fixed + 16 * phase.per_image)[:, 1].sum())
            fixed, per_image = phase.peak_bytes
            memory = (f"{(fixed + batch * per_image) / 1e9:.1f}" for batch in IMAGES_A_GPU[1:])
            operators = str(len(phase.fixed))
            counts = f"{phase.flops_per_image / 1e9:.0f}", f"{moved / 1e9:.1f}", *memory, operators, gradients
            rows.append([f"{resolution} px", phase.name, f"1/{phase.interval}", *counts, *times])
    head = ["", "phase", "steps an iteration", "GFLOP/img", "GB moved, 16 images"]
    head += [*(f"peak GB, {batch} images" for batch in IMAGES_A_GPU[1:]), "operators", "MB of gradients"]
    return _table([*head, *(f"ms, {batch} images" for batch in IMAGES_A_GPU)], rows)


def _weak(phases: Sequence[PhaseWork], cluster: Cluster) -> str:
    rows = []
    for num in PAPER_GPUS:
        row = [str(num)]
        for batch in IMAGES_A_GPU:
            alone, predicted = (iteration(phases, batch, n, cluster) for n in (1, num))
            efficiency = predicted.img_per_s / num / alone.img_per_s
            row += [f"{predicted.img_per_s:.0f}", f"{efficiency:.0%}"]
        rows.append(row)
    heads = [[f"img/s, {batch} images a GPU", "of linear"] for batch in IMAGES_A_GPU]
    return _table(["GPUs", *(name for head in heads for name in head)], rows)


def _strong(phases: Sequence[PhaseWork], cluster: Cluster) -> str:
    rows = []
    for num in PAPER_GPUS:
        row = [str(num)]
        for batch in GLOBAL_BATCHES:
            possible = batch % (GROUP_SIZE * num) == 0
            predicted = iteration(phases, batch // num, num, cluster)
            waiting = predicted.reduction_s / predicted.seconds if possible else 0.0
            row.append(f"{predicted.img_per_s:.0f} ({waiting:.0%})" if possible else "-")
        rows.append(row)
    return _table(["GPUs", *(f"batch {batch}" for batch in GLOBAL_BATCHES)], rows)


def _settings(phases: Sequence[PhaseWork], cluster: Cluster, num: int = 64) -> str:
    few, more = GROUP_SIZE, 4 * GROUP_SIZE
    cases = [
        ("as assumed", cluster, few),
        ("an adapter for each GPU", replace(cluster, adapters=cluster.gpus_per_node), few),
        ("gradients sent in bfloat16", replace(cluster, gradient_bytes=2), few),
        ("kernels that start in no time", replace(cluster, launch_s=0.0), few),
        (f"{more} images on each GPU", cluster, more),
    ]
    rows = []
    for name, changed, batch in cases:
        predicted = iteration(phases, batch, num, changed)
        times = f"{1e3 * predicted.compute_s:.1f}", f"{1e3 * predicted.reduction_s:.1f}"
        rows.append([name, str(predicted.images), *times, f"{predicted.img_per_s:.0f}"])
    return _table(["", "global batch", "ms computing", "ms reducing", "img/s"], rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--dataset", choices=PRESETS, default="furballs", help="preset that is measured")
    add("--resolution", type=int, help="pixels; the preset's by default")
    add("--batch", type=int, help="global; the preset's by default")
    add("--ranks", type=int, nargs="*", default=[1, 2, 4], help="numbers of ranks to measure; none: paper alone")
    add("--repetitions", type=int, default=3, help="of everything, in turn")
    add("--paper", action=argparse.BooleanOptionalAction, default=True, help="print the model on paper")
    add("--paper-dataset", choices=PRESETS, default="ffhq", help="preset of the model on paper")
    add("--adapters", type=int, default=Cluster.adapters, help="of InfiniBand a node, on paper")
    return parser.parse_args()


def main() -> None:
    """Measure and predict as the command line says."""
    arguments = _parse()
    for number in (*arguments.ranks, arguments.repetitions, arguments.adapters):
        if number < 1:
            raise UserError(f"{number} is invalid: give numbers of 1 or more")
    config = preset(arguments.dataset, data="none", precision="fp32")
    config = replace(
        config, resolution=arguments.resolution or config.resolution, batch=arguments.batch or config.batch
    )
    for num in arguments.ranks:
        if config.batch % (GROUP_SIZE * num):
            raise UserError(f"batch {config.batch} does not divide among {num} ranks in groups of {GROUP_SIZE}")
    if arguments.ranks:
        cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
        print(
            f"{config.dataset}, {config.resolution} px, global batch {config.batch}; gloo, ranks with a thread each on "
            f"{cores} CPU cores; torch {torch.__version__}\n"
        )
        print(measured_table(measure(config, arguments.ranks, arguments.repetitions), config), end="\n\n", flush=True)
    if not arguments.paper:
        return
    base = preset(arguments.paper_dataset, data="none")
    work = {resolution: count(replace(base, resolution=resolution)) for resolution in PAPER_RESOLUTIONS}
    print("\n\n".join(paper(base, replace(Cluster(), adapters=arguments.adapters), work)))


if __name__ == "__main__":
    run_command(main)
