"""Latents and noise as a function of (seed, stream, iteration, sample): nothing to save, nothing to synchronise.

Each sample of the global batch has a generator of its own, so that a resumed run draws what the interrupted one would
have drawn, and a sample gets the same numbers on whichever rank it lands.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.fused import has_triton
from models.fused_ops import normal


class Stream(IntEnum):
    """Who draws; two streams never share a number."""

    D_MAIN = 0
    G_MAIN = 1
    GRID = 2
    EVALUATION = 3
    GENERATION = 4
    BACKGROUNDS = 5
    PROJECTION = 6
    DISTILLATION = 7
    UNLABELLED = 8
    SCRIBBLES = 9


@dataclass(frozen=True)
class Draw:
    """Random input of the generator for b samples.

    Attributes:
        z: ``[b, z_dim]`` standard normal.
        noise: ``[b, num_noise]`` standard normal.
    """

    z: Tensor
    noise: Tensor


def draw(
    seed: int,
    stream: Stream,
    iteration: int,
    slots: Sequence[int] | NDArray[np.int64],
    *,
    z_dim: int,
    num_noise: int,
    device: torch.device,
) -> Draw:
    """Draw for the samples `slots` (positions in the global batch) of one iteration."""
    return draw_from(sample_seeds(seed, stream, iteration, slots), z_dim=z_dim, num_noise=num_noise, device=device)


def sample_seeds(seed: int, stream: Stream, iteration: int, slots: Sequence[int] | NDArray[np.int64]) -> Tensor:
    """A seed for each of the samples `slots` (positions in the global batch) of one iteration, ``[b]`` int64."""
    states = np.random.SeedSequence([seed, int(stream), iteration]).generate_state(int(max(slots)) + 1, np.uint64)
    return torch.from_numpy((states[np.asarray(slots)] >> np.uint64(1)).astype(np.int64))  # torch takes 63 bits


def draw_from(seeds: Tensor, *, z_dim: int, num_noise: int, device: torch.device) -> Draw:
    """Draw for samples with these seeds.

    One kernel does it on a GPU with Triton, where the seeds may be on the GPU. The numbers differ from a CPU's.
    """
    if device.type == "cuda" and has_triton():
        rows = normal(seeds.to(device, non_blocking=True), z_dim + num_noise)
    else:
        generator = torch.Generator(device)
        rows = torch.empty(len(seeds), z_dim + num_noise, device=device)
        for row, seed in zip(rows, seeds.tolist(), strict=True):
            generator.manual_seed(seed)
            row.normal_(generator=generator)
    z, noise = rows.split([z_dim, num_noise], dim=1)
    return Draw(z, noise)


def generator_for(seed: int, stream: Stream, number: int) -> torch.Generator:
    """A generator on the CPU of its own for one of a stream's numbered things."""
    (state,) = np.random.SeedSequence([seed, int(stream), number]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))  # torch takes 63 bits
