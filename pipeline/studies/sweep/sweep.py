"""A sweep, from its options to its results."""

from pathlib import Path

from data_shards.errors import UserError
from pipeline.studies.sweep.options import SWEEP_FILE, SweepOptions
from pipeline.studies.sweep.space import PBT_MUTATIONS, make_space


def sweep(options: SweepOptions, out: Path) -> None:
    """Run the trials that have not been run, and tell what all of them say.

    Args:
        options: of the sweep.
        out: its directory.

    Raises:
        UserError: the configuration, the space or the resources are invalid; nothing was begun.
        SystemExit: after Ctrl-C.
    """
    space = make_space(options.tree, _searched(options))
    if options.resume is None and (out / SWEEP_FILE).exists():
        raise UserError(f"{out} holds a sweep already: resume it with --resume {out}, or choose another --out")
    # Ray takes seconds to import, and what is invalid is to be known before.
    from pipeline.studies.sweep.search import Search

    Search(options, space, out).run()


def _searched(options: SweepOptions) -> list[str]:
    """What is asked for besides the fields of the data set."""
    if options.scheduler != "pbt":
        return list(options.search)
    named = {one.partition("=")[0] for one in options.search}
    return [*options.search, *(f"{f}={d}" for f, d in PBT_MUTATIONS.items() if f not in named)]
