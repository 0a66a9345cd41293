"""The benchmark counts right, compares like with like, keeps what it has, and runs where torch alone is installed."""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from data_shards.errors import UserError
from pipeline import bench
from pipeline.benchmarks.alternatives import Group, groups
from pipeline.benchmarks.measure import Runner, costs, profiled
from pipeline.benchmarks.steps import agreement
from pipeline.benchmarks.variants import Ours, Plain, Variant
from pipeline.config import Config, ModelConfig, preset
from pipeline.training.costs import Counter, Operators

CPU = torch.device("cpu")
PHASES = {"d_main", "d_r1", "g_main", "ema"}
OTHERS = ("accelerate", "pydantic", "mlflow", "tyro", "webdataset", "nvidia.dali", "torchvision", "yaml", "tqdm", "PIL")


@pytest.fixture
def config() -> Config:
    return preset("furballs", batch=4, model={"channel_base": 512, "channel_max": 24})


def test_preset_without_pydantic_is_the_one_with_it() -> None:
    from pipeline.config.files import config_from_dict

    for name in ("furballs", "ffhq", "cub"):
        assert preset(name, data="shards") == config_from_dict({"dataset": name, "data": "shards"})
    assert preset("ffhq", data="x", model={"channel_max": 64}).model == ModelConfig(channel_max=64)


def test_flops_and_bytes_of_a_convolution_and_its_backward() -> None:
    x, weight = torch.randn(2, 3, 8, 8, requires_grad=True), torch.randn(5, 3, 3, 3, requires_grad=True)
    with Counter() as counter:
        y = F.conv2d(x, weight, padding=1)
    forward = 2 * (2 * 5 * 8 * 8) * (3 * 3 * 3)  # a multiplication and an addition a tap and output
    assert counter.flops == forward
    assert counter.bytes_moved == 4 * (x.numel() + weight.numel() + y.numel())
    with Counter() as counter:
        y.sum().backward()
    assert counter.flops == 2 * forward


def test_plain_reading_computes_the_same_losses(config: Config) -> None:
    assert agreement(config, CPU) < 1e-4


def test_what_adam_writes_counts_though_it_returns_nothing() -> None:
    parameter = torch.zeros(1000, requires_grad=True)
    parameter.grad = torch.ones(1000)
    optimizer = torch.optim.Adam([parameter], fused=True)
    optimizer.step()
    with Counter() as counter:
        optimizer.step()
    # Reads parameter, gradient and two moments, and writes as many; the step's number counts for little.
    assert counter.bytes_moved == pytest.approx(8 * parameter.nbytes, rel=0.01)


def test_memory_is_what_is_alive_at_a_time_since_the_last_restart() -> None:
    with Operators() as operators:
        held = torch.zeros(1000)  # 4,000 bytes
        for _ in range(3):
            held + 1.0  # gone at once
    assert operators.peak_bytes == 8000
    operators.restart()
    with operators:
        held.mul_(2.0)
    assert operators.peak_bytes == 4000 and len(operators.work) == 1


@pytest.fixture(scope="module")
def runners() -> tuple[Runner, Runner]:
    config = preset("furballs", batch=4, model={"channel_base": 512, "channel_max": 24})
    return Runner(Variant("ours", config), CPU), Runner(Variant("plain", config, plain=True), CPU)


@pytest.mark.parametrize("phase", sorted(PHASES))
def test_plain_reading_does_more_arithmetic_for_the_same_step(phase: str, runners: tuple[Runner, Runner]) -> None:
    ours, plain = costs(runners, phase, CPU, repetitions=1)
    assert plain.flops > 1.2 * ours.flops or phase == "ema"
    assert plain.bytes_moved > ours.bytes_moved and plain.operators > ours.operators
    assert 0 < ours.device_s == ours.host_s


def test_counts_of_a_phase_are_the_mean_over_iterations_with_and_without_the_terms_that_are_not_always_due(
    config: Config, runners: tuple[Runner, Runner]
) -> None:
    ours = Ours(config, CPU)
    (g_main,) = (phase for phase in ours.learner.phases if phase.name == "g_main")
    flops = []
    for iteration in (0, 1):
        with Counter() as counter:
            ours.run(g_main, iteration, ours.images())
        flops.append(counter.flops)
    assert flops[0] > flops[1]
    assert costs(runners[:1], "g_main", CPU, repetitions=1)[0].flops == sum(flops) / 2


def test_terms_that_start_late_are_measured() -> None:
    """The unaligned recipe has L_cons from iteration 5,000 on."""
    lsun = preset("lsun_cat", data="none", resolution=32, batch=4, model={"channel_base": 512, "channel_max": 24})
    steps = Ours(lsun, CPU).steps()["g_main"]
    assert ["consistency" in step() for step in steps] == [True, False]


def test_profile_lists_what_a_step_computes(runners: tuple[Runner, Runner]) -> None:
    found = profiled(runners[0].steps["d_main"], CPU)
    calls = {kernel.name: kernel.calls for kernel in found.kernels}
    assert calls["aten::convolution_backward"] > 3 and not PHASES & set(calls)
    seconds = [kernel.seconds for kernel in found.kernels]
    assert seconds == sorted(seconds, reverse=True) and found.launches == 0


SMALL = ("--batch", "4", "--repetitions", "1", "--device", "cpu")


def run_bench(*arguments: str) -> None:
    with mock.patch.object(sys, "argv", ["bench.py", *arguments]):
        bench.main()


def test_rows_are_printed_before_the_next_phase_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    """Phases whose rows are on the screen when a phase is run for the last time."""
    printed: dict[str, set[str]] = {}
    run, text = Ours.run, ""

    def watched(self: Ours, phase: Any, *arguments: Any) -> Any:
        nonlocal text
        text += capsys.readouterr().out
        printed[phase.name] = {name for name in PHASES if f"\n| {name} | " in text}
        return run(self, phase, *arguments)

    with mock.patch.object(Ours, "run", watched):
        run_bench(*SMALL, "--no-reference")
    assert printed == {"g_main": {"ema"}, "d_r1": {"ema", "g_main"}, "d_main": {"ema", "g_main", "d_r1"}}


@pytest.fixture
def _same_handlers() -> Iterator[None]:
    """A command that was interrupted ignores further signals until its end, which is not that of the tests."""
    former = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    # A shell that starts the tests in the background has SIGINT ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in former.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("_same_handlers")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_keeps_its_figures(
    number: signal.Signals, code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The signal comes as the plain reading begins."""
    path = tmp_path / "bench.json"
    with mock.patch.object(Plain, "run", lambda *_: signal.raise_signal(number)), pytest.raises(SystemExit) as ended:
        run_bench(*SMALL, "--json", str(path))
    assert ended.value.code == code
    (figures,) = json.loads(path.read_text())
    assert figures["variants"].keys() == {"ours auto"} and figures["variants"]["ours auto"]["phases"].keys() == PHASES
    out, err = capsys.readouterr()
    assert "| mean iteration |" in out and str(path) in err and len(err.splitlines()) == 1


def test_a_phase_without_enough_memory_is_named_and_the_others_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, path = Ours.run, tmp_path / "bench.json"

    def short(self: Ours, phase: Any, *arguments: Any) -> Any:
        if phase.name == "d_r1":
            torch.empty(2**60)
        return run(self, phase, *arguments)

    with mock.patch.object(Ours, "run", short):
        run_bench(*SMALL, "--no-reference", "--json", str(path))
    (figures,) = json.loads(path.read_text())
    phases = figures["variants"]["ours auto"]["phases"]
    assert "out of memory" in phases.pop("d_r1")["failed"]
    assert phases.keys() == PHASES - {"d_r1"} and all(phase["device_s"] > 0 for phase in phases.values())
    assert "| d_r1 | out of memory" in capsys.readouterr().out


def test_benchmark_runs_with_torch_alone_and_writes_its_figures(tmp_path: Path) -> None:
    launcher = (
        f"import runpy, sys; sys.modules.update(dict.fromkeys({OTHERS})); sys.argv = sys.argv[1:]; "
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    arguments = [*SMALL, "--threads", "1", "--profile", "--json", str(tmp_path / "bench.json")]
    done = subprocess.run(
        [sys.executable, "-c", launcher, bench.__file__, *arguments], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "times as fast as plain" in done.stdout
    (figures,) = json.loads((tmp_path / "bench.json").read_text())
    ours, plain = figures["variants"]["ours auto"], figures["variants"]["plain"]
    assert figures["speed_against_plain"] > 0 and figures["agreement"] < 1e-4
    phases, iteration = ours["phases"], ours["iteration"]
    assert phases.keys() == plain["phases"].keys() == PHASES
    for what in ("device_s", "host_s", "flops", "bytes_moved", "operators"):  # R1 comes every 16th iteration
        total = sum(phase[what] / (16 if name == "d_r1" else 1) for name, phase in phases.items())
        assert iteration[what] == pytest.approx(total)
    assert ours["img_per_s"] == pytest.approx(4 / iteration["device_s"])
    limits = figures["limits"]["float32"]
    assert limits["stated_flop_per_s"] is None
    for cost in (*phases.values(), iteration):
        assert cost["mfu"] == pytest.approx(cost["flops"] / cost["device_s"] / limits["matmul_flop_per_s"])
        bandwidth = cost["bytes_moved"] / cost["device_s"]
        assert cost["bandwidth_share"] == pytest.approx(bandwidth / limits["copy_bytes_per_s"])
        assert 10**6 < cost["peak_bytes"] <= iteration["peak_bytes"] < 2**31
    assert 0 < figures["drawing_share"] < 1
    assert figures["checkpoint"]["stall_s"] > 0 and 10**5 < figures["checkpoint"]["bytes"] < 10**8


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--batch", "0"], "--batch 0"),
        (["--batch", "6"], "batch 6"),
        (["--resolution", "48"], "resolution 48"),
        (["--json", "nowhere/bench.json"], "nowhere"),
        (["--device", "cpu", "--no-graphs"], "--no-graphs"),
        pytest.param(
            ["--device", "cuda"],
            "--device cuda",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU"),
        ),
    ],
)
def test_impossible_arguments_end_with_one_line(
    arguments: list[str], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench.py", *arguments])
    with pytest.raises(UserError, match=named):
        bench.main()


@pytest.mark.parametrize("group", groups(batch=2, channels=4, resolution=8), ids=lambda group: group.name)
def test_alternatives_compute_the_same(group: Group) -> None:
    inputs = [torch.randn(shape, dtype=torch.float64) for shape in group.shapes]
    plain, *others = (way(*inputs) for way in group.ways.values())
    for other in others:
        torch.testing.assert_close(other, plain)
