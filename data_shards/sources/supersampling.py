"""Reduction of a supersampled image to its final resolution."""

from PIL import Image


def downscaled(canvas: Image.Image, resolution: int) -> Image.Image:
    """A square image at its final resolution, through a triangle two pixels wide: a lens, not a grid of boxes."""
    return canvas.resize((resolution, resolution), Image.Resampling.BILINEAR)
