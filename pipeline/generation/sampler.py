"""Samples by number: images as a function of (checkpoint, seed, number, psi, noise mode)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from data_shards.progress import progress_bar
from models.generator import GeneratorOutput
from pipeline.generation.trained_run import TrainedRun
from pipeline.methods.randomness import Draw, Stream, draw

NoiseMode = Literal["random", "const", "none"]
"""Noise of each sample's own, that of sample 0 for all, or zeros."""


@dataclass(frozen=True, eq=False)
class Sampler:
    """Draws from the average generator of a run.

    Attributes:
        run: whose generator it is.
        seed: of latents and noise.
        psi: truncation.
        noise_mode: see `NoiseMode`.
        batch: samples at a time.
    """

    run: TrainedRun
    seed: int
    psi: float
    noise_mode: NoiseMode
    batch: int

    def generate(self, samples: Sequence[int]) -> GeneratorOutput:
        """Samples with their own backgrounds."""
        z = self._draw(samples).z
        return self.synthesize(self.foreground_styles(z), self.background_styles(z), self.noise(samples))

    def batches(self, count: int, *, label: str) -> Iterator[tuple[Sequence[int], GeneratorOutput]]:
        """Samples ``0 ... count - 1`` a batch at a time, with a progress bar."""
        with progress_bar(total=count, desc=label, unit="img") as bar:
            for first in range(0, count, self.batch):
                samples = range(first, min(first + self.batch, count))
                yield samples, self.generate(samples)
                bar.update(len(samples))

    def latents(self, samples: Sequence[int], stream: Stream = Stream.GENERATION) -> Tensor:
        """``z [b, z_dim]``."""
        return self._draw(samples, stream).z

    def noise(self, samples: Sequence[int]) -> Tensor:
        """``[b, num_noise]`` in this sampler's mode."""
        if self.noise_mode == "random":
            return self._draw(samples).noise
        if self.noise_mode == "const":
            return self._draw([0]).noise.expand(len(samples), -1)
        return torch.zeros(len(samples), self.run.generator.num_noise, device=self._device)

    @torch.no_grad()
    def foreground_styles(self, z: Tensor) -> Tensor:
        """Truncated styles ``[b, Z]`` of latents ``[b, z_dim]``."""
        w: Tensor = self.run.generator.mapping_foreground(z, self.psi)
        return w

    @torch.no_grad()
    def background_styles(self, z: Tensor) -> Tensor:
        """Truncated styles ``[b, Z_bg]`` of latents ``[b, z_dim]``."""
        generator = self.run.generator
        w: Tensor = generator.mapping_background(z[:, : generator.z_dim_background], self.psi)
        return w

    @torch.no_grad()
    def synthesize(self, w_foreground: Tensor, w_background: Tensor, noise: Tensor) -> GeneratorOutput:
        """As `FurryGenerator.synthesize`, with the fade-in of the checkpoint."""
        return self.run.generator.synthesize(w_foreground, w_background, noise, fade_in=self.run.fade_in)

    @property
    def _device(self) -> torch.device:
        return next(self.run.generator.parameters()).device

    def _draw(self, samples: Sequence[int], stream: Stream = Stream.GENERATION) -> Draw:
        generator = self.run.generator
        return draw(
            self.seed, stream, 0, samples, z_dim=generator.z_dim, num_noise=generator.num_noise, device=self._device
        )
