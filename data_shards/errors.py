"""Errors that are reported to the user in one line."""

import errno
import re


class UserError(ValueError):
    """A mistake in the input: one line that names the thing and the remedy.

    Commands print it without a traceback and end with exit code 2.
    """


class MemoryShortageError(UserError):
    """There is not enough memory for what was asked."""


_SIGNS = (
    *("out of memory", "ALLOC_FAILED"),  # of CUDA, NCCL and torch on a GPU; of cuBLAS and cuDNN
    *("DefaultCPUAllocator: can't allocate", "could not create a primitive"),  # of torch on a CPU; of oneDNN in it
    "bad_alloc",  # of C++
)


def shortage_of_memory(error: BaseException | None) -> str | None:
    """What an error says about memory, such as "20.00 MiB more could not be allocated"; None if it is of another kind.

    Libraries raise a RuntimeError of their own over it, sometimes while they clean up after the first one.
    """
    if error is None or isinstance(error, MemoryShortageError):
        return None
    of_torch = isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)
    of_system = isinstance(error, OSError) and error.errno == errno.ENOMEM
    if not (of_torch or of_system or isinstance(error, MemoryError)):
        return shortage_of_memory(error.__cause__ or error.__context__)
    amount = re.search(r"allocate (\d[\d.]*) ?(bytes|[KMGT]iB)", str(error))
    if amount is None:
        return "no more could be allocated"
    number, unit = amount.groups()
    if unit == "bytes":
        number, unit = f"{int(number) / 2**20:,.2f}", "MiB"
    return f"{number} {unit} more could not be allocated"
