"""Labelled grids of what the generator makes of fixed latents."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from models.generator import FurryGenerator, GeneratorOutput

CELL = 96
"""Least side of a picture in the grid, in pixels; smaller ones are enlarged by a whole factor."""

MARGIN = 4
INK, PAPER = (20, 20, 20), (255, 255, 255)
ROWS = ("foreground", "coarse mask", "fine mask adds", "final mask", "cut-out", "background", "composite")


@torch.no_grad()
def sample_grid(
    generator: FurryGenerator, z: Tensor, noise: Tensor, *, fade_in: float, psis: Sequence[float] = (1.0, 0.7)
) -> Image.Image:
    """Draw one column a latent and, for each truncation psi, one row a kind of picture.

    Args:
        generator: usually the EMA.
        z: ``[N, z_dim]``.
        noise: ``[N, num_noise]``.
        fade_in: gamma of Eq. 3 at this moment of the training.
        psis: truncations, one panel each.
    """
    panels = []
    for psi in psis:
        out = generator(z, noise=noise, fade_in=fade_in, psi=psi)
        panels.append(draw_panel(_pictures(out), ROWS, title=f"psi = {psi:g}"))
    return stack_panels(panels)


def checkerboard(resolution: int, squares: int = 8) -> Tensor:
    """``[1, 1, R, R]`` of two greys in [-1, 1], the customary ground for what is transparent."""
    at = torch.arange(resolution) * squares // resolution
    board = (at[:, None] + at[None, :]) % 2
    return torch.where(board == 0, 0.6, 0.9)[None, None]


def _pictures(out: GeneratorOutput) -> list[Tensor]:
    """As in `ROWS`, each ``[N, 1 or 3, R, R]`` in [-1, 1]."""
    board = checkerboard(out.mask.shape[-1]).to(out.mask)
    return [
        out.foreground,
        out.mask_coarse * 2 - 1,
        (out.mask - out.mask_coarse) * 2 - 1,
        out.mask * 2 - 1,
        out.mask * out.foreground + (1 - out.mask) * board,
        out.background,
        out.composite,
    ]


def _to_uint8(pictures: Tensor) -> NDArray[np.uint8]:
    x = ((pictures.float().clamp(-1, 1) + 1) * 127.5).round().byte()
    array: NDArray[np.uint8] = x.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).cpu().numpy()
    return array


def draw_panel(rows: Sequence[Tensor], labels: Sequence[str], *, title: str) -> Image.Image:
    """Draw rows of pictures under a title.

    Args:
        rows: each ``[N, 1 or 3, R, R]`` in [-1, 1].
        labels: of the rows, at their left.
        title: above them.
    """
    count, size = len(rows[0]), rows[0].shape[-1]
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
        for c, picture in enumerate(_to_uint8(pictures)):
            panel.paste(Image.fromarray(picture).resize((cell, cell), Image.Resampling.NEAREST), (left + c * pitch, y))
    return panel


def stack_panels(panels: Sequence[Image.Image]) -> Image.Image:
    """Panels one below the other."""
    width = max(panel.width for panel in panels)
    grid = Image.new("RGB", (width, sum(panel.height for panel in panels)), PAPER)
    y = 0
    for panel in panels:
        grid.paste(panel, (0, y))
        y += panel.height
    return grid
