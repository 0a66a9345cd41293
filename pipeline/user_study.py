"""Ask people which of two methods' masks is more precise (the paper's appendix G).

python pipeline/user_study.py serve --images photos --method-a ours=masks/ours --method-b u2net=masks/u2net \
    --answers study.sqlite
python pipeline/user_study.py result --answers study.sqlite
"""

import sys
from pathlib import Path

from data_shards.command import one_line_errors, run_command

import tyro

from pipeline.pages.study.commands import Result, Serve, serve, show_result

DESCRIPTION = "Ask people which of two methods' masks is more precise (the paper's appendix G)."


def main() -> None:
    """Serve or sum up, as the command line says."""
    with one_line_errors(passthrough=bool({"-h", "--help"} & set(sys.argv[1:]))):
        command = tyro.cli(Serve | Result, prog=Path(sys.argv[0]).name, description=DESCRIPTION)
    if isinstance(command, Serve):
        serve(command)
    else:
        show_result(command)


if __name__ == "__main__":
    run_command(main)
