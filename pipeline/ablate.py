"""Train and evaluate the method without each of its parts: Table 1 and figures 7 and 8 of the paper.

python pipeline/ablate.py                                               # on furballs
python pipeline/ablate.py --dataset ffhq --data shards/ffhq --seeds 0 --num-parallel 8 --num-samples 50000
python pipeline/ablate.py --steps 500 --variants full no-dual-fake-input
"""

import logging
from pathlib import Path

from data_shards.command import run_command

from pipeline.config.command_line import parse_arguments
from pipeline.studies.ablation.study import AblationOptions, study
from pipeline.training.interrupt import Interrupt

DESCRIPTION = "Train and evaluate the method, and the method without each of its parts, over several seeds."


def main() -> None:
    """Study as the command line says."""
    options = parse_arguments(AblationOptions, DESCRIPTION)
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    out = options.out or Path("runs") / f"ablation-{options.tree.dataset}"
    with Interrupt():
        study(options, out)


if __name__ == "__main__":
    run_command(main)
