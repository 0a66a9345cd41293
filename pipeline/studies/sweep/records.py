"""Records of the trials: a file for each outcome, and the end of each MLflow run."""

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from ray.tune import Callback
from ray.tune.experiment import Trial

from data_shards.files import write_atomically
from pipeline.config.command_line import CONFIG_FILE
from pipeline.config.files import config_from_dict, load_config
from pipeline.runs.mlflow_mirror import MlflowMirror, Status, absolute_uri, find_run, make_client, read_key, why
from pipeline.runs.tracking import RunFiles
from pipeline.studies.sweep.trial import FAILED, ITERATION, newest_run_dir

logger = logging.getLogger(__name__)

Outcome = Literal["finished", "stopped early", "failed"]
STATUS: dict[Outcome, Status] = {"finished": "FINISHED", "stopped early": "KILLED", "failed": "FAILED"}
"""Of MLflow's run."""


@dataclass(frozen=True)
class Record:
    """A trial that has ended.

    Attributes:
        trial: its id.
        run_dir: name of its run directory.
        parameters: fields of the configuration by dotted name.
        outcome: how it ended.
        reason: why it failed; empty otherwise.
        iteration: of its last measurement.
        metrics: of its last measurement.
        node: address of the machine that it was measured on; empty if it never was.
    """

    trial: str
    run_dir: str
    parameters: dict[str, Any]
    outcome: Outcome
    reason: str
    iteration: int
    metrics: dict[str, float]
    node: str


def read_records(directory: Path) -> list[Record]:
    """Of all trials in a directory that have ended, by their ids."""
    return [Record(**json.loads(path.read_text())) for path in sorted(directory.glob("trial-*.json"))]


class RecordTrials(Callback):  # type: ignore[misc]
    """Writes a record of each trial that ends, and ends its MLflow run where the trial could not.

    Args:
        directory: of the run directories.
        steps: iterations of a trial that goes to its end.
    """

    def __init__(self, directory: Path, steps: int) -> None:
        self._directory = directory
        self._steps = steps

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """It went to its end, or was stopped."""
        result = trial.last_result or {}
        if reason := result.get(FAILED, ""):
            self._record(trial, "failed", reason)
        else:
            self._record(trial, "finished" if result.get(ITERATION, 0) >= self._steps else "stopped early", "")

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Its process died, more often than it is started again."""
        lines = [line.strip() for line in str(trial.get_pickled_error() or trial.get_error()).splitlines()]
        self._record(trial, "failed", next((line for line in reversed(lines) if line), "its process died"))

    def _record(self, trial: Trial, outcome: Outcome, reason: str) -> None:
        run_dir = newest_run_dir(self._directory, trial.trial_id)
        result = trial.last_result or {}
        metrics = {name: value for name, value in result.items() if "/" in name}  # ours, not Tune's
        record = Record(
            trial=trial.trial_id,
            run_dir=run_dir.name,
            parameters=dict(trial.config),
            outcome=outcome,
            reason=reason,
            iteration=int(result.get(ITERATION, 0)),
            metrics={} if outcome == "failed" else {name: float(value) for name, value in metrics.items()},
            node=result.get("node_ip", ""),
        )
        write_atomically(self._directory / f"trial-{trial.trial_id}.json", json.dumps(asdict(record), indent=2) + "\n")
        end_mlflow_run(run_dir, outcome, reason)


def end_mlflow_run(run_dir: Path, outcome: Outcome, reason: str) -> None:
    """End the MLflow run of a trial whose process could not, and tag it with the outcome."""
    if not (run_dir / CONFIG_FILE).is_file():
        return
    config = config_from_dict(load_config(run_dir / CONFIG_FILE))
    key, uri = read_key(run_dir), config.log.tracking_uri
    if key is None or uri == "none":
        return
    try:
        client = make_client(absolute_uri(uri))
        run = find_run(client, config, key)
        if run is None:
            return
        if run.info.status == "RUNNING":
            files = RunFiles(run_dir)
            MlflowMirror(config, run_dir, files.rows(), files.pictures()).close(STATUS[outcome], None)
        client.set_tag(run.info.run_id, "outcome", outcome)
        if reason:
            client.set_tag(run.info.run_id, "failure", reason)
    except Exception as error:  # see `MlflowMirror._attempt`
        logger.warning("MLflow has not been told how %s ended: %s", run_dir.name, why(error))
