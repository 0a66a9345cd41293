"""Sweeps as tests run them: small ones, in processes of their own."""

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import yaml
from helpers import PIPES, TINY, Outcome, environment, run_in_process

import ray_tune
from pipeline.config.files import merge

RAY_TUNE = Path(__file__).parents[2] / "ray_tune.py"
STEPS = 10
SMALL = ("--config", "tiny.yaml", "--trial-steps", str(STEPS))


def write_configuration(cwd: Path, cache: Path) -> None:
    """Of `SMALL`: the sweeps of a directory log to one SQLite."""
    tree = merge(TINY, {"cache_dir": str(cache), "steps": 6, "log": {"tracking_uri": "sqlite:///mlflow.db"}})
    (cwd / "tiny.yaml").write_text(yaml.safe_dump(tree))


def run_sweep(cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    call = [sys.executable, str(RAY_TUNE), *arguments]
    return subprocess.run(call, cwd=cwd, env=environment(), **PIPES, timeout=500)


def sweep_in_process(cwd: Path, *arguments: str) -> Outcome:
    """The command, without the seconds that a new process takes; for sweeps that come to no trial."""
    return run_in_process(ray_tune.main, RAY_TUNE, cwd, *arguments)


@contextlib.contextmanager
def started(cwd: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    with (cwd / "out").open("w") as out, (cwd / "err").open("w") as err:
        call = [sys.executable, str(RAY_TUNE), *arguments]
        process = subprocess.Popen(call, cwd=cwd, env=environment(), stdout=out, stderr=err, text=True)
    try:
        yield process
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(process.pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()
        process.kill()
        process.wait()
