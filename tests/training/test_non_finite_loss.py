"""A loss that becomes NaN or infinite stops the run before it can touch the weights."""

import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from helpers import (
    BATCH,
    assert_same_bits,
    shard_cache,
    tiny,
    tiny_trainer,
    train_in_process,
    training_rows,
)

from pipeline.methods.furrygan import losses
from pipeline.runs.checkpoints import checkpoint_path, list_checkpoints, load_checkpoint, save_checkpoint
from pipeline.training.finite_guard import NonFiniteLossError
from pipeline.training.trainer import Trainer

LOSSES = {
    "d_logistic": ("discriminator", "d_main_adversarial"),
    "mask_prediction": ("discriminator", "d_main_prediction"),
    "r1_penalty": ("discriminator", "d_r1_r1"),
    "g_nonsaturating": ("generator", "g_main_adversarial"),
    "fine_area": ("generator", "g_main_fine"),
    "background_participation": ("generator", "g_main_participation"),
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shard_cache(tmp_path_factory)


def moving_parts(trainer: Trainer, network: str) -> dict[str, Any]:
    """All that an optimizer step on `network` would change, copied."""
    state = trainer.state_dict()
    parts = {network: state[network], "ema": state["ema"], "optimizer": state["optimizers"][network]}
    return torch.utils._pytree.tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, parts)


def spoil(monkeypatch: pytest.MonkeyPatch, module: ModuleType, name: str, by: float, note: Callable[[], None]) -> None:
    """Let a loss be `by`, and call `note` at that moment."""
    right = getattr(module, name)

    def wrong(*args: Any, **kwargs: Any) -> torch.Tensor:
        note()
        return right(*args, **kwargs) * by

    monkeypatch.setattr(module, name, wrong)


@pytest.mark.parametrize("by", [math.nan, math.inf])
@pytest.mark.parametrize("name", LOSSES)
def test_loss_that_is_not_finite_stops_before_the_optimizer_step(
    name: str, by: float, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, term = LOSSES[name]
    # phi2 = 0 keeps the hinge of L_fine above 0.
    with tiny_trainer(cache, loss={"r1_interval": 2, "phi2": 0.0}) as trainer:
        trainer.step()
        trainer.step()
        before: list[dict[str, Any]] = []
        spoil(monkeypatch, losses, name, by, lambda: before.append(moving_parts(trainer, network)))
        with pytest.raises(NonFiniteLossError, match=rf"{term} .* iteration 2") as error:
            trainer.step()
        assert "\n" not in str(error.value)
        assert_same_bits(moving_parts(trainer, network), before[-1])
        assert trainer.iteration == 2


def test_weight_that_makes_a_loss_infinite_stops_before_the_optimizer_step(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each term is finite, the weighted sum is not."""
    monkeypatch.setattr(losses, "r1_penalty", lambda logits, images: logits.sum() * 0 + images.sum() * 0 + 3e38)
    with tiny_trainer(cache, loss={"r1_interval": 1, "r1": 100.0}) as trainer:
        with pytest.raises(NonFiniteLossError, match=r"d_r1_r1 .* iteration 0"):
            trainer.step()
        assert all(parameter.isfinite().all() for parameter in trainer.discriminator.parameters())


def test_run_with_a_poisoned_weight_ends_with_code_2_and_leaves_its_checkpoints(cache: Path, tmp_path: Path) -> None:
    every_step = {"log": {"checkpoint_interval_images": BATCH}, "run_dir": "run", "steps": 2}
    assert train_in_process(tmp_path, *tiny(cache, **every_step)).code == 0
    directory = tmp_path / "run" / "checkpoints"
    state = load_checkpoint(checkpoint_path(directory, 2))
    state["generator"]["synthesis_foreground.constant"][0, 0, 0, 0] = math.nan
    save_checkpoint(state, checkpoint_path(directory, 2))

    outcome = train_in_process(tmp_path, "--resume", "run", "--steps", "4")
    assert outcome.code == 2, outcome.err
    assert "Traceback" not in outcome.err
    assert "d_main_adversarial" in outcome.err and "iteration 2" in outcome.err
    assert len(outcome.errors) == 1  # at the beginning of a line, not behind the progress bar
    assert [load_checkpoint(path)["iteration"] for path in list_checkpoints(directory)] == [2, 1]
    assert [row["iteration"] for row in training_rows(tmp_path / "run")] == [1, 2]
