"""The MLflow run of a sweep, the parent of its trials' runs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_shards.errors import UserError
from pipeline.config import Config
from pipeline.runs.mlflow_mirror import (
    KEY_TAG,
    Status,
    absolute_uri,
    find_run,
    hide_password,
    make_client,
    make_experiment,
    make_key,
    prepare_store,
    why,
)


class ParentRun:
    """Makes the run, or finds that of a sweep that resumes. Without MLflow there is none, and nothing is done.

    Attributes:
        tags_of_children: that the runs of the trials need.
        status: that the run ends with.

    Args:
        config: names the store and the experiment.
        directory: of the sweep; its name becomes the run's.
        params: to show.

    Raises:
        UserError: the store does not answer, which only the runs of trials can wait for.
    """

    def __init__(self, config: Config, directory: Path, params: Mapping[str, str]) -> None:
        self._client: Any = None
        self.tags_of_children: dict[str, str] = {}
        self.status: Status = "KILLED"
        uri, name = config.log.tracking_uri, directory.resolve().name
        if uri == "none":
            return
        prepare_store(config)
        try:
            self._client = make_client(absolute_uri(uri))
            run = find_run(self._client, config, key := make_key(directory))
            if run is None:
                tags = {KEY_TAG: key, "dataset": config.dataset, "sweep": name, "mlflow.source.name": "ray_tune.py"}
                run = self._client.create_run(make_experiment(self._client, config), run_name=name, tags=tags)
                for param, value in params.items():
                    self._client.log_param(run.info.run_id, param, value)
            self._id = run.info.run_id
            self._client.update_run(self._id, status="RUNNING")
        except Exception as error:  # MLflow's, SQLAlchemy's
            raise UserError(
                f"--log.tracking-uri {hide_password(uri)} does not answer ({why(error)}), and a sweep is compared "
                "there: start it, or give none"
            ) from None
        self.tags_of_children = {"mlflow.parentRunId": self._id, "sweep": name}

    def add(self, metrics: Mapping[str, float], files: Sequence[Path]) -> None:
        """Log metrics, and files as artifacts."""
        if self._client is None:
            return
        for name, value in metrics.items():
            self._client.log_metric(self._id, name, value)
        for file in files:
            self._client.log_artifact(self._id, str(file))

    def close(self) -> None:
        """End the run."""
        if self._client is not None:
            self._client.set_terminated(self._id, status=self.status)
