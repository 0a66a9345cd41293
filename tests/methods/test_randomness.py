"""A sample's latents depend on its place in the run and on nothing else."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from pipeline.methods.randomness import Draw, Stream, draw

PLACE = {"seed": 3, "stream": Stream.D_MAIN, "iteration": 7}


def draw_at(slots: Sequence[int], **place: Any) -> Draw:
    sizes = {"z_dim": 24, "num_noise": 80}
    return draw(**{**PLACE, **place}, slots=slots, **sizes, device=torch.device("cpu"))


@pytest.mark.parametrize("slots", [[2], [2, 3], [3, 2, 0], [5, 2, 900], np.array([1, 2])], ids=str)
def test_draws_of_a_sample_do_not_depend_on_the_others(slots: Sequence[int]) -> None:
    whole, part = draw_at(range(8)), draw_at(slots)
    at = list(slots).index(2)
    assert torch.equal(part.z[at], whole.z[2])
    assert torch.equal(part.noise[at], whole.noise[2])


def test_draws_leave_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    first = draw_at([0, 1])
    assert torch.equal(torch.get_rng_state(), state)
    torch.randn(5)
    assert torch.equal(draw_at([0, 1]).z, first.z)


@pytest.mark.parametrize("place", [{"seed": 4}, {"stream": Stream.G_MAIN}, {"iteration": 8}], ids=str)
def test_draws_differ_between_places(place: dict[str, Any]) -> None:
    ours, theirs = draw_at(range(4)), draw_at(range(4), **place)
    both = torch.cat([ours.z, theirs.z])
    assert len(both.unique()) == both.numel()


def test_no_place_of_a_run_repeats_another() -> None:
    first = [
        draw_at(range(4), seed=seed, stream=stream, iteration=iteration).z[:, 0]
        for seed in range(4)
        for stream in Stream
        for iteration in range(4)
    ]
    assert len(torch.cat(first).unique()) == 4 * len(Stream) * 4 * 4


def test_z_and_noise_of_a_sample_are_independent() -> None:
    given = draw(**PLACE, slots=range(200), z_dim=50, num_noise=50, device=torch.device("cpu"))
    correlation = np.corrcoef(given.z.flatten(), given.noise.flatten())[0, 1]
    assert abs(correlation) < 0.05  # five standard errors of 10,000 pairs


def test_draws_are_standard_normal() -> None:
    given = draw(**PLACE, slots=range(100), z_dim=100, num_noise=100, device=torch.device("cpu"))
    for values in (given.z, given.noise, given.z[0], given.z[:, 0]):
        assert stats.kstest(values.flatten().numpy(), "norm").pvalue > 1e-4
    assert given.z.dtype == given.noise.dtype == torch.float32
