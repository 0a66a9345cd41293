"""What all commands share: reading of arguments, and one-line errors.

Commands import this module before torch (`[tool.ruff.lint.isort]` in pyproject.toml holds the order): it decides how
torch's threads wait.
"""

import contextlib
import io
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from data_shards.errors import MemoryShortageError, UserError, shortage_of_memory

# OpenMP threads spin while they wait for each other, for milliseconds by default. On a core that also does other work,
# that keeps the awaited thread from running. Waking a sleeping thread at each operator costs a quarter of the speed on
# idle cores. A short spin of GNU's OpenMP, torch's on Linux, avoids both: docs/benchmarks.md.
if "OMP_WAIT_POLICY" not in os.environ and "GOMP_SPINCOUNT" not in os.environ:
    os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "5000"}


@contextlib.contextmanager
def one_line_errors(*, passthrough: bool = False) -> Iterator[None]:
    """Turn tyro's boxed error messages into one line.

    Args:
        passthrough: leave all as it is, as `--help` needs.

    Raises:
        UserError: where tyro would have ended the program.
    """
    captured = io.StringIO()
    try:
        with contextlib.nullcontext() if passthrough else contextlib.redirect_stderr(captured):
            yield
    except SystemExit as error:
        if passthrough or not error.code:
            raise
        lines = [line.strip("│╭╮╰╯─|+- ") if line[:1] in "│╭╰|+" else line for line in captured.getvalue().splitlines()]
        raise UserError(" ".join(" ".join(lines).split())) from None


def parse_options(
    kind: Any, description: str | None = None, *, args: Sequence[str] | None = None, prog: str | None = None
) -> Any:
    """Read a command line into a dataclass with tyro.

    Args:
        kind: a dataclass, or a union of them for subcommands.
        description: shown by `--help`.
        args: the arguments; those of this process by default.
        prog: name of the command; that of its file by default.

    Raises:
        UserError: an argument is unknown, missing or of the wrong type.
    """
    import tyro  # not on every machine that only runs benchmarks

    args = sys.argv[1:] if args is None else args
    with one_line_errors(passthrough=bool({"-h", "--help"} & set(args))):
        return tyro.cli(kind, prog=prog or Path(sys.argv[0]).name, description=description, args=args)


@contextlib.contextmanager
def memory_errors(remedy: str) -> Iterator[None]:
    """Turn the many errors of a lack of memory into one line.

    Args:
        remedy: what to do about it.

    Raises:
        MemoryShortageError: there was not enough for what is inside.
    """
    try:
        yield
    except Exception as error:
        if (shortage := shortage_of_memory(error)) is None:
            raise
        raise MemoryShortageError(f"out of memory ({shortage}): {remedy}") from error


def run_command(main: Callable[[], None], memory_remedy: str = "end other programs, or use a larger machine") -> None:
    """Run a command; a user's mistake, or a lack of memory, ends it with one line and exit code 2.

    Args:
        main: of the command.
        memory_remedy: what to do where there is not enough memory.
    """
    try:
        with memory_errors(memory_remedy):
            main()
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")  # one write: two ranks' lines must not run into each other
        sys.exit(2)
