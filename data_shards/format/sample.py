"""A sample: what a source yields and a shard stores."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Sample:
    """One image, square, with its ground-truth alpha where the source has one.

    Attributes:
        image: ``[H, W, 3]`` uint8 RGB.
        alpha: ``[H, W]`` uint8, 255 where the foreground is opaque; None where the source has none.
        metadata: JSON-serialisable facts about the image.
    """

    image: NDArray[np.uint8]
    alpha: NDArray[np.uint8] | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
