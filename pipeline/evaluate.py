"""Measure a trained run as the paper measures: FID, masks against pseudo ground truth, matting errors, a report.

accelerate launch pipeline/evaluate.py --run runs/mine
accelerate launch pipeline/evaluate.py --run runs/mine --num-samples 50000 --psi 1.0 0.7 --pseudo-gt u2netp=u2netp.onnx
"""

import logging

from data_shards.command import parse_options, run_command

from pipeline.evaluation.evaluate import EvaluationOptions, evaluate
from pipeline.runs.reproducible import make_repeatable
from pipeline.training.trainer import make_accelerator

DESCRIPTION = "Measure a trained run as the paper measures: FID, masks against pseudo ground truth, matting errors."
PATIENCE_S = 1800.0
"""For the other ranks, which wait while one downloads weights or draws the report, seconds."""


def main() -> None:
    """Evaluate as the command line says."""
    options: EvaluationOptions = parse_options(EvaluationOptions, DESCRIPTION)
    accelerator = make_accelerator(PATIENCE_S)
    logging.basicConfig(
        level=logging.INFO if accelerator.is_main_process else logging.ERROR, format="%(message)s", force=True
    )
    make_repeatable(options.num_threads)
    try:
        evaluate(options, accelerator)
    finally:
        accelerator.end_training()


if __name__ == "__main__":
    run_command(main, memory_remedy="give a smaller --batch")
