"""Style mixing (paper, figure S14)."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch

from data_shards.errors import UserError
from data_shards.progress import progress_bar
from models.generator import SynthesisNetwork
from pipeline.generation.grid import save_picture
from pipeline.generation.kind import Kind
from pipeline.generation.sample_grid import beside, draw_panel, to_uint8_pictures
from pipeline.generation.sampler import Sampler

Level = Literal["coarse", "middle", "fine"]
LEVELS: tuple[Level, ...] = get_args(Level)


@dataclass(frozen=True, kw_only=True)
class Mix(Kind):
    """Foregrounds with some layers' styles of one sample and the rest of another, and their masks (figure S14)."""

    name = "mix"
    suffix = ".png"

    count: int = 4
    """How many samples, each mixed with each of as many others."""
    noise: Literal["const", "none"] = "const"
    """Per-pixel noise, the same for all."""
    levels: tuple[Level, ...] = LEVELS
    """Which styles come from the sample at the left; a panel each."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.levels:
            raise UserError(f"--levels is empty: give one or more of {', '.join(LEVELS)}")

    def write(self, sampler: Sampler, out: Path) -> None:
        """See `Kind.write`."""
        network = sampler.run.generator.synthesis_foreground
        n = self.count
        z = sampler.latents(range(2 * n))
        sources = sampler.foreground_styles(z)[:, None].expand(-1, network.num_styles, -1)
        left, top = sources[:n], sources[n:]
        backgrounds = sampler.background_styles(z)
        noise = sampler.noise(range(2 * n))
        alone = sampler.synthesize(sources, backgrounds, noise)
        pictures, masks = alone.foreground, alone.mask.expand(-1, 3, -1, -1) * 2 - 1
        nothing = torch.ones_like(pictures[:1])
        panels = []
        for level in progress_bar(self.levels, desc=self.name, unit="panel"):
            chosen = styles_of(network, level)
            rows, labels = [torch.cat([nothing, pictures[n:]])], ["the rest of"]
            for i in range(n):
                w = top.clone()
                w[:, chosen] = left[i, chosen]
                mixed = sampler.synthesize(w, backgrounds[:n], noise[:n])
                rows += [
                    torch.cat([pictures[i : i + 1], mixed.foreground]),
                    torch.cat([masks[i : i + 1], mixed.mask.expand(-1, 3, -1, -1) * 2 - 1]),
                ]
                labels += [f"{level} of", "mask"]
            title = f"{level} styles ({_resolutions(network, chosen)}) of the left, the rest of the top"
            panels.append(draw_panel([to_uint8_pictures(row) for row in rows], labels, title=title))
        save_picture(beside(panels), out)


def styles_of(network: SynthesisNetwork, level: Level) -> list[int]:
    """Numbers of a network's styles at one level: thirds of its resolutions, ToRGB and masks among the fine ones."""
    at = [*network.noise_resolutions, network.noise_resolutions[-1]]
    resolutions = sorted(set(at))
    number, k = LEVELS.index(level), len(resolutions)
    mine = resolutions[round(k * number / 3) : round(k * (number + 1) / 3)]
    return [i for i, resolution in enumerate(at) if resolution in mine]


def _resolutions(network: SynthesisNetwork, styles: Sequence[int]) -> str:
    at = [*network.noise_resolutions, network.noise_resolutions[-1]]
    low, high = at[styles[0]], at[styles[-1]]
    return f"{low} px" if low == high else f"{low} to {high} px"
