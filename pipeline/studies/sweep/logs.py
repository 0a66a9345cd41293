"""Capture of what a trial prints in a log file."""

import contextlib
import logging
import traceback
from collections.abc import Iterator
from pathlib import Path

from data_shards.errors import UserError


@contextlib.contextmanager
def logged(path: Path) -> Iterator[None]:
    """Within, all that is printed and logged goes to the end of a file; so does the error that ends it, if one does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", buffering=1) as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
        try:
            yield
        except UserError as error:
            print(f"error: {error}")
            raise
        except Exception:
            traceback.print_exc()
            raise


def last_line(path: Path) -> str:
    """What was said at the end: of a user's mistake, all of it."""
    lines = path.read_text(errors="replace").splitlines() if path.is_file() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "without a word")
