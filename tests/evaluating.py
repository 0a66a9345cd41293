"""What the tests of the evaluation command share."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from helpers import PIPES, Outcome, environment, python_path, run_in_process, tiny, train_in_process

from pipeline import evaluate

EVALUATE = Path(evaluate.__file__)
FEATURES = ("--features", "extractors:TinyFeatures")
ACCELERATE_TWO_RANKS = (
    *("-m", "accelerate.commands.launch"),
    *("--multi_gpu", "--num_processes", "2", "--main_process_port", "0"),
)
NUM_SAMPLES = 24
# Three batches: an odd number for two ranks.
SMALL = ("--run", "run", "--num-samples", str(NUM_SAMPLES), "--batch", "8", "--num-threads", "1")


def train_tiny_run(cwd: Path, cache: Path, **overrides: Any) -> Path:
    """A trained run of seconds in ``cwd / "run"``."""
    outcome = train_in_process(cwd, *tiny(cache, run_dir="run", **overrides))
    assert outcome.code == 0, outcome.err
    return cwd / "run"


def evaluate_in_process(cwd: Path, *arguments: str) -> Outcome:
    """The evaluation command on one rank, in this process."""
    return run_in_process(evaluate.main, EVALUATE, cwd, *arguments)


def evaluate_in_new_process(cwd: Path, *arguments: str, launcher: Sequence[str] = ()) -> Outcome:
    """The evaluation command as a user calls it, on the CPU."""
    done = subprocess.run(
        [sys.executable, *launcher, str(EVALUATE), *arguments],
        cwd=cwd,
        env=environment() | {"PYTHONPATH": python_path()},
        **PIPES,
        timeout=300,
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


def results(out: Path) -> dict[str, Any]:
    """What an evaluation wrote."""
    tree: dict[str, Any] = json.loads((out / "evaluation.json").read_text())
    return tree
