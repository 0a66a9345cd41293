"""Benchmark of training steps: what is measured, in which order, and how it is printed."""

import argparse
import json
from dataclasses import asdict, replace
from typing import Any

import torch

from data_shards.errors import shortage_of_memory
from pipeline.benchmarks.around import checkpoint_cost, drawing_seconds, waiting_share
from pipeline.benchmarks.measure import Limits, Profile, Runner, costs, limits, profiled
from pipeline.benchmarks.variants import Ours, Plain, Variant
from pipeline.config import Config
from pipeline.training.costs import Cost
from pipeline.training.learner import uses_bfloat16

ITERATIONS_WAITING = 20
"""Trained on --data to see how long a step waits."""

NOTHING = Cost(0.0, 0.0, 0.0, 0.0, 0.0)

HEADER = (
    "| phase | device ms | host ms | TFLOP | MFU | GB moved | of bandwidth | operators | peak GB |\n"
    "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"
)


class Bench:
    """Measures one batch size after the other, prints and keeps what it has.

    Attributes:
        figures: all that was measured, one tree a batch size; written to the file after each step.

    Args:
        arguments: of the command line.
        configs: one a batch size.
    """

    def __init__(self, arguments: argparse.Namespace, configs: list[Config]) -> None:
        self._arguments, self._device = arguments, torch.device(arguments.device)
        self._configs = configs
        self._limits: dict[torch.dtype, Limits] = {}
        self._plan = [(config, _variants(config, arguments)) for config in configs]
        self.figures = [self._heading(config) for config in configs]

    def run(self) -> None:
        """Measure everything that the command line asks for, the cheapest first."""
        for (config, variants), figures in zip(self._plan, self.figures, strict=True):
            print(f"\n## {config.dataset}, {config.resolution} px, batch {config.batch}")
            for number, variant in enumerate(variants):
                self._steps(variant, figures, with_surroundings=number == 0)
        if self._device.type == "cuda" or self._arguments.profile:
            for (_, variants), figures in zip(self._plan, self.figures, strict=True):
                for variant in variants:
                    self._kernels(variant, figures)
        if self._arguments.reference:
            for (config, variants), figures in zip(self._plan, self.figures, strict=True):
                self._reference(variants[0], Variant("plain", config, plain=True), figures)
            smallest = min(self._configs, key=lambda config: config.batch)
            difference = agreement(replace(smallest, precision="fp32"), self._device)
            self.figures[0]["agreement"] = difference
            self._keep(f"greatest relative difference of a loss term between ours, fp32, and plain: {difference:.1e}")

    def _heading(self, config: Config) -> dict[str, Any]:
        return {
            "dataset": config.dataset,
            "resolution": config.resolution,
            "batch": config.batch,
            "machine": machine(self._device),
            "torch": torch.__version__,
            "limits": {},
            "variants": {},
        }

    def _keep(self, line: str = "") -> None:
        """Print a line, and write what there is."""
        print(line, flush=True)
        if self._arguments.json:
            self._arguments.json.write_text(json.dumps(self.figures, indent=2) + "\n")

    def _started(self, variant: Variant, figures: dict[str, Any]) -> Runner | None:
        """The variant, warmed up; None where there is not enough memory for it."""
        try:
            return Runner(variant, self._device)
        except Exception as error:
            if (shortage := shortage_of_memory(error)) is None:
                raise
            figures["variants"].setdefault(variant.name, {})["failed"] = f"out of memory ({shortage})"
        self._keep(f"\n{variant.name}: out of memory at batch {variant.config.batch} ({shortage})")
        return None

    def _limits_of(self, variant: Variant, figures: dict[str, Any]) -> Limits:
        """What the device does at most in the variant's precision, measured once."""
        bfloat16 = not variant.plain and uses_bfloat16(variant.config.precision, self._device)
        dtype = torch.bfloat16 if bfloat16 else torch.float32
        name = str(dtype).removeprefix("torch.")
        if dtype not in self._limits:
            found = self._limits[dtype] = limits(self._device, dtype)
            of = "by its maker's data sheet" if found.stated_flop_per_s else "of that product"
            self._keep(
                f"\nlargest {name} matrix product: {found.matmul_flop_per_s / 1e12:.3g} TFLOP/s; copy: "
                f"{found.copy_bytes_per_s / 1e9:.3g} GB/s; MFU: share of {found.flop_per_s / 1e12:.3g} TFLOP/s, {of}"
            )
        figures["limits"][name] = asdict(self._limits[dtype])
        return self._limits[dtype]

    def _steps(self, variant: Variant, figures: dict[str, Any], *, with_surroundings: bool) -> None:
        """Time a variant's phases, and what happens around them."""
        allowed = self._limits_of(variant, figures)
        runner = self._started(variant, figures)
        if runner is None:
            return
        own = figures["variants"][variant.name] = {
            "first_iteration_s": runner.first_iteration_s,
            "warm_up_s": runner.warm_up_s,
            "phases": {},
        }
        self._keep(
            f"\n{variant.name}: first iteration after {runner.first_iteration_s:.1f} s, "
            f"warmed up after {runner.warm_up_s:.1f} s\n\n{HEADER}"
        )
        iterations = self._timed([runner], allowed, own)
        if iterations is None:
            return
        memory = f"; {runner.reserved_bytes / 1e9:.2f} GB of the GPU's memory reserved" if runner.reserved_bytes else ""
        own["reserved_bytes"] = runner.reserved_bytes
        self._keep(f"\n{variant.name}: {own['img_per_s']:.1f} img/s{memory}")
        if not variant.config.cuda_graphs:
            graphed = figures["variants"][variant.name.removesuffix(" eager")]
            if "img_per_s" in graphed:
                self._keep(f"with graphs it is {graphed['img_per_s'] / own['img_per_s']:.2f} times as fast")
        if with_surroundings:
            self._surroundings(runner.implementation, figures, *iterations)

    def _timed(self, runners: list[Runner], allowed: Limits, tree: dict[str, Any]) -> list[Cost] | None:
        """The mean iteration of each variant; None where a phase failed. They take turns.

        Rows of the last one are printed, and go into `tree`.
        """
        shown = runners[-1]
        intervals = shown.implementation.intervals()
        iterations = [NOTHING for _ in runners]
        ready = [phase for phase in shown.steps if not any(phase in runner.failures for runner in runners)]
        for phase in sorted(ready, key=lambda phase: shown.counted(phase)[0]):
            timed = shown.attempt(phase, lambda: costs(runners, phase, self._device, self._arguments.repetitions))  # noqa: B023
            if timed is not None:
                iterations = [sum_ + x.times(1 / intervals[phase]) for sum_, x in zip(iterations, timed, strict=True)]
                peak = shown.peak_bytes[phase]
                tree["phases"][phase] = _figures(timed[-1], allowed) | {"peak_bytes": peak}
                self._keep(_row(phase, timed[-1], allowed, peak))
        failures = {phase: why for runner in runners for phase, why in runner.failures.items()}
        for phase, why in failures.items():
            tree["phases"][phase] = {"failed": why}
            self._keep(f"| {phase} | {why} |" + " |" * 7)
        if failures:
            return None
        peak = max(shown.peak_bytes.values())
        tree["iteration"] = _figures(iterations[-1], allowed) | {"peak_bytes": peak}
        tree["img_per_s"] = shown.variant.config.batch / iterations[-1].device_s
        self._keep(_row("mean iteration", iterations[-1], allowed, peak))
        return iterations

    def _surroundings(self, ours: Ours, figures: dict[str, Any], iteration: Cost) -> None:
        checkpoint = checkpoint_cost(ours, self._device)
        figures["checkpoint"] = asdict(checkpoint)
        self._keep(
            f"checkpoint of {checkpoint.bytes / 1e6:.0f} MB: training stalls for {checkpoint.stall_s:.2f} s, "
            f"writing in the background takes {checkpoint.write_s:.2f} s"
        )
        drawing = drawing_seconds(ours, self._device, 5 * self._arguments.repetitions) / iteration.device_s
        figures["drawing_share"] = drawing
        self._keep(f"latents and noise, drawn sample by sample: {drawing:.2%} of an iteration")
        if self._arguments.data:
            kind = self._arguments.loader
            waiting = waiting_share(ours, self._device, self._arguments.data, kind, ITERATIONS_WAITING)
            figures["waiting_share"] = waiting
            self._keep(f"waiting for data: {waiting:.2%} of the time")

    def _kernels(self, variant: Variant, figures: dict[str, Any]) -> None:
        """What the device does in each phase of a variant; on a GPU also how often the host calls it."""
        runner = self._started(variant, figures)
        if runner is None:
            return
        title, cuda = f"{variant.name}, batch {variant.config.batch}", self._device.type == "cuda"
        profiles: dict[str, Profile] = {}
        if cuda:
            self._keep(f"\n| {title} | kernels | calls by the host | busy ms |\n| --- | --- | --- | --- |")
        for phase, steps in runner.steps.items():
            found = runner.attempt(phase, lambda: profiled(steps, self._device))  # noqa: B023
            if found is None:
                continue
            profiles[phase] = found
            if cuda:
                tree = figures["variants"][variant.name].setdefault("phases", {}).setdefault(phase, {})
                tree |= {"kernels": found.calls, "launches": found.launches, "busy_s": found.seconds}
                self._keep(f"| {phase} | {found.calls:.0f} | {found.launches:.0f} | {found.seconds * 1e3:.2f} |")
        if self._arguments.profile:
            for phase, found in profiles.items():
                title = f"{phase} of {variant.name}, batch {variant.config.batch}: {'kernel' if cuda else 'operator'}"
                self._keep(f"\n{profile_table(title, found, self._arguments.rows)}")

    def _reference(self, ours: Variant, plain: Variant, figures: dict[str, Any]) -> None:
        """Time the plain reading in turn with ours."""
        runners = [runner for variant in (ours, plain) if (runner := self._started(variant, figures)) is not None]
        if len(runners) < 2:
            return
        own: dict[str, Any] = {"phases": {}}
        figures["variants"]["plain"] = own
        self._keep(f"\nplain, batch {plain.config.batch}:\n\n{HEADER}")
        iterations = self._timed(runners, self._limits_of(plain, figures), own)
        if iterations is not None:
            speedup = iterations[1].device_s / iterations[0].device_s
            figures["speed_against_plain"] = speedup
            self._keep(f"\n{ours.name} is {speedup:.2f} times as fast as plain, timed in turn")


def agreement(config: Config, device: torch.device) -> float:
    """Greatest relative difference between a loss term of ours and of the plain reading, before any step."""
    worst = 0.0
    for phase in Ours(config, device).learner.phases:
        ours, plain = Ours(config, device), Plain(config, device)  # again: a step moves what the next one sees
        images = ours.images()
        mine = ours.run(phase, 0, images)
        for name, value in plain.run(phase, 0, images).items():
            difference = (mine[name] - value).abs() / value.abs().clamp(min=1e-3)
            worst = max(worst, float(difference.detach()))
    return worst


def profile_table(title: str, found: Profile, num_rows: int) -> str:
    """Where a phase's time goes, as a table in Markdown."""
    lines = [f"| {title} | calls | ms | share |", "| --- | --- | --- | --- |"]
    shown, rest = found.kernels[:num_rows], found.kernels[num_rows:]
    rows = [(f"`{kernel.name[:90]}`", kernel.calls, kernel.seconds) for kernel in shown]
    if rest:
        rows.append((f"{len(rest)} others", sum(k.calls for k in rest), sum(k.seconds for k in rest)))
    lines += [
        f"| {name} | {calls:.0f} | {seconds * 1e3:.2f} | {seconds / max(found.seconds, 1e-12):.1%} |"
        for name, calls, seconds in rows
    ]
    return "\n".join(lines)


def machine(device: torch.device) -> str:
    """What the device is."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def _shares(cost: Cost, allowed: Limits) -> tuple[float, float]:
    """Of the device's FLOP/s (MFU) and of its bandwidth."""
    return cost.flops / cost.device_s / allowed.flop_per_s, cost.bytes_moved / cost.device_s / allowed.copy_bytes_per_s


def _row(name: str, cost: Cost, allowed: Limits, peak_bytes: int) -> str:
    """Of the table under `HEADER`."""
    mfu, bandwidth = _shares(cost, allowed)
    arithmetic = f"{cost.flops / 1e12:.3g} | {mfu:.0%}" if cost.flops else "- | -"
    return (
        f"| {name} | {cost.device_s * 1e3:.2f} | {cost.host_s * 1e3:.2f} | {arithmetic} | "
        f"{cost.bytes_moved / 1e9:.3g} | {bandwidth:.0%} | {cost.operators:.0f} | {peak_bytes / 1e9:.2f} |"
    )


def _figures(cost: Cost, allowed: Limits) -> dict[str, float]:
    mfu, bandwidth = _shares(cost, allowed)
    return asdict(cost) | {"mfu": mfu, "bandwidth_share": bandwidth}


def _variants(config: Config, arguments: argparse.Namespace) -> list[Variant]:
    named = [(f"ours {precision}", replace(config, precision=precision)) for precision in arguments.precision]
    if arguments.recompute:
        named += [(f"{name} recomputing", replace(config, recompute=True)) for name, config in named]
    if arguments.no_graphs:
        named += [(f"{name} eager", replace(config, cuda_graphs=False)) for name, config in named]
    return [Variant(name, config) for name, config in named]
