"""Agreement of predicted masks with ground truth, from pixel counts over a set of images.

Counts are pooled over all pixels of all images, as in the paper's tables (their F1, precision and recall agree with
their IoU only so).
"""

from dataclasses import asdict, dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class MaskMetrics:
    """Figures of the paper's tables, each in [0, 1]; nan where the denominator is empty.

    Attributes:
        iou_fg: intersection over union of the foreground.
        iou_bg: of the background.
        miou: mean of both.
        precision: share of the predicted foreground that is right.
        recall: share of the true foreground that is found.
        f1: harmonic mean of precision and recall.
        accuracy: share of pixels that are right (the paper's column of that name repeats iou_fg).
    """

    iou_fg: float
    iou_bg: float
    miou: float
    precision: float
    recall: float
    f1: float
    accuracy: float

    @classmethod
    def from_counts(cls, counts: Tensor) -> "MaskMetrics":
        """The figures of ``counts [4]``: true positives, false positives, false negatives, true negatives."""
        tp, fp, fn, tn = (float(c) for c in counts)
        iou_fg, iou_bg = _ratio(tp, tp + fp + fn), _ratio(tn, tn + fp + fn)
        return cls(
            iou_fg=iou_fg,
            iou_bg=iou_bg,
            miou=(iou_fg + iou_bg) / 2,
            precision=_ratio(tp, tp + fp),
            recall=_ratio(tp, tp + fn),
            f1=_ratio(2 * tp, 2 * tp + fp + fn),
            accuracy=_ratio(tp + tn, tp + fp + fn + tn),
        )

    def named(self, prefix: str) -> dict[str, float]:
        """Flat metric names, such as ``mask/iou_fg``."""
        return {f"{prefix}/{name}": value for name, value in asdict(self).items()}


class MaskCounter:
    """Pools the confusion counts of batches of masks.

    Attributes:
        counts: so far, as `MaskMetrics.from_counts` takes them: int64 ``[4]`` on the CPU.

    Args:
        threshold: a value above it is foreground, in prediction and truth alike.
    """

    def __init__(self, threshold: float = 0.5) -> None:
        self.threshold = threshold
        self.counts = torch.zeros(4, dtype=torch.int64)

    def add(self, predicted: Tensor, true: Tensor) -> None:
        """Count a batch; both in [0, 1] and of one shape."""
        self.counts += confusion_counts(predicted, true, self.threshold).sum(dim=0)

    def metrics(self) -> MaskMetrics:
        """The figures of all that was counted."""
        return MaskMetrics.from_counts(self.counts)


def confusion_counts(predicted: Tensor, true: Tensor, threshold: float) -> Tensor:
    """True positives, false positives, false negatives and true negatives of each mask, int64 ``[B, 4]`` on the CPU.

    Args:
        predicted: ``[B, ...]`` in [0, 1].
        true: of the same shape, in [0, 1].
        threshold: a value above it is foreground.
    """
    if predicted.shape != true.shape:
        raise ValueError(f"masks of shape {tuple(predicted.shape)} and {tuple(true.shape)} cannot be compared")
    p, t = ((mask > threshold).reshape(len(mask), -1) for mask in (predicted, true))
    return torch.stack([(p & t).sum(1), (p & ~t).sum(1), (~p & t).sum(1), (~p & ~t).sum(1)], dim=1).cpu()


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else float("nan")
