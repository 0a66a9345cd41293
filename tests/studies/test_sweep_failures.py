"""A real Ray at its limits: killed drivers and workers, too few resources; and two workers for a trial."""

import signal
from pathlib import Path

import psutil
import pytest
from helpers import BATCH, rows, shard_cache, train_in_process, wait_until
from sweeping import SMALL, run_sweep, started, sweep_in_process, write_configuration

from pipeline.studies.sweep.records import read_records

MEASURED = (2, 4, 6, 8, 10)


@pytest.fixture(scope="module")
def cwd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the configuration of all sweeps."""
    cwd = tmp_path_factory.mktemp("sweeps")
    write_configuration(cwd, shard_cache(tmp_path_factory))
    return cwd


def test_a_killed_sweep_resumes_and_repeats_no_finished_trial(cwd: Path) -> None:
    every = ("--log.checkpoint-interval-images", str(2 * BATCH))
    arguments = (*SMALL, *every, "--num-trials", "2", "--num-parallel", "1", "--scheduler", "none", "--out", "killed")
    trials = cwd / "killed" / "trials"
    with started(cwd, *arguments) as process:
        # In the middle of the second trial, the first one having ended.
        wait_until(
            lambda: list(trials.glob("trial-*.json")) and len(list(trials.glob("*/metrics.jsonl"))) == 2, [process]
        )
        process.send_signal(signal.SIGKILL)
        process.wait()
        (first,) = read_records(trials)
    before = {path: path.stat().st_mtime_ns for path in (trials / first.run_dir).rglob("*") if path.is_file()}
    resumed = run_sweep(cwd, "--resume", "killed")
    assert resumed.returncode == 0, resumed.stderr
    records = read_records(trials)
    assert [record.outcome for record in records] == ["finished"] * 2 and first in records
    assert {path: path.stat().st_mtime_ns for path in before} == before
    for record in records:
        measured = [row["iteration"] for row in rows(trials / record.run_dir) if "mask/miou" in row]
        assert measured == list(MEASURED)
        assert (trials / record.run_dir / "trial.log").read_text().count("trained 10 iterations") == 1


def test_a_trial_whose_process_dies_goes_on_from_its_checkpoint(cwd: Path) -> None:
    every = ("--log.checkpoint-interval-images", str(2 * BATCH))
    arguments = (*SMALL, *every, "--num-trials", "1", "--scheduler", "none", "--out", "worker-dies")
    trials = cwd / "worker-dies" / "trials"
    with started(cwd, *arguments) as process:
        wait_until(lambda: list(trials.glob("*/checkpoints/checkpoint-*.pt")), [process])
        for child in psutil.Process(process.pid).children(recursive=True):
            if "run_trial" in " ".join(child.cmdline()) or "ImplicitFunc" in " ".join(child.cmdline()):
                child.kill()
        process.wait(400)
        assert process.returncode == 0, (cwd / "err").read_text()
    (record,) = read_records(trials)
    log = (trials / record.run_dir / "trial.log").read_text()
    assert record.outcome == "finished" and "resuming at iteration" in log


def test_infeasible_resources_end_at_once_with_one_line(cwd: Path) -> None:
    for option, words in (("--gpus-per-trial", "no machine here has more"), ("--workers-per-trial", "have room for")):
        outcome = sweep_in_process(cwd, *SMALL, option, "400", "--out", "infeasible")
        assert outcome.code == 2 and len(outcome.errors) == 1 and words in outcome.errors[0], outcome.err
        assert "Traceback" not in outcome.err and not (cwd / "infeasible").exists()


def test_two_workers_train_a_trial_together(cwd: Path) -> None:
    arguments = (*SMALL, "--num-trials", "1", "--workers-per-trial", "2", "--batch", "16", "--out", "group")
    outcome = run_sweep(cwd, *arguments)
    assert outcome.returncode == 0, outcome.stderr
    (record,) = read_records(cwd / "group" / "trials")
    assert record.outcome == "finished", record.reason
    run_dir = cwd / "group" / "trials" / record.run_dir
    (cwd / "one.yaml").write_text((run_dir / "config.yaml").read_text())
    alone = train_in_process(cwd, "--config", "one.yaml", "--run-dir", "alone")
    assert alone.code == 0, alone.err
    for together, one in zip(rows(run_dir), rows(cwd / "alone"), strict=True):
        for name in ("loss/g_main_adversarial", "loss/d_main_adversarial", "mask/area"):
            if name in one:
                assert together[name] == pytest.approx(one[name], rel=0.02)
