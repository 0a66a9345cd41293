"""What breaks on one rank ends every rank soon, and is told by its name. Real processes, gloo."""

import os
import signal
import socket
import time
from pathlib import Path

import pytest
from helpers import (
    BATCH,
    children,
    ended,
    patched,
    shard_cache,
    tiny,
    train_in_new_process,
    training,
    training_rows,
    wait_until,
    write_noise,
)
from two_ranks import TWO_RANKS

from pipeline.runs.checkpoints import list_checkpoints, load_checkpoint


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shard_cache(tmp_path_factory)


@pytest.mark.parametrize("lost", [0, 1])
def test_killed_rank_is_named_by_the_other_which_ends(lost: int, cache: Path, tmp_path: Path) -> None:
    arguments = tiny(cache, run_dir="run", steps=100_000, log={"checkpoint_interval_images": 2 * BATCH})
    with training(tmp_path, *arguments, launcher=TWO_RANKS, num_rows=3) as process:
        os.kill(children(process.pid)[lost], signal.SIGKILL)
        outcome = ended(process, tmp_path, timeout_s=60)
    assert outcome.code != 0
    (error,) = outcome.errors
    assert error.startswith(f"error: rank {1 - lost}: rank {lost} ({socket.gethostname()}) lost: killed, ")
    newest = list_checkpoints(tmp_path / "run" / "checkpoints")[0]
    assert load_checkpoint(newest)["iteration"] % 2 == 0


def test_loss_that_breaks_on_one_rank_stops_both_and_that_rank_names_phase_and_term(
    cache: Path, tmp_path: Path
) -> None:
    script = patched(
        tmp_path,
        """
        from pipeline.methods.furrygan import losses
        right, calls = losses.binarization, []
        def wrong(mask):
            calls.append(0)
            return right(mask) * (float("nan") if RANK == 1 and len(calls) > 4 else 1.0)  # twice a step
        losses.binarization = wrong
        """,
    )
    arguments = tiny(cache, run_dir="run", steps=100_000)
    outcome = train_in_new_process(tmp_path, *arguments, launcher=TWO_RANKS, script=script)
    assert outcome.code != 0
    broken, other = sorted(outcome.errors, reverse=True)
    assert broken.startswith("error: rank 1: loss g_main_binarization is not finite at iteration 2; ")
    assert other.startswith("error: rank 0: averaged gradient of g_main is not finite at iteration 2; ")


def test_broken_picture_of_one_rank_ends_both_and_is_named(tmp_path: Path) -> None:
    data = write_noise(tmp_path / "data", 32, num=16)
    (tar,) = data.glob("*.tar")
    whole = bytearray(tar.read_bytes())
    at = [i for i in range(len(whole)) if whole[i : i + 8] == b"\x89PNG\r\n\x1a\n"][5]
    whole[at + 8 : at + 600] = bytes(592)
    tar.write_bytes(whole)
    arguments = [*tiny(tmp_path, data=data, run_dir="run", steps=100_000), "--no-verify-data"]
    outcome = train_in_new_process(tmp_path, *arguments, launcher=TWO_RANKS)
    assert outcome.code != 0
    assert len(outcome.errors) == 2, outcome.err
    (broken,) = [line for line in outcome.errors if "failed" not in line]
    (other,) = [line for line in outcome.errors if "failed" in line]
    assert tar.name in broken and "rank " in broken
    assert broken.split(": ", 2)[2] in other  # with its reason, for who reads the log of another machine


def test_rank_that_is_only_busy_for_longer_than_the_heartbeat_timeout_is_not_taken_for_dead(
    cache: Path, tmp_path: Path
) -> None:
    """No thread of it runs: worse than a call that holds Python's lock."""
    arguments = tiny(cache, run_dir="run", steps=100_000, heartbeat_timeout_s=5)
    with training(tmp_path, *arguments, launcher=TWO_RANKS) as process:
        for pid in children(process.pid):
            os.kill(pid, signal.SIGSTOP)
            time.sleep(8)
            os.kill(pid, signal.SIGCONT)
        before = len(training_rows(tmp_path / "run"))
        wait_until(lambda: len(training_rows(tmp_path / "run")) > before + 1, [process])
        assert "error:" not in (tmp_path / "err").read_text()


def test_rank_that_waits_for_ever_ends_when_another_has_failed(cache: Path, tmp_path: Path) -> None:
    """As it does in a collective of GPUs: nothing in its main thread fails. The launcher would wait 30 s to kill it."""
    script = patched(
        tmp_path,
        """
        import time
        from data_shards.errors import UserError
        from pipeline.ranks import failure_detector
        from pipeline.training import learner
        failure_detector.GRACE_S = 8.0
        right, calls = learner.Learner.run, []
        def wrong(*arguments):
            calls.append(0)
            if len(calls) == 5:
                if RANK == 0:
                    time.sleep(1000)
                raise UserError("out of coffee")
            return right(*arguments)
        learner.Learner.run = wrong
        """,
    )
    arguments = tiny(cache, run_dir="run", steps=100_000)
    outcome = train_in_new_process(tmp_path, *arguments, launcher=TWO_RANKS, script=script)
    assert outcome.code != 0
    assert sorted(outcome.errors) == ["error: rank 0: rank 1 failed (out of coffee)", "error: rank 1: out of coffee"]
