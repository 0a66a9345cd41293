"""Ask people which of two methods' masks is more precise (the paper's appendix G).

python pipeline/user_study.py serve --images photos --method-a ours=masks/ours --method-b u2net=masks/u2net \
    --answers study.sqlite
python pipeline/user_study.py result --answers study.sqlite
"""

from data_shards.command import parse_options, run_command

from pipeline.pages.study.commands import Result, Serve, serve, show_result

DESCRIPTION = "Ask people which of two methods' masks is more precise (the paper's appendix G)."


def main() -> None:
    """Serve or sum up, as the command line says."""
    command: Serve | Result = parse_options(Serve | Result, DESCRIPTION)
    if isinstance(command, Serve):
        serve(command)
    else:
        show_result(command)


if __name__ == "__main__":
    run_command(main)
