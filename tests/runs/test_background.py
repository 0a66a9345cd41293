"""Checkpoints and images are written while training continues: whole, in order, and with their errors told."""

import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import BATCH, TINY

from pipeline.config.files import config_from_dict, merge
from pipeline.runs.background import Background
from pipeline.runs.checkpoints import checkpoint_path, copy_to_host, list_checkpoints, load_checkpoint
from pipeline.training import callbacks
from pipeline.training.callbacks import Checkpoints


def test_tasks_are_done_in_order_and_without_the_caller() -> None:
    done: list[int] = []
    gate = threading.Event()
    background = Background("test")
    background.submit(gate.wait, 60)
    for i in range(5):
        background.submit(done.append, i)
    assert done == []
    gate.set()
    background.close()
    assert done == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("how", ["submit", "wait", "close"])
def test_failure_is_raised_by_the_next_call(how: str) -> None:
    background = Background("test")
    background.submit(Path("/nowhere/at/all").read_text)
    time.sleep(0.2)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        background.submit(print) if how == "submit" else getattr(background, how)()


def test_copy_does_not_follow_the_training() -> None:
    weight = torch.ones(3)
    state = {"network": {"weight": weight}, "step": 4, "rows": [weight, "text"]}
    copied = copy_to_host(state)
    weight.add_(1.0)
    assert torch.equal(copied["network"]["weight"], torch.ones(3))
    assert torch.equal(copied["rows"][0], torch.ones(3))
    assert (copied["step"], copied["rows"][1]) == (4, "text")


def trainer_at(iteration: int, weight: torch.Tensor) -> Any:
    return SimpleNamespace(
        iteration=iteration,
        images_seen=iteration * BATCH,
        config=config_from_dict(merge(TINY, {"steps": 99, "log": {"checkpoint_interval_images": BATCH}})),
        state_dict=lambda: {"iteration": iteration, "weight": weight},
        accelerator=SimpleNamespace(wait_for_everyone=lambda: None),
        refuse_drift=lambda: None,
    )


def checkpoints_of(run_dir: Path) -> Checkpoints:
    tracker: Any = SimpleNamespace(log_metrics=lambda *_, **__: None)
    return Checkpoints(run_dir, tracker, None, best_miou=0.0, seconds_before=0.0)


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, write = threading.Event(), callbacks.save_checkpoint

    def slowly(*args: Any) -> None:
        gate.wait(60)
        write(*args)

    monkeypatch.setattr(callbacks, "save_checkpoint", slowly)
    weight = torch.full((2,), 5.0)
    checkpoints = checkpoints_of(tmp_path)
    checkpoints.on_step(trainer_at(5, weight))
    assert list_checkpoints(tmp_path / "checkpoints") == []  # the disk is slow
    weight.fill_(6.0)  # and training continues
    gate.set()
    checkpoints.close()
    saved = load_checkpoint(checkpoint_path(tmp_path / "checkpoints", 5))
    assert torch.equal(saved["weight"], torch.full((2,), 5.0))
