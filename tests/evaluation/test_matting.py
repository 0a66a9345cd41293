"""Matting errors equal closed forms on small cases, and a plain reading of their definitions on random ones."""

from collections import deque

import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.evaluation.matting import connected_level, gradient_magnitude, matting_errors, unknown_band

Floats = NDArray[np.float64]


def disc(size: int, radius: float, softness: float) -> Floats:
    """``[1, size, size]``: opaque in the middle, a linear edge of `softness` pixels."""
    y, x = np.mgrid[:size, :size] - (size - 1) / 2
    return np.clip((radius - np.hypot(x, y)) / softness + 0.5, 0, 1)[None]


def test_equal_mattes_have_no_error() -> None:
    alpha = disc(48, 15, 6)
    for errors in matting_errors(alpha, alpha).values():
        assert [float(v[0]) for v in vars(errors).values()] == [0.0, 0.0, 0.0, 0.0]


def test_constant_difference_gives_sad_and_mse_in_closed_form() -> None:
    true = np.full((2, 20, 20), 0.5)
    errors = matting_errors(true + np.array([0.1, 0.2])[:, None, None], true)
    for region in ("all", "unknown"):  # neither opaque nor transparent anywhere: all is unknown
        assert errors[region].sad == pytest.approx([0.1 * 400 / 1000, 0.2 * 400 / 1000])
        assert errors[region].mse == pytest.approx([0.01, 0.04])
        assert errors[region].gradient == pytest.approx([0, 0], abs=1e-12)


def test_gradient_of_a_ramp_is_its_slope_times_the_kernel() -> None:
    """Sum over the kernel of g(y) x g(x) x, with kernels g and x g of unit energy over -4..4, and sigma 1.4."""
    x = np.arange(-4, 5)
    g = np.exp(-(x**2) / (2 * 1.4**2))
    gain = (g / np.sqrt((g**2).sum())).sum() * (x * (x * g) / np.sqrt(((x * g) ** 2).sum())).sum()
    slope = 0.02
    ramp = np.broadcast_to(np.arange(40) * slope, (1, 40, 40))
    magnitude = gradient_magnitude(ramp)[0, 5:-5, 5:-5]
    assert magnitude == pytest.approx(np.full_like(magnitude, slope * gain))
    diagonal = gradient_magnitude(ramp + ramp.transpose(0, 2, 1))[0, 5:-5, 5:-5]
    assert diagonal == pytest.approx(np.full_like(diagonal, slope * gain * np.sqrt(2)))


def test_gradient_error_of_a_ramp_against_a_constant_is_the_sum_of_its_squares() -> None:
    ramp = np.broadcast_to(np.linspace(0.1, 0.9, 32), (1, 32, 32))
    flat = np.full((1, 32, 32), 0.5)
    expected = np.square(gradient_magnitude(ramp)).sum() / 1000
    assert matting_errors(ramp, flat)["all"].gradient == pytest.approx([expected])


def test_gradient_equals_a_convolution_in_two_dimensions() -> None:
    alpha = np.random.default_rng(0).random((1, 9, 11))
    x = np.arange(-4, 5)
    g = np.exp(-(x**2) / (2 * 1.4**2))
    kernel = np.outer(g, x * g)
    kernel /= np.sqrt((kernel**2).sum())
    padded = np.pad(alpha[0], 4, mode="edge")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (9, 9))
    along_x, along_y = (np.einsum("hwij,ij->hw", windows, k) for k in (kernel, kernel.T))
    assert gradient_magnitude(alpha)[0] == pytest.approx(np.sqrt(along_x**2 + along_y**2))


def test_detached_island_costs_connectivity_its_own_alpha() -> None:
    """A blob of 6 pixels that the truth does not have, at alpha 0.8: connected at no level above 0, so d = 0.8."""
    true = np.zeros((1, 24, 24))
    true[0, 2:12, 2:12] = 1.0
    predicted = true.copy()
    predicted[0, 18:20, 18:21] = 0.8
    assert matting_errors(predicted, true)["all"].connectivity == pytest.approx([6 * 0.8 / 1000])


def test_small_difference_costs_no_connectivity() -> None:
    """Below theta = 0.15 a pixel counts as connected."""
    true = np.zeros((1, 24, 24))
    true[0, 2:12, 2:12] = 1.0
    predicted = true.copy()
    predicted[0, 18:20, 18:21] = 0.14
    assert matting_errors(predicted, true)["all"].connectivity == pytest.approx([0.0])


def largest_component(mask: NDArray[np.bool_]) -> set[tuple[int, int]]:
    """The largest 4-connected region; the first of several in reading order."""
    left = {(int(y), int(x)) for y, x in np.argwhere(mask)}
    best: set[tuple[int, int]] = set()
    for start in sorted(left):
        if start not in left:
            continue
        found, queue = {start}, deque([start])
        while queue:
            y, x = queue.popleft()
            for step in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
                if step in left and step not in found:
                    found.add(step)
                    queue.append(step)
        left -= found
        if len(found) > len(best):
            best = found
    return best


def test_connected_levels_equal_a_flood_fill() -> None:
    rng = np.random.default_rng(1)
    predicted, true = np.clip(rng.random((2, 3, 12, 12)) * 1.3, 0, 1)
    levels = connected_level(predicted, true)
    for p, t, level in zip(predicted, true, levels, strict=True):
        expected = np.zeros((12, 12))
        open_ = np.ones((12, 12), bool)
        for i in range(1, 11):
            region = largest_component((p >= i / 10 - 1e-12) & (t >= i / 10 - 1e-12))
            inside = np.zeros((12, 12), bool)
            for at in region:
                inside[at] = True
            open_ &= inside  # a pixel keeps the last level before it first falls out
            expected[open_] = i / 10
        assert level == pytest.approx(expected)


def test_pictures_of_a_batch_do_not_touch_each_other() -> None:
    rng = np.random.default_rng(2)
    predicted, true = rng.random((2, 4, 16, 16))
    together = matting_errors(predicted, true)
    for i in range(4):
        alone = matting_errors(predicted[i : i + 1], true[i : i + 1])
        for region in together:
            for name, values in vars(together[region]).items():
                assert values[i] == pytest.approx(getattr(alone[region], name)[0])


def test_unknown_band_surrounds_a_hard_edge_by_a_thirty_second_of_the_side() -> None:
    true = np.zeros((1, 64, 64))
    true[:, :, 32:] = 1.0  # a radius of 2 pixels at 64: two columns on each side of the edge
    assert np.flatnonzero(unknown_band(true)[0].all(axis=0)).tolist() == [30, 31, 32, 33]
    assert unknown_band(true).sum() == 4 * 64


def test_unknown_band_holds_every_soft_pixel() -> None:
    true = disc(64, 20, 10)
    assert unknown_band(true)[(true > 0.05) & (true < 0.95)].all()


def test_error_outside_the_band_counts_over_all_pixels_alone() -> None:
    true = disc(64, 20, 4)
    predicted = true.copy()
    predicted[0, 0, 0] = 1.0
    errors = matting_errors(predicted, true)
    assert errors["all"].sad == pytest.approx([1 / 1000])
    assert errors["unknown"].sad == pytest.approx([0.0])


def test_picture_without_an_edge_has_no_mse_in_the_band() -> None:
    errors = matting_errors(np.zeros((1, 16, 16)), np.ones((1, 16, 16)))
    assert np.isnan(errors["unknown"].mse[0]) and errors["unknown"].sad[0] == 0
    assert errors["all"].mse[0] == 1.0
