"""From any file that Pillow opens to a square 8-bit RGB image of the wanted size.

Upright by its EXIF orientation. Grey, palette, CMYK and the like become RGB; 16 bits become 8 by division; of an
animation the first frame is taken. An image with transparency is shown on white, as viewers show it, and its alpha is
kept. Embedded colour profiles are not applied.
"""

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from data_shards.format.sample import Sample

DOWNSCALE_FILTER = Image.Resampling.LANCZOS
UPSCALE_FILTER = Image.Resampling.BICUBIC
ALPHA_FILTER = Image.Resampling.BILINEAR
"""Of alphas, either way. It has no negative lobes, which would put faint rings beside every edge of a mask."""

BOX_MARGIN = 0.1  # around an object's box, on each side, relative to its longer side

# Pillow also names documents and the output of scientific instruments, and runs Ghostscript on EPS.
_NO_PICTURES = {"BUFR", "EPS", "FITS", "GRIB", "HDF5", "MPEG", "PDF", "WMF"}

_COMMON = ("JPEG", "PNG", "WEBP")

Box = tuple[float, float, float, float]
"""Left, top, right, bottom in pixels; right and bottom are outside."""


class BrokenPictureError(Exception):
    """An image that has to be left out; its text is the reason, one line."""


@dataclass(frozen=True, eq=False)
class Picture:
    """One image of a source, of any size.

    Attributes:
        image: RGB, upright.
        alpha: 8-bit grey, of the image's shape though not always of its size; None where the source has none.
        box: what to crop to; None: the centre.
        is_upsampled: whether a part was enlarged already.
        metadata: JSON-serialisable facts about the image.
    """

    image: Image.Image
    alpha: Image.Image | None = None
    box: Box | None = None
    is_upsampled: bool = False
    metadata: Mapping[str, Any] = field(default_factory=dict)


def picture_extensions() -> frozenset[str]:
    """Of all files that count as images, in lower case with their dot."""
    formats = picture_formats()
    return frozenset(extension for extension, name in Image.registered_extensions().items() if name in formats)


@cache
def picture_formats() -> tuple[str, ...]:
    """Pillow's names of the formats that are read, in the order in which a file is tried as each."""
    Image.init()
    return tuple(sorted(set(Image.OPEN) - _NO_PICTURES, key=lambda name: (name not in _COMMON, name)))


def read_picture(file: Path | IO[bytes]) -> Picture:
    """Decode an image.

    Raises:
        BrokenPictureError: it is no image, is cut off or damaged, has more pixels than Pillow's limit against
            decompression bombs, or pixels whose range is unknown.
    """
    image, alpha = _rgb_and_alpha(_decode(file))
    return Picture(image, alpha)


def read_mask(file: Path) -> Image.Image:
    """Decode a mask as 8-bit grey; a transparency of its own does not matter.

    Raises:
        BrokenPictureError: as for `read_picture`.
    """
    return _decode(file).convert("L")


def read_cutout(file: Path) -> Image.Image:
    """Decode an image with its transparency, RGBA; opaque where it has none.

    Raises:
        BrokenPictureError: as for `read_picture`.
    """
    return _decode(file).convert("RGBA")


def fit(picture: Picture, resolution: int) -> tuple[Sample, bool]:
    """Crop an image to a square and resize it.

    Args:
        image: of any size.
        resolution: side of the result, pixels.

    Returns:
        The sample, and whether it had to be enlarged.

    Raises:
        BrokenPictureError: the alpha is not of the image's shape.
    """
    width, height = picture.image.size
    left, top, side = square(width, height, picture.box)
    kernel = UPSCALE_FILTER if side < resolution else DOWNSCALE_FILTER
    alpha = None
    if picture.alpha is not None:
        scale = picture.alpha.width / width
        if picture.alpha.height != round(height * scale):
            sizes = f"{picture.alpha.width}x{picture.alpha.height} px for an image of {width}x{height} px"
            raise BrokenPictureError(f"its mask is of another shape: {sizes}")
        where = round(left * scale), round(top * scale), round(side * scale)
        alpha = np.asarray(_resized(picture.alpha, *where, resolution, ALPHA_FILTER))
    image = np.asarray(_resized(picture.image, left, top, side, resolution, kernel))
    return Sample(image, alpha, picture.metadata), picture.is_upsampled or side < resolution


def square(width: int, height: int, box: Box | None) -> tuple[int, int, int]:
    """The square to crop: left, top and side, pixels.

    Without a box it is the greatest in the centre. With one it is centred on the box and holds it with a margin, as far
    as the image reaches.
    """
    left, top, right, bottom = box or (0, 0, width, height)
    side = min(width, height)
    if box:
        side = max(1, min(side, math.ceil(max(right - left, bottom - top) * (1 + 2 * BOX_MARGIN))))
    x = min(max(math.floor((left + right - side) / 2), 0), width - side)
    y = min(max(math.floor((top + bottom - side) / 2), 0), height - side)
    return x, y, side


def _resized(
    image: Image.Image, left: int, top: int, side: int, resolution: int, kernel: Image.Resampling
) -> Image.Image:
    # Cropped before, not by `resize(box=...)`, whose filter would reach for pixels outside.
    image = image.crop((left, top, left + side, top + side))
    return image if side == resolution else image.resize((resolution, resolution), kernel)


def _decode(file: Path | IO[bytes]) -> Image.Image:
    """The decoded first frame, upright, with 8 bits a channel."""
    try:
        with warnings.catch_warnings():
            # Pillow only warns up to twice its limit: such an image takes some 500 MB in each worker.
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file, formats=picture_formats()) as image:
                image.load()
                ImageOps.exif_transpose(image, in_place=True)
        return _to_8_bits(image) if image.mode.startswith("I") else image
    except BrokenPictureError:
        raise
    except UnidentifiedImageError:
        raise BrokenPictureError("it is no image that Pillow knows") from None
    except FileNotFoundError:
        raise BrokenPictureError("there is no such file") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        limit = (Image.MAX_IMAGE_PIXELS or 0) / 1e6
        raise BrokenPictureError(f"it has more than {limit:.3g} million pixels, too many to unpack") from None
    except Exception as error:  # decoders raise whatever foreign bytes lead them to
        raise BrokenPictureError(one_line(error)) from None


def _to_8_bits(image: Image.Image) -> Image.Image:
    """From 16 bits; Pillow's own conversion would cut off instead of dividing."""
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 65535:
        raise BrokenPictureError("its integer pixels are not of 8 or 16 bits, so their range is unknown")
    return Image.fromarray(((values.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8))


def _rgb_and_alpha(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    if image.mode == "F":
        raise BrokenPictureError("its pixels are floating-point numbers, whose range is unknown")
    try:
        if not image.has_transparency_data:
            return image if image.mode == "RGB" else image.convert("RGB"), None
        with_alpha = image.convert("RGBA")
    except ValueError as error:  # a mode without a conversion to RGB
        raise BrokenPictureError(one_line(error)) from None
    alpha = with_alpha.getchannel("A")
    if alpha.getextrema() == (255, 255):
        return with_alpha.convert("RGB"), None
    shown = Image.new("RGB", image.size, "white")
    shown.paste(with_alpha.convert("RGB"), mask=alpha)
    return shown, alpha


def one_line(error: BaseException) -> str:
    """An exception's text as a reason."""
    return " ".join(str(error).split()) or type(error).__name__
