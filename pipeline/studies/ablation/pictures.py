"""Grids of all variants from the same latents, as in the paper's figures 7 and 8."""

from collections.abc import Mapping

import torch
from PIL import Image

from pipeline.generation.sample_grid import PICTURES, draw_panel, stack, to_uint8_pictures
from pipeline.generation.trained_run import TrainedRun
from pipeline.methods.randomness import Stream, draw

ROWS = ("foreground", "coarse mask", "final mask", "composite")


@torch.no_grad()
def comparison(runs: Mapping[str, TrainedRun], *, seed: int, num_columns: int) -> Image.Image:
    """A panel a run, with a column a latent.

    Args:
        runs: by title; of one architecture but for the ablated part.
        seed: of latents and noise.
        num_columns: latents.
    """
    panels = []
    for title, run in runs.items():
        generator = run.generator
        device = next(generator.parameters()).device
        sizes = {"z_dim": generator.z_dim, "num_noise": generator.num_noise}
        given = draw(seed, Stream.GRID, 0, range(num_columns), **sizes, device=device)
        out = generator(given.z, noise=given.noise, fade_in=run.fade_in)
        rows = [to_uint8_pictures(PICTURES[name](out)) for name in ROWS]
        panels.append(draw_panel(rows, ROWS, title=title))
    return stack(panels)
