"""What `pipeline/evaluate.py` measures, and the smaller measurement that training makes of itself."""

from pipeline.evaluation.in_training import (
    PseudoTruth,
    generated_mask_metrics,
    prepare_pseudo_truth,
    real_mask_prediction_metrics,
)

__all__ = ["PseudoTruth", "generated_mask_metrics", "prepare_pseudo_truth", "real_mask_prediction_metrics"]
