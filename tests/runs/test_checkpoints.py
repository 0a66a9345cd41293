"""Checkpoints are written whole or not at all, damage is told, and the newest few and the best stay."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import BATCH, TINY, assert_same_bits, shard_cache, tiny_trainer

from data_shards.errors import UserError
from pipeline.config.files import config_from_dict, merge
from pipeline.runs.checkpoints import (
    BEST,
    checkpoint_path,
    list_checkpoints,
    load_checkpoint,
    prune_checkpoints,
    save_checkpoint,
)
from pipeline.runs.directory import load_newest_whole
from pipeline.training.callbacks import Checkpoints
from pipeline.training.trainer import Trainer


def state(iteration: int) -> dict[str, Any]:
    return {"iteration": iteration, "weights": {"a": torch.full((1000,), float(iteration))}, "betas": (0.0, 0.99)}


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run with checkpoints after 4 and 8 iterations."""
    for iteration in (4, 8):
        save_checkpoint(state(iteration), checkpoint_path(tmp_path / "checkpoints", iteration))
    return tmp_path


def newest(run_dir: Path) -> Path:
    return checkpoint_path(run_dir / "checkpoints", 8)


# --- written whole or not at all ---


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    save_checkpoint(state(3), tmp_path / "new" / "checkpoint-000000003.pt")
    assert_same_bits(load_checkpoint(tmp_path / "new" / "checkpoint-000000003.pt"), state(3))


STEPS_OF_SAVING = (
    (torch, "save"),
    (os, "fsync"),
    (os, "replace"),
    (Path, "replace"),
    (Path, "rename"),
    (Path, "write_text"),
)


class PowerCutError(Exception):
    """Ends the process at this moment, as far as the disk is concerned."""


def save_with_power_cut(path: Path, iteration: int, cut: int) -> bool:
    """Save, but end before step number `cut` of it, in the middle of it where it writes; whether that was reached."""
    done = 0

    def until_cut(step: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            nonlocal done
            if done == cut:
                if step is torch_save:
                    args[1].write(b"PK half of it")
                raise PowerCutError
            done += 1
            return step(*args, **kwargs)

        return wrapped

    torch_save = torch.save
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in STEPS_OF_SAVING:
            patch.setattr(owner, name, until_cut(getattr(owner, name)))
        try:
            save_checkpoint(state(iteration), path)
        except PowerCutError:
            return True
    return False


@pytest.mark.parametrize("name", [BEST, "checkpoint-000000008.pt"])
def test_crash_at_any_moment_of_saving_leaves_the_former_checkpoint_or_the_new_one(name: str, run_dir: Path) -> None:
    path, found = run_dir / "checkpoints" / name, []
    save_checkpoint(state(8), path)
    while save_with_power_cut(path, 9, cut=len(found)):
        found.append(load_checkpoint(path)["iteration"])
        save_checkpoint(state(8), path)
    assert len(found) >= 3 and found[0] == 8
    assert found == sorted(found)  # 8 up to some moment, 9 from it on


def test_crash_at_any_moment_of_saving_leaves_nothing_broken_under_a_final_name(run_dir: Path) -> None:
    path, found = checkpoint_path(run_dir / "checkpoints", 12), []
    while save_with_power_cut(path, 12, cut=len(found)):
        found.append(load_newest_whole(run_dir)["iteration"])
        assert found[-1] == (12 if path.exists() else 8)
        path.unlink(missing_ok=True)
    assert len(found) >= 3 and found[0] == 8
    assert load_newest_whole(run_dir)["iteration"] == 12  # what the others left about does not hinder


def test_checkpoint_is_on_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, done = tmp_path / "checkpoint-000000001.pt", []
    fsync, replace = os.fsync, Path.replace

    def note_fsync(descriptor: int) -> None:
        done.append("directory" if path.exists() else "file")
        fsync(descriptor)

    def note_replace(self: Path, target: Path) -> Path:
        done.append(f"rename {Path(target).name}")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(Path, "replace", note_replace)
    save_checkpoint(state(1), path)
    renamed = done.index(f"rename {path.name}")
    assert "file" in done[:renamed] and "directory" in done[renamed:]


# --- damage ---

DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "flipped byte": lambda b: b[: len(b) // 2] + bytes([b[len(b) // 2] ^ 1]) + b[len(b) // 2 + 1 :],
    "truncated": lambda b: b[:-100],
    "empty": lambda b: b"",
    "other file": lambda b: b"not a checkpoint",
}


def damage(path: Path, how: str) -> None:
    path.write_bytes(DAMAGES[how](path.read_bytes()))


@pytest.mark.parametrize("how", DAMAGES)
def test_damage_is_told(how: str, run_dir: Path) -> None:
    damage(newest(run_dir), how)
    with pytest.raises(UserError, match=str(newest(run_dir))) as error:
        load_checkpoint(newest(run_dir))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("how", ["truncated", "empty", "other file"])
def test_damage_is_told_where_the_digest_is_lost_too(how: str, run_dir: Path) -> None:
    damage(newest(run_dir), how)
    newest(run_dir).with_name(newest(run_dir).name + ".sha256").unlink()
    with pytest.raises(UserError, match=str(newest(run_dir))) as error:
        load_checkpoint(newest(run_dir))
    assert "\n" not in str(error.value)


def test_missing_checkpoint_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=str(tmp_path / "checkpoint-000000001.pt")):
        load_checkpoint(tmp_path / "checkpoint-000000001.pt")


@pytest.mark.parametrize("how", DAMAGES)
def test_damaged_newest_falls_back_to_the_one_before_and_says_so(
    how: str, run_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    damage(newest(run_dir), how)
    assert_same_bits(load_newest_whole(run_dir), state(4))
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    message = caplog.records[0].getMessage()
    assert str(newest(run_dir)) in message and "trying the one before" in message


def test_whole_checkpoints_are_loaded_in_silence(run_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert_same_bits(load_newest_whole(run_dir), state(8))
    assert caplog.records == []


def test_run_without_checkpoints_starts_anew(tmp_path: Path) -> None:
    assert load_newest_whole(tmp_path) is None


def test_run_whose_checkpoints_are_all_damaged_is_refused(run_dir: Path) -> None:
    for path in list_checkpoints(run_dir / "checkpoints"):
        damage(path, "truncated")
    with pytest.raises(UserError, match=f"no checkpoint in {run_dir / 'checkpoints'} can be read") as error:
        load_newest_whole(run_dir)
    assert "\n" not in str(error.value)


def test_loading_runs_no_code_of_the_file(tmp_path: Path) -> None:
    class Mischief:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "mischief"),)

    save_checkpoint({"iteration": Mischief()}, tmp_path / "checkpoint-000000001.pt")
    with pytest.raises(UserError, match=r"checkpoint-000000001\.pt cannot be read"):
        load_checkpoint(tmp_path / "checkpoint-000000001.pt")
    assert not (tmp_path / "mischief").exists()


# --- which stay ---


def test_the_newest_stay_and_the_best_besides(tmp_path: Path) -> None:
    for iteration in (9, 10, 100, 1000, 999):
        save_checkpoint(state(iteration), checkpoint_path(tmp_path, iteration))
    save_checkpoint(state(9), tmp_path / BEST)
    prune_checkpoints(tmp_path, keep=2)
    assert list_checkpoints(tmp_path) == [checkpoint_path(tmp_path, 1000), checkpoint_path(tmp_path, 999)]
    assert load_checkpoint(tmp_path / BEST)["iteration"] == 9
    assert len(list(tmp_path.iterdir())) == 6  # three files and their digests


def test_what_a_killed_run_was_writing_does_not_stay(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-000000005.pt.77.tmp").write_bytes(b"PK half of it")
    save_checkpoint(state(9), checkpoint_path(tmp_path, 9))
    prune_checkpoints(tmp_path, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoint-000000009.pt",
        "checkpoint-000000009.pt.sha256",
    ]


def keep_checkpoints_of(run_dir: Path, mious: dict[int, float], *, keep: int = 2, best_miou: float = 0.0) -> None:
    """Let the callback save at each of these iterations, where the masks are so good."""
    config = config_from_dict(merge(TINY, {"steps": 99, "log": {"keep_checkpoints": keep}}))
    tracker = SimpleNamespace(log_metrics=lambda *_, **__: None)
    callback = Checkpoints(run_dir, tracker, None, best_miou=best_miou, seconds_before=0.0)
    for iteration, miou in mious.items():
        callback._measure = lambda *_, miou=miou: {"mask/miou": miou}
        trainer = SimpleNamespace(
            iteration=iteration,
            images_seen=iteration * BATCH,
            config=config,
            state_dict=lambda iteration=iteration: state(iteration),
            accelerator=SimpleNamespace(wait_for_everyone=lambda: None),
            refuse_drift=lambda: None,
        )
        callback.on_end(trainer)


def test_a_run_keeps_its_newest_few_and_its_best(tmp_path: Path) -> None:
    keep_checkpoints_of(tmp_path, {1: 0.2, 2: 0.6, 3: 0.4, 4: 0.5})
    directory = tmp_path / "checkpoints"
    assert list_checkpoints(directory) == [checkpoint_path(directory, 4), checkpoint_path(directory, 3)]
    assert load_checkpoint(directory / BEST)["iteration"] == 2
    assert load_checkpoint(checkpoint_path(directory, 4))["best_miou"] == 0.6


def test_best_checkpoint_outlives_a_resume(tmp_path: Path) -> None:
    keep_checkpoints_of(tmp_path, {1: 0.6})
    keep_checkpoints_of(tmp_path, {2: 0.5}, best_miou=0.6)
    assert load_checkpoint(tmp_path / "checkpoints" / BEST)["iteration"] == 1


def test_masks_that_cannot_be_measured_neither_count_as_best_nor_hinder_it(tmp_path: Path) -> None:
    """With all masks empty an IoU is 0 / 0: that is when training has collapsed."""
    keep_checkpoints_of(tmp_path, {1: float("nan")})
    assert load_checkpoint(tmp_path / "checkpoints" / BEST)["iteration"] == 1  # any is better than none
    keep_checkpoints_of(tmp_path, {1: float("nan"), 2: 0.3, 3: float("nan"), 4: 0.2})
    assert load_checkpoint(tmp_path / "checkpoints" / BEST)["iteration"] == 2


# --- what is in them ---


def test_everything_to_go_on_is_loaded_without_running_code(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    with tiny_trainer(shard_cache(tmp_path_factory)) as trainer:
        trainer.step()
        trainer.step()
        saved = trainer.state_dict()
        save_checkpoint(saved, tmp_path / "checkpoint-000000002.pt")
        loaded = torch.load(tmp_path / "checkpoint-000000002.pt", weights_only=True)
        assert_same_bits(loaded, dict(saved))
        assert {"generator", "discriminator", "ema", "optimizers", "loader", "seed", "iteration"} <= loaded.keys()
        assert (loaded["iteration"], loaded["images_seen"], loaded["loader"]["step"]) == (2, 2 * BATCH, 2)
        assert_moments_of_every_parameter(trainer, loaded["optimizers"])


def assert_moments_of_every_parameter(trainer: Trainer, optimizers: dict[str, Any]) -> None:
    for name in ("generator", "discriminator"):
        moments = optimizers[name]["state"]
        assert len(moments) == len(list(getattr(trainer, name).parameters()))
        assert all({"step", "exp_avg", "exp_avg_sq"} <= moment.keys() for moment in moments.values())


def test_checkpoint_of_another_version_is_refused(tmp_path_factory: pytest.TempPathFactory) -> None:
    with tiny_trainer(shard_cache(tmp_path_factory)) as trainer:
        other = trainer.state_dict() | {"version": 0}
        with pytest.raises(UserError, match="version 0"):
            trainer.load_state_dict(other)


def test_checkpoint_of_other_data_is_refused(tmp_path_factory: pytest.TempPathFactory) -> None:
    with tiny_trainer(shard_cache(tmp_path_factory)) as trainer:
        other = trainer.state_dict()
        other["loader"] = other["loader"] | {"digest": "of another set"}
        with pytest.raises(UserError, match="digest is of another set"):
            trainer.load_state_dict(other)


def test_run_directory_can_be_moved(run_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("moved") / "run"
    shutil.copytree(run_dir, elsewhere)
    assert_same_bits(load_newest_whole(elsewhere), state(8))
