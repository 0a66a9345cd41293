"""Distil a trained run into a small matting network that segments real photographs in one forward pass.

python pipeline/distill.py --run runs/mine
python pipeline/segment.py PHOTO... --run runs/mine
"""

import logging

from data_shards.command import parse_options, run_command

from pipeline.photographs.distillation.distill import DistillOptions, distill_run


def main() -> None:
    """Distil as the command line says."""
    options: DistillOptions = parse_options(DistillOptions, __doc__)
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    print(distill_run(options))


if __name__ == "__main__":
    run_command(main, memory_remedy="give a smaller --batch")
