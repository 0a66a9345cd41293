"""Signals: a run finishes its step, saves, and exits with the code that schedulers expect."""

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Self

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Interrupted(SystemExit):
    """A signal ended the run: exit code 128 + its number, 143 for SIGTERM and 138 for SIGUSR1.

    Attributes:
        name: of the signal.
    """

    def __init__(self, signal_number: int) -> None:
        super().__init__(128 + signal_number)
        self.name = signal.Signals(signal_number).name


class Interrupt:
    """Takes SIGTERM and SIGUSR1 while it is entered. The first one counts, further ones change nothing.

    Attributes:
        signal_number: of the first signal, else 0.
        deferred: whether a signal is only noted. Else it raises `Interrupted` on the spot: before training begins there
            is nothing to save.
    """

    def __init__(self) -> None:
        self.signal_number = 0
        self.deferred = False

    def __enter__(self) -> Self:
        self._former = {number: signal.signal(number, self._take) for number in SIGNALS}
        return self

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Within, a signal is not deferred, nor is one that came before: all is saved.

        Raises:
            Interrupted: there was a signal.
        """
        self.deferred = False
        try:
            if self.signal_number:
                raise Interrupted(self.signal_number)
            yield
        finally:
            self.deferred = True

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, former in self._former.items():
            # Until the process has ended: a second signal must not change its exit code.
            signal.signal(number, signal.SIG_IGN if self.signal_number else former)

    def _take(self, number: int, _frame: FrameType | None) -> None:
        if self.signal_number:
            return
        self.signal_number = number
        if not self.deferred:
            raise Interrupted(number)
