"""Scores of masks against (pseudo) ground truth, per sample and in total."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.evaluation.mask_metrics import MaskMetrics, confusion_counts
from pipeline.evaluation.matting import ERRORS, REGIONS, matting_errors


@dataclass(frozen=True, eq=False)
class MaskScores:
    """Of n samples.

    Attributes:
        counts: ``[n, 4]`` int64: true positives, false positives, false negatives, true negatives.
        errors: ``[n, 8]``: the four matting errors over all pixels, then in the unknown band; empty ``[n, 0]`` where
            they were not measured.
    """

    counts: NDArray[np.int64]
    errors: NDArray[np.float64]

    @property
    def miou(self) -> NDArray[np.float64]:
        """mIoU of each sample ``[n]``; an empty union counts as perfect."""
        tp, fp, fn, tn = self.counts.T.astype(np.float64)
        wrong = fp + fn
        iou_fg = np.divide(tp, tp + wrong, out=np.ones_like(tp), where=tp + wrong > 0)
        iou_bg = np.divide(tn, tn + wrong, out=np.ones_like(tn), where=tn + wrong > 0)
        return np.asarray((iou_fg + iou_bg) / 2, np.float64)

    def figures(self) -> dict[str, float]:
        """Hard metrics pooled over all pixels of all samples, then the means of the samples' matting errors.

        Names as in `MaskMetrics`; ``accuracy_as_in_paper``, whose column equals the foreground's IoU in every row of
        the paper; ``sad``, ``mse``, ``gradient``, ``connectivity``, and each again with ``_unknown``.
        """
        hard = asdict(MaskMetrics.from_counts(torch.from_numpy(self.counts).sum(dim=0)))
        figures = hard | {"accuracy_as_in_paper": hard["iou_fg"]}
        names = [name if region == "all" else f"{name}_{region}" for region in REGIONS for name in ERRORS]
        for name, column in zip(names, self.errors.T, strict=False):
            known = column[~np.isnan(column)]
            figures[name] = float(known.mean()) if len(known) else float("nan")
        return figures


def score_masks(predicted: Tensor, true: Tensor, *, threshold: float, soft: bool = True) -> MaskScores:
    """Score a batch of masks.

    Args:
        predicted: ``[b, 1, H, W]`` in [0, 1].
        true: ``[b, 1, H, W]`` in [0, 1].
        threshold: a value above it is foreground, in both.
        soft: measure matting errors too.
    """
    errors = np.empty((len(predicted), 0))
    if soft:
        p, t = (mask.squeeze(1).double().cpu().numpy() for mask in (predicted, true))
        by_region = matting_errors(p, t)
        errors = np.stack([getattr(by_region[region], name) for region in REGIONS for name in ERRORS], axis=1)
    return MaskScores(confusion_counts(predicted, true, threshold).numpy(), errors)


def join(parts: Sequence[MaskScores]) -> MaskScores:
    """The scores of several batches as one."""
    return MaskScores(np.concatenate([part.counts for part in parts]), np.concatenate([part.errors for part in parts]))
