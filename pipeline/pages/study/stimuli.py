"""The stimuli of a study: photographs, and their cut-outs by two methods."""

import hashlib
import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from data_shards.errors import UserError
from data_shards.sources.images import BrokenPictureError, read_cutout, read_mask, read_picture
from data_shards.sources.source import existing_folder, picture_names

View = Literal["photo", "mask", "cutout"]
VIEWS: tuple[View, ...] = ("photo", "mask", "cutout")


@dataclass(frozen=True)
class Method:
    """One of the two that are compared.

    Attributes:
        name: in the answers and the result; participants never see it.
        masks: folder of grey masks, or of cut-outs, whose transparency is the mask; or one that segment.py filled.
        images: folder of the images that they belong to, by the same names.
    """

    name: str
    masks: Path
    images: Path


@dataclass(frozen=True)
class Stimulus:
    """An image and a method's mask of it."""

    image: Path
    mask: Path

    def check(self) -> None:
        """Read it once, so that no participant meets a broken one.

        Raises:
            UserError: a file cannot be read, or the two do not fit.
        """
        photo, mask = self._photo(), self._mask()
        if photo.size != mask.size:
            sizes = " px and ".join(f"{image.width}x{image.height}" for image in (photo, mask))
            raise UserError(f"{self.image} and its mask {self.mask} differ in size ({sizes} px); make them the same")
        if _coverage(mask).getextrema()[1] == 1:
            raise UserError(f"{self.mask} holds no value but 0 and 1, which is black; save masks with values up to 255")

    def digest(self) -> str:
        """Of what both files hold."""
        digests = (hashlib.sha256(path.read_bytes()).digest() for path in (self.image, self.mask))
        return hashlib.sha256(b"".join(digests)).hexdigest()

    def png(self, view: View) -> bytes:
        """A view, encoded again: nothing of the files' names, dates, formats or metadata is in it."""
        if view == "photo":
            image = self._photo()
        elif view == "mask":
            image = _coverage(self._mask())
        else:
            image = self._mask()
            if image.mode != "RGBA":
                photo = self._photo()
                photo.putalpha(image)
                image = photo
        # From bare pixels: Pillow would save an ICC profile or text that it has read.
        encoded = io.BytesIO()
        Image.fromarray(np.asarray(image)).save(encoded, "png", compress_level=1)
        return encoded.getvalue()

    def _photo(self) -> Image.Image:
        with _broken_is_an_error(self.image):
            return read_picture(self.image).image

    def _mask(self) -> Image.Image:
        """Grey, or RGBA where the method gives cut-outs, in colours of its own."""
        with _broken_is_an_error(self.mask):
            return read_cutout(self.mask) if _has_transparency(self.mask) else read_mask(self.mask)


@dataclass(frozen=True)
class Pair:
    """What the two methods made of one name."""

    name: str
    stimuli: tuple[Stimulus, Stimulus]


def find_pairs(methods: tuple[Method, Method], num_pairs: int | None, seed: int) -> list[Pair]:
    """The names that all folders have, in their order; extensions do not matter.

    Args:
        methods: the two.
        num_pairs: only so many, drawn by `seed`; None: all.
        seed: of that draw.

    Raises:
        UserError: a folder is missing or empty, has two files of a name, or they have no name in common, or fewer than
            `num_pairs`; or a file is unusable.
    """
    folders = [(_by_stem(method.images), _masks_by_stem(method.masks)) for method in methods]
    common = sorted(set.intersection(*(set(names) for pair in folders for names in pair)))
    if not common:
        listed = ", ".join(dict.fromkeys(str(folder) for method in methods for folder in (method.images, method.masks)))
        raise UserError(
            f"{listed} have no file name in common (such as cat.jpg and cat.png); name masks as their images"
        )
    if num_pairs is not None:
        if num_pairs > len(common):
            raise UserError(f"--num-pairs {num_pairs} is more than the {len(common)} names that all folders have")
        common = sorted(common, key=lambda name: hashlib.sha256(f"{seed}/{name}".encode()).digest())[:num_pairs]
        common.sort()
    (images_a, masks_a), (images_b, masks_b) = folders
    pairs = [
        Pair(name, (Stimulus(images_a[name], masks_a[name]), Stimulus(images_b[name], masks_b[name])))
        for name in common
    ]
    for pair in pairs:
        for stimulus in pair.stimuli:
            stimulus.check()
    return pairs


def _coverage(mask: Image.Image) -> Image.Image:
    return mask.getchannel("A") if mask.mode == "RGBA" else mask


def _by_stem(folder: Path) -> dict[str, Path]:
    """The images of a folder by their relative path without the extension."""
    names: dict[str, Path] = {}
    for name in picture_names(existing_folder(folder, "give a folder of images")):
        stem = Path(name).with_suffix("").as_posix()
        if stem in names:
            raise UserError(f"{folder} has both {names[stem].name} and {Path(name).name}; keep one of them")
        names[stem] = folder / name
    return names


def _masks_by_stem(folder: Path) -> dict[str, Path]:
    """As `_by_stem`, and NAME-alpha.png, as segment.py writes it, is the mask of NAME where nothing else is."""
    names = _by_stem(folder)
    alphas = {stem.removesuffix("-alpha"): path for stem, path in names.items() if stem.endswith("-alpha")}
    return alphas | names


def _has_transparency(path: Path) -> bool:
    try:
        with Image.open(path) as image:
            return image.has_transparency_data
    except OSError:
        return False  # whoever reads it says what is wrong


@contextmanager
def _broken_is_an_error(path: Path) -> Iterator[None]:
    try:
        yield
    except BrokenPictureError as error:
        raise UserError(f"{path}: {error}; mend or remove it") from None
