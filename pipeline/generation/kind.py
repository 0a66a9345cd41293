"""Interface of an output kind: a dataclass of options that writes one file or directory.

A new kind is a subclass in a file of its own, and its name in `pipeline.generation.kinds`.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from data_shards.errors import UserError
from data_shards.files import check_new
from pipeline.generation.sampler import NoiseMode, Sampler
from pipeline.generation.trained_run import open_run
from pipeline.runs.reproducible import make_repeatable, this_device


@dataclass(frozen=True, kw_only=True)
class Kind(ABC):
    """Options that all kinds share."""

    name: ClassVar[str]
    """On the command line."""
    suffix: ClassVar[str]
    """Of the file that it writes; empty: it writes a directory."""

    run: Path
    """Run directory; it stays as it is, but for what is written below generated/ in it by default."""
    out: Path | None = None
    """File or directory to make, which must not exist yet; RUN/generated/KIND by default."""
    count: int = 16
    """How many."""
    seed: int = 0
    """Of latents and noise: the same seed, the same images."""
    psi: float = 1.0
    """Truncation: less than 1 gives up variety for typical images."""
    noise: NoiseMode = "random"
    """Per-pixel noise: of each sample's own, const for all the same, or none."""
    checkpoint: str = "best"
    """best, latest, or a checkpoint file."""
    batch: int = 32
    """Samples at a time."""
    num_threads: int = 0
    """CPU threads; 0 is all cores."""

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            UserError: one is invalid.
        """
        for option, value in (("count", self.count), ("batch", self.batch)):
            if value < 1:
                raise UserError(f"--{option} {value} is invalid: give 1 or more")
        if not math.isfinite(self.psi):
            raise UserError(f"--psi {self.psi} is invalid: give a number, such as 0.7")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"--seed {self.seed} is invalid: give 0 to {2**32 - 1}")

    def make(self) -> Path:
        """Write it, whole or not at all, and say where it is.

        Raises:
            UserError: the run cannot be opened, or the output is there already or cannot be written.
        """
        out = self.run / "generated" / f"{self.name}{self.suffix}" if self.out is None else self.out
        if self.suffix and out.suffix.lower() != self.suffix:
            raise UserError(f"--out {out}: {self.name} writes one file, give it a name that ends in {self.suffix}")
        check_new(out)
        make_repeatable(self.num_threads)
        run = open_run(self.run, self.checkpoint, this_device())
        sampler = Sampler(run, seed=self.seed, psi=self.psi, noise_mode=self.noise, batch=self.batch)
        self.write(sampler, out)
        return out

    @abstractmethod
    def write(self, sampler: Sampler, out: Path) -> None:
        """Write the samples to `out`, which does not exist yet."""
