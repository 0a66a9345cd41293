"""Trace of host and device for ui.perfetto.dev."""

import contextlib
import gzip
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch.autograd import profiler
from torch.profiler import ProfilerActivity, profile, record_function

from pipeline.runs.saving import saving


def named(name: str) -> AbstractContextManager[Any]:
    """Give what is inside a name in a trace, where one is being recorded."""
    # Otherwise not even the two operators that a name takes.
    return record_function(name) if profiler._is_profiler_enabled else contextlib.nullcontext()


@contextlib.contextmanager
def tracing(path: Path) -> Iterator[None]:
    """Record what is inside, until the device has finished it.

    Args:
        path: of the trace, gzipped JSON.

    Raises:
        SaveError: it cannot be written.
    """
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    with profile(activities=activities) as recorded:
        yield
    with saving(path) as temporary, tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(plain))
        with plain.open("rb") as source, gzip.open(temporary, "wb") as compressed:
            shutil.copyfileobj(source, compressed)
