"""Settings with which a command gives the same bits each time."""

import os

import torch

from data_shards.errors import UserError


def make_repeatable(num_threads: int) -> None:
    """Threads as in training; the same bits each time.

    Args:
        num_threads: of this process; 0 shares the cores among the processes of this machine.

    Raises:
        UserError: they are fewer than none.
    """
    if num_threads < 0:
        raise UserError(f"--num-threads {num_threads} is invalid: give 0 or more")
    local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(num_threads or max(1, available // local_processes))
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True
    torch.backends.cudnn.allow_tf32 = False


def this_device() -> torch.device:
    """The GPU where there is one, for commands of one process."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
