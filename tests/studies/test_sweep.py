"""Sweeps over a real Ray: trials side by side, ended early or failing, seen in MLflow, and trained in full."""

import contextlib
import shutil
import sqlite3
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import rows, shard_cache, tiny, train_in_process
from PIL import Image
from ray import tune
from sweeping import SMALL, STEPS, run_sweep, sweep_in_process, write_configuration

from pipeline.config.files import config_from_dict, config_to_dict, load_config
from pipeline.studies.sweep import trial
from pipeline.studies.sweep.records import STATUS, Record, read_records


@pytest.fixture(scope="module")
def cwd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the configuration of all sweeps."""
    cwd = tmp_path_factory.mktemp("sweeps")
    write_configuration(cwd, shard_cache(tmp_path_factory))
    return cwd


def by_outcome(out: Path) -> dict[str, list[Record]]:
    found: dict[str, list[Record]] = {}
    for record in read_records(out / "trials"):
        found.setdefault(record.outcome, []).append(record)
    return found


def mlflow_client(cwd: Path) -> Any:
    from pipeline.runs.mlflow_mirror import make_client

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
            if record.outcome == "failed":  # before anything was measured
                continue
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


def test_weights_are_handed_over_to_a_trial_with_other_parameters(
    cwd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As population-based training does; Tune, which carries the checkpoint, is left out."""
    cache = load_config(cwd / "tiny.yaml")["cache_dir"]
    for name in ("trial-a", "trial-b"):
        begun = train_in_process(tmp_path, *tiny(Path(cache)), "--run-dir", name)
        assert begun.code == 0, begun.err
    tree = config_to_dict(config_from_dict(load_config(tmp_path / "trial-a" / "config.yaml") | {"steps": 6}))
    plan = trial.Plan(tree, tmp_path, "mask/miou", num_workers=1, cpus=1, gpus=0, hands_over=True)
    carried: list[tune.Checkpoint] = []

    def carry(result: dict[str, Any], checkpoint: tune.Checkpoint) -> None:
        carried.append(tune.Checkpoint.from_directory(shutil.copytree(checkpoint.path, tmp_path / "carried")))

    monkeypatch.setattr(tune, "report", carry)
    trial._reporter(plan, tmp_path / "trial-a")({"mask/miou": 0.5})
    monkeypatch.setattr(tune, "get_checkpoint", lambda: carried[0])
    assert trial._take_over(tmp_path / "trial-a", "a") == tmp_path / "trial-a"  # its own: it just resumes
    taken = trial._take_over(trial.newest_run_dir(tmp_path, "b"), "b")
    assert taken == trial.newest_run_dir(tmp_path, "b") == tmp_path / "trial-b-2"
    assert trial._take_over(tmp_path / "trial-b-2", "b") == tmp_path / "trial-b-3"

    (tmp_path / "b.yaml").write_text(yaml.safe_dump(config_to_dict(plan.config({"loss.r1": 7.0}, taken))))
    outcome = train_in_process(tmp_path, "--config", "b.yaml")
    assert outcome.code == 0 and "resuming at iteration 4" in outcome.err, outcome.err
    assert [row["iteration"] for row in rows(taken) if "loss/d_main_adversarial" in row] == [5, 6]
    assert load_config(taken / "config.yaml")["loss"]["r1"] == 7.0
