"""What `docs/scaling.md` rests on: bytes really sent, and a model whose parts are right."""

import math
import shutil
import subprocess
import sys
from dataclasses import replace
from unittest import mock

import pytest
import torch
from helpers import PIPES
from test_bench import OTHERS
from torch._subclasses.fake_tensor import FakeTensorMode

from data_shards.errors import UserError
from models import fused
from pipeline.benchmarks import ranks as bench_ranks
from pipeline.benchmarks.scaling_model import Cluster, PhaseWork, count, iteration, memory_bytes
from pipeline.config import Config, preset
from pipeline.training.costs import Counter, Operators
from pipeline.training.learner import Learner

OWN_LOOPBACK = ("unshare", "--map-root-user", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh")
CLUSTER = Cluster()


@pytest.fixture(scope="module")
def config() -> Config:
    return preset("furballs", batch=8, model={"channel_base": 512, "channel_max": 24})


@pytest.fixture(scope="module")
def work(config: Config) -> list[PhaseWork]:
    return count(config)


def test_ranks_send_the_counted_bytes_and_the_benchmark_needs_torch_alone() -> None:
    """On a loopback of their own, whose counter counts headers and acknowledgements too."""
    if shutil.which("unshare") is None or subprocess.run([*OWN_LOOPBACK, "true"], **PIPES).returncode:
        pytest.skip("network namespaces cannot be made here (unshare --map-root-user --net, ip)")
    launcher = (
        f"import runpy, sys; sys.modules.update(dict.fromkeys({OTHERS})); sys.argv = sys.argv[1:]; "
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    arguments = ["--ranks", "2", "--batch", "8", "--repetitions", "1", "--no-paper"]
    call = [*OWN_LOOPBACK, sys.executable, "-c", launcher, bench_ranks.__file__, *arguments]
    done = subprocess.run(call, timeout=500, **PIPES)
    assert done.returncode == 0, done.stderr
    (row,) = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("| 2 |")]
    learner = Learner(preset("furballs"), torch.device("cpu"))
    generator, discriminator = (
        sum(p.nbytes for p in network.parameters()) for network in (learner.generator, learner.discriminator)
    )
    # Of two ranks, each sends what is reduced, once: half of it summed, and half of the sums.
    expected = (generator + discriminator * (1 + 1 / 16)) / 1e6
    assert float(row[5]) == pytest.approx(expected, rel=1e-3)
    assert 1.0 <= float(row[7].rstrip(" |")) < 1.05


def test_work_is_counted_as_where_it_is_done(config: Config, work: list[PhaseWork]) -> None:
    """Without computing it; at a batch that was not counted but follows from those that were."""
    learner, batch = Learner(config, torch.device("cpu")), 12
    images = torch.zeros(batch, 3, config.resolution, config.resolution)
    assert [phase.name for phase in work] == ["d_main", "d_r1", "g_main"]
    for phase, counted in zip(learner.phases, work, strict=True):
        with Counter() as counter, fused.on_every_device():
            learner.run(phase, 0, images, range(batch))
        counted_flops = float((counted.fixed + batch * counted.per_image)[:, 0].sum())
        assert counted_flops == pytest.approx(counter.flops, rel=1e-9)
        assert counted.flops_per_image * batch == pytest.approx(counter.flops, rel=0.01)
        network = getattr(learner, phase.trains)
        assert counted.num_parameters == sum(p.numel() for p in network.parameters())


def test_reduction_takes_what_rings_take() -> None:
    cluster = Cluster(nvlink_bytes_per_s=100.0, adapter_bytes_per_s=10.0, adapters=2, latency_s=0.0)
    assert cluster.all_reduce_s(1000.0, 1) == 0.0
    assert cluster.all_reduce_s(1000.0, 4) == pytest.approx(2 * 3 / 4 * 10)
    assert cluster.all_reduce_s(1000.0, 32) == pytest.approx(2 * 7 / 8 * 10 + 2 * 3 / 4 * 50)
    assert replace(cluster, latency_s=1.0).all_reduce_s(0.0, 32) == 10.0  # five hops, there and back


def hand_made(**changes: object) -> PhaseWork:
    """Two operators: 100 and 200 FLOPs an image, and each 50 bytes of weights and 10 an image."""
    one = torch.tensor([[0.0, 50.0], [0.0, 50.0]]), torch.tensor([[100.0, 10.0], [200.0, 10.0]])
    phase = PhaseWork("d_main", 1, *(x.double() for x in one), (0.0, 0.0), num_parameters=1000, num_small_reductions=0)
    return replace(phase, **changes)  # type: ignore[arg-type]


def test_an_operator_takes_its_arithmetic_its_bytes_or_its_start() -> None:
    slow = Cluster(bf16_flop_per_s=100.0, memory_bytes_per_s=1e9, launch_s=0.0)
    assert hand_made().compute_s(4, slow) == pytest.approx(4.0 + 8.0, rel=1e-3)
    narrow = replace(slow, bf16_flop_per_s=1e9, memory_bytes_per_s=10.0)
    update = 36 * 1000 / 10
    assert hand_made().compute_s(4, narrow) == pytest.approx(9.0 + 9.0 + update)
    assert hand_made().compute_s(4, replace(slow, bf16_flop_per_s=1e9, launch_s=7.0)) == pytest.approx(14.0, rel=1e-3)


def test_gradients_are_reduced_after_the_backward_pass() -> None:
    cluster = Cluster(memory_bytes_per_s=1e9, nvlink_bytes_per_s=1e3, latency_s=0.0)
    # 4,000 bytes on four GPUs, each of which sends 3/4 of them twice.
    assert hand_made().reduction_s(4, cluster) == pytest.approx(6.0, rel=1e-3)
    assert hand_made().reduction_s(1, cluster) == 0.0


@pytest.fixture(scope="module")
def paper() -> list[PhaseWork]:
    """Of the paper's setting, 256 px."""
    return count(preset("ffhq", data="none"))


def test_on_eight_gpus_reducing_takes_less_than_three_percent(paper: list[PhaseWork]) -> None:
    """With 16 images on each; the claim of `pipeline/ranks/all_reduce.py`."""
    predicted = iteration(paper, 16, 8, CLUSTER)
    assert 0.0 < predicted.reduction_s < 0.03 * predicted.seconds


def test_an_iteration_moves_at_most_70_gb(paper: list[PhaseWork]) -> None:
    moved = sum(float((phase.fixed + 16 * phase.per_image)[:, 1].sum()) / phase.interval for phase in paper)
    assert moved < 70e9


@pytest.mark.parametrize(("batch", "gigabytes"), [(16, 12), (64, 45)])
def test_the_paper_s_networks_fit_without_recomputation(batch: int, gigabytes: int, paper: list[PhaseWork]) -> None:
    assert memory_bytes(paper, batch) < gigabytes * 1e9


def test_memory_counts_what_is_alive_at_a_time() -> None:
    with FakeTensorMode(), Operators() as operators:
        x = torch.empty(1000)
        for _ in range(5):
            x = x + 1.0  # two of 4,000 bytes at a time
        y = x * 2.0
        del x
    assert operators.peak_bytes == 8000 and y.numel() == 1000


def test_more_gpus_are_never_faster_than_their_number(work: list[PhaseWork]) -> None:
    alone = iteration(work, 8, 1, CLUSTER)
    assert alone.reduction_s == 0.0 and alone.seconds > 0.0
    efficiencies = [iteration(work, 8, num, CLUSTER).img_per_s / num / alone.img_per_s for num in (1, 8, 16, 64, 256)]
    assert efficiencies == sorted(efficiencies, reverse=True) and 0 < efficiencies[-1] < efficiencies[0] == 1.0


def test_lazy_phase_counts_its_share(work: list[PhaseWork]) -> None:
    with_r1, without = (iteration([p for p in work if p.name in names], 8, 8, CLUSTER) for names in NAMES)
    r1 = iteration([replace(p, interval=1) for p in work if p.name == "d_r1"], 8, 8, CLUSTER)
    assert math.isclose(with_r1.seconds - without.seconds, r1.seconds / 16, rel_tol=1e-6)


NAMES = (("d_main", "d_r1", "g_main"), ("d_main", "g_main"))


def test_tables_leave_out_what_cannot_be(config: Config, work: list[PhaseWork]) -> None:
    """Fewer than 4 images on a GPU; and every table has a full row for each of its lines."""
    tables = list(bench_ranks.paper(config, CLUSTER, {32: work}))
    for table in tables[1::2]:
        lines = table.splitlines()
        assert len({line.count("|") for line in lines}) == 1 and len(lines) > 2
    strong = {line.split(" | ")[0]: line for line in tables[7].splitlines()[2:]}
    assert strong["| 8"].count(" - ") == 1 and strong["| 16"].count(" - ") == 2  # batch 16; and batch 32
    assert "nan" not in "".join(tables)


@pytest.mark.parametrize(
    ("arguments", "named"), [(["--batch", "12", "--ranks", "2"], "batch 12"), (["--adapters", "0"], "0 is invalid")]
)
def test_impossible_arguments_end_with_one_line(arguments: list[str], named: str) -> None:
    with mock.patch.object(sys, "argv", ["bench_ranks.py", *arguments]), pytest.raises(UserError, match=named):
        bench_ranks.main()
