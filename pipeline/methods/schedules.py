"""Schedules: functions of the iteration (from 0) or of the number of images seen."""

import math


def linear_ramp(iteration: int, start: float, end: float, num_iterations: int) -> float:
    """From `start` at iteration 0 to `end` at `num_iterations`, then constant; `end` at once if that is 0.

    Serves the fade-in gamma of the fine mask (Eq. 3: 0 to 1) and lambda_bin (Eq. 8: 5 to 0.5).
    """
    if iteration >= num_iterations:
        return end
    return start + (end - start) * iteration / num_iterations


def ema_decay(global_batch: int, halflife_images: float, images_seen: int, rampup: float | None) -> float:
    """Decay of the generator's average for one step: ``0.5 ** (batch / half-life)``.

    Args:
        global_batch: images a step.
        halflife_images: half-life in images.
        images_seen: before this step.
        rampup: the half-life is at most this share of the images seen, so that a short run's average forgets its
            random start (Karras et al. 2020, ADA); None for a constant half-life.
    """
    if rampup is not None:
        halflife_images = min(halflife_images, rampup * images_seen)
    return math.pow(0.5, global_batch / max(halflife_images, 1e-8))


def is_due(iteration: int, interval: int) -> bool:
    """Whether something lazy is due: at iteration 0 and every `interval` after."""
    return iteration % interval == 0
