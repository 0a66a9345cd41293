"""The plan of a study: pairs, order and sides as a function of the seed and the participant."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Side = Literal["left", "right"]
SIDES: tuple[Side, Side] = ("left", "right")


@dataclass(frozen=True)
class Trial:
    """One question.

    Attributes:
        pair: name of the pair.
        left: method on the left, 0 or 1.
        is_repeat: whether the participant has seen the pair before, on the other sides.
    """

    pair: str
    left: int
    is_repeat: bool = False

    def method_on(self, side: Side) -> int:
        """Which method is on a side."""
        return self.left if side == "left" else 1 - self.left


def trials(pairs: Sequence[str], participant: str, *, seed: int, num_repeats: int) -> list[Trial]:
    """All questions for a participant, in their order.

    The repeats come last, as long after the first showing as can be: the first pairs again, sides swapped.
    """

    def drawn(what: str, pair: str) -> bytes:
        return hashlib.sha256(f"{seed}/{participant}/{what}/{pair}".encode()).digest()

    first = [Trial(pair, drawn("side", pair)[0] & 1) for pair in sorted(pairs, key=lambda pair: drawn("order", pair))]
    return first + [Trial(trial.pair, 1 - trial.left, is_repeat=True) for trial in first[:num_repeats]]
