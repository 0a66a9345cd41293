"""Reading of photographs, and writing of mattes and cut-outs at the photographs' own size."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage
from torch import Tensor

from data_shards.errors import UserError
from data_shards.files import whole_file
from data_shards.sources.images import BrokenPictureError, read_picture
from data_shards.sources.source import picture_names

GUIDE_RADIUS = 1
GUIDE_EPSILON = 1e-3
COARSE_SHARE, FINE_SHARE = 1 / 8, 1 / 64
"""Radius of the two passes of `foreground_colours`, of the image's longer side."""


def find_photos(given: Sequence[Path]) -> list[Path]:
    """The photos that were named, and all in the folders that were.

    Raises:
        UserError: one does not exist, two have the same name, or there are none.
    """
    photos: list[Path] = []
    for path in given:
        if path.is_dir():
            photos += [path / name for name in picture_names(path)]
        elif path.is_file():
            photos.append(path)
        else:
            raise UserError(f"{path} does not exist; give photos, or folders of them")
    if not photos:
        raise UserError("no photo is given; give photos, or folders of them")
    first: dict[str, Path] = {}
    for photo in photos:
        if (other := first.setdefault(photo.stem, photo)) is not photo:
            raise UserError(f"{other} and {photo} would be written under the same name; rename one")
    return photos


def read_photo(path: Path) -> NDArray[np.uint8]:
    """``[H, W, 3]``, upright; what is transparent is shown on white.

    Raises:
        UserError: it is no image, is cut off, or has more pixels than Pillow's limit.
    """
    try:
        return np.asarray(read_picture(path).image)
    except BrokenPictureError as error:
        raise UserError(f"{path} cannot be used: {error}; give another image") from None


def check_outputs_new(photos: Sequence[Path], out: Path, kinds: Sequence[str]) -> None:
    """Whether nothing of what is to be written is there.

    Raises:
        UserError: something is.
    """
    for photo in photos:
        for kind in kinds:
            if (path := output_path(out, photo, kind)).exists():
                raise UserError(f"{path} exists already; delete it or choose another --out")


def output_path(out: Path, photo: Path, kind: str) -> Path:
    """File of one kind of output for a photo."""
    return out / f"{photo.stem}-{kind}.png"


def save_png(pixels: NDArray[np.uint8], path: Path) -> None:
    """Write ``[H, W]`` or ``[H, W, C]``, whole or not at all."""
    with whole_file(path) as partial:
        Image.fromarray(pixels).save(partial, format="png")


def to_tensor(image: NDArray[np.uint8], device: torch.device) -> Tensor:
    """``[H, W, 3]`` as ``[1, 3, H, W]`` in [-1, 1]."""
    return torch.tensor(image, device=device).permute(2, 0, 1)[None].float() / 127.5 - 1


@torch.no_grad()
def matte(network: Callable[[Tensor], Tensor], image: Tensor, *, resolution: int, stride: int) -> Tensor:
    """Alpha of a photo at its own size.

    The network sees it with its shorter side at the resolution that it was taught at. Its alpha is then brought to the
    photo's size along the photo's own edges (fast guided filter, He & Sun 2015).

    Args:
        network: ``[1, 3, h, w]`` in [-1, 1] -> alpha ``[1, 1, h, w]``, h and w multiples of `stride`.
        image: ``[1, 3, H, W]`` in [-1, 1].
        resolution: that it was taught at, pixels.
        stride: of the network.

    Returns:
        ``[1, 1, H, W]`` in [0, 1].
    """
    height, width = image.shape[-2:]
    scale = resolution / min(height, width)
    small = tuple(max(stride, round(side * scale / stride) * stride) for side in (height, width))
    if small == (height, width):
        same: Tensor = network(image)
        return same
    seen = F.interpolate(image, size=small, mode="bilinear", antialias=True)
    alpha = network(seen)
    if scale >= 1:
        return F.interpolate(alpha, size=(height, width), mode="bilinear", antialias=True)
    return guided_upsample(alpha, seen, image)


def guided_upsample(alpha: Tensor, seen: Tensor, image: Tensor) -> Tensor:
    """An alpha brought to a larger size: locally, alpha is a linear function of the image's three colours.

    Of all three, as on a textured ground luminance alone would carry the texture into alpha.

    Args:
        alpha: ``[1, 1, h, w]``.
        seen: the image at that size ``[1, 3, h, w]``.
        image: the image ``[1, 3, H, W]``.

    Returns:
        ``[1, 1, H, W]`` in [0, 1].
    """

    def mean(x: Tensor) -> Tensor:
        side = 2 * GUIDE_RADIUS + 1
        return F.avg_pool2d(F.pad(x, [GUIDE_RADIUS] * 4, mode="replicate"), side, stride=1)

    def outer(x: Tensor, y: Tensor) -> Tensor:
        return (x[:, :, None] * y[:, None]).flatten(1, 2)

    mean_seen, mean_alpha = mean(seen), mean(alpha)
    covariance = mean(outer(seen, alpha)) - outer(mean_seen, mean_alpha)
    variance = (mean(outer(seen, seen)) - outer(mean_seen, mean_seen)).movedim(1, -1).unflatten(-1, (3, 3))
    regular = variance + GUIDE_EPSILON * torch.eye(3, device=seen.device)
    slopes = torch.linalg.solve(regular, covariance.movedim(1, -1)).movedim(-1, 1)
    offset = mean_alpha - (slopes * mean_seen).sum(dim=1, keepdim=True)
    coefficients = F.interpolate(mean(torch.cat([slopes, offset], dim=1)), size=image.shape[-2:], mode="bilinear")
    slopes, offset = coefficients.split([3, 1], dim=1)
    enlarged: Tensor = ((slopes * image).sum(dim=1, keepdim=True) + offset).clamp(0, 1)
    return enlarged


def foreground_colours(image: NDArray[np.uint8], alpha: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Colours of the foreground alone, also where the photo shows it mixed with its background (Forte 2021).

    Args:
        image: ``[H, W, 3]``.
        alpha: ``[H, W]``.

    Returns:
        ``[H, W, 3]``, for a straight RGBA that pastes without a fringe of the old background.
    """
    seen = image.astype(np.float32) / 255
    a = alpha.astype(np.float32)[..., None] / 255
    foreground: NDArray[np.floating] = seen
    background: NDArray[np.floating] = seen
    for share in (COARSE_SHARE, FINE_SHARE):
        size = 2 * max(1, round(share * max(alpha.shape))) + 1
        near = _mean(foreground, a, size)
        far = _mean(background, 1 - a, size)
        foreground = np.clip(near + a * (seen - a * near - (1 - a) * far), 0, 1)
        background = far
    return np.asarray((foreground * 255).round(), np.uint8)


def _mean(colours: NDArray[np.floating], share: NDArray[np.floating], size: int) -> NDArray[np.floating]:
    """Local mean, in which those pixels count most that are wholly of this layer; themselves where none is near."""
    weight = share**2 + 1e-6
    window = (size, size, 0)
    total = ndimage.uniform_filter(colours * weight, window, mode="nearest")
    mean: NDArray[np.floating] = total / ndimage.uniform_filter(weight, window, mode="nearest")
    return mean


def cut_out(image: NDArray[np.uint8], alpha: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Straight RGBA ``[H, W, 4]`` of a photo."""
    return np.dstack([foreground_colours(image, alpha), alpha])
