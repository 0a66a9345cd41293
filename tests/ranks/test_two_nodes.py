"""Two machines train as one does: two network namespaces, joined by a cable and by nothing else but a shared disk.

Each runs `accelerate launch` with the configuration of `cluster/accelerate/multi_node.yaml` and its own machine rank.
Shards and run directory are the same for both, as on a cluster's shared file system; the working directories are not.
"""

import json
import socket
import subprocess
import sysconfig
import time
from pathlib import Path

import pytest
from helpers import TRAIN, environment, shard_cache, train_in_process, training_rows, wait_until
from two_nodes import ADDRESSES, INTERFACE, delete, ip, two_nodes
from two_nodes import _needs_root as _needs_root  # a fixture of all tests here
from two_ranks import STEPS, arguments, assert_trained_alike, final_state

pytestmark = pytest.mark.netns

CONFIG = TRAIN.parents[1] / "cluster" / "accelerate" / "multi_node.yaml"


def launch(node: str, machine_rank: int, cwd: Path, *train_arguments: str) -> subprocess.Popen[str]:
    """`accelerate launch` on one of the nodes, as the first lines of the configuration have it."""
    cwd.mkdir()
    accelerate = Path(sysconfig.get_path("scripts")) / "accelerate"
    call = [
        *("ip", "netns", "exec", node, str(accelerate), "launch", "--config_file", str(CONFIG)),
        *("--num_machines", "2", "--num_processes", "2"),
        *("--machine_rank", str(machine_rank), "--main_process_ip", ADDRESSES[0]),
        *(str(TRAIN), *train_arguments),
    ]
    return subprocess.Popen(
        call,
        cwd=cwd,
        env=environment() | {"GLOO_SOCKET_IFNAME": INTERFACE},
        stdout=(cwd / "out").open("w"),
        stderr=(cwd / "err").open("w"),
        text=True,
    )


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shard_cache(tmp_path_factory)


def test_two_nodes_match_one_process(cache: Path, tmp_path: Path) -> None:
    alone = train_in_process(tmp_path, *arguments(cache, run_dir="one"))
    assert alone.code == 0, alone.err
    shared, nodes_at = tmp_path / "shared-run", [tmp_path / "node-0", tmp_path / "node-1"]
    with two_nodes() as nodes:
        launched = [
            launch(node, rank, cwd, *arguments(cache, run_dir=shared))
            for rank, (node, cwd) in enumerate(zip(nodes, nodes_at, strict=True))
        ]
        deadline = time.monotonic() + 400
        codes = [process.wait(max(1, deadline - time.monotonic())) for process in launched]
        links = [json.loads(ip("-n", node, "-json", "-statistics", "link", "show", INTERFACE))[0] for node in nodes]
    told = [(cwd / "out").read_text() for cwd in nodes_at]
    assert codes == [0, 0], "\n".join((cwd / "err").read_text() for cwd in nodes_at)
    assert_trained_alike(shared, tmp_path / "one")

    assert [row["iteration"] for row in training_rows(shared)] == list(range(1, STEPS + 1))
    assert "trained 4 iterations, 64 images" in told[0] and told[1] == ""  # rank 0 alone writes and tells
    assert [{path.name for path in cwd.iterdir()} for cwd in nodes_at] == [{"out", "err"}] * 2
    # Each gradient of each step crossed the cable, once in either direction.
    weights = [value for name in ("generator", "discriminator") for value in final_state(shared)[name].values()]
    num_bytes = STEPS * sum(value.nbytes for value in weights)
    assert all(link["stats64"]["rx"]["bytes"] > num_bytes for link in links)


@pytest.mark.parametrize("lost", [0, 1])
def test_node_that_vanishes_is_named_by_the_other_which_ends(lost: int, cache: Path, tmp_path: Path) -> None:
    """No connection is closed, packets just stop; the lost node is once that of rank 0 and of the launcher's store."""
    train = arguments(cache, run_dir=tmp_path / "run", steps=100_000, heartbeat_timeout_s=5)
    metrics, nodes_at = tmp_path / "run" / "metrics.jsonl", [tmp_path / "node-0", tmp_path / "node-1"]
    with two_nodes() as nodes:
        launched = [launch(nodes[rank], rank, nodes_at[rank], *train) for rank in (0, 1)]
        wait_until(lambda: metrics.exists() and len(metrics.read_text().splitlines()) >= 2, launched)
        delete(nodes[lost])
        survivor = 1 - lost
        code = launched[survivor].wait(60)
        assert ip("netns", "pids", nodes[survivor]) == ""
    errors = [line for line in (nodes_at[survivor] / "err").read_text().splitlines() if line.startswith("error:")]
    assert code != 0
    assert errors == [
        f"error: rank {survivor}: rank {lost} ({socket.gethostname()}) lost: nothing heard for 5 s, so the machine or "
        "its network is gone; every rank ends, and the last checkpoint is whole: resume from there"
    ]
