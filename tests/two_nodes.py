"""Two network namespaces, joined by a cable: two machines, for the tests of many nodes."""

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import PIPES

INTERFACE = "veth-node"
ADDRESSES = ("10.77.0.1", "10.77.0.2")  # seen in the namespaces alone


def ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, timeout=30, **PIPES).stdout


def delete(node: str) -> None:
    """A namespace and all that runs in it; not a packet leaves it any more."""
    if not Path("/run/netns", node).exists():
        return
    with contextlib.suppress(subprocess.CalledProcessError):  # it went with the other end
        ip("-n", node, "link", "set", INTERFACE, "down")
    for pid in ip("netns", "pids", node).split():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)
    ip("netns", "delete", node)


@contextlib.contextmanager
def two_nodes() -> Iterator[tuple[str, str]]:
    """Names of two namespaces with an address each; whatever still runs in them is killed at the end."""
    nodes = (f"furrygan-{os.getpid()}-0", f"furrygan-{os.getpid()}-1")
    made = []
    try:
        for node in nodes:
            try:
                ip("netns", "add", node)
            except subprocess.CalledProcessError as error:
                pytest.skip(f"network namespaces cannot be made here: {error.stderr.strip()}")
            made.append(node)
        ip("link", "add", INTERFACE, "netns", nodes[0], "type", "veth", "peer", "name", INTERFACE, "netns", nodes[1])
        for node, address in zip(nodes, ADDRESSES, strict=True):
            ip("-n", node, "address", "add", f"{address}/24", "dev", INTERFACE)
            for link in ("lo", INTERFACE):
                ip("-n", node, "link", "set", link, "up")
        yield nodes
    finally:
        for node in made:
            delete(node)


@pytest.fixture(scope="module", autouse=True)
def _needs_root() -> None:
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    if shutil.which("ip") is None:
        pytest.skip("network namespaces need the command `ip` of iproute2")
