"""The results of an evaluation as plain JSON types, from which files, tables, report and MLflow are made."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data_shards.reading.shard_set import ShardSet
from pipeline.evaluation.features import Extractor, FeatureStatistics, ImageMetric, image_distances
from pipeline.evaluation.mask_metrics import MaskMetrics
from pipeline.evaluation.measure import Generated, Plan, Real

RESULTS_VERSION = 1


def describe(
    plan: Plan, shard_set: ShardSet, psis: Sequence[float], extractor: Extractor | None, missing: str | None
) -> dict[str, Any]:
    """What was evaluated, and how.

    Args:
        plan: of the evaluation.
        shard_set: the real images.
        psis: truncations.
        extractor: of features; None where image metrics were left out.
        missing: why, if not by wish.
    """
    run = plan.run
    with run.checkpoint.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    features: dict[str, Any] | None = None
    if extractor is not None:
        features = {
            "extractor": extractor.name,
            "layer": extractor.layer,
            "fingerprint": extractor.fingerprint,
            "is_inception": extractor.is_inception,
            "resize": extractor.resize,
        }
    return {
        "version": RESULTS_VERSION,
        "run": {
            "name": run.run_dir.resolve().name,
            "dataset": run.config.dataset,
            "resolution": run.config.resolution,
            "checkpoint": run.checkpoint.name,
            "checkpoint_sha256": digest,
            "iteration": run.iteration,
            "images_seen": run.images_seen,
        },
        "settings": {
            "num_samples": plan.num_samples,
            "psi": list(psis),
            "seed": plan.seed,
            "threshold": plan.threshold,
        },
        "data": {"digest": shard_set.digest, "num_images": shard_set.num_samples, "has_alpha": shard_set.has_alpha},
        "features": features,
        "features_missing": missing,
    }


def generated_figures(
    generated: Generated,
    real: FeatureStatistics | None,
    extractor: Extractor | None,
    metrics: Sequence[ImageMetric],
    *,
    seed: int,
) -> dict[str, Any]:
    """Figures at one truncation."""
    images = {}
    if real is not None and extractor is not None:
        images = {
            kind: image_distances(statistics, real, extractor, metrics, seed=seed)
            for kind, statistics in generated.statistics.items()
        }
    histogram = generated.alpha_histogram
    return {
        "psi": generated.psi,
        "images": images,
        "masks": {name: scores.figures() for name, scores in generated.scores.items()},
        "area_mean": float(generated.areas.mean()),
        "area_std": float(generated.areas.std()),
        # Neither clearly foreground nor clearly background: the outermost twentieths are.
        "soft_share": float(histogram[1:-1].sum() / histogram.sum()),
    }


def real_figures(real: Real | None, fitted: MaskMetrics | None) -> dict[str, Any]:
    """Figures on real images.

    Args:
        real: what was measured.
        fitted: the fitted segmenter's own, on images that it was not fitted on.
    """
    truths = {} if fitted is None else {"fitted": asdict(fitted)}
    if real is None:
        return {"num_images": 0, "mask_pred": {}, "pseudo_truth": truths}
    truths |= {name: scores.figures() for name, scores in real.truths.items()}
    return {
        "num_images": real.num,
        "mask_pred": {name: scores.figures() for name, scores in real.mask_pred.items()},
        "pseudo_truth": truths,
    }


def as_metrics(results: Mapping[str, Any]) -> dict[str, float]:
    """The finite figures by flat names, such as ``evaluation/psi_1.0/mask/fitted/iou_fg``."""
    flat: dict[str, float] = {}
    for at in results["generated"]:
        prefix = f"evaluation/psi_{at['psi']}"
        for kind, figures in at["images"].items():
            flat |= {f"{prefix}/{kind}/{name}": value for name, value in figures.items()}
        for truth, figures in at["masks"].items():
            flat |= {f"{prefix}/mask/{truth}/{name}": value for name, value in figures.items()}
        flat |= {f"{prefix}/{name}": at[name] for name in ("area_mean", "area_std", "soft_share")}
    for group in ("mask_pred", "pseudo_truth"):
        for truth, figures in results["real"][group].items():
            flat |= {f"evaluation/real/{group}/{truth}/{name}": value for name, value in figures.items()}
    return {name: value for name, value in flat.items() if math.isfinite(value)}


def write_results(results: Mapping[str, Any], path: Path) -> None:
    """Save as JSON; the same figures give the same bytes."""
    write_whole(path, json.dumps(_finite(results), indent=2) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _finite(value: Any) -> Any:
    """JSON has no nan."""
    if isinstance(value, Mapping):
        return {key: _finite(below) for key, below in value.items()}
    if isinstance(value, list):
        return [_finite(below) for below in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
