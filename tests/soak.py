"""Trains on two ranks for a long time while ranks are killed, and checks that nothing was lost.

    python tests/soak.py --minutes 30 --kills 8
    python tests/soak.py --minutes 3 --kills 2 --verify-exact

Ranks die by SIGKILL at random moments, every second time in the middle of writing a checkpoint; `torchrun
--max-restarts` starts them again. At the end SIGTERM stops the run. Ends with 1 if a check fails.
"""

import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data_shards.command import run_command

import tyro
from helpers import assert_same_bits, children, command, environment, flags, training_rows, wait_until
from two_ranks import EXACT, TWO_RANKS, of_the_seed

from data_shards.errors import UserError
from pipeline.runs.checkpoints import BEST, checkpoint_path, list_checkpoints, load_checkpoint

NUM_RANKS, BATCH = 2, 16
PATIENCE_S = 600.0
"""For ranks to start and train, or to save and end."""


@dataclass(frozen=True)
class Arguments:
    """How long, and how often."""

    minutes: float = 30.0
    """From the first step to SIGTERM."""
    kills: int = 8
    """Ranks to kill."""
    verify_exact: bool = False
    """Train again without interruption and compare every bit, which takes as long again."""
    checkpoint_interval_images: int = 800
    """Between checkpoints."""
    seed: int = 0
    """Of the moments and the ranks."""
    out: Path = Path("runs/soak")
    """A directory that is not there yet."""
    cache_dir: Path = Path("shards")
    """Where furballs are kept."""


def main() -> None:
    """Train, kill, check, tell."""
    arguments = tyro.cli(Arguments, description=__doc__)
    if arguments.out.exists():
        raise UserError(f"--out {arguments.out} is there already: give another one, or delete it")
    killed, whole = arguments.out.absolute() / "killed", arguments.out.absolute() / "whole"
    num_cut = soak(arguments, killed)

    told = (killed / "err").read_text()
    stopped = re.search(r"SIGTERM: stopped after iteration (\d+)", told)
    if stopped is None:
        raise UserError(f"SIGTERM did not stop the run: see {killed / 'err'}")
    last = int(stopped[1])
    starts = re.findall(r"resuming at iteration (\d+)", told)
    print(f"trained     {last} iterations in {arguments.minutes:.0f} minutes")
    print(f"killed      {arguments.kills} ranks, {num_cut} of them while a checkpoint was half written")
    print(f"resumed at  {', '.join(starts)}")
    problems = [*check_history(killed / "run", last), *check_checkpoints(killed / "run", last)]
    if arguments.verify_exact:
        with launched(arguments, whole, "--steps", str(last)) as process:
            process.wait()
        problems += check_exact(killed / "run", whole / "run", last)
    print("\n".join(f"FAILED      {problem}" for problem in problems) or "held        all checks")
    sys.exit(bool(problems))


@contextlib.contextmanager
def launched(arguments: Arguments, cwd: Path, *more: str) -> Iterator[subprocess.Popen[str]]:
    """The training command under torchrun, in a directory of its own; what it says is in ``err`` there."""
    cwd.mkdir(parents=True)
    config = {
        "run_dir": "run",
        "cache_dir": arguments.cache_dir.absolute(),
        "batch": BATCH,
        "num_threads": 1,
        "log": {
            "metrics_interval_images": BATCH,
            "checkpoint_interval_images": arguments.checkpoint_interval_images,
            "keep_checkpoints": 10,
            "tracking_uri": "none",
        },
        "evaluation": {"num_samples": 16, "num_samples_final": 16},
    }
    launcher = [*TWO_RANKS, "--max-restarts", str(arguments.kills)]
    with (cwd / "out").open("w") as out, (cwd / "err").open("w") as err:
        process = subprocess.Popen(
            command(*flags(config), *more, launcher=launcher),
            cwd=cwd,
            env=environment(),
            stdout=out,
            stderr=err,
            text=True,
        )
    try:
        yield process
    finally:
        for pid in [*children(process.pid), process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()


def soak(arguments: Arguments, cwd: Path) -> int:
    """Train and kill; how many checkpoints were cut off."""
    rng = random.Random(arguments.seed)
    seconds = 60 * arguments.minutes
    moments = sorted(rng.uniform(0.0, 0.9) * seconds for _ in range(arguments.kills))
    num_cut, ranks = 0, [0]
    with launched(arguments, cwd, "--steps", "100000000") as process:
        wait_until(lambda: newest_row(cwd) > 0, [process], PATIENCE_S)
        start = time.monotonic()
        for i, moment in enumerate(moments):
            time.sleep(max(0.0, start + moment - time.monotonic()))
            ranks = new_ranks(process, ranks)  # perhaps still starting
            rank = rng.randrange(NUM_RANKS)
            if i % 2:
                former, rank = half_written(cwd), 0  # which writes
                wait_until(lambda former=former: half_written(cwd) - former, [process], PATIENCE_S, poll_s=0.001)
            os.kill(ranks[rank], signal.SIGKILL)
            if i % 2:
                time.sleep(0.1)
                num_cut += bool(half_written(cwd) - former)
            print(f"{time.monotonic() - start:6.0f} s    rank {rank} killed at iteration {newest_row(cwd)}", flush=True)
        new_ranks(process, ranks)
        going_on = newest_row(cwd)
        wait_until(lambda: newest_row(cwd) not in (0, going_on), [process], PATIENCE_S)
        time.sleep(max(0.0, start + seconds - time.monotonic()))
        process.send_signal(signal.SIGTERM)
        process.wait(PATIENCE_S)
    return num_cut


def new_ranks(process: subprocess.Popen[str], former: list[int]) -> list[int]:
    """Process ids of the ranks that came after `former`."""
    wait_until(
        lambda: len(found := children(process.pid)) == NUM_RANKS and not set(found) & set(former), [process], PATIENCE_S
    )
    return children(process.pid)


def half_written(cwd: Path) -> set[Path]:
    return set((cwd / "run" / "checkpoints").glob("*.tmp"))


def newest_row(cwd: Path) -> int:
    """Iteration of the last row of the training; 0 if there is none."""
    if not (cwd / "run" / "metrics.jsonl").exists():
        return 0
    return max((row["iteration"] for row in training_rows(cwd / "run")), default=0)


def check_history(run_dir: Path, last: int) -> Iterator[str]:
    iterations = [row["iteration"] for row in training_rows(run_dir)]
    if iterations != list(range(1, last + 1)):
        missing = sorted(set(range(1, last + 1)) - set(iterations))
        again = sorted({i for i in iterations if iterations.count(i) > 1})
        yield f"metrics.jsonl: missing {missing}, twice {again}, last {iterations[-1]}"


def check_checkpoints(run_dir: Path, last: int) -> Iterator[str]:
    directory = run_dir / "checkpoints"
    newest = list_checkpoints(directory)
    if newest[:1] != [checkpoint_path(directory, last)]:
        yield f"no checkpoint of iteration {last}"
    for path in (*newest, directory / BEST):
        try:
            load_checkpoint(path)
        except UserError as error:
            yield str(error)


def check_exact(run_dir: Path, whole: Path, last: int) -> Iterator[str]:
    states = [load_checkpoint(checkpoint_path(path / "checkpoints", last)) for path in (run_dir, whole)]
    try:
        assert_same_bits(*({name: state[name] for name in EXACT} for state in states))
    except AssertionError as error:
        yield f"not as without interruption: {error}"
    if [of_the_seed(row) for row in training_rows(run_dir)] != [of_the_seed(row) for row in training_rows(whole)]:
        yield "losses are not as without interruption"


if __name__ == "__main__":
    run_command(main)
