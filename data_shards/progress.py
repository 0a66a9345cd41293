"""Progress bars that suit both a terminal and a log file."""

import os
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm


def progress_bar(iterable: Iterable[Any] | None = None, **options: Any) -> "tqdm[Any]":
    """A bar on stderr; where that is no terminal each update is a line of a log, so they are seldom.

    Args:
        iterable: what it wraps, if anything.
        options: of tqdm.
    """
    return tqdm(iterable, dynamic_ncols=True, mininterval=0.2 if os.isatty(2) else 15.0, **options)
