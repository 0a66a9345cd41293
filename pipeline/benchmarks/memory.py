"""Memory per rank for training both networks, counted from the shapes of their tensors.

python pipeline/benchmarks/memory.py                         # of the paper's networks, a table in Markdown
python pipeline/benchmarks/memory.py --resolutions 512 --ranks 4 16

Activations, which are most of a step, are not in it: `pipeline/bench.py` measures those.
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, fields

from data_shards.command import parse_options, run_command

import torch
from torch import Tensor, nn

from data_shards.errors import UserError
from models.discriminator import Discriminator
from models.generator import FurryGenerator
from models.widths import Widths
from pipeline.config import preset
from pipeline.ranks.zero import settings

FLOAT_BYTES = 4
PAD = 2
"""DeepSpeed pads the parameters to a multiple of this many elements a rank."""
BACKENDS: dict[str, int | None] = {"DDP": None, "ZeRO 0": 0, "ZeRO 1": 1, "ZeRO 2": 2}
"""Stages by name."""


@dataclass(frozen=True)
class Held:
    """Bytes on the rank that holds the most.

    Attributes:
        weights: parameters and buffers of G, D and the average of G; from stage 1 on, Adam's copy of its part too.
        optimizer: Adam's two moments.
        gradients: the most at a time; of G and D together with DDP, which keeps them until the network's next phase.
        buckets: what gradients are gathered in to be sent, the most at a time.
    """

    weights: int
    optimizer: int
    gradients: int
    buckets: int

    @property
    def total(self) -> int:
        """All of it, at most."""
        return sum(astuple(self))


def held(generator: nn.Module, discriminator: nn.Module, stage: int | None, ranks: int) -> Held:
    """What a rank holds of two networks, which may be on the meta device.

    Args:
        generator: G; its average is as large.
        discriminator: D.
        stage: of ZeRO, or None for DDP.
        ranks: of the run.
    """
    sizes = [[p.numel() for p in network.parameters()] for network in (generator, discriminator)]
    whole = [sum(each) for each in sizes]
    settled = sum(whole) + whole[0] + 2 * count(generator.buffers()) + count(discriminator.buffers())
    if stage is None:
        elements = Held(settled, 2 * sum(whole), sum(whole), sum(whole) if ranks > 1 else 0)
    elif stage == 0:
        elements = Held(settled, 2 * sum(whole), max(whole), max(whole))
    else:
        parts = [-(-n // (PAD * ranks)) * PAD for n in whole]
        padding = ranks * sum(parts) - sum(whole)
        # Before a step, its part is copied out of the gradients that stage 2 has kept; stage 1 has kept all until then.
        at_step = max(largest_share(each, part) + part for each, part in zip(sizes, parts, strict=True))
        gradients = max(at_step, *whole) if stage == 1 else at_step
        bucket = settings(stage)["zero_optimization"]["reduce_bucket_size"]
        elements = Held(settled + padding + sum(parts), 2 * sum(parts), gradients, bucket)
    return Held(*(FLOAT_BYTES * n for n in astuple(elements)))


def largest_share(sizes: list[int], part: int) -> int:
    """Most elements of whole parameters that lie, be it with one element, in a part of that many."""
    ends = list(itertools.accumulate(sizes))
    spans = [(end - size, end) for end, size in zip(ends, sizes, strict=True)]
    return max(
        sum(end - start for start, end in spans if start < low + part and end > low) for low in range(0, ends[-1], part)
    )


def count(tensors: Iterable[Tensor]) -> int:
    """Elements."""
    return sum(x.numel() for x in tensors)


def table(resolutions: Sequence[int], ranks: Sequence[int]) -> str:
    """Markdown, in MB (10^6 bytes)."""
    names = [f.name for f in fields(Held)]
    lines = [
        f"| px | ranks | | {' | '.join(names)} | total |",
        f"| ---: | ---: | --- | {'---: | ' * len(names)}---: |",
    ]
    for resolution in resolutions:
        config = preset("ffhq", data="", resolution=resolution)
        model, widths = config.model, Widths(config.model.channel_base, config.model.channel_max)
        with torch.device("meta"):
            generator = FurryGenerator(resolution, widths, z_dim=model.z_dim, z_dim_background=model.z_dim_background)
            discriminator = Discriminator(resolution, widths)
        for number, (name, stage) in itertools.product(ranks, BACKENDS.items()):
            of_rank = held(generator, discriminator, stage, number)
            cells = [f"{n / 1e6:,.0f}" for n in (*astuple(of_rank), of_rank.total)]
            lines.append(f"| {resolution} | {number} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


@dataclass(frozen=True)
class Arguments:
    """What the command line says."""

    resolutions: tuple[int, ...] = (256, 1024)
    """Sides of the images in pixels."""
    ranks: tuple[int, ...] = (1, 2, 8, 64)
    """Numbers of processes."""


def main() -> None:
    """Print the table that the command line asks for."""
    arguments: Arguments = parse_options(Arguments, __doc__)
    if min(arguments.ranks) < 1:
        raise UserError(f"--ranks {min(arguments.ranks)} is invalid: give 1 or more")
    print(table(arguments.resolutions, arguments.ranks))


if __name__ == "__main__":
    run_command(main)
