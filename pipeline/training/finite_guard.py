"""Guard against losses that become NaN or infinite. No step is taken with one, and no step waits for the check."""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from data_shards.errors import UserError


class NonFiniteLossError(UserError):
    """A loss term became NaN or infinite; no optimizer step was taken with it."""


@dataclass(frozen=True)
class _Check:
    phase: str
    iteration: int
    losses: tuple[str, ...]
    finite: Tensor  # [len(losses) + 1] bool, the gradient's last; on the host once `copied` has happened
    copied: torch.cuda.Event | None


class FiniteGuard:
    """Watches what an optimizer step is about to use.

    The answer is on the device. On a GPU, reading it at once would let the GPU run dry at every step, so the host
    learns it a little later; until then `tripped` alone keeps the optimizers from moving a weight.

    Attributes:
        tripped: float32 scalar on the device, 1 from the first value that is not finite on. Adam takes it as
            ``found_inf`` and skips its step.

    Args:
        device: of what is watched.
    """

    def __init__(self, device: torch.device) -> None:
        self.tripped = torch.zeros((), device=device)
        self._checks: deque[_Check] = deque()

    def check(self, losses: Iterable[Tensor], gradient_norm: Tensor) -> Tensor:
        """Trip if a value is not finite. Asks the device nothing, so that a CUDA graph can record it.

        Args:
            losses: scalars of this rank.
            gradient_norm: of the averaged gradient, the same on all ranks: where one rank's loss broke, all stop.

        Returns:
            Which of them are finite, the norm last, ``[n + 1]`` bool.
        """
        finite = torch.stack([x.detach().float() for x in (*losses, gradient_norm)]).isfinite()
        torch.maximum(self.tripped, 1.0 - finite.all().float(), out=self.tripped)
        return finite

    def watch(self, phase: str, iteration: int, losses: Iterable[str], finite: Tensor) -> None:
        """Raise if a check failed, here or in one of the next calls.

        Args:
            phase: for the message.
            iteration: likewise.
            losses: names of what was checked, without the norm.
            finite: from `check`.

        Raises:
            NonFiniteLossError: this or an earlier check failed.
        """
        copied = None
        if finite.is_cuda:
            finite = torch.empty(finite.shape, dtype=torch.bool, pin_memory=True).copy_(finite, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
        self._checks.append(_Check(phase, iteration, tuple(losses), finite, copied))
        self._raise_for_answers()

    def wait(self) -> None:
        """Let every check be answered, before what was trained is saved or shown.

        Raises:
            NonFiniteLossError: one failed.
        """
        if self._checks and (copied := self._checks[-1].copied) is not None:
            copied.synchronize()
        self._raise_for_answers()

    def _raise_for_answers(self) -> None:
        while self._checks and ((copied := self._checks[0].copied) is None or copied.query()):
            check = self._checks.popleft()
            *finite, gradient_finite = check.finite.tolist()
            broken = [name for name, ok in zip(check.losses, finite, strict=True) if not ok]
            if broken or not gradient_finite:
                what = f"loss {' and '.join(broken)}" if broken else f"averaged gradient of {check.phase}"
                raise NonFiniteLossError(
                    f"{what} is not finite at iteration {check.iteration}; "
                    "its step was not taken, and the last checkpoint is whole: resume from there with a lower "
                    "--optimizer.learning-rate or a higher --loss.r1"
                )
