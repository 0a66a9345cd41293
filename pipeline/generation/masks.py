"""Grids of coarse, fine and final masks (paper, figure S16)."""

from dataclasses import dataclass
from pathlib import Path

from pipeline.generation.grid import write_grid
from pipeline.generation.kind import Kind
from pipeline.generation.sampler import Sampler


@dataclass(frozen=True, kw_only=True)
class Masks(Kind):
    """Coarse mask, fine mask, what the fine one really adds after clipping, and the final mask (figure S16)."""

    name = "masks"
    suffix = ".png"

    count: int = 8
    """How many."""

    def write(self, sampler: Sampler, out: Path) -> None:
        """See `Kind.write`."""
        rows = ("foreground", "coarse mask", "fine mask", "fine mask adds", "final mask", "cut-out")
        write_grid(sampler, self.count, rows, out, self.name)
