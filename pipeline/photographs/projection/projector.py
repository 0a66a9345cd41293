"""StyleGAN2's projector (Karras et al. 2020, appendix D) for a generator with a foreground and a background.

Both styles and all noise maps are optimised so that the composite becomes the image; its alpha then comes from the
generator's mask networks (FurryGAN, section 4.6). Images of a batch do not touch each other.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from data_shards.errors import UserError
from data_shards.progress import progress_bar
from models.generator import FurryGenerator, GeneratorOutput
from models.mapping import MappingNetwork
from pipeline.generation.trained_run import TrainedRun
from pipeline.methods.randomness import Stream, draw
from pipeline.photographs.projection.perceptual import PerceptualDistance

NUM_W_SAMPLES = 10_000
W_CHUNK = 1_000
NOISE_TURN = NUM_W_SAMPLES // W_CHUNK
"""Number of the draw that gives the noise maps, after those of the styles."""
RAMP_DOWN, RAMP_UP = 0.25, 0.05
"""Shares of the steps over which the learning rate falls to zero and rises from it."""
W_NOISE, W_NOISE_SHARE = 0.05, 0.75
"""Noise on w at the start, in units of its spread, and the share of the steps over which it fades."""

Space = Literal["w", "w+"]


@dataclass(frozen=True)
class ProjectionOptions:
    """How images are projected."""

    space: Space = "w"
    """w: one style for all layers; w+: one for each."""
    steps: int = 1000
    """Of Adam."""
    learning_rate: float = 0.1
    """Greatest."""
    noise_regularization: float = 1e5
    """Weight of keeping the noise maps noise: free of the image."""
    seed: int = 0
    """Of the noise at the start and on w."""

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            UserError: one is invalid.
        """
        if self.steps < 1:
            raise UserError(f"--steps {self.steps} is invalid: give 1 or more")
        if not 0 < self.learning_rate < math.inf:
            raise UserError(f"--learning-rate {self.learning_rate} is invalid: give something like 0.1")
        if not 0 <= self.noise_regularization < math.inf:
            raise UserError(f"--noise-regularization {self.noise_regularization} is invalid: give 0 or more")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"--seed {self.seed} is invalid: give 0 to {2**32 - 1}")


@dataclass(frozen=True, eq=False)
class Projection:
    """What was found for b images.

    Attributes:
        output: what the generator makes of the styles found; its composite is the reconstruction.
        distance: of the reconstructions ``[b]``, perceptual.
    """

    output: GeneratorOutput
    distance: Tensor


@dataclass(frozen=True, eq=False)
class StyleStatistics:
    """Mean ``[D]`` and spread of a mapping network's styles."""

    mean: Tensor
    spread: float


def style_statistics(mapping: MappingNetwork, dim: int, seed: int) -> StyleStatistics:
    """Over many samples; the spread is the root of the mean squared distance from the mean."""
    device = next(mapping.parameters()).device
    z = torch.cat(
        [
            draw(seed, Stream.PROJECTION, first, range(W_CHUNK), z_dim=dim, num_noise=0, device=device).z
            for first in range(NUM_W_SAMPLES // W_CHUNK)
        ]
    )
    with torch.no_grad():
        w = mapping(z)
    mean = w.mean(dim=0)
    return StyleStatistics(mean, float((w - mean).square().sum(dim=1).mean().sqrt()))


def project(
    run: TrainedRun,
    images: Tensor,
    distance: PerceptualDistance,
    options: ProjectionOptions,
    *,
    first: int = 0,
    progress: bool = False,
) -> Projection:
    """Project a batch.

    Args:
        run: whose average generator it is.
        images: ``[b, 3, R, R]`` in [-1, 1].
        distance: to minimise.
        options: how.
        first: number of the first image among all, so that each has the same noise in any batch.
        progress: show a bar.
    """
    generator = run.generator
    device = next(generator.parameters()).device
    numbers = range(first, first + len(images))
    statistics = [
        style_statistics(generator.mapping_foreground, generator.z_dim, options.seed),
        style_statistics(generator.mapping_background, generator.z_dim_background, options.seed),
    ]
    networks = (generator.synthesis_foreground, generator.synthesis_background)
    styles = [
        found.mean.expand(len(images), network.num_styles if options.space == "w+" else 1, -1).clone().requires_grad_()
        for found, network in zip(statistics, networks, strict=True)
    ]
    num_noise = generator.num_noise
    given = draw(options.seed, Stream.PROJECTION, NOISE_TURN, numbers, z_dim=0, num_noise=num_noise, device=device)
    noise = given.noise.clone().requires_grad_()
    rng = [torch.Generator(device).manual_seed(options.seed * 2**20 + number) for number in numbers]
    optimizer = torch.optim.Adam([*styles, noise], betas=(0.9, 0.999))
    with torch.no_grad():
        targets = distance.features(images)

    for step in progress_bar(range(options.steps), desc="projecting", unit="step", disable=not progress, leave=False):
        at = step / options.steps
        optimizer.param_groups[0]["lr"] = options.learning_rate * learning_rate_ramp(at)
        strength = W_NOISE * max(0.0, 1 - at / W_NOISE_SHARE) ** 2
        shaken = []
        for w, found in zip(styles, statistics, strict=True):
            turn = torch.stack([torch.randn(w.shape[1:], generator=r, device=device) for r in rng])
            shaken.append(w + found.spread * strength * turn)
        output = _synthesize(run, shaken, noise)
        loss = distance.between(distance.features(output.composite), targets)
        loss = loss + options.noise_regularization * noise_autocorrelation(generator, noise)
        optimizer.zero_grad(set_to_none=True)
        loss.sum().backward()
        optimizer.step()
        with torch.no_grad():
            _normalize_noise(generator, noise)

    with torch.no_grad():
        output = _synthesize(run, styles, noise)
        found_distance = distance.between(distance.features(output.composite), targets)
    return Projection(output, found_distance)


def learning_rate_ramp(at: float) -> float:
    """Share of the greatest learning rate at a share of the steps: a linear rise and a cosine fall."""
    fall = 0.5 - 0.5 * math.cos(math.pi * min(1.0, (1.0 - at) / RAMP_DOWN))
    return fall * min(1.0, at / RAMP_UP)


def noise_autocorrelation(generator: FurryGenerator, noise: Tensor) -> Tensor:
    """How much each sample's noise maps look like an image ``[b]``.

    Squared mean products of neighbours, in each map and in its reductions by two down to 8x8.
    """
    total = noise.new_zeros(len(noise))
    for full in generator.noise_maps(noise):
        x = full
        while True:
            for dim in (2, 3):
                total = total + (x * x.roll(1, dims=dim)).mean(dim=(1, 2, 3)).square()
            if x.shape[-1] <= 8:
                break
            x = torch.nn.functional.avg_pool2d(x, 2)
    return total


def _normalize_noise(generator: FurryGenerator, noise: Tensor) -> None:
    """Each map of each sample to mean 0 and deviation 1."""
    for x in generator.noise_maps(noise):
        x -= x.mean(dim=(1, 2, 3), keepdim=True)
        x *= x.square().mean(dim=(1, 2, 3), keepdim=True).rsqrt()


def _synthesize(run: TrainedRun, styles: list[Tensor], noise: Tensor) -> GeneratorOutput:
    w_foreground, w_background = (w.squeeze(1) if w.shape[1] == 1 else w for w in styles)
    return run.generator.synthesize(w_foreground, w_background, noise, fade_in=run.fade_in)
