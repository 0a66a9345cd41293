"""Composites with a ground-truth alpha: cut-outs pasted on backgrounds at random places and sizes."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from data_shards.errors import UserError
from data_shards.sources.images import (
    ALPHA_FILTER,
    DOWNSCALE_FILTER,
    UPSCALE_FILTER,
    BrokenPictureError,
    Picture,
    read_cutout,
    read_picture,
)
from data_shards.sources.source import Source, existing_folder, picture_names

MIN_BACKGROUND = 0.3
"""The least part of a background to crop, relative to its shorter side."""


@dataclass(frozen=True, kw_only=True)
class Cutouts(Source):
    """Cut-outs (RGBA) pasted whole on backgrounds, at random places and sizes; the alpha is exact.

    SOURCE/**/*.png with transparency; BACKGROUNDS/**/*.jpg, *.png, ...
    """

    kind = "cutouts"

    source: Path
    """A folder of images with transparency."""
    backgrounds: Path
    """A folder of images to paste them on."""
    num_images: int = 10_000
    """How many composites to make."""
    sizes: tuple[float, float] = (0.4, 0.9)
    """Least and greatest size of what is pasted: its longer side, relative to the image's."""

    def references(self) -> Sequence[str]:
        """See `Source.references`: numbers; which of the cut-outs it is follows from number and seed."""
        least, greatest = self.sizes
        if not 0 < least <= greatest <= 1:
            raise UserError(f"--sizes {least} {greatest} are not within 0 and 1 and rising; give sizes like 0.4 0.9")
        if self.num_images < 1:
            raise UserError(f"--num-images {self.num_images} is not positive; give 1 or more")
        return [f"{number:08d}" for number in range(self.num_images)]

    def other_inputs(self) -> Sequence[str]:
        """See `Source.other_inputs`."""
        return [*self._cutout_names, *self._background_names]

    def read(self, reference: str) -> Picture:
        """See `Source.read`: image = alpha * cut-out + (1 - alpha) * background, to rounding."""
        rng = np.random.Generator(np.random.Philox(np.random.SeedSequence((self.seed, int(reference)))))
        cutout_name = self._cutout_names[int(rng.integers(len(self._cutout_names)))]
        background_name = self._background_names[int(rng.integers(len(self._background_names)))]
        cutout, cutout_grows = self._cutout(cutout_name, rng)
        background, background_grows = self._background(background_name, rng)
        x, y = (int(rng.integers(self.resolution - size + 1)) for size in cutout.size)

        # Premultiplied by alpha, as resized: else the hidden colour of transparent pixels would bleed into the edge.
        layer = Image.new("RGBa", (self.resolution, self.resolution))
        layer.paste(cutout, (x, y))
        values = np.asarray(layer).astype(np.uint32)
        alpha = values[..., 3]
        behind = np.asarray(background).astype(np.uint32) * (255 - alpha[..., None])
        image = np.minimum(values[..., :3] + (behind + 127) // 255, 255)
        return Picture(
            Image.fromarray(image.astype(np.uint8)),
            Image.fromarray(alpha.astype(np.uint8)),
            is_upsampled=cutout_grows or background_grows,
            metadata={"cutout": cutout_name, "background": background_name},
        )

    def _cutout(self, name: str, rng: np.random.Generator) -> tuple[Image.Image, bool]:
        """What is to be pasted, premultiplied, in its final size, and whether it was enlarged."""
        size = rng.uniform(*self.sizes) * self.resolution
        flip = rng.integers(2)
        try:
            cutout = read_cutout(self.source / name)
        except BrokenPictureError as error:
            raise BrokenPictureError(f"cut-out {name}: {error}") from None
        alpha = cutout.getchannel("A")
        if alpha.getextrema() == (255, 255):
            raise BrokenPictureError(f"cut-out {name}: it has no transparency")
        box = alpha.getbbox()
        if box is None:
            raise BrokenPictureError(f"cut-out {name}: it is wholly transparent")
        cutout = cutout.crop(box)
        scale = size / max(cutout.size)
        width, height = (max(1, round(side * scale)) for side in cutout.size)
        cutout = ImageOps.mirror(cutout) if flip else cutout
        return cutout.convert("RGBa").resize((width, height), ALPHA_FILTER), scale > 1

    def _background(self, name: str, rng: np.random.Generator) -> tuple[Image.Image, bool]:
        """A random square of a background, as large as the image, and whether it was enlarged."""
        part, left, top = rng.uniform(MIN_BACKGROUND, 1), rng.random(), rng.random()
        flip = rng.integers(2)
        try:
            background = read_picture(self.backgrounds / name).image
        except BrokenPictureError as error:
            raise BrokenPictureError(f"background {name}: {error}") from None
        side = max(1, round(part * min(background.size)))
        x, y = int(left * (background.width - side + 1)), int(top * (background.height - side + 1))
        background = background.crop((x, y, x + side, y + side))
        background = ImageOps.mirror(background) if flip else background
        kernel = UPSCALE_FILTER if side < self.resolution else DOWNSCALE_FILTER
        return background.resize((self.resolution, self.resolution), kernel), side < self.resolution

    @cached_property
    def _cutout_names(self) -> Sequence[str]:
        return picture_names(existing_folder(self.source, "give a folder of images with transparency"))

    @cached_property
    def _background_names(self) -> Sequence[str]:
        return picture_names(existing_folder(self.backgrounds, "give a folder of images as --backgrounds"))
