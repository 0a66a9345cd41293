"""Generate with a trained run: grids, cut-outs, labelled data sets, and the paper's figures.

python pipeline/generate.py cutouts --run runs/mine --count 100 --out cutouts
python pipeline/generate.py dataset --run runs/mine --count 10000 --out shards/generated
"""

import sys
from pathlib import Path

from data_shards.command import one_line_errors, run_command

import tyro

from pipeline.generation.kinds import KINDS


def main() -> None:
    """Generate what the command line says."""
    argv = sys.argv[1:]
    with one_line_errors(passthrough=bool({"-h", "--help"} & set(argv))):
        kind = tyro.extras.subcommand_cli_from_dict(
            dict(KINDS), prog=Path(sys.argv[0]).name, description=__doc__, args=argv
        )
    out = kind.make()
    print(out)


if __name__ == "__main__":
    run_command(main, memory_remedy="give a smaller --batch")
