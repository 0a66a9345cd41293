"""One-line errors on all ranks when a rank fails, with its name and the reason if it is known."""

import contextlib
from collections.abc import Iterator

from torch import distributed as dist

from data_shards.errors import UserError
from pipeline.ranks.collectives import num_ranks
from pipeline.ranks.failure_detector import ADVICE, FailureDetector

WAIT_S = 10.0
"""For news of the rank that is gone, seconds."""


class LostRankError(UserError):
    """Other ranks failed, or do not answer."""


@contextlib.contextmanager
def ranks_named(heartbeat_timeout_s: int) -> Iterator[None]:
    """Let errors name their rank, and let the other ranks name it too.

    Args:
        heartbeat_timeout_s: seconds without an answer after which another rank's machine is gone. The process then
            ends, whatever it waits for.

    Raises:
        LostRankError: another rank is gone.
        UserError: what was raised inside, beginning with the rank.
    """
    if num_ranks() == 1:
        yield
        return
    detector = FailureDetector(heartbeat_timeout_s)
    try:
        yield
    except Exception as error:
        if _is_of_another_rank(error):
            unknown = f"the ranks lost each other, though none is known to be gone ({_one_line(error)}); {ADVICE}"
            happened = detector.what_happened(WAIT_S) or unknown
            detector.close("ended")
            raise LostRankError(f"rank {detector.rank}: {happened}") from error
        detector.close("failed", _one_line(error) or type(error).__name__)
        if isinstance(error, UserError):
            error.args = (f"rank {detector.rank}: {error}",)
        raise
    except BaseException:  # interrupted
        detector.close("ended")
        raise
    detector.close("ended")


def _is_of_another_rank(error: Exception) -> bool:
    # gloo raises a bare RuntimeError with the place in its sources.
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
