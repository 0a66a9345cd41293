"""How fast a training step is, and how much of what the arithmetic allows.

python pipeline/bench.py                                       # the default run, on this machine
python pipeline/bench.py --dataset ffhq --batch 16 64          # the paper's networks at 256 px
python pipeline/bench.py --dataset ffhq --resolution 64 --batch 4 --json bench.json

Times each phase of training beside a plain reading of the papers (`tests/reference.py`) in the same run, one after the
other and over again, so that a noisy machine slows both. Counts FLOPs with torch's own counter and compares them with
the matrix product of this machine. Needs torch alone.
"""

import argparse
import contextlib
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from data_shards.errors import UserError
from pipeline.config import PRESETS, Config, preset
from pipeline.learner import Learner
from pipeline.phases import Phase, generator_weights
from pipeline.randomness import draw
from pipeline.schedules import is_due, linear_ramp

REFERENCE = Path(__file__).resolve().parent.parent / "tests" / "reference.py"
MATMUL_SIZES = (512, 1024, 2048)


@dataclass(frozen=True)
class Cost:
    """What one optimizer step takes.

    Attributes:
        seconds: median over the repetitions.
        flops: of convolutions and matrix products.
        bytes_moved: read and written by all operators, as if no cache were there.
    """

    seconds: float
    flops: int
    bytes_moved: int

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.seconds + other.seconds, self.flops + other.flops, self.bytes_moved + other.bytes_moved)

    def times(self, factor: float) -> "Cost":
        """The cost of `factor` such steps."""
        return Cost(self.seconds * factor, round(self.flops * factor), round(self.bytes_moved * factor))


@dataclass(frozen=True)
class Measurement:
    """One implementation at one batch size: cost of a step of each phase, and of a mean iteration."""

    phases: dict[str, Cost]
    iteration: Cost
    batch: int
    peak_bytes: int | None

    @property
    def img_per_s(self) -> float:
        """Real images a second."""
        return self.batch / self.iteration.seconds

    @property
    def flop_per_s(self) -> float:
        """Counted floating-point operations a second."""
        return self.iteration.flops / self.iteration.seconds


class Implementation(Protocol):
    """What is timed."""

    phases: tuple[Phase, ...]

    def run(self, phase: Phase, iteration: int, images: Tensor) -> dict[str, Tensor]:
        """One optimizer step; the loss terms."""

    def update_ema(self, images_seen: int) -> None:
        """Move the average of G."""


class Ours:
    """The code that trains."""

    def __init__(self, config: Config, device: torch.device) -> None:
        self._learner = Learner(config, device)
        self._slots = range(config.batch)
        self.phases = self._learner.phases

    def run(self, phase: Phase, iteration: int, images: Tensor) -> dict[str, Tensor]:
        return dict(self._learner.run(phase, iteration, images, self._slots).terms)

    def update_ema(self, images_seen: int) -> None:
        self._learner.update_ema(images_seen)


class Plain:
    """The same networks, losses and random numbers, computed and optimized the straightforward way, in float32."""

    def __init__(self, config: Config, device: torch.device) -> None:
        self._config, self._device = config, device
        self._reference = _load_reference()
        self._learner = Learner(config, device)  # for its parameters
        self.phases = self._learner.phases
        self._optimizers = {
            name: torch.optim.Adam(optimizer.param_groups[0]["params"], lr=1e-3, betas=(0.0, 0.99), foreach=False)
            for name, optimizer in self._learner.optimizers.items()
        }

    def run(self, phase: Phase, iteration: int, images: Tensor) -> dict[str, Tensor]:
        learner = self._learner
        learner.generator.requires_grad_(phase.trains == "generator")
        learner.discriminator.requires_grad_(phase.trains == "discriminator")
        optimizer = self._optimizers[phase.trains]
        optimizer.zero_grad()
        terms, weights = self._terms(phase, iteration, images)
        torch.stack([weights[name] * value for name, value in terms.items()]).sum().backward()
        optimizer.step()
        return terms

    def _terms(self, phase: Phase, iteration: int, images: Tensor) -> tuple[dict[str, Tensor], dict[str, float]]:
        learner, loss, reference = self._learner, self._config.loss, self._reference
        generator, discriminator = learner.generator, learner.discriminator
        if phase.stream is None:
            return reference.reference_d_r1(discriminator, images), {"r1": loss.r1 / 2 * loss.r1_interval}
        sizes = {"z_dim": generator.z_dim, "num_noise": generator.num_noise}
        given = draw(self._config.seed, phase.stream, iteration, range(len(images)), **sizes, device=self._device)
        fade_in = linear_ramp(iteration, 0.0, 1.0, loss.fade_in_iterations)
        if phase.trains == "discriminator":
            terms = reference.reference_d_main(generator, discriminator, images, given.z, given.noise, fade_in)
            return terms, {"adversarial": 1.0, "prediction": loss.prediction}
        terms = reference.reference_g_main(
            generator,
            discriminator,
            given.z,
            given.noise,
            fade_in,
            phi1=loss.phi1,
            phi2=loss.phi2,
            area_over_batch=loss.area_over_batch,
            with_consistency=iteration >= loss.consistency_start and is_due(iteration, loss.consistency_interval),
            with_participation=is_due(iteration, loss.participation_interval),
        )
        return terms, generator_weights(loss, iteration)

    def update_ema(self, images_seen: int) -> None:
        del images_seen
        with torch.no_grad():
            for average, parameter in zip(
                self._learner.ema.parameters(), self._learner.generator.parameters(), strict=True
            ):
                average.copy_(parameter.lerp(average, 0.999))


def _load_reference() -> ModuleType:
    if not REFERENCE.is_file():
        raise UserError(f"{REFERENCE} is missing: run the benchmark from a checkout, or with --no-reference")
    spec = importlib.util.spec_from_file_location("reference", REFERENCE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["reference"] = module
    spec.loader.exec_module(module)
    return module


def measure(
    implementations: dict[str, Implementation], config: Config, device: torch.device, repetitions: int
) -> dict[str, Measurement]:
    """Time the phases of all implementations in turn, and count what they do."""
    images = torch.rand(config.batch, 3, config.resolution, config.resolution, device=device) * 2.0 - 1.0
    interval = config.loss.r1_interval

    def steps(implementation: Implementation) -> Iterator[tuple[str, Callable[[], Any]]]:
        """Two iterations, for some terms of g_main are due at every other one only; R1 once."""
        for iteration in (0, 1):
            for phase in implementation.phases:
                if iteration == 0 or phase.name != "d_r1":
                    yield phase.name, partial(implementation.run, phase, iteration, images)
            yield "ema", partial(implementation.update_ema, iteration * config.batch)

    counts: dict[str, dict[str, list[tuple[int, int]]]] = {}
    seconds: dict[str, dict[str, list[float]]] = {}
    peaks: dict[str, int | None] = {}
    for name, implementation in implementations.items():
        counts[name], seconds[name] = {}, {}
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        for phase, step in steps(implementation):  # warms up as well
            with _Counter() as counter:
                step()
            counts[name].setdefault(phase, []).append((counter.flops, counter.bytes_moved))
        peaks[name] = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    for _ in range(repetitions):
        for name, implementation in implementations.items():
            for phase, step in steps(implementation):
                with _stopwatch(device) as watch:
                    step()
                seconds[name].setdefault(phase, []).append(watch.seconds)

    measured = {}
    for name in implementations:
        phases = {
            phase: Cost(
                statistics.median(seconds[name][phase]),
                round(statistics.mean(flops for flops, _ in pairs)),
                round(statistics.mean(moved for _, moved in pairs)),
            )
            for phase, pairs in counts[name].items()
        }
        iteration = phases["d_main"] + phases["g_main"] + phases["ema"] + phases["d_r1"].times(1 / interval)
        measured[name] = Measurement(phases, iteration, config.batch, peaks[name])
    return measured


class _Counter(TorchDispatchMode):
    """Counts FLOPs by torch's own formulas, and bytes of the tensors that operators take and give.

    `torch.utils.flop_counter.FlopCounterMode` follows modules too, and cannot do so through R1's double backward.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0
        self.bytes_moved = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func.overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=out)
        if not func.is_view:
            self.bytes_moved += sum(x.nbytes for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor))
        return out


@dataclass
class _Watch:
    seconds: float = 0.0


@contextlib.contextmanager
def _stopwatch(device: torch.device) -> Iterator[_Watch]:
    watch = _Watch()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    yield watch
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    watch.seconds = time.perf_counter() - start


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the fastest square matrix product of this machine, best of several."""
    best = 0.0
    for n in MATMUL_SIZES if device.type == "cpu" else (4096, 8192):
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        for _ in range(8):
            with _stopwatch(device) as watch:
                a @ b
            best = max(best, 2 * n**3 / watch.seconds)
    return best


def report(
    config: Config, device: torch.device, measured: dict[str, Measurement], peaks: dict[str, float]
) -> tuple[str, dict[str, Any]]:
    """The result as Markdown and as plain types."""
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    lines = [
        f"{config.dataset}, {config.resolution} px, batch {config.batch}; {machine}; torch {torch.__version__}",
        "",
        "| | img/s | GFLOP/img | GB moved/img | GFLOP/s | peak GB | d_main ms | d_r1 ms | g_main ms | ema ms |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, m in measured.items():
        peak = "-" if m.peak_bytes is None else f"{m.peak_bytes / 1e9:.2f}"
        times = " | ".join(f"{m.phases[phase].seconds * 1e3:.1f}" for phase in ("d_main", "d_r1", "g_main", "ema"))
        lines.append(
            f"| {name} | {m.img_per_s:.1f} | {m.iteration.flops / m.batch / 1e9:.2f} | "
            f"{m.iteration.bytes_moved / m.batch / 1e9:.3f} | {m.flop_per_s / 1e9:.0f} | {peak} | {times} |"
        )
    lines.append("")
    lines += [f"Matrix product, {name}: {peak / 1e9:.0f} GFLOP/s" for name, peak in peaks.items()]
    ours = measured["ours"]
    facts: dict[str, Any] = {
        "dataset": config.dataset,
        "resolution": config.resolution,
        "batch": config.batch,
        "machine": machine,
        "torch": torch.__version__,
        "matmul_flop_per_s": peaks,
        "share_of_matmul": ours.flop_per_s / max(peaks.values()),
    }
    lines.append(f"Share of it that an iteration reaches: {facts['share_of_matmul']:.0%}")
    if "plain" in measured:
        facts["speedup"] = measured["plain"].iteration.seconds / ours.iteration.seconds
        lines.append(f"Speed against the plain reading: {facts['speedup']:.2f}x")
    for name, m in measured.items():
        facts[name] = {
            "img_per_s": m.img_per_s,
            "peak_bytes": m.peak_bytes,
            "iteration": vars(m.iteration),
            "phases": {phase: vars(cost) for phase, cost in m.phases.items()},
        }
    return "\n".join(lines), facts


def agreement(config: Config, device: torch.device) -> float:
    """Greatest relative difference between a loss term of ours and of the plain reading, before any step."""
    ours, plain = Ours(config, device), Plain(config, device)
    images = torch.rand(config.batch, 3, config.resolution, config.resolution, device=device) * 2.0 - 1.0
    worst = 0.0
    for phase in ours.phases[::-1]:  # the generator's first: a step on D would move what it sees
        mine, theirs = ours.run(phase, 0, images), plain.run(phase, 0, images)
        for name, value in theirs.items():
            difference = (mine[name] - value).abs() / value.abs().clamp(min=1e-3)
            worst = max(worst, float(difference.detach()))
        ours, plain = Ours(config, device), Plain(config, device)
    return worst


def main() -> None:
    """Measure as the command line says."""
    parser = argparse.ArgumentParser(description="Time training steps against a plain reading of the papers.")
    parser.add_argument("--dataset", default="furballs", choices=PRESETS, help="preset whose networks to time")
    parser.add_argument("--resolution", type=int, help="side of the pictures in pixels; the preset's by default")
    parser.add_argument("--batch", type=int, nargs="+", help="batch sizes; the preset's by default")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--repetitions", type=int, default=5, help="times that every step is timed")
    parser.add_argument("--threads", type=int, help="CPU threads; all cores by default")
    parser.add_argument("--no-reference", action="store_true", help="time ours alone")
    parser.add_argument("--json", type=Path, help="file for the figures")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True

    base = preset(arguments.dataset, data="none")
    if arguments.resolution:
        base = replace(base, resolution=arguments.resolution)
    peaks = {"float32": matmul_peak(device, torch.float32)}
    if device.type == "cuda":
        peaks["bfloat16"] = matmul_peak(device, torch.bfloat16)
    results = []
    for batch in arguments.batch or [base.batch]:
        config = replace(base, batch=batch)
        implementations: dict[str, Implementation] = {"ours": Ours(config, device)}
        if not arguments.no_reference:
            print(f"greatest relative difference of a loss term: {agreement(config, device):.1e}")
            implementations["plain"] = Plain(config, device)
        text, facts = report(config, device, measure(implementations, config, device, arguments.repetitions), peaks)
        print(text, flush=True)
        results.append(facts)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
