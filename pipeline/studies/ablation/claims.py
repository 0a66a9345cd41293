"""The paper's claims on each ablation, and whether a study supports them (section 4.4, Table 1).

A claim is compared with the difference of two means over seeds, ablated minus full, and its Welch 95% confidence
interval.
It is reproduced where the whole interval is on the claimed side, contradicted where it is on the other, and undecided
where the spread over seeds leaves both open.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from scipy import stats

Change = Literal["falls", "rises", "stays"]
Verdict = Literal["reproduced", "contradicted", "undecided", "not measured"]

CONFIDENCE = 0.95

SAME = 0.01
"""A share that differs by less stays the same: the paper's tables have two digits."""


@dataclass(frozen=True)
class Claim:
    """A statement of the paper.

    Attributes:
        variant: that lacks a part.
        figure: that it moves: a mask metric, `mse_unknown` (error in hair and fur) or `distance` (FID, or its like by
            other features).
        change: against the full method.
        words: what the paper says, in short.
    """

    variant: str
    figure: str
    change: Change
    words: str


CLAIMS = (
    Claim("no-fine-mask", "miou", "stays", "the mask metrics do not show the fine mask"),
    Claim("no-fine-mask", "mse_unknown", "rises", "fine details of the masks are less accurate, hair above all"),
    Claim("no-fine-mask", "distance", "rises", "without any of the parts FID is worse"),
    Claim("no-participation", "miou", "falls", "masks are worse"),
    Claim("no-participation", "precision", "falls", "masks are wider than the object"),
    Claim("no-participation", "distance", "rises", "without any of the parts FID is worse"),
    Claim("no-consistency", "miou", "falls", "masks do not align with the object"),
    Claim("no-consistency", "distance", "rises", "without any of the parts FID is worse"),
    Claim("no-dual-fake-input", "miou", "falls", "there are no meaningful masks"),
    Claim("no-dual-fake-input", "distance", "rises", "there are no meaningful foregrounds"),
)


def judge(claim: Claim, full: Sequence[float], ablated: Sequence[float]) -> dict[str, Any]:
    """The claim, the difference of the means with its interval, and the verdict.

    Args:
        claim: of the paper.
        full: its figure of the full method, one a seed; empty if it was not measured.
        ablated: likewise without the part.
    """
    difference = low = high = None
    verdict: Verdict = "not measured"
    if full and ablated:
        difference = float(np.mean(ablated) - np.mean(full))
        low, high = _interval(full, ablated)
        verdict = _verdict(claim.change, low, high)
        low, high = (bound if math.isfinite(bound) else None for bound in (low, high))
    return {**vars(claim), "difference": difference, "low": low, "high": high, "verdict": verdict}


def _interval(full: Sequence[float], ablated: Sequence[float]) -> tuple[float, float]:
    """Of the difference of the means; without bounds where a mean of one value has no spread."""
    if min(len(full), len(ablated)) < 2:
        return -math.inf, math.inf
    if np.var(full) == np.var(ablated) == 0:
        difference = float(np.mean(ablated) - np.mean(full))
        return difference, difference
    interval = stats.ttest_ind(ablated, full, equal_var=False).confidence_interval(CONFIDENCE)
    return float(interval.low), float(interval.high)


def _verdict(change: Change, low: float, high: float) -> Verdict:
    claimed, other = {
        "falls": (high < 0, low > 0),
        "rises": (low > 0, high < 0),
        "stays": (low > -SAME and high < SAME, low >= SAME or high <= -SAME),
    }[change]
    return "reproduced" if claimed else "contradicted" if other else "undecided"
