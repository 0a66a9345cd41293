"""A run that was interrupted ends with the bits of one that never was.

The reference is one run of 8 steps in a process of its own, with a checkpoint and a row of metrics after every step.
"""

import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    BATCH,
    TINY,
    Outcome,
    assert_same_bits,
    command,
    environment,
    flags,
    furballs,
    rows,
    shard_cache,
    train_in_new_process,
    train_in_process,
    training_rows,
)
from two_ranks import of_the_seed

from data_shards.reading.batches import Batch
from data_shards.reading.loader import make_loader
from data_shards.reading.shard_set import ShardSet
from pipeline.config.files import merge
from pipeline.runs.checkpoints import checkpoint_path, list_checkpoints, load_checkpoint

pytest.importorskip("nvidia.dali")

EVERY_STEP = {"loader": "dali", "log": {"checkpoint_interval_images": BATCH, "keep_checkpoints": 99}}
EXACT = ("iteration", "images_seen", "seed", "generator", "discriminator", "ema", "optimizers", "loader")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shard_cache(tmp_path_factory)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """The directory of the run that was never interrupted."""
    cwd = tmp_path_factory.mktemp("whole")
    outcome = train_in_new_process(cwd, *arguments(cache, steps=8, run_dir="whole"))
    assert outcome.code == 0, outcome.err
    return cwd / "whole"


def arguments(cache: Path, **overrides: Any) -> list[str]:
    return flags(merge(merge(TINY, EVERY_STEP), {"cache_dir": cache} | overrides))


def interrupted(whole: Path, tmp_path: Path, iteration: int) -> Path:
    """A copy of the run as it would stand, had its process ended some time after the checkpoint of `iteration`."""
    run_dir = tmp_path / "run"
    shutil.copytree(whole, run_dir)
    (run_dir / "summary.json").unlink()
    for path in list_checkpoints(run_dir / "checkpoints"):
        if path > checkpoint_path(run_dir / "checkpoints", iteration):
            path.unlink()
    return run_dir


def final_state(run_dir: Path) -> dict[str, Any]:
    state = load_checkpoint(checkpoint_path(run_dir / "checkpoints", 8))
    return {name: state[name] for name in EXACT}


def next_batch(run_dir: Path, cache: Path, *, steps_before: int | None = None) -> Batch:
    """What the loader delivers after the run's last checkpoint, or after so many steps from the start."""
    shard_set = ShardSet.open(furballs(cache))
    loader = make_loader(
        "dali",
        shard_set,
        global_batch=BATCH,
        rank=0,
        world_size=1,
        seed=0,
        flip=True,
        with_alpha=False,
        device=torch.device("cpu"),
        num_threads=1,
    )
    if steps_before is None:
        loader.load_state_dict(final_state(run_dir)["loader"])
    for _ in range(steps_before or 0):
        next(loader)
    batch = next(loader)
    loader.close()
    shard_set.close()
    return batch


# --- exactly ---


def test_resume_is_exact(whole: Path, cache: Path, tmp_path: Path) -> None:
    """8 steps, and 4 + a new process + 4."""
    first = train_in_new_process(tmp_path, *arguments(cache, steps=4, run_dir="parts"))
    assert first.code == 0, first.err
    second = train_in_new_process(tmp_path, "--resume", "parts", "--steps", "8")
    assert second.code == 0, second.err
    assert "resuming at iteration 4" in second.err
    parts = tmp_path / "parts"

    assert_same_bits(final_state(parts), final_state(whole))
    batch, expected = next_batch(parts, cache), next_batch(whole, cache, steps_before=8)
    assert torch.equal(batch.images, expected.images) and torch.equal(batch.indices, expected.indices)
    assert list(map(of_the_seed, training_rows(parts))) == list(map(of_the_seed, training_rows(whole)))


def test_training_moves_every_network(whole: Path) -> None:
    """Else equal weights would show nothing."""
    directory = whole / "checkpoints"
    first, last = (load_checkpoint(checkpoint_path(directory, i)) for i in (4, 8))
    for network in ("generator", "discriminator", "ema"):
        for name, before in first[network].items():
            assert not torch.equal(before, last[network][name]) or before.numel() == 0, f"{network}.{name}"


@pytest.mark.parametrize("iteration", [1, 3])
def test_resume_at_an_odd_step_is_exact(iteration: int, whole: Path, tmp_path: Path) -> None:
    run_dir = interrupted(whole, tmp_path, iteration)
    outcome = train_in_process(tmp_path, "--resume", str(run_dir))
    assert outcome.code == 0, outcome.err
    assert f"resuming at iteration {iteration}" in outcome.err
    assert_same_bits(final_state(run_dir), final_state(whole))
    assert list(map(of_the_seed, rows(run_dir))) == list(map(of_the_seed, rows(whole)))


def test_random_numbers_drawn_by_others_change_nothing(whole: Path, tmp_path: Path) -> None:
    run_dir = interrupted(whole, tmp_path, 6)
    torch.manual_seed(123)
    assert train_in_process(tmp_path, "--resume", str(run_dir)).code == 0
    assert_same_bits(final_state(run_dir), final_state(whole))


# --- after an accident ---


def test_killed_run_goes_on_without_gap_or_repetition(cache: Path, tmp_path: Path) -> None:
    """SIGKILL between checkpoints, then the same command again."""
    every_fourth = {"log": {"checkpoint_interval_images": 4 * BATCH, "keep_checkpoints": 2}}
    run_dir = tmp_path / "killed"
    metrics = run_dir / "metrics.jsonl"

    def again(steps: int) -> list[str]:
        return flags(merge(merge(TINY, every_fourth), {"cache_dir": cache, "run_dir": run_dir, "steps": steps}))

    process = subprocess.Popen(
        command(*again(100_000)), cwd=tmp_path, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        while process.poll() is None and (not metrics.exists() or len(training_rows(run_dir)) < 6):
            time.sleep(0.01)
    finally:
        process.kill()
    assert process.wait() == -signal.SIGKILL
    with metrics.open("a") as file:
        file.write('{"iteration": 7, "loss/g_m')  # it may end in the middle of a row, too
    reached = max(int(path.stem.removeprefix("checkpoint-")) for path in list_checkpoints(run_dir / "checkpoints"))

    outcome = train_in_process(tmp_path, *again(reached + 6))
    assert outcome.code == 0, outcome.err
    assert f"resuming at iteration {reached}" in outcome.err
    assert [row["iteration"] for row in training_rows(run_dir)] == list(range(1, reached + 7))
    assert [row["images_seen"] for row in training_rows(run_dir)] == [i * BATCH for i in range(1, reached + 7)]
    masks = [row["iteration"] for row in rows(run_dir) if "mask/miou" in row]
    assert masks == sorted({*range(4, reached + 7, 4), reached + 6})


@pytest.mark.parametrize("damage", [b"", b"no checkpoint"])
def test_damaged_newest_checkpoint_falls_back_and_says_so(damage: bytes, whole: Path, tmp_path: Path) -> None:
    run_dir = interrupted(whole, tmp_path, 7)
    newest = checkpoint_path(run_dir / "checkpoints", 7)
    newest.write_bytes(damage)
    outcome = train_in_process(tmp_path, "--resume", str(run_dir))
    assert outcome.code == 0, outcome.err
    assert [line for line in outcome.err.splitlines() if str(newest) in line and "trying the one before" in line]
    assert "resuming at iteration 6" in outcome.err
    assert_same_bits(final_state(run_dir), final_state(whole))
    assert list(map(of_the_seed, rows(run_dir))) == list(map(of_the_seed, rows(whole)))


def test_run_whose_checkpoints_are_all_damaged_ends_with_one_error(whole: Path, tmp_path: Path) -> None:
    run_dir = interrupted(whole, tmp_path, 2)
    for path in list_checkpoints(run_dir / "checkpoints"):
        path.write_bytes(path.read_bytes()[:-50])
    outcome = train_in_process(tmp_path, "--resume", str(run_dir))
    assert outcome.code == 2
    assert len(outcome.errors) == 1 and str(run_dir / "checkpoints") in outcome.errors[0]


# --- what may change, and what may not ---


def snapshot(run_dir: Path) -> dict[str, bytes]:
    return {str(p.relative_to(run_dir)): p.read_bytes() for p in run_dir.rglob("*") if p.is_file()}


def refused(outcome: Outcome) -> str:
    """The one line."""
    assert outcome.code == 2, outcome.err
    assert outcome.err.splitlines() == outcome.errors and len(outcome.errors) == 1
    return outcome.errors[0]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("loss.phi1", "0.2"),
        ("seed", "1"),
        ("batch", "16"),
        ("resolution", "64"),
        ("model.z_dim", "32"),
        ("optimizer.learning_rate", "0.001"),
        ("num_images", "128"),
        ("data", "elsewhere"),
        ("dataset", "ffhq"),
    ],
)
def test_resume_with_another_configuration_is_refused(key: str, value: str, whole: Path, cache: Path) -> None:
    before = snapshot(whole)
    other = ["--" + key.replace("_", "-"), value] + (["--data", "x", "--resolution", "32"] if key == "dataset" else [])
    resumed = refused(train_in_process(whole.parent, "--resume", "whole", *other))
    assert f"{key} " in resumed and value in resumed and "--run-dir" in resumed
    again = refused(train_in_process(whole.parent, *arguments(cache, steps=8, run_dir="whole"), *other))
    assert f"{key} " in again and value in again
    assert snapshot(whole) == before


def test_resume_may_log_otherwise_and_train_longer(whole: Path, tmp_path: Path) -> None:
    run_dir = interrupted(whole, tmp_path, 8)
    other = ["--steps", "9", "--log.checkpoint-interval-images", "800", "--evaluation.num-samples-final", "4"]
    outcome = train_in_process(tmp_path, "--resume", str(run_dir), *other)
    assert outcome.code == 0, outcome.err
    assert [row["iteration"] for row in training_rows(run_dir)] == list(range(1, 10))
    assert load_checkpoint(checkpoint_path(run_dir / "checkpoints", 9))["iteration"] == 9


def test_finished_run_is_not_trained_again(whole: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(whole, run_dir)
    outcome = train_in_process(tmp_path, "--resume", str(run_dir))
    assert outcome.code == 0, outcome.err
    assert "8 iterations" in outcome.out
    assert_same_bits(final_state(run_dir), final_state(whole))
    assert [path.name for path in list_checkpoints(run_dir / "checkpoints")] == [
        path.name for path in list_checkpoints(whole / "checkpoints")
    ]
    assert rows(run_dir) == rows(whole)  # no row twice


def test_same_run_dir_goes_on_as_resume_does(whole: Path, cache: Path, tmp_path: Path) -> None:
    run_dir = interrupted(whole, tmp_path, 5)
    outcome = train_in_process(tmp_path, *arguments(cache, steps=8, run_dir=run_dir))
    assert outcome.code == 0, outcome.err
    assert "resuming at iteration 5" in outcome.err
    assert_same_bits(final_state(run_dir), final_state(whole))


@pytest.mark.parametrize("key", ["run_dir", "cache_dir"])
@pytest.mark.parametrize("directory", ["file", "file/below"])
def test_directory_that_is_a_file_is_refused(key: str, directory: str, cache: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    line = refused(train_in_process(tmp_path, *arguments(cache, **{"run_dir": "run", key: directory})))
    assert line == f"error: --{key.replace('_', '-')} {directory}: file is a file, give a directory"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
