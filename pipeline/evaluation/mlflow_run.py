"""An evaluation in the MLflow run of the training that it evaluates."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from pipeline.tracking import SQLITE, absolute_uri
from pipeline.trained import TrainedRun

logger = logging.getLogger(__name__)


def log_to_mlflow(run: TrainedRun, metrics: dict[str, float], files: Sequence[Path], folder: str) -> None:
    """Add metrics and files to the training's MLflow run; one line where there is none any more.

    Args:
        run: that was evaluated.
        metrics: by name, at the images seen of its checkpoint.
        files: to keep with it.
        folder: of its artifacts, for the files.
    """
    uri = run.config.log.tracking_uri
    if uri == "none" or run.tracker_run_id is None:
        return
    if uri.startswith(SQLITE) and not Path(uri.removeprefix(SQLITE)).is_file():  # MLflow would make an empty one
        logger.warning("not logged to MLflow: %s is not here; evaluate from where the training was started", uri)
        return
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    from mlflow import MlflowClient
    from mlflow.entities import Metric
    from mlflow.exceptions import MlflowException
    from mlflow.utils.time import get_current_time_millis

    client = MlflowClient(tracking_uri=absolute_uri(uri))
    now = get_current_time_millis()
    rows = [Metric(name, value, now, run.images_seen) for name, value in metrics.items()]
    try:
        client.log_batch(run.tracker_run_id, metrics=rows)
        for file in files:
            client.log_artifact(run.tracker_run_id, str(file), artifact_path=folder)
    except MlflowException as error:
        reason = " ".join(str(error).split())
        logger.warning("not logged to MLflow: run %s at %s: %s", run.tracker_run_id, uri, reason)
