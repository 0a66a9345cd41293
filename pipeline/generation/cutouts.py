"""Cut-outs with the generator's alpha, ready to paste."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from data_shards.files import whole_directory
from pipeline.generation.kind import Kind
from pipeline.generation.sample_grid import to_uint8_pictures
from pipeline.generation.sampler import Sampler


@dataclass(frozen=True, kw_only=True)
class Cutouts(Kind):
    """A folder of cut-outs, RGBA PNGs: the generator's own foreground colours, not mixed with any background."""

    name = "cutouts"
    suffix = ""

    def write(self, sampler: Sampler, out: Path) -> None:
        """See `Kind.write`."""
        with whole_directory(out) as partial:
            for samples, output in sampler.batches(self.count, label=self.name):
                for sample, pixels in zip(samples, to_rgba(output.foreground, output.mask), strict=True):
                    Image.fromarray(pixels).save(partial / f"{sample:08d}.png")


def to_rgba(colours: Tensor, alpha: Tensor) -> NDArray[np.uint8]:
    """Straight (not premultiplied) RGBA ``[b, H, W, 4]``.

    Args:
        colours: ``[b, 3, H, W]`` in [-1, 1].
        alpha: ``[b, 1, H, W]`` in [0, 1].
    """
    return np.concatenate([to_uint8_pictures(colours), to_uint8_alpha(alpha)[..., None]], axis=3)


def to_uint8_alpha(alpha: Tensor) -> NDArray[np.uint8]:
    """``[b, 1, H, W]`` in [0, 1] as ``[b, H, W]``."""
    array: NDArray[np.uint8] = (alpha.squeeze(1) * 255).round().to(torch.uint8).cpu().numpy()
    return array
