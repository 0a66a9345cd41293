"""Perceptual distances for the projector.

LPIPS (Zhang et al. 2018) where the weights of its VGG-16 are available. Elsewhere the features of the run's own
discriminator, which knows these images, compared as LPIPS compares: unit length at each pixel, squared difference.
"""

import importlib
import importlib.util
import warnings
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from data_shards.errors import UserError
from models.discriminator import Discriminator

VGG_FILE = "vgg16-397923af.pth"
"""torchvision's name for its ImageNet weights."""
LPIPS_RESOLUTION = 256
"""Larger images are reduced to it, as in StyleGAN2's projector."""
PIXEL_WEIGHT = 1.0
"""Of the mean squared error of the pixels, beside the discriminator's features."""


class PerceptualDistance(Protocol):
    """``images [b, 3, R, R]`` in [-1, 1] and features of as many targets -> distances ``[b]``."""

    name: str

    def features(self, images: Tensor) -> list[Tensor]:
        """Of ``[b, 3, R, R]``."""
        ...

    def between(self, ours: list[Tensor], theirs: list[Tensor]) -> Tensor:
        """Distance ``[b]`` of two images by their features."""
        ...


class DiscriminatorDistance:
    """By the discriminator's features at every resolution, and by the pixels.

    Args:
        discriminator: of the run.
    """

    name = "features of the run's discriminator, and pixels"

    def __init__(self, discriminator: Discriminator) -> None:
        self._discriminator = discriminator

    def features(self, images: Tensor) -> list[Tensor]:
        """See `PerceptualDistance.features`: the pixels first."""
        network = self._discriminator
        x = network.from_rgb(images.contiguous(memory_format=torch.channels_last))
        found = [images, F.normalize(x, dim=1)]
        for block in (*network.blocks_to_mask, *network.blocks_to_logits):
            x = block(x)
            found.append(F.normalize(x, dim=1))
        return found

    def between(self, ours: list[Tensor], theirs: list[Tensor]) -> Tensor:
        """See `PerceptualDistance.between`."""
        pixels = (ours[0] - theirs[0]).square().mean(dim=(1, 2, 3))
        others = [(a - b).square().sum(dim=1).mean(dim=(1, 2)) for a, b in zip(ours[1:], theirs[1:], strict=True)]
        return PIXEL_WEIGHT * pixels + torch.stack(others).mean(dim=0)


class LpipsDistance:
    """LPIPS by VGG-16.

    Args:
        backbone: file of torchvision's VGG-16 weights.
        device: to compute on.

    Raises:
        UserError: the package lpips is not installed, or the file is something else.
    """

    name = "LPIPS (VGG-16)"

    def __init__(self, backbone: Path, device: torch.device) -> None:
        try:
            lpips: Any = importlib.import_module("lpips")
        except ImportError:
            raise UserError("LPIPS needs the package lpips: pip install lpips, or leave out --lpips-backbone") from None
        self._lpips = lpips
        with warnings.catch_warnings():  # it calls torchvision by an old name of an option
            warnings.simplefilter("ignore")
            network = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
        try:
            saved = torch.load(backbone, map_location="cpu", weights_only=True)
            # Its slices name their layers as torchvision does: slice1.0.weight is features.0.weight.
            state = {name: saved[f"features.{name.partition('.')[2]}"] for name in network.net.state_dict()}
            network.net.load_state_dict(state)
        except Exception as error:  # torch raises half a dozen kinds for a file that is something else
            raise UserError(
                f"--lpips-backbone {backbone} is no state of torchvision's vgg16 ({type(error).__name__}): "
                f"give {VGG_FILE}"
            ) from None
        self._network = network.to(device).eval().requires_grad_(False)

    def features(self, images: Tensor) -> list[Tensor]:
        """See `PerceptualDistance.features`."""
        if images.shape[-1] > LPIPS_RESOLUTION:
            images = F.interpolate(images, size=LPIPS_RESOLUTION, mode="area")
        return [self._lpips.normalize_tensor(x) for x in self._network.net(self._network.scaling_layer(images))]

    def between(self, ours: list[Tensor], theirs: list[Tensor]) -> Tensor:
        """See `PerceptualDistance.between`."""
        levels = zip(self._network.lins, ours, theirs, strict=True)
        return torch.stack([linear((a - b).square()).mean(dim=(1, 2, 3)) for linear, a, b in levels]).sum(dim=0)


def choose_distance(
    discriminator: Discriminator, backbone: Path | None, device: torch.device
) -> DiscriminatorDistance | LpipsDistance:
    """LPIPS by the file given or by what torchvision has downloaded before; else by the discriminator.

    Raises:
        UserError: a file is given that cannot be used.
    """
    if backbone is not None:
        if not backbone.is_file():
            raise UserError(f"--lpips-backbone {backbone} does not exist: give {VGG_FILE}")
        return LpipsDistance(backbone, device)
    downloaded = Path(torch.hub.get_dir()) / "checkpoints" / VGG_FILE
    if downloaded.is_file() and importlib.util.find_spec("lpips"):
        return LpipsDistance(downloaded, device)
    return DiscriminatorDistance(discriminator)
