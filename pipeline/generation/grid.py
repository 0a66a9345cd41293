"""Labelled grids of samples."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from data_shards.files import whole_file
from pipeline.generation.kind import Kind
from pipeline.generation.sample_grid import PICTURES, draw_panel, stack, to_uint8_pictures
from pipeline.generation.sampler import Sampler

COLUMNS = 8


@dataclass(frozen=True, kw_only=True)
class Grid(Kind):
    """Samples, uncurated: composite, foreground, mask, cut-out and background of each."""

    name = "grid"
    suffix = ".png"

    def write(self, sampler: Sampler, out: Path) -> None:
        """See `Kind.write`."""
        write_grid(
            sampler, self.count, ("composite", "foreground", "final mask", "cut-out", "background"), out, self.name
        )


def write_grid(sampler: Sampler, count: int, labels: Sequence[str], out: Path, name: str) -> None:
    """One column a sample, one row a kind of image, panels of eight.

    Args:
        sampler: of the samples.
        count: samples in all.
        labels: rows, by their names in `PICTURES`.
        out: PNG file to write.
        name: of the progress bar.
    """
    parts = [
        [to_uint8_pictures(PICTURES[label](output)) for label in labels]
        for _, output in sampler.batches(count, label=name)
    ]
    rows = [np.concatenate(row) for row in zip(*parts, strict=True)]
    panels = []
    for first in range(0, count, COLUMNS):
        last = min(first + COLUMNS, count)
        title = f"samples {first} to {last - 1}, seed {sampler.seed}, psi = {sampler.psi:g}"
        panels.append(draw_panel([row[first:last] for row in rows], labels, title=title))
    save_picture(stack(panels), out)


def save_picture(picture: Image.Image, out: Path) -> None:
    """Write a PNG, whole or not at all."""
    with whole_file(out) as partial:
        picture.save(partial, format="png")
