"""Search the thresholds and schedules of a data set, without labels if it has none.

python ray_tune.py --dataset furballs                                                 # small, on this CPU
python ray_tune.py --dataset lsun_horse --data shards/horse --num-trials 32 --gpus-per-trial 1
python ray_tune.py --resume runs/sweep-NAME
"""

import logging
from datetime import datetime
from pathlib import Path

from data_shards.command import run_command

from pipeline.config.command_line import parse_arguments
from pipeline.studies.sweep.options import SweepOptions, saved_options
from pipeline.studies.sweep.sweep import sweep
from pipeline.training.interrupt import Interrupt

DESCRIPTION = "Search thresholds and schedules for a data set: many short trainings, the best of them in best.yaml."


def main() -> None:
    """Search as the command line says."""
    options = parse_arguments(SweepOptions, DESCRIPTION)
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    if options.resume is not None:
        options = saved_options(options)
    out = options.resume or options.out or Path("runs") / f"sweep-{options.tree.dataset}-{datetime.now():%Y%m%d-%H%M%S}"
    with Interrupt():
        sweep(options, out)


if __name__ == "__main__":
    run_command(main)
