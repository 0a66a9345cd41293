"""An MLflow run that mirrors a run directory, and catches up when the server was away.

The directory is the record. What the store has is asked of the store itself: so after any interruption of store,
network or run, what is missing is sent, and nothing is sent twice. Points of iterations that a resumed run repeats stay
as they first were: MLflow takes none back.
"""

import logging
import math
import os
import re
import sys
import threading
import time
import uuid
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from PIL import Image

from data_shards.errors import UserError
from pipeline.config import Config
from pipeline.config.files import config_to_dict, flatten
from pipeline.runs.saving import refuse_file_in_the_way, saving

logger = logging.getLogger(__name__)

SQLITE = "sqlite:///"
SERVERS = ("http", "https")
DATABASES = ("sqlite", "postgresql", "mysql", "mssql")

KEY_FILE = "mlflow_key"
KEY_TAG = "run_key"

RETRY_S = 30.0
"""Between attempts to reach a store that does not answer, seconds."""
PATIENCE_S = 60.0
"""For a store that neither answers nor fails, at the end of the run, seconds."""
METRICS_AT_ONCE = 1000
"""The most that MLflow takes in a request."""

Status = Literal["FINISHED", "FAILED", "KILLED"]
"""How a run ended, in MLflow's words. One that was killed may be resumed later."""


@dataclass(frozen=True)
class Row:
    """A row of metrics.jsonl.

    Attributes:
        images_seen: at that moment.
        timestamp_ms: since 1970.
        metrics: by name; None where a value is not finite.
    """

    images_seen: int
    timestamp_ms: int
    metrics: dict[str, float | None]


@dataclass(frozen=True)
class Picture:
    """An image of ``samples/``.

    Attributes:
        path: of its file.
        key: name of its series.
        images_seen: at that moment.
    """

    path: Path
    key: str
    images_seen: int


class MlflowMirror:
    """Keeps an MLflow run like its run directory: metrics over images seen, configuration as params, images by step.

    A thread of its own does it. A store that does not answer is tried again, and holds nothing up.

    Args:
        config: names the store and the experiment.
        run_dir: of the run; its name becomes the MLflow run's.
        rows: that the directory holds already.
        images: likewise.
    """

    def __init__(self, config: Config, run_dir: Path, rows: Iterable[Row], pictures: Iterable[Picture]) -> None:
        self._config = config
        self._run_dir = run_dir
        self._uri = absolute_uri(config.log.tracking_uri)
        self._key = make_key(run_dir)
        self._rows, self._pictures = deque(rows), deque(pictures)
        self._start_ms = self._rows[0].timestamp_ms if self._rows else now_ms()
        self._status: Status = "FAILED"
        self._summary: dict[str, float] | None = None
        self._client: Any = None  # while the store answers
        self._run_id = ""
        self._steps_there: dict[str, set[int]] = {}  # what the store has, by metric
        self._pictures_there: set[str] = set()
        self._failure: str | None = None
        self._behind = bool(self._rows or self._pictures)
        self._num_sent = 0
        self._new, self._closing, self._closed = threading.Event(), threading.Event(), False
        _import_mlflow()  # takes seconds, which the thread would take from the training
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._thread.start()

    def add_row(self, row: Row) -> None:
        """Have it sent."""
        self._rows.append(row)
        self._new.set()

    def add_picture(self, picture: Picture) -> None:
        """Have it sent."""
        self._pictures.append(picture)
        self._new.set()

    def close(self, status: Status, summary: dict[str, float] | None) -> None:
        """Send the rest and how the run ended; one line tells what a store that does not answer has missed."""
        self._status, self._summary = status, summary
        self._closing.set()
        self._new.set()
        num_sent = -1
        while self._thread.is_alive() and num_sent != self._num_sent:
            num_sent = self._num_sent
            self._thread.join(PATIENCE_S)
        if not self._closed:
            logger.warning(
                "MLflow at %s has not got %s and the end of the run (%s): send them later by "
                "python pipeline/train.py --resume %s",
                *(hide_password(self._uri), _count(len(self._rows), len(self._pictures))),
                *(self._failure or "no answer", self._run_dir),
            )

    def _work(self) -> None:
        while True:
            self._new.clear()  # before `_closing` is read: `close` may come between the two
            closing = self._closing.is_set()
            reached = self._attempt(closing=closing)
            if closing or (not reached and self._closing.is_set()):
                return
            if reached:
                self._new.wait()
            else:
                self._closing.wait(RETRY_S)

    def _attempt(self, *, closing: bool) -> bool:
        """Send all there is; False if the store does not take it."""
        try:
            if self._client is None:
                self._connect()
            num_rows, num_pictures = self._send_rows(), self._send_pictures()
            if self._behind and (num_rows or num_pictures or self._failure):
                caught_up = _count(num_rows, num_pictures)
                logger.info("MLflow at %s has got what it had missed: %s", hide_password(self._uri), caught_up)
            self._failure, self._behind = None, False
            if closing:
                self._close_run()
        except Exception as error:  # MLflow's, SQLAlchemy's, an artifact store's: none of them may end a training
            self._client = None
            reason = why(error)
            if self._failure is None:
                logger.warning(
                    "MLflow at %s does not answer (%s): training continues, and what it misses is sent when it does",
                    *(hide_password(self._uri), reason),
                )
            self._failure, self._behind = reason, True
            return False
        return True

    def _connect(self) -> None:
        """Find the run in the store, or make it, and find out what it has."""
        from mlflow.entities import Param

        client = make_client(self._uri)
        run = find_run(client, self._config, self._key)
        if run is None:
            tags = {"dataset": self._config.dataset, "mlflow.source.name": Path(sys.argv[0]).name}
            run = client.create_run(
                make_experiment(client, self._config),
                start_time=self._start_ms,
                run_name=self._run_dir.name,
                tags={KEY_TAG: self._key, **tags, **self._config.log.tags},
            )
        self._run_id = run.info.run_id
        if run.info.status != "RUNNING":
            client.update_run(self._run_id, status="RUNNING")
        params = flatten(config_to_dict(self._config))
        missing = [Param(name, str(value)) for name, value in params.items() if name not in run.data.params]
        if missing:
            client.log_batch(self._run_id, params=missing)
        names = (Path(file.path).name for file in client.list_artifacts(self._run_id, "images"))
        # MLflow writes a small copy of an image after the image itself.
        self._pictures_there = {name.split("+timestamp+")[0] for name in names if name.endswith("+compressed.webp")}
        self._steps_there = {}
        self._client = client

    def _send_rows(self) -> int:
        """How many of them the store had not got."""
        from mlflow.entities import Metric

        num_new = 0
        while self._rows:
            metrics: list[Metric] = []
            num_rows = 0
            while num_rows < len(self._rows):
                row = self._rows[num_rows]
                if len(metrics) + len(row.metrics) > METRICS_AT_ONCE:
                    break
                num_rows += 1
                if row.images_seen not in self._steps_of(min(row.metrics)):  # a row gets there whole or not at all
                    values = {name: math.nan if value is None else value for name, value in row.metrics.items()}
                    metrics += [Metric(n, v, row.timestamp_ms, row.images_seen) for n, v in values.items()]
                    num_new += 1
            if metrics:
                # Sent again after a lost answer, the same points at the same time stay one point each.
                self._client.log_batch(self._run_id, metrics=metrics)
            for _ in range(num_rows):
                self._rows.popleft()
            self._num_sent += num_rows
        return num_new

    def _steps_of(self, name: str) -> set[int]:
        if name not in self._steps_there:
            history = self._client.get_metric_history(self._run_id, name)
            self._steps_there[name] = {metric.step for metric in history}
        return self._steps_there[name]

    def _send_pictures(self) -> int:
        """How many of them the store had not got."""
        num_new = 0
        while self._pictures:
            picture = self._pictures[0]
            name = f"{picture.key}+step+{picture.images_seen}"
            if name not in self._pictures_there and picture.path.is_file():
                with Image.open(picture.path) as image:
                    self._client.log_image(
                        self._run_id, image, key=picture.key, step=picture.images_seen, synchronous=True
                    )
                self._pictures_there.add(name)
                num_new += 1
            self._pictures.popleft()
            self._num_sent += 1
        return num_new

    def _close_run(self) -> None:
        if self._summary is not None:
            self._client.log_dict(self._run_id, self._summary, "summary.json")
        self._client.set_terminated(self._run_id, status=self._status)
        self._closed = True


def refuse_unknown_store(uri: str) -> None:
    """Find out before anything is made whether MLflow could take such an address; nothing is asked for an answer.

    Raises:
        UserError: it could not.
    """
    if uri == "none":
        return
    scheme = urlsplit(uri).scheme
    known = {*SERVERS, *DATABASES, "databricks", *(e.name for e in entry_points(group="mlflow.tracking_store"))}
    if uri != "databricks" and ("://" not in uri or scheme.split("+")[0] not in known or not _names_a_host(uri)):
        raise UserError(
            f"--log.tracking-uri {hide_password(uri)} is no store that MLflow knows: give http://HOST:PORT "
            "of a server, sqlite:///FILE, postgresql://... or none"
        )
    if uri.startswith(SQLITE):
        refuse_file_in_the_way(Path(uri.removeprefix(SQLITE)).parent, "--log.tracking-uri: directory")


def _names_a_host(uri: str) -> bool:
    """Whether it does, where it should."""
    try:
        parts = urlsplit(uri)
        return parts.scheme not in SERVERS or (parts.hostname is not None and parts.port != 0)
    except ValueError:  # a port that is no number
        return False


def absolute_uri(uri: str) -> str:
    """The address of an MLflow store from anywhere: MLflow keeps a database open by its name, which may be relative."""
    return f"{SQLITE}{Path(uri.removeprefix(SQLITE)).absolute()}" if uri.startswith(SQLITE) else uri


def is_server(uri: str) -> bool:
    """Whether the store is a tracking server, which has pages of its own."""
    return urlsplit(uri).scheme in SERVERS


def hide_password(uri: str) -> str:
    """The address of a store as it may be shown."""
    return re.sub(r"(://[^/@:]*):[^/@]*@", r"\1:***@", uri)


def now_ms() -> int:
    """Milliseconds since 1970."""
    return time.time_ns() // 1_000_000


def make_client(uri: str) -> Any:
    """An `MlflowClient` that gives up after seconds, not minutes, unless the environment says otherwise."""
    client_class = _import_mlflow()
    if uri.startswith(SQLITE):
        Path(uri.removeprefix(SQLITE)).parent.mkdir(parents=True, exist_ok=True)
    return client_class(tracking_uri=uri)


def prepare_store(config: Config) -> None:
    """Make the store and the experiment: runs that all began by making them would get in each other's way.

    A store that does not answer is left to the runs, each of which tries again.
    """
    uri = config.log.tracking_uri
    refuse_unknown_store(uri)
    if uri == "none":
        return
    try:
        make_experiment(make_client(absolute_uri(uri)), config)
    except Exception as error:  # see `MlflowMirror._attempt`
        logger.warning("MLflow at %s does not answer (%s)", hide_password(uri), why(error))


def _import_mlflow() -> Any:
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")  # seconds
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    from mlflow import MlflowClient

    for name in ("mlflow", "urllib3"):  # each table that is made, each retry
        logging.getLogger(name).setLevel(logging.ERROR)
    return MlflowClient


def read_key(run_dir: Path) -> str | None:
    """What an MLflow run is known by to mirror `run_dir`; None if none does."""
    path = run_dir / KEY_FILE
    return path.read_text().strip() if path.is_file() else None


def find_run(client: Any, config: Config, key: str) -> Any:
    """The MLflow run with this key, None if the store has none."""
    experiment = client.get_experiment_by_name(config.log.experiment)
    if experiment is None:
        return None
    runs = client.search_runs([experiment.experiment_id], f"tags.{KEY_TAG} = '{key}'", max_results=1)
    return runs[0] if runs else None


def make_key(run_dir: Path) -> str:
    """By which the MLflow run of a directory is found. Ours, not the store's: it is there before any has answered."""
    key = read_key(run_dir)
    if not key:
        key = uuid.uuid4().hex
        with saving(run_dir / KEY_FILE) as temporary:
            temporary.write_text(key + "\n")
    return key


def make_experiment(client: Any, config: Config) -> str:
    """The id of the configured experiment, which may be there."""
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


def why(error: BaseException) -> str:
    """What lies at the bottom of an error: MLflow wraps requests, which wraps urllib3, which wraps the socket's."""
    while (deeper := error.__cause__ or error.__context__) is not None:
        error = deeper
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(text).split())[:200]


def _count(num_rows: int, num_pictures: int) -> str:
    rows = f"{num_rows} row{'' if num_rows == 1 else 's'} of metrics"
    return f"{rows} and {num_pictures} image{'' if num_pictures == 1 else 's'}"
