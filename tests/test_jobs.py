"""Jobs run side by side as told, and none is left behind."""

import contextlib
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from pipeline.interrupt import SIGNALS, Interrupt, Interrupted
from pipeline.jobs import Job, run_jobs


def job(tmp_path: Path, name: str, *scripts: str) -> Job:
    return Job(name, tuple(("sh", "-c", script) for script in scripts), tmp_path / f"{name}.log")


def test_a_job_runs_its_commands_in_order_and_logs_what_they_say(tmp_path: Path) -> None:
    one = job(tmp_path, "one", "echo first", "echo second; echo third >&2")
    one.log.write_text("before\n")
    assert list(run_jobs([one], [{}])) == [(one, 0)]
    assert one.log.read_text().splitlines() == ["before", "first", "second", "third"]


def test_a_command_that_fails_ends_its_job_and_no_other(tmp_path: Path) -> None:
    jobs = [job(tmp_path, "bad", "exit 3", "echo never"), job(tmp_path, "good", "echo yes")]
    assert {(j.name, code) for j, code in run_jobs(jobs, [{}])} == {("bad", 3), ("good", 0)}
    assert (tmp_path / "bad.log").read_text() == ""
    assert (tmp_path / "good.log").read_text() == "yes\n"


def test_an_environment_serves_one_job_at_a_time(tmp_path: Path) -> None:
    """Each makes the directory of its environment, which must not be there yet, and removes it again."""
    alone = f'cd {tmp_path} && mkdir "slot$SLOT" && sleep 0.1 && rmdir "slot$SLOT" && echo $SLOT'
    jobs = [job(tmp_path, f"job{i}", alone) for i in range(6)]
    assert [code for _, code in run_jobs(jobs, [{"SLOT": "a"}, {"SLOT": "b"}])] == [0] * 6
    assert {j.log.read_text().strip() for j in jobs} == {"a", "b"}


PATIENT = "trap 'echo saved; exit 143' TERM; echo started; while :; do sleep 0.05; done"


def wait_for_start(slow: Job) -> None:
    while not slow.log.exists() or "started" not in slow.log.read_text():
        time.sleep(0.01)


def test_jobs_that_are_given_up_are_ended_in_good_order(tmp_path: Path) -> None:
    """By SIGTERM, on which they may save; what has not begun does not begin."""
    quick, slow, never = (
        job(tmp_path, "quick", "exit 0"),
        job(tmp_path, "slow", PATIENT, "echo no"),
        job(tmp_path, "no"),
    )
    with contextlib.closing(run_jobs([quick, slow, never], [{}])) as ended:
        assert next(ended) == (quick, 0)
        wait_for_start(slow)
    assert slow.log.read_text().splitlines() == ["started", "saved"]
    assert not never.log.exists()


def test_a_signal_that_raises_ends_the_jobs_too(tmp_path: Path) -> None:
    slow = job(tmp_path, "slow", PATIENT)

    def interrupt() -> None:
        wait_for_start(slow)
        os.kill(os.getpid(), signal.SIGTERM)

    former = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        with Interrupt(), pytest.raises(Interrupted):
            threading.Thread(target=interrupt).start()
            list(run_jobs([slow], [{}]))
    finally:
        for number, handler in former.items():  # a process that was interrupted ignores them from then on
            signal.signal(number, handler)
    assert slow.log.read_text().splitlines() == ["started", "saved"]


def test_commands_inherit_what_is_kept_open(tmp_path: Path) -> None:
    with (tmp_path / "kept").open("w") as file:
        write = (sys.executable, "-c", f"import os; os.write({file.fileno()}, b'hello')")
        one = Job("one", (write,), tmp_path / "one.log")
        assert [code for _, code in run_jobs([one], [{}], keep_open=[file.fileno()])] == [0]
    assert (tmp_path / "kept").read_text() == "hello"
