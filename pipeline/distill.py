"""Distil a trained run into a small matting network that segments real photographs in one forward pass.

python pipeline/distill.py --run runs/mine
python pipeline/segment.py PHOTO... --run runs/mine
"""

import logging
import sys
from pathlib import Path

from data_shards.command import one_line_errors, run_command

import tyro

from pipeline.photographs.distillation.distill import DistillOptions, distill_run


def main() -> None:
    """Distil as the command line says."""
    with one_line_errors(passthrough=bool({"-h", "--help"} & set(sys.argv[1:]))):
        options = tyro.cli(DistillOptions, prog=Path(sys.argv[0]).name, description=__doc__)
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    print(distill_run(options))


if __name__ == "__main__":
    run_command(main, memory_remedy="give a smaller --batch")
