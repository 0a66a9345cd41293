"""How every command reads its arguments and ends on a user's mistake."""

import contextlib
import io
import sys
from collections.abc import Callable, Iterator

from data_shards.errors import UserError


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


def run_command(main: Callable[[], None]) -> None:
    """Run a command; a user's mistake ends it with one line and exit code 2."""
    try:
        main()
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")  # one write: two ranks' lines must not run into each other
        sys.exit(2)
