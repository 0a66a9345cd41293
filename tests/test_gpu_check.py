"""The check for a GPU goes through all its parts, says how each ended, and its own comparisons can fail."""

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import gpu_parts
import pytest
import torch
from helpers import PIPES
from torch import Tensor

from pipeline.config import preset

SCRIPT = Path(gpu_parts.__file__).with_name("gpu_check.sh")
# In the place of Python: says what the script asks for, and ends as some part would.
STUB = """#!/bin/sh
case "$*" in
    *"gpu_parts.py tests") echo tests/test_one.py ;;
    *"gpu_parts.py missing data_shards.bench"*) echo tyro ;;
    "-m pytest"*) exit 1 ;;
    *--profile*) echo "what a profile prints"; exit 3 ;;
    *"gpu_parts.py graphs"*) exit 124 ;;
esac
"""


def check(*arguments: str, python: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": python}
    return subprocess.run(["bash", str(SCRIPT), *arguments], env=environment, timeout=300, **PIPES)


def test_a_part_that_fails_is_named_and_the_others_run(tmp_path: Path) -> None:
    stub, out = tmp_path / "python", tmp_path / "out"
    stub.write_text(STUB)
    stub.chmod(0o755)
    done = check("--device", "cpu", "--out", str(out), python=str(stub))
    assert done.returncode == 1
    *_, pytest_, bench, profile, graphs, furballs, loaders = done.stdout.splitlines()
    assert pytest_.startswith("pytest: FAILED with exit code 1")
    assert bench.startswith("bench: passed")
    assert profile.startswith("profile: FAILED with exit code 3")
    assert graphs == "graphs: FAILED: not done in 600 s"
    assert furballs.startswith("furballs: passed")
    assert loaders.startswith("loaders: skipped: tyro is not installed")
    assert (out / "check.log").read_text() == done.stdout
    assert (out / "profile.txt").read_text() == "what a profile prints\n"


def test_parts_that_pass_or_are_skipped_are_no_failure(tmp_path: Path) -> None:
    stub = tmp_path / "python"
    stub.write_text(STUB)
    stub.chmod(0o755)
    done = check("--device", "cpu", "--out", str(tmp_path), "--parts", "bench loaders", python=str(stub))
    assert done.returncode == 0, done.stdout


def test_graphs_part_passes_on_a_cpu_which_has_none(tmp_path: Path) -> None:
    done = check("--device", "cpu", "--out", str(tmp_path), "--parts", "graphs", python=sys.executable)
    assert done.returncode == 0, done.stdout
    assert "iteration 7: greatest difference of a loss 0.0e+00" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "named"),
    [(["--parts", "bench nonsense"], "nonsense"), (["--wheels", "/nowhere"], "/nowhere"), (["--fast"], "--fast")],
)
def test_a_mistake_is_one_line(arguments: list[str], named: str) -> None:
    done = check(*arguments, python=sys.executable)
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert named in line


def test_other_losses_with_graphs_are_a_failure() -> None:
    runs = iter([[torch.ones(3)], [torch.tensor([1.0, 1.0, 1.02])]])

    def losses(*_: Any) -> Iterator[Tensor]:
        yield from next(runs)

    with mock.patch.object(gpu_parts, "_losses", losses), pytest.raises(SystemExit, match=r"2\.0e-02"):
        gpu_parts.graphs(preset("furballs", batch=4), torch.device("cpu"), 1)


def test_what_is_not_installed_is_named_by_its_package() -> None:
    assert gpu_parts.missing("pipeline.training.learner") is None
    assert gpu_parts.missing("no_such_package.at_all") == "no_such_package"


def test_script_pleases_shellcheck() -> None:
    tool = shutil.which("shellcheck", path=Path(sysconfig.get_path("scripts"))) or shutil.which("shellcheck")
    if tool is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run([tool, str(SCRIPT)], **PIPES, timeout=60)
    assert done.returncode == 0, done.stdout
