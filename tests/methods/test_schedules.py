"""Schedules hit their corners, and the average's half-life is what its name says."""

import pytest

from pipeline.methods.schedules import ema_decay, is_due, linear_ramp


@pytest.mark.parametrize(
    ("iteration", "expected"), [(0, 5.0), (1, 4.9991), (2500, 2.75), (4999, 0.5009), (5000, 0.5), (300_000, 0.5)]
)
def test_lambda_bin_falls_from_5_to_a_half_in_5000_iterations(iteration: int, expected: float) -> None:
    assert linear_ramp(iteration, 5.0, 0.5, 5000) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("iteration", "expected"), [(0, 0.0), (2500, 0.5), (5000, 1.0), (5001, 1.0)])
def test_gamma_rises_from_0_to_1_in_5000_iterations(iteration: int, expected: float) -> None:
    assert linear_ramp(iteration, 0.0, 1.0, 5000) == expected


def test_ramp_of_no_length_is_at_its_end() -> None:
    assert linear_ramp(0, 5.0, 0.5, 0) == 0.5


@pytest.mark.parametrize("batch", [4, 16, 100])
@pytest.mark.parametrize("images_seen", [0, 1_000_000])
def test_after_a_half_life_of_images_half_is_forgotten(batch: int, images_seen: int) -> None:
    halflife_images = 5000
    weight_left = ema_decay(batch, halflife_images, images_seen, None) ** (halflife_images / batch)
    assert weight_left == pytest.approx(0.5, rel=1e-12)


def test_decay_at_batch_16_is_the_published_one() -> None:
    assert ema_decay(16, 5000, 0, None) == pytest.approx(0.5 ** (32 / 10_000), rel=1e-12)


def test_rampup_shortens_the_half_life_of_a_young_run() -> None:
    # A tenth of 1,600 images: 160, ten steps of 16.
    assert ema_decay(16, 5000, 1600, 0.1) ** 10 == pytest.approx(0.5, rel=1e-12)
    # From 50,000 images on the half-life is the constant one.
    assert ema_decay(16, 5000, 50_000, 0.1) == ema_decay(16, 5000, 50_000, None)
    assert ema_decay(16, 5000, 49_000, 0.1) < ema_decay(16, 5000, 50_000, 0.1)


def test_rampup_starts_by_copying_the_generator() -> None:
    assert ema_decay(16, 5000, 0, 0.1) == pytest.approx(0.0, abs=1e-12)


def test_lazy_work_is_due_at_once_and_at_every_interval() -> None:
    assert [i for i in range(40) if is_due(i, 16)] == [0, 16, 32]
    assert all(is_due(i, 1) for i in range(5))
