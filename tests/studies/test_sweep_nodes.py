"""A sweep over a Ray cluster of two machines: network namespaces, joined by a cable and a shared disk."""

import contextlib
import shutil
import subprocess
import sys
import sysconfig
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from helpers import PIPES, TINY, environment, shard_cache
from sweeping import RAY_TUNE, SMALL
from two_nodes import ADDRESSES, two_nodes
from two_nodes import _needs_root as _needs_root  # a fixture of all tests here

from pipeline.config.files import merge
from pipeline.studies.sweep.records import read_records

pytestmark = pytest.mark.netns

PORT = 6379
RAY = Path(sysconfig.get_path("scripts")) / "ray"
TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": uuid.uuid4().hex}


@contextlib.contextmanager
def ray_cluster(nodes: tuple[str, str]) -> Iterator[str]:
    """Its address: a head and a worker with a core each, started by hand as cluster/README.md says."""
    temporary = Path("/tmp", f"ray-{uuid.uuid4().hex[:8]}")  # sockets in it must have short names
    head = ("--head", f"--port={PORT}", "--include-dashboard=false", f"--temp-dir={temporary}")
    worker = (f"--address={ADDRESSES[0]}:{PORT}",)
    for node, address, options in zip(nodes, ADDRESSES, (head, worker), strict=True):
        call = ["ip", "netns", "exec", node, str(RAY), "start", *options, f"--node-ip-address={address}"]
        with (temporary.parent / f"{temporary.name}.log").open("a") as log:  # a pipe would stay open with the daemons
            started = subprocess.run(
                [*call, "--num-cpus=1"], env=environment() | TOKEN, stdout=log, stderr=log, timeout=120
            )
        assert started.returncode == 0, Path(log.name).read_text()
    try:
        yield f"{ADDRESSES[0]}:{PORT}"  # the daemons end with their namespaces
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        Path(log.name).unlink()


def test_trials_run_on_both_machines_of_a_cluster(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    tree = merge(TINY, {"cache_dir": str(shard_cache(tmp_path_factory))})
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tree))
    with two_nodes() as nodes, ray_cluster(nodes) as address:
        arguments = (*SMALL, "--num-trials", "4", "--address", address, "--out", "sweep", "--scheduler", "none")
        call = ["ip", "netns", "exec", nodes[0], sys.executable, str(RAY_TUNE), *arguments]
        done = subprocess.run(call, cwd=tmp_path, env=environment() | TOKEN, **PIPES, timeout=500)
        assert done.returncode == 0, done.stdout + done.stderr
    records = read_records(tmp_path / "sweep" / "trials")
    assert [record.outcome for record in records] == ["finished"] * 4, [record.reason for record in records]
    assert {record.node for record in records} == set(ADDRESSES)
