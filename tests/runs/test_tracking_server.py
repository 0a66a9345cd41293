"""While MLflow's server is away, training continues; in the end nothing is missing, and nothing is there twice."""

import itertools
import json
import math
import re
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import (
    BATCH,
    TINY,
    Outcome,
    rows,
    shard_cache,
    tiny,
    train_in_process,
    training,
)
from mlflow import MlflowClient
from PIL import Image
from tracking_server import Cable, Server, mlflow_server

from pipeline.config import Config
from pipeline.config.files import config_from_dict, config_to_dict, flatten, load_config, merge
from pipeline.runs import mlflow_mirror
from pipeline.runs.mlflow_mirror import KEY_TAG, read_key
from pipeline.runs.tracking import RunTracker, make_tracker

SUMMARY = {"mask/miou": 0.5}
OF_THE_ROW = ("iteration", "images_seen", "timestamp_ms")
NOT_OF_THE_SEED = ("speed/", "memory/")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with mlflow_server(tmp_path_factory.mktemp("server")) as started:
        yield started


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shard_cache(tmp_path_factory)


@pytest.fixture
def cable(server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cable]:
    monkeypatch.setattr(mlflow_mirror, "RETRY_S", 0.2)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    cable = Cable(server)
    yield cable
    cable.pull()


@pytest.fixture
def config(cable: Cable, tmp_path: Path) -> Config:
    return config_from_dict(merge(TINY, {"log": {"tracking_uri": cable.url, "experiment": tmp_path.name}}))


def tracked(config: Config, run_dir: Path, iteration: int = 0) -> RunTracker:
    run_dir.mkdir(exist_ok=True)
    return make_tracker(config, run_dir, iteration=iteration)


def log(tracker: RunTracker, iterations: range) -> None:
    """Rows of two kinds, some with what is not finite, and an image now and then."""
    for i in iterations:
        seen = {"iteration": i, "images_seen": i * BATCH}
        tracker.log_metrics({"loss/a": 1.0 / i, "mask/area": math.nan if i % 5 == 0 else 0.1 * i}, **seen)
        if i % 3 == 0:
            tracker.log_metrics({"mask/miou": 0.01 * i}, **seen)
            tracker.log_image(Image.new("RGB", (8, 8), (i, 0, 0)), "grid", images_seen=i * BATCH)


def until(condition: Callable[[], Any]) -> None:
    while not condition():
        time.sleep(0.05)


def points(metrics: list[dict[str, Any]]) -> dict[str, list[tuple[Any, ...]]]:
    """By name, from rows of metrics.jsonl: what a store must hold."""
    found: dict[str, list[tuple[Any, ...]]] = {}
    for row in metrics:
        for name, value in row.items():
            if name not in OF_THE_ROW:
                found.setdefault(name, []).append((row["images_seen"], row["timestamp_ms"], value))
    return found


def the_run(server: Server, run_dir: Path, experiment: str) -> tuple[MlflowClient, Any]:
    """The only one that mirrors the directory."""
    client = MlflowClient(tracking_uri=server.url)
    found = client.get_experiment_by_name(experiment)
    assert found is not None
    (run,) = client.search_runs([found.experiment_id])
    assert run.data.tags[KEY_TAG] == read_key(run_dir)
    return client, run


def stored(client: MlflowClient, run: Any) -> dict[str, list[tuple[Any, ...]]]:
    return {
        name: sorted(
            (m.step, m.timestamp, None if math.isnan(m.value) else m.value)
            for m in client.get_metric_history(run.info.run_id, name)
        )
        for name in run.data.metrics
    }


def stored_pictures(client: MlflowClient, run: Any) -> Counter[str]:
    names = (Path(file.path).name for file in client.list_artifacts(run.info.run_id, "images"))
    return Counter(name.split("+timestamp+")[0] for name in names if name.endswith(".png"))


def assert_mirrored(
    server: Server, run_dir: Path, config: Config, status: str = "FINISHED", *, answers_lost: bool = False
) -> None:
    """Every point once, and everything else.

    An image and its small copy are two requests of MLflow. Where an answer to the first is lost, both are sent again.
    """
    client, run = the_run(server, run_dir, config.log.experiment)
    assert stored(client, run) == points(rows(run_dir))
    pictures = (path.stem.rpartition("-") for path in (run_dir / "samples").glob("*.png"))
    expected = {f"{key}+step+{int(seen)}": 1 for key, _, seen in pictures}
    found = stored_pictures(client, run)
    assert (set(found) == set(expected)) if answers_lost else (found == expected)
    assert run.data.params == {name: str(value) for name, value in flatten(config_to_dict(config)).items()}
    assert run.info.status == status and run.info.run_name == run_dir.name
    assert run.info.start_time <= rows(run_dir)[0]["timestamp_ms"]


def test_server_that_comes_late_gets_everything(
    server: Server, cable: Cable, config: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    tracker = tracked(config, tmp_path / "run")
    log(tracker, range(1, 9))
    until(lambda: "does not answer" in caplog.text)
    cable.plug()
    until(lambda: "has got what it had missed" in caplog.text)
    log(tracker, range(9, 12))
    tracker.close("FINISHED", SUMMARY)
    assert_mirrored(server, tmp_path / "run", config)
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert f"MLflow at {cable.url} does not answer (Connection refused): training continues" in warning


def test_server_that_is_away_in_the_middle_gets_everything(
    server: Server, cable: Cable, config: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    cable.plug()
    tracker = tracked(config, tmp_path / "run")
    for first, last in ((1, 4), (10, 14)):  # twice
        log(tracker, range(first, last))
        until(lambda: not tracker._mirror._rows and not tracker._mirror._pictures)
        cable.pull()
        log(tracker, range(last, last + 6))
        until(lambda: tracker._mirror._failure)
        cable.plug()
        until(lambda: not tracker._mirror._failure)
    tracker.close("FINISHED", SUMMARY)
    assert_mirrored(server, tmp_path / "run", config)
    told = [record.getMessage() for record in caplog.records if record.name == "pipeline.runs.mlflow_mirror"]
    assert ["does not answer" in line for line in told] == [True, False, True, False]


def test_server_that_is_away_at_the_end_gets_everything_by_resume(
    server: Server, cable: Cable, config: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cable.plug()
    tracker = tracked(config, tmp_path / "run")
    log(tracker, range(1, 8))
    until(lambda: tracker._mirror._num_sent == 7 + 2 + 2)
    cable.pull()
    log(tracker, range(8, 11))
    tracker.close("FINISHED", SUMMARY)
    missed = "4 rows of metrics and 1 image and the end of the run"
    assert f"MLflow at {cable.url} has not got {missed}" in caplog.text
    assert caplog.text.splitlines()[-1].endswith(f"python pipeline/train.py --resume {tmp_path / 'run'}")
    assert the_run(server, tmp_path / "run", config.log.experiment)[1].info.status == "RUNNING"
    cable.plug()
    tracked(config, tmp_path / "run", iteration=10).close("FINISHED", SUMMARY)
    assert_mirrored(server, tmp_path / "run", config)
    client, run = the_run(server, tmp_path / "run", config.log.experiment)
    summary = Path(client.download_artifacts(run.info.run_id, "summary.json", str(tmp_path)))
    assert json.loads(summary.read_text()) == SUMMARY


def test_what_the_server_took_without_an_answer_is_there_once(
    server: Server, cable: Cable, config: Config, tmp_path: Path
) -> None:
    """Whichever request it was: each run loses the answer to another one, until a run has no more requests."""
    cable.plug()
    for lost in itertools.count(1):
        cable.num_answers, cable.lost_answer = 0, lost
        run_dir, of_its_own = tmp_path / f"run-{lost}", {"log": {"experiment": f"{tmp_path.name}-{lost}"}}
        one = config_from_dict(merge(config_to_dict(config), of_its_own))
        tracker = tracked(one, run_dir)
        log(tracker, range(1, 4))
        tracker.close("FINISHED", SUMMARY)
        if cable.num_answers < lost:
            break
        if not tracker._mirror._closed:  # the answer to one of the last requests: a run that ends does not ask again
            tracked(one, run_dir, iteration=3).close("FINISHED", SUMMARY)
        assert_mirrored(server, run_dir, one, answers_lost=True)
    assert lost > 8, "experiment, run, parameters, rows, image and end are more requests than that"


def test_server_that_hangs_holds_nothing_up(
    server: Server, cable: Cable, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    cable.plug()
    with server.hanging():
        tracker = tracked(config, tmp_path / "run")
        log(tracker, range(1, 5))
        tracker.wait()
        assert len(rows(tmp_path / "run")) == 5
        tracker.close("KILLED")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")
    tracker = tracked(config, tmp_path / "run", iteration=4)
    log(tracker, range(5, 8))
    tracker.close("FINISHED", SUMMARY)
    assert_mirrored(server, tmp_path / "run", config)


def test_long_backlog_is_sent_in_few_requests(server: Server, cable: Cable, config: Config, tmp_path: Path) -> None:
    tracker = tracked(config, tmp_path / "run")
    for i in range(1, 601):
        tracker.log_metrics({f"loss/{name}": float(i) for name in "abcde"}, iteration=i, images_seen=i * BATCH)
    tracker.wait()
    cable.plug()
    tracker.close("FINISHED", SUMMARY)
    assert_mirrored(server, tmp_path / "run", config)


# --- the command ---


def arguments(cache: Path, cable: Cable, experiment: str, **overrides: Any) -> list[str]:
    where = {"tracking_uri": cable.url, "experiment": experiment}
    return tiny(cache, **merge({"run_dir": "run", "log": where}, overrides))


def told(outcome: Outcome) -> list[str]:
    return [line[line.index("MLflow at") :] for line in outcome.err.splitlines() if "MLflow at" in line]


def test_run_without_its_server_is_whole_and_resume_sends_it(
    server: Server, cable: Cable, cache: Path, tmp_path: Path
) -> None:
    alone = train_in_process(tmp_path, *arguments(cache, cable, tmp_path.name))
    assert alone.code == 0, alone.err
    first, last = told(alone)
    assert "does not answer (Connection refused)" in first
    assert re.search(r"has not got 5 rows of metrics and 1 image and the end of the run .* --resume run$", last)
    assert alone.out.splitlines()[-1].split() == ["compare", "runs", cable.url]
    summary = (tmp_path / "run" / "summary.json").read_text()
    before = rows(tmp_path / "run")

    cable.plug()
    resumed = train_in_process(tmp_path, "--resume", "run")
    assert resumed.code == 0, resumed.err
    assert told(resumed) == [f"MLflow at {cable.url} has got what it had missed: 5 rows of metrics and 1 image"]
    assert rows(tmp_path / "run") == before
    config = config_from_dict(load_config(tmp_path / "run" / "config.yaml"))
    assert_mirrored(server, tmp_path / "run", config)
    client, run = the_run(server, tmp_path / "run", tmp_path.name)
    sent = json.loads(Path(client.download_artifacts(run.info.run_id, "summary.json", str(tmp_path))).read_text())
    assert sent["mask/miou"] == json.loads(summary)["mask/miou"]

    again = train_in_process(tmp_path, "--resume", "run")
    assert again.code == 0 and told(again) == []
    assert_mirrored(server, tmp_path / "run", config)


def test_killed_run_has_every_point_once_after_its_resume(
    server: Server, cable: Cable, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server has had rows of iterations that the resumed run repeats, and has missed others."""
    cable.plug()
    every_4 = {"log": {"checkpoint_interval_images": 4 * BATCH}}
    client = MlflowClient(tracking_uri=server.url)

    def has_got() -> bool:
        experiment = client.get_experiment_by_name(tmp_path.name)
        return experiment is not None and any(
            run.data.metrics for run in client.search_runs([experiment.experiment_id])
        )

    with training(tmp_path, *arguments(cache, cable, tmp_path.name, steps=100_000, **every_4)) as process:
        until(has_got)
        cable.pull()
        process.send_signal(signal.SIGKILL)
        process.wait()
    reached = max(row["iteration"] for row in rows(tmp_path / "run"))
    cable.plug()
    resumed = train_in_process(tmp_path, "--resume", "run", "--steps", str(reached + 2))
    assert resumed.code == 0, resumed.err

    client, run = the_run(server, tmp_path / "run", tmp_path.name)
    assert run.info.status == "FINISHED"

    def of_the_seed(of: dict[str, list[tuple[Any, ...]]]) -> dict[str, list[tuple[Any, ...]]]:
        return {k: [(p[0], p[2]) for p in v] for k, v in of.items() if not k.startswith(NOT_OF_THE_SEED)}

    expected = points(rows(tmp_path / "run"))
    assert of_the_seed(stored(client, run)) == of_the_seed(expected)
    assert [p[0] for p in stored(client, run)["speed/img_per_s"]] == [p[0] for p in expected["speed/img_per_s"]]


@pytest.mark.parametrize(
    "uri",
    ["foo://x", "mlruns", "file:///mlruns", "http:/x", "http://", "http://host:port", "sqlite:mlflow.db"],
)
def test_address_that_is_none_is_one_line_and_nothing_is_made(uri: str, tmp_path: Path) -> None:
    outcome = train_in_process(tmp_path, *tiny(tmp_path / "shards", run_dir="run", log={"tracking_uri": uri}))
    assert outcome.code == 2
    assert outcome.err.splitlines() == outcome.errors and len(outcome.errors) == 1, outcome.err
    assert f"--log.tracking-uri {uri} " in outcome.errors[0] and "http://HOST:PORT" in outcome.errors[0]
    assert list(tmp_path.iterdir()) == []


def test_password_of_a_store_is_not_shown(tmp_path: Path) -> None:
    outcome = train_in_process(tmp_path, *tiny(tmp_path, log={"tracking_uri": "foo://me:secret@host/x"}))
    assert outcome.code == 2 and "secret" not in outcome.err and "foo://me:***@host/x" in outcome.err
