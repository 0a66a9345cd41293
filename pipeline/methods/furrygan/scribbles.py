"""Scribbles: a little human supervision for what is ambiguous, as the paper's conclusion proposes.

A directory of a few images ``NAME.png`` (or .jpg, .webp, ...), square and of the run's resolution, each with
``NAME.scribble.png``: green strokes where the foreground is, red ones where the background is, the rest black or
transparent.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from data_shards.errors import UserError
from data_shards.sources.images import BrokenPictureError, read_cutout, read_picture
from data_shards.sources.source import existing_folder, picture_names
from pipeline.methods.furrygan.phases import Scribbled

SUFFIX = ".scribble.png"

MIN_BRIGHT, MAX_DIM = 160, 96
"""A stroke is at least so green and at most so red and blue; or the other way round. Softer pixels, as at the rim of a
brush, say nothing."""


def load_scribbles(directory: Path, resolution: int, device: torch.device) -> Scribbled:
    """Read all images of a directory with their strokes, by their names.

    Raises:
        UserError: one is missing, cannot be read, is of another size, or has no stroke; the line names it.
    """
    folder = existing_folder(directory, "give --scribbles a folder of NAME.png with NAME.scribble.png beside each")
    names = picture_names(folder)
    drawn = {name.removesuffix(SUFFIX): name for name in names if name.endswith(SUFFIX)}
    photos = {str(Path(name).with_suffix("")): name for name in names if not name.endswith(SUFFIX)}
    if not drawn:
        raise UserError(f"--scribbles {folder} has no NAME{SUFFIX}: draw strokes on an image and save them so")
    for stem, name in drawn.items():
        if stem not in photos:
            raise UserError(f"{folder / name} belongs to no image: put {stem}.png beside it")
    images, strokes = [], []
    for stem in sorted(drawn):
        photo = _read(folder / photos[stem], resolution, lambda path: read_picture(path).image)
        images.append(np.asarray(photo))
        strokes.append(_strokes(folder / drawn[stem], resolution))
    x = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1.0
    return Scribbled(x.to(device), torch.from_numpy(np.stack(strokes)).float().to(device))


def _strokes(path: Path, resolution: int) -> NDArray[np.bool_]:
    """``[2, R, R]``: green, red."""
    red, green, blue, alpha = np.moveaxis(np.asarray(_read(path, resolution, read_cutout)), -1, 0)
    painted = (alpha > 127) & (blue <= MAX_DIM)
    foreground = painted & (green >= MIN_BRIGHT) & (red <= MAX_DIM)
    background = painted & (red >= MIN_BRIGHT) & (green <= MAX_DIM)
    if not (foreground.any() or background.any()):
        raise UserError(f"{path} has no green and no red stroke: draw one, in pure green (foreground) or pure red")
    return np.stack([foreground, background])


def _read(path: Path, resolution: int, decode: Callable[[Path], Image.Image]) -> Image.Image:
    try:
        image = decode(path)
    except BrokenPictureError as error:
        raise UserError(f"{path}: {error}; mend or remove it") from None
    if image.size != (resolution, resolution):
        raise UserError(
            f"{path} is of {image.width}x{image.height} px, the run of {resolution}x{resolution}: resize image and "
            "strokes alike, without smoothing the strokes"
        )
    return image
