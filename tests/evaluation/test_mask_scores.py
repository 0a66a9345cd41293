"""Figures of many samples' masks equal scikit-learn's, and the paper's own arithmetic."""

import math

import numpy as np
import pytest
import torch
from sklearn import metrics as sklearn_metrics

from pipeline.evaluation import published
from pipeline.evaluation.mask_scores import join, score_masks


def masks(num: int, size: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    true = torch.rand(num, 1, size, size, generator=rng)
    return (true + 0.4 * torch.randn(true.shape, generator=rng)).clamp(0, 1), true


@pytest.mark.parametrize("threshold", [0.5, 0.9])
def test_hard_figures_equal_scikit_learns(threshold: float) -> None:
    predicted, true = masks(9)
    figures = score_masks(predicted, true, threshold=threshold).figures()
    p, t = (x.flatten().numpy() > threshold for x in (predicted, true))
    assert figures["iou_fg"] == pytest.approx(sklearn_metrics.jaccard_score(t, p, pos_label=True))
    assert figures["iou_bg"] == pytest.approx(sklearn_metrics.jaccard_score(t, p, pos_label=False))
    assert figures["miou"] == pytest.approx(sklearn_metrics.jaccard_score(t, p, average="macro"))
    assert figures["precision"] == pytest.approx(sklearn_metrics.precision_score(t, p))
    assert figures["recall"] == pytest.approx(sklearn_metrics.recall_score(t, p))
    assert figures["f1"] == pytest.approx(sklearn_metrics.f1_score(t, p))
    assert figures["accuracy"] == pytest.approx(sklearn_metrics.accuracy_score(t, p))


def test_soft_figures_equal_numpys_over_all_pixels() -> None:
    predicted, true = masks(5)
    figures = score_masks(predicted, true, threshold=0.5).figures()
    difference = (predicted - true).double().numpy()
    assert figures["mse"] == pytest.approx(np.square(difference).mean())
    assert figures["sad"] == pytest.approx(np.abs(difference).sum() / 5 / 1000)


def test_accuracy_as_in_the_paper_is_the_foregrounds_iou() -> None:
    figures = score_masks(*masks(3), threshold=0.5).figures()
    assert figures["accuracy_as_in_paper"] == figures["iou_fg"] != figures["accuracy"]


@pytest.mark.parametrize("row", published.MASKS, ids=str)
def test_published_rows_agree_with_themselves(row: published.PublishedMasks) -> None:
    """Guards against slips of the pen: figures of two digits, so sums may be off by one in the second."""
    assert row.miou == pytest.approx((row.iou_fg + row.iou_bg) / 2, abs=0.0101)
    if row.method != "PSeg":  # whose masks are next to empty, and whose row the paper cannot have pooled
        assert row.f1 == pytest.approx(2 * row.precision * row.recall / (row.precision + row.recall), abs=0.0151)
        assert row.f1 == pytest.approx(2 * row.accuracy / (1 + row.accuracy), abs=0.0151)


def test_miou_of_a_sample_is_by_hand() -> None:
    # tp 1, fp 1, fn 1, tn 1: both IoU are 1/3.
    predicted = torch.tensor([[[[1.0, 1.0], [0.0, 0.0]]]])
    true = torch.tensor([[[[1.0, 0.0], [1.0, 0.0]]]])
    assert score_masks(predicted, true, threshold=0.5).miou.tolist() == pytest.approx([1 / 3])


def test_empty_picture_that_is_found_empty_is_perfect() -> None:
    assert score_masks(torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 8, 8), threshold=0.5).miou.tolist() == [1.0]


def test_joined_batches_score_as_the_whole() -> None:
    predicted, true = masks(7)
    parts = [score_masks(p, t, threshold=0.5) for p, t in zip(predicted.split(3), true.split(3), strict=True)]
    whole = score_masks(predicted, true, threshold=0.5)
    assert join(parts).figures() == pytest.approx(whole.figures())
    assert join(parts).miou.tolist() == whole.miou.tolist()


def test_errors_that_no_sample_has_are_nan() -> None:
    figures = score_masks(torch.zeros(2, 1, 8, 8), torch.ones(2, 1, 8, 8), threshold=0.5).figures()
    assert math.isnan(figures["mse_unknown"]) and figures["mse"] == 1.0
