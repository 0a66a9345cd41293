"""Segmentation of an uploaded photograph by the best network that a run has."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from numpy.typing import NDArray
from torch import Tensor

from data_shards.errors import UserError
from data_shards.sources.images import BrokenPictureError, read_picture
from models.discriminator import MASK_RESOLUTION
from pipeline.generation.cutouts import to_uint8_alpha
from pipeline.generation.trained_run import TrainedRun
from pipeline.photographs.distillation.network import load_network
from pipeline.photographs.photos import cut_out, matte, to_tensor

MAX_PIXELS = 25_000_000
"""Of a photo: some 3 GB of memory while it is cut out."""


@dataclass(frozen=True, eq=False)
class Matting:
    """A way to alpha.

    Attributes:
        network: ``[1, 3, h, w]`` in [-1, 1] -> alpha ``[1, 1, h, w]``.
        resolution: that it was taught at, pixels.
        stride: h and w are multiples of it.
        is_distilled: whether it is the network of distill.py.
        device: that it runs on.
    """

    network: Callable[[Tensor], Tensor]
    resolution: int
    stride: int
    is_distilled: bool
    device: torch.device


def choose_matting(run: TrainedRun, device: torch.device) -> Matting | None:
    """The distilled network; where there is none the discriminator's mask predictor; None where there is neither.

    Raises:
        UserError: the distilled network is damaged.
    """
    path = run.run_dir / "distilled" / "network.pt"
    if path.is_file():
        network = load_network(path, device)
        return Matting(network, network.resolution, network.stride, True, device)
    if run.discriminator.mask_predictor is None:
        return None

    def upsampled(images: Tensor) -> Tensor:
        return F.interpolate(run.discriminator.predict_mask(images), size=images.shape[-2:], mode="bilinear")

    return Matting(upsampled, run.config.resolution, run.config.resolution // MASK_RESOLUTION, False, device)


def read_upload(path: Path) -> NDArray[np.uint8]:
    """``[H, W, 3]``, upright; what is transparent is shown on white.

    Raises:
        UserError: it is no image, is cut off, or has too many pixels.
    """
    try:
        image = read_picture(path).image
    except BrokenPictureError as error:
        raise UserError(f"{path.name} cannot be used: {error}; give another image") from None
    if image.width * image.height > MAX_PIXELS:
        size = f"{image.width:,} x {image.height:,} px"
        raise UserError(f"{path.name} is of {size}: give one of {MAX_PIXELS / 1e6:g} million pixels at most")
    return np.asarray(image)


def segment(matting: Matting, photo: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Alpha ``[H, W]`` and cut-out, straight RGBA ``[H, W, 4]``, of a photo ``[H, W, 3]``."""
    image = to_tensor(photo, matting.device)
    alpha = to_uint8_alpha(matte(matting.network, image, resolution=matting.resolution, stride=matting.stride))[0]
    return alpha, cut_out(photo, alpha)
