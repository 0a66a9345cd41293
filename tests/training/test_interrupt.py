"""A run that is told to stop saves, says so, ends with the code of the signal, and resumes without a difference."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from helpers import (
    TINY,
    Outcome,
    assert_same_bits,
    children,
    ended,
    flags,
    rows,
    shard_cache,
    train_in_new_process,
    train_in_process,
    training,
    training_rows,
)
from two_ranks import EXACT, TWO_RANKS

from pipeline.config.files import merge
from pipeline.evaluation.mask_metrics import MaskMetrics
from pipeline.runs.checkpoints import checkpoint_path, list_checkpoints, load_checkpoint
from pipeline.training import callbacks


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shard_cache(tmp_path_factory)


def arguments(cache: Path, steps: int, **overrides: Any) -> list[str]:
    # No checkpoint falls due: what is there is the signal's.
    return flags(merge(TINY, {"cache_dir": cache, "run_dir": "run", "steps": steps} | overrides))


def saved_state(cwd: Path, outcome: Outcome, name: str) -> int:
    """Iterations of the only checkpoint, which the last words name."""
    directory = cwd / "run" / "checkpoints"
    (path,) = list_checkpoints(directory)
    iteration = int(load_checkpoint(path)["iteration"])
    expected = f"{name}: stopped after iteration {iteration}, saved in run/checkpoints; resume with --resume run"
    assert outcome.err.count(expected) == 1
    assert "Traceback" not in outcome.err.split(expected)[0]
    assert [row["iteration"] for row in training_rows(cwd / "run")] == list(range(1, iteration + 1))
    return iteration


def assert_same_end(one: Path, other: Path, steps: int) -> None:
    states = [load_checkpoint(checkpoint_path(cwd / "run" / "checkpoints", steps)) for cwd in (one, other)]
    assert_same_bits(*({name: state[name] for name in EXACT} for state in states))


def test_sigterm_saves_and_the_run_goes_on_exactly(cache: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    with training(parts, *arguments(cache, 100_000)) as process:
        process.send_signal(signal.SIGTERM)
        outcome = ended(process, parts)
    assert outcome.code == 143, outcome.err
    steps = saved_state(parts, outcome, "SIGTERM") + 3
    for cwd, more in ((whole, arguments(cache, steps)), (parts, ["--resume", "run", "--steps", str(steps)])):
        done = train_in_process(cwd, *more)
        assert done.code == 0, done.err
    assert_same_end(parts, whole, steps)


def test_sigusr1_ends_with_its_code_and_mlflow_knows_and_further_signals_change_nothing(
    cache: Path, tmp_path: Path
) -> None:
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    with training(tmp_path, *arguments(cache, 100_000, log={"tracking_uri": uri})) as process:
        process.send_signal(signal.SIGUSR1)
        for _ in range(20):
            process.send_signal(signal.SIGTERM)
        outcome = ended(process, tmp_path)
    assert outcome.code == 138, outcome.err
    steps = saved_state(tmp_path, outcome, "SIGUSR1") + 1
    client = MlflowClient(tracking_uri=uri)

    def status() -> str:
        (run,) = client.search_runs([client.get_experiment_by_name("furrygan").experiment_id])
        return str(run.info.status)

    assert status() == "KILLED"
    assert train_in_process(tmp_path, "--resume", "run", "--steps", str(steps)).code == 0
    assert status() == "FINISHED"


def test_last_evaluation_is_interrupted_at_once_with_all_saved(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = callbacks.generated_mask_metrics

    def told_to_stop(*args: Any, **kwargs: Any) -> MaskMetrics:
        signal.raise_signal(signal.SIGTERM)
        return measure(*args, **kwargs)

    arguments_of_both = [*arguments(cache, 3), "--log.grid-interval-images", "8"]
    former = signal.getsignal(signal.SIGTERM)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(callbacks, "generated_mask_metrics", told_to_stop)
            outcome = train_in_process(tmp_path, *arguments_of_both)
    finally:
        signal.signal(signal.SIGTERM, former)
    assert outcome.code == 143
    assert saved_state(tmp_path, outcome, "SIGTERM") == 3
    assert not (tmp_path / "run" / "summary.json").exists()
    assert not [row for row in rows(tmp_path / "run") if "mask/miou" in row]

    assert train_in_process(tmp_path, "--resume", "run").code == 0
    assert "mask/miou" in json.loads((tmp_path / "run" / "summary.json").read_text())
    assert [row["iteration"] for row in rows(tmp_path / "run") if "mask/miou" in row] == [3]
    assert load_checkpoint(checkpoint_path(tmp_path / "run" / "checkpoints", 3))["metrics"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_two_ranks_stop_at_the_same_step_whoever_is_told(number: signal.Signals, cache: Path, tmp_path: Path) -> None:
    """The launcher passes SIGTERM on to both; SIGUSR1 is sent to one of the ranks alone."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    with training(parts, *arguments(cache, 100_000), launcher=TWO_RANKS) as process:
        if number == signal.SIGTERM:
            process.send_signal(number)
        else:
            os.kill(children(process.pid)[1], number)
        outcome = ended(process, parts)
    assert outcome.code == 1  # the launcher's
    steps = saved_state(parts, outcome, number.name) + 2
    if number == signal.SIGUSR1:
        assert "138" in outcome.err
        return
    for cwd, more in ((whole, arguments(cache, steps)), (parts, ["--resume", "run", "--steps", str(steps)])):
        done = train_in_new_process(cwd, *more, launcher=TWO_RANKS)
        assert done.code == 0, done.err
    assert_same_end(parts, whole, steps)


def test_before_training_begins_there_is_nothing_to_wait_for(tmp_path: Path) -> None:
    from pipeline.training.interrupt import Interrupt, Interrupted

    former = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    with Interrupt():
        pass
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)] == former
    try:
        with pytest.raises(Interrupted) as end, Interrupt():
            signal.raise_signal(signal.SIGTERM)
        assert end.value.code == 143
        signal.raise_signal(signal.SIGTERM)  # on the way out
    finally:
        for number, handler in zip((signal.SIGTERM, signal.SIGUSR1), former, strict=True):
            signal.signal(number, handler)
