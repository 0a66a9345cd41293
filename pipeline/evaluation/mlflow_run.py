"""Logging of an evaluation to the MLflow run of its training."""

import logging
from collections.abc import Sequence
from pathlib import Path

from pipeline.generation.trained_run import TrainedRun
from pipeline.runs.mlflow_mirror import (
    SQLITE,
    absolute_uri,
    find_run,
    hide_password,
    make_client,
    now_ms,
    read_key,
    why,
)

logger = logging.getLogger(__name__)


def log_to_mlflow(run: TrainedRun, metrics: dict[str, float], files: Sequence[Path], folder: str) -> None:
    """Add metrics and files to the training's MLflow run; one line where there is none any more.

    Args:
        run: that was evaluated.
        metrics: by name, at the images seen of its checkpoint.
        files: to keep with it.
        folder: of its artifacts, for the files.
    """
    uri, key = run.config.log.tracking_uri, read_key(run.run_dir)
    if uri == "none":
        return
    if uri.startswith(SQLITE) and not Path(uri.removeprefix(SQLITE)).is_file():  # MLflow would make an empty one
        logger.warning("not logged to MLflow: %s is not here; evaluate from where the training was started", uri)
        return
    from mlflow.entities import Metric
    from mlflow.exceptions import MlflowException

    now = now_ms()
    rows = [Metric(name, value, now, run.images_seen) for name, value in metrics.items()]
    try:
        client = make_client(absolute_uri(uri))
        mirrored = None if key is None else find_run(client, run.config, key)
        if mirrored is None:
            logger.warning("not logged to MLflow: the run is not at %s", hide_password(uri))
            return
        client.log_batch(mirrored.info.run_id, metrics=rows)
        for file in files:
            client.log_artifact(mirrored.info.run_id, str(file), artifact_path=folder)
    except MlflowException as error:
        logger.warning("not logged to MLflow at %s: %s", hide_password(uri), why(error))
