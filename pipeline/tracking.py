"""Where a run's numbers and pictures go: metrics.jsonl always, MLflow besides.

Metric names are ``group/name``. The groups: ``loss/<phase>_<term>``, ``grad_norm/<network>``, ``mask`` (generated),
``mask_pred_real`` (the mask predictor on real images), ``score`` (the discriminator's logits), ``speed``, ``memory``,
``schedule``, ``segmenter``.
"""

import json
import logging
import math
import os
import sys
import time
from pathlib import Path
from typing import Any, Literal, Protocol

from PIL import Image

from pipeline.background import Background
from pipeline.config import Config
from pipeline.config_io import config_to_dict, flatten

SQLITE = "sqlite:///"

Status = Literal["FINISHED", "FAILED", "KILLED"]
"""How a run ended, in MLflow's words. One that was killed may go on later."""


class Tracker(Protocol):
    """Takes what a run has to tell."""

    @property
    def run_id(self) -> str | None:
        """Identifies the run at a tracking server, so that a resumed run goes on in the same place."""

    def log_metrics(self, metrics: dict[str, float], *, iteration: int, images_seen: int) -> None:
        """A row of scalars."""

    def log_image(self, image: Image.Image, key: str, *, images_seen: int) -> None:
        """A picture of a series named `key`."""

    def close(self, status: Status, summary: dict[str, float] | None = None) -> None:
        """End the run, with its final figures if it has any."""


class JsonlTracker:
    """Rows in ``metrics.jsonl``, pictures in ``samples/``.

    Args:
        run_dir: of the run.
        iteration: where the run goes on; rows beyond it, of a run that was cut off, are dropped.
    """

    run_id = None

    def __init__(self, run_dir: Path, *, iteration: int) -> None:
        self._path = run_dir / "metrics.jsonl"
        self._samples = run_dir / "samples"
        self._samples.mkdir(parents=True, exist_ok=True)
        if self._path.exists():
            rows = [row for line in self._path.read_text().splitlines() if (row := _parse(line))]
            kept = "".join(json.dumps(row) + "\n" for row in rows if row["iteration"] <= iteration)
            temporary = self._path.with_suffix(".tmp")
            temporary.write_text(kept)
            temporary.replace(self._path)

    def log_metrics(self, metrics: dict[str, float], *, iteration: int, images_seen: int) -> None:
        figures = {name: value if math.isfinite(value) else None for name, value in metrics.items()}  # JSON has no nan
        row = {"iteration": iteration, "images_seen": images_seen, **figures}
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def log_image(self, image: Image.Image, key: str, *, images_seen: int) -> None:
        image.save(self._samples / f"{key}-{images_seen:010d}.png")

    def close(self, status: Status, summary: dict[str, float] | None = None) -> None:
        pass


class MlflowTracker:
    """A run in an MLflow store: metrics over images seen, the whole configuration as params, pictures by step.

    Args:
        config: names the store and the experiment.
        run_dir: its name becomes the run's.
        run_id: of a run to go on with.
    """

    def __init__(self, config: Config, run_dir: Path, *, run_id: str | None) -> None:
        self._client = _open_store(config)
        from mlflow.entities import Metric, Param
        from mlflow.exceptions import MlflowException

        self._metric = Metric
        if run_id is not None:
            try:
                self._client.update_run(run_id, status="RUNNING")
                self.run_id = run_id
                return
            except MlflowException:
                pass  # another store than before: a new run there
        self.run_id = self._client.create_run(
            _experiment_id(self._client, config),
            run_name=run_dir.name,
            tags={"dataset": config.dataset, "mlflow.source.name": Path(sys.argv[0]).name},
        ).info.run_id
        params = [Param(key, str(value)) for key, value in flatten(config_to_dict(config)).items()]
        self._client.log_batch(self.run_id, params=params)

    def log_metrics(self, metrics: dict[str, float], *, iteration: int, images_seen: int) -> None:
        now = time.time_ns() // 1_000_000
        rows = [self._metric(key, value, now, images_seen) for key, value in metrics.items()]
        self._client.log_batch(self.run_id, metrics=rows)

    def log_image(self, image: Image.Image, key: str, *, images_seen: int) -> None:
        self._client.log_image(self.run_id, image, key=key, step=images_seen, synchronous=True)

    def close(self, status: Status, summary: dict[str, float] | None = None) -> None:
        if summary is not None:
            self._client.log_dict(self.run_id, summary, "summary.json")
        self._client.set_terminated(self.run_id, status=status)


class Trackers:
    """Several trackers as one, in a thread of their own: a database or a server may be slow."""

    def __init__(self, *trackers: Tracker) -> None:
        self._trackers = trackers
        self._background = Background("tracking")

    @property
    def run_id(self) -> str | None:
        return next((t.run_id for t in self._trackers if t.run_id is not None), None)

    def log_metrics(self, metrics: dict[str, float], *, iteration: int, images_seen: int) -> None:
        for tracker in self._trackers:
            self._background.submit(tracker.log_metrics, metrics, iteration=iteration, images_seen=images_seen)

    def log_image(self, image: Image.Image, key: str, *, images_seen: int) -> None:
        for tracker in self._trackers:
            self._background.submit(tracker.log_image, image, key, images_seen=images_seen)

    def close(self, status: Status, summary: dict[str, float] | None = None) -> None:
        for tracker in self._trackers:
            self._background.submit(tracker.close, status, summary)
        self._background.close()


def make_tracker(config: Config, run_dir: Path, *, iteration: int, run_id: str | None) -> Trackers:
    """The trackers of the main process, going on at `iteration`."""
    trackers: list[Tracker] = [JsonlTracker(run_dir, iteration=iteration)]
    if config.log.tracking_uri != "none":
        trackers.append(MlflowTracker(config, run_dir, run_id=run_id))
    return Trackers(*trackers)


def prepare_store(config: Config) -> None:
    """Make the MLflow store and the experiment: runs that all began by making them would get in each other's way."""
    _experiment_id(_open_store(config), config)


def absolute_uri(uri: str) -> str:
    """The address of an MLflow store from anywhere: MLflow keeps a database open by its name, which may be relative."""
    return f"{SQLITE}{Path(uri.removeprefix(SQLITE)).absolute()}" if uri.startswith(SQLITE) else uri


def _open_store(config: Config) -> Any:
    # MLflow takes seconds to import, and is needed on one rank alone.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    from mlflow import MlflowClient

    logging.getLogger("mlflow").setLevel(logging.WARNING)  # it reports each table that it makes
    uri = absolute_uri(config.log.tracking_uri)
    if uri.startswith(SQLITE):
        Path(uri.removeprefix(SQLITE)).parent.mkdir(parents=True, exist_ok=True)
    return MlflowClient(tracking_uri=uri)


def _experiment_id(client: Any, config: Config) -> str:
    experiment = client.get_experiment_by_name(config.log.experiment)
    if experiment is not None:
        return str(experiment.experiment_id)
    uri, location = absolute_uri(config.log.tracking_uri), None
    if uri.startswith(SQLITE):
        # Beside the database: MLflow's own default is ./mlruns of whoever calls.
        location = (Path(uri.removeprefix(SQLITE)).parent / "mlflow-artifacts").as_uri()
    # The kind opens MLflow's pages for trained models; else they are those for conversations with language models.
    tags = {"mlflow.experimentKind": "custom_model_development"}
    return str(client.create_experiment(config.log.experiment, artifact_location=location, tags=tags))


def _parse(line: str) -> dict[str, Any] | None:
    try:
        row: dict[str, Any] = json.loads(line)
    except json.JSONDecodeError:  # the last line of a run that was cut off
        return None
    return row
