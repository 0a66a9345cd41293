"""The four matting errors of Rhemann et al. (2009): SAD, MSE, gradient and connectivity, per image.

Definitions and constants are those of the benchmark at alphamatting.com, and sums are in thousands as there. They are
taken over all pixels, and over the unknown band of a trimap made from the ground-truth alpha: hair, fur, whiskers.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Floats = NDArray[np.float64]

ERRORS = ("sad", "mse", "gradient", "connectivity")
REGIONS = ("all", "unknown")

GRADIENT_SIGMA = 1.4
CONNECTIVITY_STEP = 0.1
CONNECTIVITY_THETA = 0.15
OPAQUE, TRANSPARENT = 0.95, 0.05
BAND_SHARE = 1 / 32
"""Half-width of the unknown band, as a share of the image's side: 8 pixels at 256."""


@dataclass(frozen=True, eq=False)
class MattingErrors:
    """Errors of b mattes, each ``[b]``.

    Attributes:
        sad: sum of absolute differences, thousands.
        mse: mean squared difference; nan where the region is empty.
        gradient: sum of squared differences of the gradients' magnitudes, thousands.
        connectivity: sum of absolute differences of the degrees of connectivity, thousands.
    """

    sad: Floats
    mse: Floats
    gradient: Floats
    connectivity: Floats


def matting_errors(predicted: Floats, true: Floats) -> dict[str, MattingErrors]:
    """Errors by region, ``"all"`` and ``"unknown"``.

    Args:
        predicted: ``[b, H, W]`` in [0, 1].
        true: ``[b, H, W]`` in [0, 1].
    """
    difference = predicted - true
    gradient = np.square(gradient_magnitude(predicted) - gradient_magnitude(true))
    levels = connected_level(predicted, true)
    connectivity = np.abs(_connectivity(predicted, levels) - _connectivity(true, levels))
    errors = {}
    for name, region in (("all", np.ones(true.shape, np.bool_)), ("unknown", unknown_band(true))):
        size = region.sum(axis=(1, 2))
        errors[name] = MattingErrors(
            sad=_sum(np.abs(difference), region) / 1000,
            mse=np.where(size, _sum(np.square(difference), region) / np.maximum(size, 1), np.nan),
            gradient=_sum(gradient, region) / 1000,
            connectivity=_sum(connectivity, region) / 1000,
        )
    return errors


def unknown_band(true: Floats) -> NDArray[np.bool_]:
    """The trimap's unknown pixels ``[b, H, W]``: those near neither opaque nor transparent pixels alone.

    A pixel is known where the whole square around it is opaque, or the whole of it transparent.
    """
    radius = max(1, round(true.shape[-1] * BAND_SHARE))
    square = (1, 2 * radius + 1, 2 * radius + 1)
    known = np.zeros(true.shape, np.bool_)
    for certain in (true >= OPAQUE, true <= TRANSPARENT):
        known |= ndimage.minimum_filter(certain, square, mode="nearest")
    return ~known


def gradient_magnitude(alpha: Floats) -> Floats:
    """Magnitude of the derivative of Gaussian, ``[b, H, W]``; kernels of unit energy, borders repeated."""
    sigma = GRADIENT_SIGMA
    # The benchmark cuts the Gaussian where it falls below 0.01.
    radius = int(np.ceil(sigma * np.sqrt(-2 * np.log(np.sqrt(2 * np.pi) * sigma * 0.01))))
    x = np.arange(-radius, radius + 1, dtype=np.float64)
    gaussian = np.exp(-np.square(x) / (2 * sigma**2))
    derivative = x * gaussian
    gaussian /= np.linalg.norm(gaussian)
    derivative /= np.linalg.norm(derivative)

    def filtered(along_y: Floats, along_x: Floats) -> Floats:
        rows = ndimage.correlate1d(alpha, along_y, axis=1, mode="nearest")
        return np.asarray(ndimage.correlate1d(rows, along_x, axis=2, mode="nearest"), np.float64)

    return np.hypot(filtered(gaussian, derivative), filtered(derivative, gaussian))


def connected_level(predicted: Floats, true: Floats) -> Floats:
    """Greatest threshold at which each pixel belongs to the largest region opaque in both, ``[b, H, W]``.

    Regions are 4-connected; thresholds are 0, 0.1, ..., 1.
    """
    levels = np.full(true.shape, -1.0)
    cross = np.zeros((3, 3, 3), np.bool_)  # within an image, never to the next one of the batch
    cross[1] = ndimage.generate_binary_structure(2, 1)
    both = np.minimum(predicted, true)
    thresholds = np.arange(0, 1 + CONNECTIVITY_STEP / 2, CONNECTIVITY_STEP)
    for below, threshold in pairwise(thresholds):
        labels, _ = ndimage.label(both >= threshold, cross)
        for picture, level in zip(labels, levels, strict=True):
            sizes = np.bincount(picture.ravel())
            sizes[0] = 0
            largest = picture == sizes.argmax() if sizes.any() else np.zeros(picture.shape, np.bool_)
            level[(level == -1) & ~largest] = below
    levels[levels == -1] = 1.0
    return levels


def _connectivity(alpha: Floats, levels: Floats) -> Floats:
    """Degree of connectivity: 1, less how far a pixel stands above the level at which it is connected."""
    distance = alpha - levels
    return 1 - distance * (distance >= CONNECTIVITY_THETA)


def _sum(values: Floats, region: NDArray[np.bool_]) -> Floats:
    return np.asarray(np.where(region, values, 0.0).sum(axis=(1, 2)), np.float64)
