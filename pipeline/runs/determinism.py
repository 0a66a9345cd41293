"""Deterministic mode on a GPU: `--deterministic`. Needs torch alone."""

import contextlib
import os
import re
from collections.abc import Iterator

import torch

from data_shards.errors import UserError

_CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
_REFUSED = re.compile(r"(\S+) does not have a deterministic implementation, but you set")


def set_deterministic(on: bool) -> None:
    """Take algorithms that always give the same bits, or else those that are the fastest here, in this process.

    Args:
        on: which; before the first matrix product on a GPU, as cuBLAS reads its variable once.
    """
    if on:
        os.environ.setdefault(_CUBLAS, ":4096:8")
    if torch.are_deterministic_algorithms_enabled() != on:  # the call imports torch's compiler
        torch.use_deterministic_algorithms(on)
    torch.backends.cudnn.deterministic = on
    torch.backends.cudnn.benchmark = not on  # which of two algorithms is faster varies; a handful of shapes comes often


@contextlib.contextmanager
def refusals_named() -> Iterator[None]:
    """Turn torch's refusal to compute something deterministically into one line.

    Raises:
        UserError: an operator has no deterministic form.
    """
    try:
        yield
    except RuntimeError as error:
        if match := _REFUSED.search(str(error)):
            raise UserError(
                f"--deterministic: {match[1]} has no deterministic form on this device; leave the option out"
            ) from error
        if _CUBLAS in str(error):
            raise UserError(
                f"--deterministic: {_CUBLAS}={os.environ.get(_CUBLAS)} lets cuBLAS give other bits each time; "
                "unset it, or give :4096:8"
            ) from error
        raise
