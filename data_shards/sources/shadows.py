"""Furballs that cast a shadow: objects whose extent is ambiguous.

The light is hard and comes from the upper left; the shadow falls on a wall close behind, so that it is the creature's
own outline, shifted, and always touches it. What light there is in it comes from the fur, and so does its colour, that
of the fur's dark rim. (A black shadow is not ambiguous, found by trial: it becomes part of the background.) It moves
with the creature as a limb would: whether it belongs to the foreground is for somebody to say, as by
`pipeline/methods/furrygan/scribbles.py`.
"""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_shards.sources.furballs import Furballs, Layers, draw_layers
from data_shards.sources.images import Picture

VERSION = 1
"""Of the look: raised when the same (seed, index) casts another shadow."""

OFFSET = (0.16, 0.09)
"""Of the shadow to its creature, to the right and down, in units of the image's side."""

OPACITY = 0.9
"""Share of the background that the shadow hides."""


def cast(layers: Layers) -> tuple[Layers, NDArray[np.uint8]]:
    """Let a creature cast its shadow.

    Returns:
        The layers with the shadow in the background, and where shadow is to be seen, uint8 ``[R, R]``.
    """
    resolution = len(layers.alpha)
    right, down = (round(shift * resolution) for shift in OFFSET)
    shadow = np.zeros_like(layers.alpha)
    shadow[down:, right:] = layers.alpha[: resolution - down, : resolution - right]
    covered = (round(OPACITY * 256) * shadow.astype(np.int32) >> 8)[..., None]
    background = (layers.background * (255 - covered) + layers.dark_fur * covered + 127) // 255
    seen = (shadow.astype(np.int32) * (255 - layers.alpha.astype(np.int32)) + 127) // 255
    return replace(layers, background=background.astype(np.uint8)), seen.astype(np.uint8)


@dataclass(frozen=True, kw_only=True)
class Shadows(Furballs):
    """Furballs with a cast shadow attached to them; the ground-truth alpha is that of the creature alone."""

    kind = "shadows"

    alpha_of: Literal["creature", "shadow"] = "creature"
    """What the alpha in the shards says: where the creature is, or where its shadow is. Measured against the second,
    recall is the share of the shadow that a mask takes."""

    def other_inputs(self) -> list[str]:
        """See `Source.other_inputs`: the way of drawing."""
        return [*super().other_inputs(), f"shadows version {VERSION}"]

    def layers(self, reference: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.uint8]]:
        """Image ``[R, R, 3]``, where the creature is, and where its shadow is to be seen, ``[R, R]``."""
        layers, shadow = cast(draw_layers(int(reference), seed=self.seed, resolution=self.resolution))
        return layers.image(), layers.alpha, shadow

    def read(self, reference: str) -> Picture:
        """See `Source.read`."""
        image, creature, shadow = self.layers(reference)
        alpha = creature if self.alpha_of == "creature" else shadow
        metadata = {"source": "shadows", "seed": self.seed, "index": int(reference), "alpha_of": self.alpha_of}
        return Picture(Image.fromarray(image), Image.fromarray(alpha), metadata=metadata)
