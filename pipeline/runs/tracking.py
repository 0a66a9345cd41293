"""Tracking of metrics and images: metrics.jsonl and samples/ always, MLflow in addition.

Metric names are ``group/name``. The groups: ``loss/<phase>_<term>``, ``grad_norm/<network>``, ``mask`` (generated),
``mask_pred_real`` (the mask predictor on real images), ``score`` (the discriminator's logits), ``speed``, ``memory``,
``schedule``, ``segmenter``.

``speed`` is measured from one row to the next. ``img_per_s`` and ``tflop_per_s`` (convolutions and matrix products) are
of all ranks over wall time, which includes grids and checkpoints; ``data_wait_share`` is rank 0's. ``mfu`` is
``tflop_per_s`` as a share of the ranks' peak in bfloat16, only for GPUs that `pipeline/training/costs.py` lists.
``ms_<phase>`` is the mean time of a step of a phase on rank 0's device, without waiting for data; the first steps of a
process, which choose algorithms and record graphs, are left out.
"""

import json
import logging
import math
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from pipeline.config import Config
from pipeline.runs.background import Background
from pipeline.runs.mlflow_mirror import MlflowMirror, Picture, Row, Status, now_ms
from pipeline.runs.saving import SaveError, saving

logger = logging.getLogger(__name__)

_OF_THE_ROW = ("iteration", "images_seen", "timestamp_ms")


class Tracker(Protocol):
    """Takes what a run has to tell."""

    def log_metrics(self, metrics: dict[str, float], *, iteration: int, images_seen: int) -> None:
        """A row of scalars."""

    def log_image(self, image: Image.Image, key: str, *, images_seen: int) -> None:
        """An image of a series named `key`."""


class RunFiles:
    """Rows in ``metrics.jsonl``, images in ``samples/``.

    Args:
        run_dir: of the run.
    """

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / "metrics.jsonl"
        self._samples = run_dir / "samples"
        self._unwritten = b""

    def drop_after(self, iteration: int) -> None:
        """Drop the rows beyond an iteration, of a run that was cut off and resumes there.

        Raises:
            SaveError: the directory cannot be written to.
        """
        if self._path.exists():
            rows = [row for row in self._read() if row["iteration"] <= iteration]
            with saving(self._path) as temporary:
                temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def rows(self) -> list[Row]:
        """Those there are."""
        return [
            Row(
                row["images_seen"],
                row.get("timestamp_ms", now_ms()),
                {name: value for name, value in row.items() if name not in _OF_THE_ROW},
            )
            for row in (self._read() if self._path.exists() else [])
        ]

    def pictures(self) -> list[Picture]:
        """Those there are."""
        names = ((*path.stem.rpartition("-"), path) for path in sorted(self._samples.glob("*-*.png")))
        return [Picture(path, key, int(images_seen)) for key, _, images_seen, path in names if images_seen.isdecimal()]

    def write_row(self, row: Row, *, iteration: int) -> None:
        """Append a row, after those that could not be appended before.

        Raises:
            SaveError: they stay in memory until the next call, and the file is as it was.
        """
        of_the_row = {"iteration": iteration, "images_seen": row.images_seen, "timestamp_ms": row.timestamp_ms}
        self._unwritten += json.dumps(of_the_row | row.metrics).encode() + b"\n"
        self.write_rest()

    def write_rest(self) -> None:
        """Append what could not be appended before.

        Raises:
            SaveError: it still cannot.
        """
        if not self._unwritten:
            return
        try:
            with self._path.open("ab", buffering=0) as file:
                size, rest = file.tell(), self._unwritten
                try:
                    while rest:
                        rest = rest[file.write(rest) :]
                except OSError:
                    file.truncate(size)  # half a row would spoil the next one
                    raise
        except OSError as error:
            raise SaveError(self._path, error) from None
        self._unwritten = b""

    def write_picture(self, image: Image.Image, key: str, *, images_seen: int) -> Picture:
        """Save an image.

        Raises:
            SaveError: it could not be.
        """
        picture = Picture(self._samples / f"{key}-{images_seen:010d}.png", key, images_seen)
        with saving(picture.path) as temporary:
            image.save(temporary, format="PNG")
        return picture

    def _read(self) -> list[dict[str, Any]]:
        return [row for line in self._path.read_text().splitlines() if (row := _parse(line))]


class RunTracker:
    """Writes what a run has to tell in a thread of its own, and MLflow mirrors it in another one.

    Args:
        files: of the run directory.
        mirror: of what is written there; None: without MLflow.
        on_save_error: see `LogConfig`.
    """

    def __init__(self, files: RunFiles, mirror: MlflowMirror | None, on_save_error: str) -> None:
        self._files = files
        self._mirror = mirror
        self._on_save_error = on_save_error
        self._rows_missing = False
        self._background = Background("tracking")

    def log_metrics(self, metrics: dict[str, float], *, iteration: int, images_seen: int) -> None:
        """A row of scalars."""
        figures = {name: value if math.isfinite(value) else None for name, value in metrics.items()}  # JSON has no nan
        self._background.submit(self._write_row, Row(images_seen, now_ms(), figures), iteration)

    def log_image(self, image: Image.Image, key: str, *, images_seen: int) -> None:
        """An image of a series named `key`."""
        self._background.submit(self._write_picture, image, key, images_seen)

    def wait(self) -> None:
        """Until everything is written.

        Raises:
            SaveError: not all rows could be.
        """
        self._background.wait()
        self._files.write_rest()

    def close(self, status: Status, summary: dict[str, float] | None = None) -> None:
        """End the run, with its final figures if it has any."""
        try:
            self._background.close()
        finally:
            if self._mirror is not None:
                self._mirror.close(status, summary)

    def _write_row(self, row: Row, iteration: int) -> None:
        try:
            self._files.write_row(row, iteration=iteration)
            self._rows_missing = False
        except SaveError as error:
            if self._on_save_error == "stop":
                raise
            if not self._rows_missing:
                logger.warning("%s: training continues, and the rows are kept until they can be", error)
            self._rows_missing = True
        if self._mirror is not None:
            self._mirror.add_row(row)

    def _write_picture(self, image: Image.Image, key: str, images_seen: int) -> None:
        try:
            picture = self._files.write_picture(image, key, images_seen=images_seen)
        except SaveError as error:
            if self._on_save_error == "stop":
                raise
            logger.warning("%s: training continues without it", error)
            return
        if self._mirror is not None:
            self._mirror.add_picture(picture)


def make_tracker(config: Config, run_dir: Path, *, iteration: int) -> RunTracker:
    """The tracker of the main process, resuming at `iteration`."""
    files, mirror = RunFiles(run_dir), None
    files.drop_after(iteration)
    if config.log.tracking_uri != "none":
        mirror = MlflowMirror(config, run_dir, files.rows(), files.pictures())
    return RunTracker(files, mirror, config.log.on_save_error)


def _parse(line: str) -> dict[str, Any] | None:
    try:
        row: dict[str, Any] = json.loads(line)
    except json.JSONDecodeError:  # the last line of a run that was cut off
        return None
    return row
