"""A step in micro-batches is the same step."""

import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import shard_cache, tiny, train_in_new_process, train_in_process
from two_ranks import TWO_RANKS, assert_trained_alike, assert_weights_alike

from pipeline.config import Config, preset
from pipeline.methods.furrygan.phases import PhaseResult, Step
from pipeline.training.learner import Learner, Measured

B, STEPS = 16, 4  # R1 at iterations 0 and 3
CPU = torch.device("cpu")


def trained(config: Config) -> tuple[dict[str, Any], list[Measured]]:
    """State after a few iterations, and what was measured."""
    learner, measured = Learner(config, CPU), list[Measured]()
    for iteration in range(STEPS):
        generator = torch.Generator().manual_seed(iteration)
        images = torch.rand(B, 3, config.resolution, config.resolution, generator=generator) * 2.0 - 1.0
        due = [phase for phase in learner.phases if iteration % phase.interval == 0]
        measured += [learner.run(phase, iteration, images, range(B)) for phase in due]
        learner.update_ema((iteration + 1) * B)
    return learner.state_dict(), measured


def config(**loss: Any) -> Config:
    model = {"channel_base": 512, "channel_max": 24, "z_dim": 16, "z_dim_background": 8}
    return preset("furballs", batch=B, precision="fp32", model=model, loss={"r1_interval": 3, **loss})


@pytest.mark.parametrize("num", [2, 4])
@pytest.mark.parametrize("area_over_batch", [False, True])
def test_micro_batches_train_as_the_whole_batch_does(area_over_batch: bool, num: int) -> None:
    first = trained(config(area_over_batch=area_over_batch))[1][2].observed["mask/area_coarse"].item()
    # Just above the mean area of the first batch: of its micro-batches, some would be above and some below.
    whole = config(area_over_batch=area_over_batch, phi1=first + 1e-4)
    (expected, terms), (actual, terms2) = trained(whole), trained(replace(whole, accumulate=num))
    if area_over_batch:
        assert 0.0 < terms[2].terms["area"].item() < 2e-4
    assert_weights_alike(actual, expected)
    for one, other in zip(terms, terms2, strict=True):
        for name, value in (one.terms | one.observed).items():
            torch.testing.assert_close((other.terms | other.observed)[name], value, rtol=1e-3, atol=1e-5, msg=name)


def test_micro_batches_keep_less() -> None:
    """The most that autograd holds at a time."""

    def most_kept(config: Config) -> int:
        learner, now, most = Learner(config, CPU), 0, 0
        images = torch.zeros(B, 3, config.resolution, config.resolution)
        engine = learner.engines["discriminator"]
        backward = engine.backward

        def keep(x: torch.Tensor) -> torch.Tensor:
            nonlocal now, most
            now += x.nbytes
            most = max(most, now)
            return x

        def release(loss: torch.Tensor) -> None:
            nonlocal now
            backward(loss)
            now = 0

        engine.backward = release  # type: ignore[method-assign]
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            learner.run(learner.phases[0], 0, images, range(B))
        return most

    assert most_kept(replace(config(), accumulate=4)) < 0.4 * most_kept(config())


def test_pictures_of_a_micro_batch_are_gone_when_the_next_one_begins() -> None:
    learner, made = Learner(replace(config(), accumulate=4), CPU), list[weakref.ref[torch.Tensor]]()
    g_main = learner.phases[2]

    def compute(step: Step) -> PhaseResult:
        assert [picture for picture in made if picture() is not None] == []
        result = g_main.compute(step)
        assert result.generated is not None
        made.append(weakref.ref(result.generated.foreground))
        return result

    images = torch.zeros(B, 3, config().resolution, config().resolution)
    learner.run(replace(g_main, compute=compute), 0, images, range(B))
    assert len(made) == 4


def test_two_ranks_with_micro_batches_match_one_without(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    common = [*tiny(shard_cache(tmp_path_factory), batch=B), "--loss.area-over-batch"]
    one = train_in_process(tmp_path, *common, "--run-dir", "one")
    assert one.code == 0, one.err
    two = train_in_new_process(tmp_path, *common, "--run-dir", "two", "--accumulate", "2", launcher=TWO_RANKS)
    assert two.code == 0, two.err
    assert_trained_alike(tmp_path / "two", tmp_path / "one")
