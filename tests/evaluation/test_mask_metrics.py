"""Mask metrics equal counts made by hand and obey their identities."""

import math
from dataclasses import asdict

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.evaluation.mask_metrics import MaskCounter, MaskMetrics


def measure(predicted: Tensor, true: Tensor, threshold: float = 0.5) -> MaskMetrics:
    counter = MaskCounter(threshold)
    counter.add(predicted, true)
    return counter.metrics()


def test_metrics_equal_counts_by_hand() -> None:
    # tp 3, fp 1, fn 2, tn 4
    predicted = torch.tensor([1, 1, 1, 1, 0, 0, 0, 0, 0, 0.0])
    true = torch.tensor([1, 1, 1, 0, 1, 1, 0, 0, 0, 0.0])
    assert asdict(measure(predicted, true)) == pytest.approx(
        {
            "iou_fg": 3 / 6,
            "iou_bg": 4 / 7,
            "miou": (3 / 6 + 4 / 7) / 2,
            "precision": 3 / 4,
            "recall": 3 / 5,
            "f1": 6 / 9,
            "accuracy": 7 / 10,
        }
    )


@pytest.mark.parametrize("threshold", [0.5, 0.9])
def test_metrics_equal_set_arithmetic(threshold: float) -> None:
    predicted, true = torch.rand(3, 1, 9, 7), torch.rand(3, 1, 9, 7)
    p = {tuple(i) for i in np.argwhere(predicted.numpy() > threshold)}
    t = {tuple(i) for i in np.argwhere(true.numpy() > threshold)}
    every = set(np.ndindex(3, 1, 9, 7))
    metrics = measure(predicted, true, threshold)
    assert metrics.iou_fg == pytest.approx(len(p & t) / len(p | t))
    assert metrics.iou_bg == pytest.approx(len(every - (p | t)) / len(every - (p & t)))
    assert metrics.precision == pytest.approx(len(p & t) / len(p))
    assert metrics.recall == pytest.approx(len(p & t) / len(t))
    assert metrics.accuracy == pytest.approx(1 - len(p ^ t) / len(every))


def test_f1_follows_from_iou_and_from_precision_and_recall() -> None:
    metrics = measure(torch.rand(4, 1, 8, 8), torch.rand(4, 1, 8, 8))
    assert metrics.f1 == pytest.approx(2 * metrics.iou_fg / (1 + metrics.iou_fg))
    harmonic = 2 / (1 / metrics.precision + 1 / metrics.recall)
    assert metrics.f1 == pytest.approx(harmonic)
    assert metrics.miou == pytest.approx((metrics.iou_fg + metrics.iou_bg) / 2)


def test_swapping_masks_swaps_precision_and_recall() -> None:
    predicted, true = torch.rand(2, 1, 8, 8), torch.rand(2, 1, 8, 8)
    there, back = measure(predicted, true), measure(true, predicted)
    assert (there.precision, there.recall, there.iou_fg) == (back.recall, back.precision, back.iou_fg)


def test_inverting_masks_swaps_foreground_and_background() -> None:
    predicted, true = torch.rand(2, 1, 8, 8).round(), torch.rand(2, 1, 8, 8).round()
    there, back = measure(predicted, true), measure(1 - predicted, 1 - true)
    assert (there.iou_fg, there.iou_bg, there.accuracy) == (back.iou_bg, back.iou_fg, back.accuracy)


def test_equal_masks_are_perfect() -> None:
    mask = torch.rand(2, 1, 8, 8)
    assert set(asdict(measure(mask, mask)).values()) == {1.0}


def test_batches_pool_to_the_whole() -> None:
    predicted, true = torch.rand(6, 1, 8, 8), torch.rand(6, 1, 8, 8) ** 3
    counter = MaskCounter()
    for part in ([0], [1, 2], [3, 4, 5]):
        counter.add(predicted[part], true[part])
    assert counter.metrics() == measure(predicted, true)


def test_images_are_pooled_by_their_pixels_not_averaged() -> None:
    # First image: tp 1 of 1; second: tp 0, fp 3. Pooled 1/4, the mean over images would be 1/2.
    predicted = torch.tensor([[1, 0, 0, 0], [1, 1, 1, 0.0]])
    true = torch.tensor([[1, 0, 0, 0], [0, 0, 0, 0.0]])
    assert measure(predicted, true).iou_fg == pytest.approx(1 / 4)


def test_value_at_the_threshold_is_background() -> None:
    metrics = measure(torch.tensor([0.5, 0.6]), torch.tensor([0.0, 1.0]))
    assert metrics.accuracy == 1.0


def test_empty_denominators_are_nan() -> None:
    nothing = measure(torch.zeros(4), torch.zeros(4))
    assert all(math.isnan(v) for v in (nothing.iou_fg, nothing.precision, nothing.recall, nothing.f1, nothing.miou))
    assert nothing.iou_bg == nothing.accuracy == 1.0
    everything = measure(torch.ones(4), torch.ones(4))
    assert math.isnan(everything.iou_bg)
    assert everything.iou_fg == everything.f1 == 1.0
    assert all(math.isnan(v) for v in asdict(MaskCounter().metrics()).values())


def test_shapes_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot be compared"):
        MaskCounter().add(torch.zeros(1, 1, 4, 4), torch.zeros(1, 4, 4))
