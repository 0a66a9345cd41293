"""Checkpoints: written atomically, found, verified and pruned.

A checkpoint is one file, `checkpoint-<iteration>.pt`, of tensors and plain types, read with ``weights_only=True``.
It is written under another name, flushed to disk and renamed: a crash never leaves half a file under a final name. A
digest beside it tells damage that came later.
"""

import hashlib
import os
import re
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.utils._pytree import tree_map_only

from data_shards.errors import UserError, shortage_of_memory
from pipeline.runs.saving import saving

PATTERN = re.compile(r"checkpoint-(\d{9})\.pt")
BEST = "best.pt"


def save_checkpoint(state: dict[str, Any], path: Path) -> None:
    """Write `state` to `path` atomically, its sha256 to ``<path>.sha256``.

    Raises:
        SaveError: it could not be written; what was there before is whole.
    """
    with saving(path) as temporary:
        with temporary.open("wb") as file:
            serialise(state, file)
            file.flush()
            os.fsync(file.fileno())
        # The digest comes first: a checkpoint under its final name always has one. Until the rename, both files' are
        # good.
        former = [_sha256(path)] if path.is_file() else []
        with saving(_digest_path(path)) as digests:
            digests.write_text("\n".join([*former, _sha256(temporary)]))


def serialise(state: dict[str, Any], file: BinaryIO) -> None:
    """`torch.save`, whose errors of the disk are the disk's.

    Raises:
        OSError: the file cannot be written.
    """
    try:
        torch.save(state, file)
    except RuntimeError as error:  # raised on the way out of its archive, over what went wrong
        if isinstance(cause := error.__context__, OSError):
            raise cause from None
        raise


def copy_to_host(state: dict[str, Any]) -> dict[str, Any]:
    """The state as it is now, in host memory: training may resume while the copy is written."""
    copied: dict[str, Any] = tree_map_only(torch.Tensor, lambda x: x.detach().to("cpu", copy=True), state)
    return copied


def load_checkpoint(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read a checkpoint.

    Raises:
        UserError: the file is missing, damaged, or not a checkpoint.
    """
    if not path.is_file():
        raise UserError(f"checkpoint {path} is missing: give an existing one, or leave --resume out to start again")
    digest = _digest_path(path)
    if digest.is_file() and _sha256(path) not in digest.read_text().split():
        raise UserError(f"checkpoint {path} is damaged (its sha256 is not that of {digest.name}): use another one")
    try:
        state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch raises half a dozen kinds for a damaged file
        if shortage_of_memory(error):  # the file is whole, and an older one would take as much
            raise
        raise UserError(f"checkpoint {path} cannot be read ({type(error).__name__}): use another one") from error
    return state


def checkpoint_path(directory: Path, iteration: int) -> Path:
    """File of the checkpoint after `iteration` iterations."""
    return directory / f"checkpoint-{iteration:09d}.pt"


def list_checkpoints(directory: Path) -> list[Path]:
    """Checkpoints of a run, newest first."""
    found = [p for p in directory.glob("checkpoint-*.pt") if PATTERN.fullmatch(p.name)]
    return sorted(found, reverse=True)


def prune_checkpoints(directory: Path, keep: int) -> None:
    """Delete all but the `keep` newest, and what was left of one that was being written; never the best one."""
    for path in directory.glob("*.tmp"):
        path.unlink()
    for path in list_checkpoints(directory)[keep:]:
        path.unlink()
        _digest_path(path).unlink(missing_ok=True)


def _digest_path(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
