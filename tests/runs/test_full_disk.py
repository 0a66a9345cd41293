"""A disk that takes no more: what is there stays whole, the run says so in a line, and continues or ends as configured.

The kernel says no: to files beyond a size (RLIMIT_FSIZE), and to a full file system where the tests may mount one.
"""

import contextlib
import os
import resource
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import (
    BATCH,
    PIPES,
    RESOLUTION,
    TINY,
    assert_same_bits,
    patched,
    rows,
    shard_cache,
    tiny,
    train_in_new_process,
    train_in_process,
    training_rows,
    write_noise,
)
from PIL import Image
from two_ranks import TWO_RANKS

from data_shards.errors import UserError
from pipeline.config.files import config_from_dict, merge
from pipeline.evaluation import in_training
from pipeline.runs.checkpoints import BEST, checkpoint_path, list_checkpoints, load_checkpoint, save_checkpoint
from pipeline.runs.saving import SaveError
from pipeline.runs.tracking import RunTracker, make_tracker
from pipeline.training.callbacks import Checkpoints

SMALL = 50_000  # bytes: all that a run writes but checkpoints and grids


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shard_cache(tmp_path_factory)


@contextlib.contextmanager
def files_no_larger_than(num_bytes: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def state(iteration: int) -> dict[str, Any]:
    return {"iteration": iteration, "a": torch.full((30_000,), float(iteration)), "b": torch.zeros(30_000)}


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("room", [0, 100, 130_000, 240_000])
def test_checkpoint_without_room_leaves_all_as_it_was(room: int, tmp_path: Path) -> None:
    path = checkpoint_path(tmp_path, 1)
    save_checkpoint(state(1), path)
    before = content(tmp_path)
    for target in (path, checkpoint_path(tmp_path, 2)):
        with (
            files_no_larger_than(room),
            pytest.raises(SaveError, match=f"^{target} cannot be written: File too large$"),
        ):
            save_checkpoint(state(2), target)
    assert content(tmp_path) == before
    assert_same_bits(load_checkpoint(path), state(1))


def test_checkpoint_where_a_file_is_in_the_way_is_told(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").touch()
    with pytest.raises(SaveError, match=r"checkpoint-000000001\.pt cannot be written: File exists$"):
        save_checkpoint(state(1), checkpoint_path(tmp_path / "checkpoints", 1))


def trainer_at(iteration: int, on_save_error: str) -> Any:
    log = {"checkpoint_interval_images": BATCH, "on_save_error": on_save_error}
    return SimpleNamespace(
        iteration=iteration,
        images_seen=iteration * BATCH,
        config=config_from_dict(merge(TINY, {"steps": 99, "log": log})),
        state_dict=lambda: state(iteration),
        accelerator=SimpleNamespace(wait_for_everyone=lambda: None),
        refuse_drift=lambda: None,
    )


def checkpoints_of(run_dir: Path, mious: dict[int, float]) -> Checkpoints:
    tracker: Any = SimpleNamespace(log_metrics=lambda *_, **__: None)
    callback = Checkpoints(run_dir, tracker, None, best_miou=0.0, seconds_before=0.0)
    callback._measure = lambda trainer, *_: {"mask/miou": mious[trainer.iteration]}  # type: ignore[method-assign]
    return callback


def test_run_goes_on_and_saves_again_when_there_is_room(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    callback = checkpoints_of(tmp_path, {1: 0.1, 2: 0.9, 3: 0.5})
    callback.on_step(trainer_at(1, "continue"))
    callback._background.wait()
    with files_no_larger_than(SMALL):
        callback.on_step(trainer_at(2, "continue"))
        callback._background.wait()
    (line,) = caplog.messages
    directory = tmp_path / "checkpoints"
    assert line.startswith(f"{checkpoint_path(directory, 2)} cannot be written: File too large: training continues")
    with pytest.raises(UserError, match=f"make room, and resume .* --resume {tmp_path}$"):
        callback.refuse_unsaved()
    callback.on_step(trainer_at(3, "continue"))
    callback.close()
    callback.refuse_unsaved()
    assert [load_checkpoint(path)["iteration"] for path in list_checkpoints(directory)] == [3, 1]
    assert load_checkpoint(directory / BEST)["iteration"] == 3  # of those there are


def test_run_stops_at_the_next_step_if_it_shall(tmp_path: Path) -> None:
    callback = checkpoints_of(tmp_path, {1: 0.1, 2: 0.9})
    callback.on_step(trainer_at(1, "stop"))
    callback._background.wait()
    with files_no_larger_than(SMALL):
        callback.on_step(trainer_at(2, "stop"))
        with pytest.raises(UserError, match=r"000000002\.pt cannot be written: File too large; make room"):
            callback._background.wait()
    assert {path.name for path in list_checkpoints(tmp_path / "checkpoints")} == {"checkpoint-000000001.pt"}


# --- rows and images ---


def tracked(run_dir: Path, on_save_error: str = "continue") -> RunTracker:
    log = {"tracking_uri": "none", "on_save_error": on_save_error}
    return make_tracker(config_from_dict(merge(TINY, {"log": log})), run_dir, iteration=0)


def log(tracker: RunTracker, iterations: range) -> None:
    for i in iterations:
        tracker.log_metrics({"loss/a": float(i)}, iteration=i, images_seen=i * BATCH)


def test_rows_without_room_are_written_later_and_none_is_half_there(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tracker, path = tracked(tmp_path), tmp_path / "metrics.jsonl"
    log(tracker, range(1, 4))
    tracker.wait()
    whole = path.read_bytes()
    with files_no_larger_than(len(whole) + 20):  # a part of the next row
        log(tracker, range(4, 8))
        with pytest.raises(SaveError, match=r"metrics\.jsonl cannot be written: File too large"):
            tracker.wait()
        assert path.read_bytes() == whole
    assert len(caplog.messages) == 1 and "rows are kept" in caplog.messages[0]
    log(tracker, range(8, 10))
    tracker.wait()
    tracker.close("FINISHED")
    assert [row["iteration"] for row in rows(tmp_path)] == list(range(1, 10))


def test_picture_without_room_is_left_out_whole(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tracker = tracked(tmp_path)
    noise = Image.frombytes("RGB", (200, 200), os.urandom(120_000))
    with files_no_larger_than(SMALL):
        tracker.log_image(noise, "grid", images_seen=8)
        tracker.wait()
    assert list((tmp_path / "samples").iterdir()) == []
    (line,) = caplog.messages
    assert "grid-0000000008.png cannot be written: File too large" in line
    tracker.log_image(noise, "grid", images_seen=16)
    tracker.close("FINISHED")
    assert [path.name for path in (tmp_path / "samples").iterdir()] == ["grid-0000000016.png"]


def test_row_without_room_ends_the_run_if_it_shall(tmp_path: Path) -> None:
    tracker = tracked(tmp_path, "stop")
    with files_no_larger_than(20):
        log(tracker, range(1, 2))
        with pytest.raises(SaveError, match=r"metrics\.jsonl"):
            tracker.wait()
    tracker.close("FAILED")


# --- the command ---


def test_segmenter_that_cannot_be_kept_is_told_and_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_noise(tmp_path / "data", RESOLUTION, with_alpha=True)
    monkeypatch.setattr(in_training, "fit_segmenter", without_room(in_training.fit_segmenter))
    with files_no_larger_than(resource.getrlimit(resource.RLIMIT_FSIZE)[0]):  # afterwards as before
        arguments = tiny(tmp_path / "cache", data=data, run_dir="run", steps=1, log={"grid_interval_images": 10**9})
        outcome = train_in_process(tmp_path, *arguments)
    (line,) = [line for line in outcome.err.splitlines() if "fit the segmenter again" in line]
    assert "segmenter-v" in line and "cannot be written: File too large" in line
    assert "pseudo ground truth: " in outcome.err
    assert not list((tmp_path / "cache").glob("*.tmp"))


def without_room(call: Callable[..., Any]) -> Callable[..., Any]:
    def called(*args: Any, **kwargs: Any) -> Any:
        result = call(*args, **kwargs)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        return result

    return called


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], **PIPES).returncode:
        pytest.skip("needs root, to mount a file system")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_run_on_a_full_disk_trains_to_its_end_says_so_and_is_resumed(
    small_disk: Path, cache: Path, tmp_path: Path
) -> None:
    run_dir = small_disk / "run"
    outcome = train_in_process(tmp_path, *tiny(cache, run_dir=run_dir, log={"checkpoint_interval_images": 2 * BATCH}))
    assert outcome.code == 2
    (error,) = outcome.errors
    last = checkpoint_path(run_dir / "checkpoints", 4)
    assert error.startswith(f"error: {last} cannot be written: No space left on device; make room")
    assert outcome.err.count("No space left on device: training continues") >= 2
    assert "Traceback" not in outcome.err and outcome.out == ""
    assert [row["iteration"] for row in training_rows(run_dir)] == [1, 2, 3, 4]
    assert not list((run_dir / "checkpoints").iterdir()) and not (run_dir / "summary.json").exists()

    subprocess.run(["mount", "-o", "remount,size=100m", str(small_disk)], check=True)
    resumed = train_in_process(tmp_path, "--resume", str(run_dir))
    assert resumed.code == 0, resumed.err
    assert load_checkpoint(last)["iteration"] == 4
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    refused = train_in_process(tmp_path, "--resume", str(run_dir), "--steps", "5")
    assert refused.code == 2
    assert refused.errors == [f"error: {run_dir}/config.yaml cannot be written: Read-only file system"]
    assert load_checkpoint(last)["iteration"] == 4


def test_both_ranks_end_when_one_cannot_save(cache: Path, tmp_path: Path) -> None:
    limit = f"resource.setrlimit(resource.RLIMIT_FSIZE, ({SMALL}, resource.RLIM_INFINITY))"
    script = patched(tmp_path, f"import resource\n{limit}")
    stop = {"checkpoint_interval_images": 2 * BATCH, "on_save_error": "stop", "grid_interval_images": 10**9}
    arguments = tiny(cache, run_dir="run", steps=100_000, log=stop)
    outcome = train_in_new_process(tmp_path, *arguments, launcher=TWO_RANKS, script=script)
    assert outcome.code != 0
    one, other = sorted(outcome.errors)
    told = "run/checkpoints/checkpoint-000000002.pt cannot be written: File too large; make room"
    assert one.startswith(f"error: rank 0: {told}")
    assert other.startswith(f"error: rank 1: rank 0 failed ({told}")
    assert "exitcode  : 2 " in outcome.err
