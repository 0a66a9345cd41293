"""Labelled grids of generated samples from fixed latents."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from models.generator import FurryGenerator, GeneratorOutput

CELL = 96
"""Least side of an image in the grid, in pixels; smaller ones are enlarged by a whole factor."""

PSIS = (1.0, 0.7)
"""Truncations, one panel each."""

MARGIN = 4
GAP = 32
"""Between panels beside each other."""
INK, PAPER = (20, 20, 20), (255, 255, 255)
ROWS = ("foreground", "coarse mask", "fine mask adds", "final mask", "cut-out", "background", "composite")

Pictures = NDArray[np.uint8]


def cutout_on_board(out: GeneratorOutput) -> Tensor:
    """Foregrounds ``[N, 3, R, R]`` blended over the checkerboard by their masks."""
    return out.mask * out.foreground + (1 - out.mask) * checkerboard(out.mask.shape[-1]).to(out.mask)


PICTURES: Mapping[str, Callable[[GeneratorOutput], Tensor]] = {
    "foreground": lambda out: out.foreground,
    "coarse mask": lambda out: out.mask_coarse * 2 - 1,
    "fine mask": lambda out: out.mask_fine * 2 - 1,
    "fine mask adds": lambda out: (out.mask - out.mask_coarse) * 2 - 1,
    "final mask": lambda out: out.mask * 2 - 1,
    "cut-out": cutout_on_board,
    "background": lambda out: out.background,
    "composite": lambda out: out.composite,
}
"""What a row of a grid may show, each ``[N, 1 or 3, R, R]`` in [-1, 1]."""


@torch.no_grad()
def sample_column(
    generator: FurryGenerator, z: Tensor, noise: Tensor, *, fade_in: float, psis: Sequence[float] = PSIS
) -> Pictures:
    """Make the images of one latent, ``[len(psis), len(ROWS), R, R, 3]``.

    Args:
        generator: usually the EMA.
        z: ``[1, z_dim]``.
        noise: ``[1, num_noise]``.
        fade_in: gamma of Eq. 3 at this moment of the training.
        psis: truncations.
    """
    made = [generator(z, noise=noise, fade_in=fade_in, psi=psi) for psi in psis]
    return np.stack([np.concatenate([to_uint8_pictures(PICTURES[name](out)) for name in ROWS]) for out in made])


def draw_grid(columns: Sequence[Pictures], *, psis: Sequence[float] = PSIS) -> Image.Image:
    """Draw one column a latent and, for each truncation psi, one row a kind of image.

    Args:
        columns: of `sample_column`.
        psis: those of the columns, one panel each.
    """
    pictures = np.stack(columns, axis=2)  # [psis, rows, columns, R, R, 3]
    return stack([draw_panel(rows, ROWS, title=f"psi = {psi:g}") for rows, psi in zip(pictures, psis, strict=True)])


def checkerboard(resolution: int, squares: int = 8) -> Tensor:
    """``[1, 1, R, R]`` of two greys in [-1, 1], the customary ground for what is transparent."""
    at = torch.arange(resolution) * squares // resolution
    board = (at[:, None] + at[None, :]) % 2
    return torch.where(board == 0, 0.6, 0.9)[None, None]


def to_uint8_pictures(pictures: Tensor) -> Pictures:
    """``[N, 1 or 3, R, R]`` in [-1, 1] as RGB ``[N, R, R, 3]``."""
    x = ((pictures.float().clamp(-1, 1) + 1) * 127.5).round().byte()
    array: Pictures = x.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).cpu().numpy()
    return array


def draw_panel(rows: Sequence[Pictures] | Pictures, labels: Sequence[str], *, title: str) -> Image.Image:
    """Draw rows of images ``[N, R, R, 3]``, with a label on the left of each, under a title."""
    count, size = rows[0].shape[:2]
    factor = -(-CELL // size)
    cell = size * factor
    font = ImageFont.load_default(size=max(13, cell // 8))
    left = max(int(font.getlength(label)) for label in labels) + 3 * MARGIN
    top = font.size + 3 * MARGIN if isinstance(font, ImageFont.FreeTypeFont) else 24
    pitch = cell + MARGIN
    panel = Image.new("RGB", (left + count * pitch, int(top) + len(rows) * pitch), PAPER)
    pen = ImageDraw.Draw(panel)
    pen.text((left, MARGIN), title, fill=INK, font=font)
    for r, (pictures, label) in enumerate(zip(rows, labels, strict=True)):
        y = int(top) + r * pitch
        pen.text((MARGIN, y + cell // 2), label, fill=INK, font=font, anchor="lm")
        for c, picture in enumerate(pictures):
            panel.paste(Image.fromarray(picture).resize((cell, cell), Image.Resampling.NEAREST), (left + c * pitch, y))
    return panel


def stack(panels: Sequence[Image.Image]) -> Image.Image:
    """Panels one below the other."""
    width = max(panel.width for panel in panels)
    grid = Image.new("RGB", (width, sum(panel.height for panel in panels)), PAPER)
    y = 0
    for panel in panels:
        grid.paste(panel, (0, y))
        y += panel.height
    return grid


def beside(panels: Sequence[Image.Image]) -> Image.Image:
    """Panels one beside the other, apart enough that a label is not taken for that of the panel before."""
    width = sum(panel.width for panel in panels) + GAP * (len(panels) - 1)
    grid = Image.new("RGB", (width, max(panel.height for panel in panels)), PAPER)
    x = 0
    for panel in panels:
        grid.paste(panel, (x, 0))
        x += panel.width + GAP
    return grid
