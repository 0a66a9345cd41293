"""What the tests of the training command share: a run of seconds, in a process of its own or in this one."""

import contextlib
import io
import json
import logging
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from data_shards.command import run_command

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState

from data_shards.building.builtin import furballs_shards
from data_shards.building.writer import write_shards
from data_shards.format.sample import Sample
from data_shards.reading.loader import make_loader
from data_shards.reading.shard_set import ShardSet
from pipeline import train
from pipeline.config.files import config_from_dict, merge
from pipeline.training.trainer import Trainer, make_accelerator

# For the fixtures of whole modules, which come before conftest's: threads that wait for one another take minutes.
torch.set_num_threads(1)

TRAIN = Path(train.__file__)
NUM_IMAGES, BATCH, RESOLUTION, STEPS = 64, 8, 32, 4
# Every network and every loss, with at least 4 channels each: Adam makes much of the gradients of fewer, which are
# nothing but rounding where demodulation takes a lone channel's scale away.
TINY: dict[str, Any] = {
    "num_threads": 1,
    "num_images": NUM_IMAGES,
    "batch": BATCH,
    "model": {"channel_base": 512, "channel_max": 24, "z_dim": 16, "z_dim_background": 8},
    "loss": {"r1_interval": 3, "fade_in_iterations": 10, "binarization_iterations": 10},
    "log": {"metrics_interval_images": BATCH, "grid_columns": 2, "tracking_uri": "none"},
    "evaluation": {"segmenter_steps": 3, "num_samples": 8, "num_samples_final": 8},
}
ON_CPU = {"ACCELERATE_USE_CPU": "1"}


def flags(tree: dict[str, Any], prefix: str = "--") -> list[str]:
    """A tree of overrides as command-line arguments."""
    arguments = []
    for key, value in tree.items():
        if isinstance(value, dict):
            arguments += flags(value, f"{prefix}{key}.")
        else:
            arguments += [prefix + key.replace("_", "-"), str(value)]
    return arguments


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        """Lines for the person at the keyboard; one rank's may come behind the progress bar of another one."""
        return [found for line in self.err.splitlines() for found in re.findall(r"(?:^|(?<=\]))error:.*", line)]


def train_in_process(cwd: Path, *arguments: str) -> Outcome:
    """The training command on one rank, without the seconds that a new process takes to import torch."""
    return run_in_process(train.main, TRAIN, cwd, *arguments)


def run_in_process(main: Callable[[], None], script: Path, cwd: Path, *arguments: str) -> Outcome:
    """A command on one rank in this process."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        _own_state(),
        contextlib.chdir(cwd),
        mock.patch.object(sys, "argv", [str(script), *arguments]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            run_command(main)
        except SystemExit as end:
            code = int(end.code or 0)
    return Outcome(code, out.getvalue(), err.getvalue())


def train_in_new_process(cwd: Path, *arguments: str, launcher: Sequence[str] = (), script: Path = TRAIN) -> Outcome:
    """The training command as a user calls it, on the CPU; `launcher` goes between python and the script."""
    done = subprocess.run(
        command(*arguments, launcher=launcher, script=script), cwd=cwd, env=environment(), **PIPES, timeout=300
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


PIPES: dict[str, Any] = {"capture_output": True, "text": True}


def command(*arguments: str, launcher: Sequence[str] = (), script: Path = TRAIN) -> list[str]:
    """The command line of `train_in_new_process`."""
    return [sys.executable, *launcher, str(script), *arguments]


def patched(cwd: Path, patch: str) -> Path:
    """A script that is the training command, after the lines of `patch` have spoilt something on one of its ranks."""
    lines = [
        "import os, torch",
        "from data_shards.command import run_command",
        "from pipeline import train",
        "RANK = int(os.environ['RANK'])",
        textwrap.dedent(patch),
        "run_command(train.main)",
    ]
    script = cwd / "train.py"
    script.write_text("\n".join(lines))
    return script


def environment() -> dict[str, str]:
    """A CPU, and no terminal's width."""
    return {key: value for key, value in os.environ.items() if key != "COLUMNS"} | ON_CPU


def python_path() -> str:
    """Where a new process finds the tests' own modules."""
    before = os.environ.get("PYTHONPATH")
    return os.pathsep.join([str(Path(__file__).parent), *([before] if before else [])])


@contextlib.contextmanager
def _own_state() -> Iterator[None]:
    """Undo what a command leaves in its process: log handlers on a captured stream, accelerate's singletons."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    try:
        with mock.patch.dict(os.environ, ON_CPU):
            yield
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        root.handlers[:] = handlers
        root.setLevel(level)


def shard_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory for ``--cache-dir`` that has the furballs of `TINY`; one for the whole session."""
    root = tmp_path_factory.getbasetemp() / "shards"
    furballs_shards(root, resolution=RESOLUTION, num_images=NUM_IMAGES, seed=0, num_workers=1)
    return root


def furballs(cache: Path) -> Path:
    """The shards in `shard_cache`."""
    return furballs_shards(cache, resolution=RESOLUTION, num_images=NUM_IMAGES, seed=0, num_workers=1)


@contextlib.contextmanager
def tiny_trainer(cache: Path, **overrides: Any) -> Iterator[Trainer]:
    """A trainer on one rank, without the command around it."""
    config = config_from_dict(merge(TINY, overrides))
    with _own_state():
        accelerator = make_accelerator(600.0)
        shard_set = ShardSet.open(furballs(cache), resolution=config.resolution)
        loader = make_loader(
            config.loader,
            shard_set,
            global_batch=config.batch,
            rank=0,
            world_size=1,
            seed=config.seed,
            flip=config.flip,
            with_alpha=False,
            device=torch.device("cpu"),
            num_threads=1,
        )
        yield Trainer(config, accelerator, loader)
        loader.close()
        shard_set.close()


def rows(run_dir: Path) -> list[dict[str, Any]]:
    """Of metrics.jsonl."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def training_rows(run_dir: Path) -> list[dict[str, Any]]:
    """Those of the training; the others are of the mask metrics at checkpoints."""
    return [row for row in rows(run_dir) if "loss/g_main_adversarial" in row]


def assert_same_bits(actual: Any, expected: Any, name: str = "state") -> None:
    """Two trees of tensors and plain values are equal to the last bit."""
    assert type(actual) is type(expected), name
    if isinstance(expected, dict):
        assert actual.keys() == expected.keys(), name
        for key in expected:
            assert_same_bits(actual[key], expected[key], f"{name}.{key}")
    elif isinstance(expected, (list, tuple)):
        assert len(actual) == len(expected), name
        for i, (one, other) in enumerate(zip(actual, expected, strict=True)):
            assert_same_bits(one, other, f"{name}.{i}")
    elif isinstance(expected, torch.Tensor):
        assert actual.dtype == expected.dtype and torch.equal(actual, expected), name
    else:
        assert actual == expected, name


def tiny(cache: Path, **overrides: Any) -> list[str]:
    return flags(merge(TINY | {"cache_dir": cache, "steps": STEPS}, overrides))


def write_noise(out: Path, resolution: int, *, with_alpha: bool = False, num: int = 16) -> Path:
    noise = np.random.default_rng(0).integers(256, size=(num, resolution, resolution, 3), dtype=np.uint8)
    samples = (Sample(image, image[..., 0].copy() if with_alpha else None) for image in noise)
    write_shards(samples, out, resolution=resolution, source={})
    return out


@contextlib.contextmanager
def training(
    cwd: Path, *arguments: str, launcher: Sequence[str] = (), num_rows: int = 2
) -> Iterator[subprocess.Popen[str]]:
    """The training command in the middle of its work: `num_rows` steps are logged in ``cwd/run``.

    What it says is in ``cwd/out`` and ``cwd/err``.
    """
    with (cwd / "out").open("w") as out, (cwd / "err").open("w") as err:
        process = subprocess.Popen(
            command(*arguments, launcher=launcher), cwd=cwd, env=environment(), stdout=out, stderr=err, text=True
        )
    try:
        metrics = cwd / "run" / "metrics.jsonl"
        while process.poll() is None and (not metrics.exists() or len(training_rows(cwd / "run")) < num_rows):
            time.sleep(0.05)
        assert process.poll() is None, (cwd / "err").read_text()
        yield process
    finally:
        for pid in [*children(process.pid), process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()


def wait_until(
    done: Callable[[], object],
    processes: Sequence[subprocess.Popen[str]],
    timeout_s: float = 300.0,
    poll_s: float = 0.05,
) -> None:
    """Until `done`, while all of `processes` live."""
    deadline = time.monotonic() + timeout_s
    while not done():
        assert time.monotonic() < deadline, "not done in time"
        assert all(process.poll() is None for process in processes), "ended before"
        time.sleep(poll_s)


def children(pid: int) -> list[int]:
    """Processes that a launcher has started: its ranks, in order."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


def ended(process: subprocess.Popen[str], cwd: Path, timeout_s: float = 60) -> Outcome:
    """How a command of `training` ends."""
    code = process.wait(timeout_s)
    return Outcome(code, (cwd / "out").read_text(), (cwd / "err").read_text())
