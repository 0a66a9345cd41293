"""Results of all trials, summarized over the seeds: the content of ``ablation.json``."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.studies.ablation.claims import CLAIMS, judge
from pipeline.studies.ablation.variants import FULL, Variant

RESULTS_VERSION = 1

DISTANCES = ("fid", "frechet_distance")
"""Names that an evaluation gives the Fréchet distance: by Inception's features, and by others."""


def summarise(evaluations: Mapping[Variant, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Figures of the variants, and what becomes of the paper's claims.

    Args:
        evaluations: of each variant one a seed, all with the same settings; seeds may be missing.
    """
    one = next(evaluation for found in evaluations.values() for evaluation in found)
    variants: dict[str, dict[str, Any]] = {
        variant.name: {
            "title": variant.title,
            "seeds": [evaluation["settings"]["seed"] for evaluation in found],
            "figures": _over_seeds([figures_of(evaluation) for evaluation in found]),
        }
        for variant, found in evaluations.items()
        if found
    }
    full = variants[FULL.name]["figures"] if FULL.name in variants else {}
    judged = [
        judge(claim, _values(full, claim.figure), _values(variants[claim.variant]["figures"], claim.figure))
        for claim in CLAIMS
        if claim.variant in variants
    ]
    return {
        "version": RESULTS_VERSION,
        "run": {key: one["run"][key] for key in ("dataset", "resolution", "iteration", "images_seen")},
        "settings": {key: one["settings"][key] for key in ("num_samples", "psi", "threshold")},
        "data": one["data"],
        "features": one["features"],
        "features_missing": one["features_missing"],
        "pseudo_truth": next(iter(one["generated"][0]["masks"]), None),
        "variants": variants,
        "claims": judged,
    }


def figures_of(evaluation: Mapping[str, Any]) -> dict[str, float | None]:
    """Figures of one evaluation: of its masks against the first pseudo ground truth, `distance` of its foregrounds
    from the real images, and the share of an image that is foreground."""
    at = evaluation["generated"][0]
    figures: dict[str, float | None] = dict(next(iter(at["masks"].values()), {}))
    images = at["images"].get("foreground", {})
    distance = next((images[name] for name in DISTANCES if name in images), None)
    return figures | {"distance": distance, "area_mean": at["area_mean"], "soft_share": at["soft_share"]}


def _over_seeds(rows: Sequence[Mapping[str, float | None]]) -> dict[str, Any]:
    """Mean and sample standard deviation; None where a seed lacks the figure, or there is only one."""
    figures = {}
    for name in rows[0]:
        values = [row.get(name) for row in rows]
        known = [value for value in values if value is not None]
        whole = len(known) == len(values)
        figures[name] = {
            "mean": statistics.fmean(known) if whole else None,
            "std": statistics.stdev(known) if whole and len(known) > 1 else None,
            "values": values,
        }
    return figures


def _values(figures: Mapping[str, Any], name: str) -> list[float]:
    found = figures.get(name)
    return [] if found is None or None in found["values"] else found["values"]
