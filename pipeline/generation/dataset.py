"""A labelled dataset: generated samples with their alpha, as shards."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data_shards.building.writer import write_shards
from data_shards.errors import UserError
from data_shards.format.sample import Sample
from pipeline.generation.cutouts import to_uint8_alpha
from pipeline.generation.kind import Kind
from pipeline.generation.sample_grid import to_uint8_pictures
from pipeline.generation.sampler import Sampler


@dataclass(frozen=True, kw_only=True)
class Dataset(Kind):
    """Shards of composites with their alpha: a labelled data set, to train on or to measure with."""

    name = "dataset"
    suffix = ""

    count: int = 10_000
    """How many."""
    samples_per_shard: int = 1024
    """Images per tar."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.samples_per_shard < 1:
            raise UserError(f"--samples-per-shard {self.samples_per_shard} is invalid: give 1 or more")

    def write(self, sampler: Sampler, out: Path) -> None:
        """See `Kind.write`."""
        run = sampler.run
        with run.checkpoint.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        source = {
            "kind": "generated",
            "run": run.run_dir.resolve().name,
            "iteration": run.iteration,
            "checkpoint_sha256": sha256,
            "seed": self.seed,
            "psi": self.psi,
            "noise": self.noise,
        }
        write_shards(
            self._samples(sampler),
            out,
            resolution=run.config.resolution,
            source=source,
            samples_per_shard=self.samples_per_shard,
        )

    def _samples(self, sampler: Sampler) -> Iterator[Sample]:
        for samples, output in sampler.batches(self.count, label=self.name):
            images, alphas = to_uint8_pictures(output.composite), to_uint8_alpha(output.mask)
            for sample, image, alpha in zip(samples, images, alphas, strict=True):
                yield Sample(image, alpha, {"sample": sample})
