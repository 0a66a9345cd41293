"""The benchmark counts right, compares like with like, and runs where torch alone is installed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from data_shards.errors import UserError
from pipeline import bench
from pipeline.bench import Measurement, agreement, measure
from pipeline.bench_alternatives import Group, groups
from pipeline.bench_variants import Variant
from pipeline.config import Config, ModelConfig, preset
from pipeline.costs import Cost, Counter

CPU = torch.device("cpu")
OTHERS = ("accelerate", "pydantic", "mlflow", "tyro", "webdataset", "nvidia.dali", "torchvision", "yaml", "tqdm", "PIL")


@pytest.fixture
def config() -> Config:
    return preset("furballs", batch=4, model={"channel_base": 512, "channel_max": 24})


def test_preset_without_pydantic_is_the_one_with_it() -> None:
    from pipeline.config_io import config_from_dict

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


def test_plain_reading_does_more_arithmetic_for_the_same_step(config: Config) -> None:
    measured = measure([Variant("ours", config), Variant("plain", config, plain=True)], CPU, repetitions=1)
    assert measured["plain"].iteration.flops > 1.5 * measured["ours"].iteration.flops
    for m in measured.values():
        assert set(m.phases) == {"d_main", "d_r1", "g_main", "ema"}
        assert all(cost.seconds > 0 for cost in m.phases.values())


def test_an_iteration_has_its_share_of_the_lazy_phase(config: Config) -> None:
    ours = measure([Variant("ours", config)], CPU, repetitions=1)["ours"]
    phases = ours.phases
    lazily = phases["d_r1"].flops / config.loss.r1_interval
    assert ours.iteration.flops == pytest.approx(phases["d_main"].flops + phases["g_main"].flops + lazily, abs=1)


def test_rates_are_per_real_image() -> None:
    cost = Cost(seconds=0.5, flops=3_000, bytes_moved=100)
    m = Measurement({}, cost, batch=16, peak_bytes=1, matmul_share=0.5)
    assert (m.img_per_s, m.flop_per_s) == (32.0, 6_000.0)


def test_benchmark_runs_with_torch_alone_and_writes_its_figures(tmp_path: Path) -> None:
    launcher = (
        f"import runpy, sys; sys.modules.update(dict.fromkeys({OTHERS})); sys.argv = sys.argv[1:]; "
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    arguments = ["--batch", "4", "--repetitions", "1", "--threads", "1", "--json", str(tmp_path / "bench.json")]
    done = subprocess.run(
        [sys.executable, "-c", launcher, bench.__file__, *arguments], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "speed against plain" in done.stdout
    (figures,) = json.loads((tmp_path / "bench.json").read_text())
    ours, plain = figures["variants"]["ours auto"], figures["variants"]["plain"]
    assert ours["speedup"] == pytest.approx(plain["iteration"]["seconds"] / ours["iteration"]["seconds"])
    assert ours["img_per_s"] == pytest.approx(4 / ours["iteration"]["seconds"])
    assert 0 < ours["peak_bytes"] < 2**31 and 0 < ours["share_of_matmul"] < 1
    assert 0 < figures["drawing_share"] < 1
    assert figures["checkpoint"]["stall_seconds"] > 0 and 10**5 < figures["checkpoint"]["bytes"] < 10**8


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--batch", "0"], "--batch 0"),
        (["--batch", "6"], "batch 6"),
        (["--resolution", "48"], "resolution 48"),
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
