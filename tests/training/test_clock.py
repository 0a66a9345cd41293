"""The speeds that training logs: FLOPs are those of the work done, times fit into the time that passed."""

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from helpers import BATCH, TINY, shard_cache, tiny_trainer
from torch import nn

from pipeline.config.files import config_from_dict, merge
from pipeline.methods.schedules import is_due
from pipeline.training.callbacks import Progress
from pipeline.training.clock import PhaseClock
from pipeline.training.costs import Counter, peak_flop_per_s, peak_of_gpu
from pipeline.training.interrupt import Interrupt
from pipeline.training.learner import Learner

CPU = torch.device("cpu")
# R1 every third iteration, L_cons and L_bgp every second one, and a row of metrics every fourth.
STEPS, ROW = 12, 4
EVERY_ROW = {"steps": STEPS, "log": {"metrics_interval_images": ROW * BATCH}}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shard_cache(tmp_path_factory)


def logged(cache: Path, first: int = 0, **overrides: Any) -> list[dict[str, float]]:
    """Rows of a training that begins at iteration `first`, as one does that is resumed."""
    with tiny_trainer(cache, **merge(EVERY_ROW, overrides)) as trainer:
        trainer.iteration = first
        tracker = mock.Mock()
        trainer.fit([Progress(trainer, tracker)], Interrupt())
    return [call.args[0] for call in tracker.log_metrics.call_args_list]


def counted_flops(iterations: range, **overrides: Any) -> int:
    """FLOPs of some iterations, each phase counted at each of them on fresh networks."""
    config = config_from_dict(merge(TINY, overrides))
    total = 0
    for iteration in iterations:
        learner = Learner(config, CPU)
        images = torch.zeros(BATCH, 3, config.resolution, config.resolution)
        for phase in learner.phases:
            if is_due(iteration, phase.interval):
                with Counter() as counter:
                    learner.run(phase, iteration, images, range(BATCH))
                total += counter.flops
    return total


@pytest.mark.parametrize("first", [0, 5], ids=["from the start", "resumed"])
def test_flops_of_a_row_are_those_of_its_iterations(cache: Path, first: int) -> None:
    """The wall time cancels out of TFLOP/s over img/s. L_cons is computed at even iterations alone."""
    begin = first
    for row in logged(cache, first):
        end = begin // ROW * ROW + ROW
        flops = row["speed/tflop_per_s"] * 1e12 / row["speed/img_per_s"] * (end - begin) * BATCH
        assert flops == pytest.approx(counted_flops(range(begin, end)), rel=1e-9)
        begin = end
    assert begin == STEPS


def test_flops_of_micro_batches_all_count(cache: Path) -> None:
    whole, parts = logged(cache), logged(cache, accumulate=2)
    for row, row2 in zip(whole, parts, strict=True):
        per_image, per_image2 = (r["speed/tflop_per_s"] / r["speed/img_per_s"] for r in (row, row2))
        assert per_image2 == pytest.approx(per_image, rel=0.01)  # what does not depend on the batch comes twice


def test_times_of_the_phases_fit_into_the_time_between_rows(cache: Path) -> None:
    seen: set[tuple[str, bool]] = set()
    for number, row in enumerate(logged(cache)):
        steps = dict.fromkeys(("d_main", "d_r1", "g_main"), 0)
        for iteration in range(number * ROW, (number + 1) * ROW):
            for name, interval in (("d_main", 1), ("d_r1", TINY["loss"]["r1_interval"]), ("g_main", 1)):
                # The first step of a kind is not timed, and G's have two: with L_cons and L_bgp, and without.
                kind = name, name == "g_main" and is_due(iteration, 2)
                steps[name] += is_due(iteration, interval) and kind in seen
                seen |= {kind} if is_due(iteration, interval) else set()
        assert {name for name, count in steps.items() if count} == {n[9:] for n in row if n.startswith("speed/ms_")}
        milliseconds = sum(count * row[f"speed/ms_{name}"] for name, count in steps.items() if count)
        between = ROW * BATCH / row["speed/img_per_s"] * 1e3
        assert 0.0 < milliseconds <= between * (1.0 - row["speed/data_wait_share"])
        assert "speed/mfu" not in row  # nobody states the peak of a CPU


def test_clock_counts_a_layer_as_by_hand_and_times_all_but_its_first_step() -> None:
    clock, layer, x = PhaseClock(CPU), nn.Linear(6, 10, bias=False), torch.ones(4, 6)
    for _ in range(3):
        with clock.timing("forward"):
            layer(x)
    with clock.timing("forward", "twice"):
        layer(layer.weight.new_ones(8, 6))
    one = 2 * 4 * 6 * 10
    reading = clock.read()
    assert reading.flops == 3 * one + 2 * one and reading.seconds.keys() == {"forward"}
    assert clock.read().flops == 0 and clock.read().seconds == {}


def test_a_step_that_fails_is_not_counted() -> None:
    clock = PhaseClock(CPU)

    def fail() -> None:
        with clock.timing("phase"):
            torch.ones(2, 2) @ torch.ones(2, 2)
            raise ValueError

    with pytest.raises(ValueError):
        fail()
    with clock.timing("phase"):
        torch.ones(2, 2) @ torch.ones(2, 2)
    assert clock.read().flops == 2 * 2**3


@pytest.mark.parametrize(
    ("name", "tflop_per_s"),
    [
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H200", 989.0),
        ("NVIDIA GH200 480GB", 989.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA GeForce RTX 3090", 71.0),
    ],
)
def test_peak_of_a_gpu_is_known_by_its_name(name: str, tflop_per_s: float) -> None:
    assert peak_of_gpu(name) == tflop_per_s * 1e12


def test_no_peak_is_guessed_for_other_devices() -> None:
    assert peak_of_gpu("NVIDIA GeForce GTX 1080") is None and peak_flop_per_s(CPU) is None
