"""Sweeps over a real Ray: trials side by side, ended early, failing, killed; resumed, and trained in full."""

import contextlib
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from helpers import (
    BATCH,
    PIPES,
    TINY,
    Outcome,
    environment,
    rows,
    run_in_process,
    shard_cache,
    train_in_process,
    wait_until,
)
from PIL import Image

from pipeline.config_io import merge
from pipeline.sweep import command
from pipeline.sweep.records import STATUS, Record, read_records

RAY_TUNE = Path(__file__).parents[1] / "ray_tune.py"
STEPS, MEASURED = 10, (2, 4, 6, 8, 10)
SMALL = ("--config", "tiny.yaml", "--trial-steps", str(STEPS))


@pytest.fixture(scope="module")
def cwd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the configuration of all sweeps, which log to one SQLite."""
    cwd = tmp_path_factory.mktemp("sweeps")
    log = {"tracking_uri": "sqlite:///mlflow.db"}
    tree = merge(TINY, {"cache_dir": str(shard_cache(tmp_path_factory)), "steps": 6, "log": log})
    (cwd / "tiny.yaml").write_text(yaml.safe_dump(tree))
    return cwd


def run_sweep(cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    call = [sys.executable, str(RAY_TUNE), *arguments]
    return subprocess.run(call, cwd=cwd, env=environment(), **PIPES, timeout=500)


def sweep_in_process(cwd: Path, *arguments: str) -> Outcome:
    """The command, without the seconds that a new process takes; for sweeps that come to no trial."""
    return run_in_process(command.main, RAY_TUNE, cwd, *arguments)


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


def by_outcome(out: Path) -> dict[str, list[Record]]:
    found: dict[str, list[Record]] = {}
    for record in read_records(out / "trials"):
        found.setdefault(record.outcome, []).append(record)
    return found


def mlflow_client(cwd: Path) -> Any:
    from pipeline.mlflow_mirror import make_client

    return make_client(f"sqlite:///{cwd / 'mlflow.db'}")


def runs(cwd: Path, sweep: str) -> tuple[Any, list[Any]]:
    """The parent's and the children's of a sweep."""
    client = mlflow_client(cwd)
    experiment = client.get_experiment_by_name("furrygan")
    found = client.search_runs([experiment.experiment_id], f"tags.sweep = '{sweep}'")
    (parent,) = [run for run in found if "mlflow.parentRunId" not in run.data.tags]
    return parent, [run for run in found if run is not parent]


@pytest.fixture(scope="module")
def swept(cwd: Path) -> subprocess.CompletedProcess[str]:
    """Four trials, two at a time, one of which cannot but fail."""
    rate = "optimizer.learning_rate=choice(0.002,0.002,1e30)"
    return run_sweep(cwd, *SMALL, "--num-trials", "4", "--out", "swept", "--search", rate, "--seed", "4")


def test_a_trial_whose_loss_is_not_finite_is_marked_and_the_others_go_on(
    cwd: Path, swept: subprocess.CompletedProcess[str]
) -> None:
    assert swept.returncode == 0, swept.stderr
    found = by_outcome(cwd / "swept")
    assert sum(map(len, found.values())) == 4
    for record in found["failed"]:
        assert record.parameters["optimizer.learning_rate"] == 1e30 and "is not finite" in record.reason
    others = [*found["finished"], *found.get("stopped early", [])]
    assert others and all(record.parameters["optimizer.learning_rate"] == 0.002 for record in others)
    assert all(record.iteration == STEPS for record in found["finished"])
    assert found["failed"][0].reason in swept.stdout


def test_two_trials_at_a_time_log_into_one_sqlite_without_an_error(
    cwd: Path, swept: subprocess.CompletedProcess[str]
) -> None:
    logs = "".join(path.read_text() for path in (cwd / "swept" / "trials").glob("*/trial.log"))
    assert "locked" not in logs + swept.stderr and "does not answer" not in logs + swept.stderr
    parent, children = runs(cwd, "swept")
    assert len(children) == 4
    with contextlib.closing(sqlite3.connect(cwd / "mlflow.db")) as database:
        for record in read_records(cwd / "swept" / "trials"):
            (child,) = [run for run in children if run.info.run_name == record.run_dir]
            assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
            assert child.data.tags["outcome"] == record.outcome
            assert child.info.status == STATUS[record.outcome]
            for field, value in record.parameters.items():
                assert child.data.params[field] == str(value)
            logged = [r for r in rows(cwd / "swept" / "trials" / record.run_dir) if "mask/miou" in r]
            query = "select step from metrics where run_uuid = ? and key = 'mask/miou' order by step"
            steps = [step for (step,) in database.execute(query, (child.info.run_id,))]
            assert steps == [row["images_seen"] for row in logged]


def test_sweep_run_holds_table_pictures_and_the_best_configuration(
    cwd: Path, swept: subprocess.CompletedProcess[str]
) -> None:
    parent, _ = runs(cwd, "swept")
    names = {file.path for file in mlflow_client(cwd).list_artifacts(parent.info.run_id)}
    assert {"trials.md", "best.yaml", "parallel-coordinates.png", "slices.png"} <= names
    assert (cwd / "swept" / "trials.md").read_text() in swept.stdout
    for name in ("parallel-coordinates.png", "slices.png"):
        with Image.open(cwd / "swept" / name) as picture:
            assert min(picture.size) >= 300
    assert parent.data.params["loss.phi1"] == "uniform(0.1, 0.6)" and parent.info.status == "FINISHED"


def test_best_configuration_trains_in_full(cwd: Path, swept: subprocess.CompletedProcess[str]) -> None:
    best = max(
        (r for r in read_records(cwd / "swept" / "trials") if r.outcome != "failed"),
        key=lambda record: record.metrics["mask/miou"],
    )
    assert swept.stdout.rstrip().endswith("accelerate launch pipeline/train.py --config swept/best.yaml")
    outcome = train_in_process(cwd, "--config", "swept/best.yaml", "--run-dir", "full")
    assert outcome.code == 0, outcome.err
    config = yaml.safe_load((cwd / "full" / "config.yaml").read_text())
    assert config["loss"]["phi1"] == best.parameters["loss.phi1"] and config["steps"] == 6
    assert "trained 6 iterations" in outcome.out


def test_first_trial_has_the_values_of_the_preset(cwd: Path, swept: subprocess.CompletedProcess[str]) -> None:
    preset = {"loss.phi1": 0.38, "loss.binarization_start": 5.0, "loss.binarization_end": 0.5, "loss.phi2": 0.01}
    first = read_records(cwd / "swept" / "trials")[0]
    assert {field: first.parameters[field] for field in preset} == preset


def test_what_was_begun_otherwise_is_not_taken_over(cwd: Path, swept: subprocess.CompletedProcess[str]) -> None:
    again = sweep_in_process(cwd, *SMALL, "--out", "swept")
    assert again.code == 2 and "holds a sweep already" in again.errors[0]
    changed = sweep_in_process(cwd, "--resume", "swept", "--num-trials", "9")
    assert changed.code == 2 and "--resume DIRECTORY alone" in changed.errors[0]


def test_a_killed_sweep_resumes_and_repeats_no_finished_trial(cwd: Path) -> None:
    every = ("--log.checkpoint-interval-images", str(2 * BATCH))
    arguments = (*SMALL, *every, "--num-trials", "3", "--num-parallel", "1", "--scheduler", "none", "--out", "killed")
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
    assert [record.outcome for record in records] == ["finished"] * 3 and first in records
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
    assert record.outcome == "finished" and "going on at iteration" in log


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


def test_population_based_training_moves_weights_between_trials(cwd: Path) -> None:
    arguments = ("--config", "tiny.yaml", "--trial-steps", "3", "--num-trials", "2", "--scheduler", "pbt")
    outcome = run_sweep(cwd, *arguments, "--out", "pbt")
    assert outcome.returncode == 0, outcome.stderr
    records = read_records(cwd / "pbt" / "trials")
    assert [record.outcome for record in records] == ["finished"] * 2
    moved = [record for record in records if record.run_dir != f"trial-{record.trial}"]
    assert moved
    for record in moved:
        run_dir = cwd / "pbt" / "trials" / record.run_dir
        config = yaml.safe_load((run_dir / "config.yaml").read_text())
        assert config["loss"]["r1"] == record.parameters["loss.r1"]
        assert "going on at iteration" in (run_dir / "trial.log").read_text()
