"""Trainings over two ranks, and how their ends compare with those of one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import BATCH, TINY, flags, training_rows

from pipeline.config.files import merge
from pipeline.runs.checkpoints import checkpoint_path, load_checkpoint

TWO_RANKS = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
STEPS, GLOBAL_BATCH = 4, 2 * BATCH  # R1 at iterations 0 and 3


def arguments(cache: Path, **overrides: Any) -> list[str]:
    sizes = {"cache_dir": cache, "run_dir": "run", "steps": STEPS, "batch": GLOBAL_BATCH}
    return flags(merge(TINY | sizes, overrides))


def final_state(run_dir: Path) -> dict[str, Any]:
    return load_checkpoint(checkpoint_path(run_dir / "checkpoints", STEPS))


NOT_OF_THE_SEED = ("speed/", "memory/", "timestamp_ms")


def root_mean_square(x: torch.Tensor) -> float:
    return float(x.double().square().mean().sqrt())


def noise_strengths_together(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    joint = [value for name, value in weights.items() if name.endswith("noise_strength")]
    rest = {name: value for name, value in weights.items() if not name.endswith("noise_strength")}
    return rest | {"noise_strength": torch.stack(joint)} if joint else rest


def assert_trained_alike(two: Path, one: Path) -> None:
    """To what the order of sums leaves open."""
    assert_weights_alike(final_state(two), final_state(one))
    for rows in zip(training_rows(two), training_rows(one), strict=True):
        same = [{k: v for k, v in row.items() if not k.startswith(NOT_OF_THE_SEED)} for row in rows]
        assert same[0] == pytest.approx(same[1], rel=1e-3, abs=1e-5)


def assert_weights_alike(ours_and_more: dict[str, Any], theirs_and_more: dict[str, Any]) -> None:
    """To what the order of sums leaves open.

    A step of Adam moves a weight by 2e-3, even where its gradient is next to nothing and rounding decides on its sign:
    so weights are compared by tensor, not one by one, and noise strengths, which are one number each, all together.
    """
    states = ours_and_more, theirs_and_more
    for network in ("generator", "discriminator", "ema"):
        ours, theirs = (noise_strengths_together(state[network]) for state in states)
        assert ours.keys() == theirs.keys()
        for name in theirs:
            difference = root_mean_square(ours[name] - theirs[name])
            assert difference <= 1e-5 * (1 + root_mean_square(theirs[name])), f"{network}.{name}"
        flat = [torch.cat([value.flatten() for value in weights.values()]) for weights in (ours, theirs)]
        assert (flat[0] - flat[1]).norm() <= 1e-5 * flat[1].norm(), network


EXACT = ("iteration", "images_seen", "generator", "discriminator", "ema", "optimizers", "loader")


def of_the_seed(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if not name.startswith(NOT_OF_THE_SEED)}
