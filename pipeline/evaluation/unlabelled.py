"""A score of a generator's masks that needs no labels: how likely is it that they are of the objects?

Each part is a number in [0, 1] that the masks of a degenerate training lower: masks that are full or empty, grey, on
the surroundings instead of the object, or that cut through it. Their product is the score; `docs/objective.md` says
how well it goes with true mIoU, and where it fails.
"""

from dataclasses import dataclass

NUM_SAMPLES = 512
CHUNK = 16
"""Samples at a time; small, so that many ranks get a share."""
THRESHOLD = 0.5


@dataclass(frozen=True)
class UnlabelledScore:
    """Means over generated samples, each in [0, 1].

    Attributes:
        separation: share of the foreground's colour variance that lies between inside and outside of the mask.
        edge: how much of the foreground's gradient along the mask's outline exceeds that elsewhere.
        inner: share of the picture's border that the mask leaves free.
        agreement: IoU of the mask with the discriminator's prediction from the foreground, at 16x16.
    """

    separation: float
    edge: float
    inner: float
    agreement: float
