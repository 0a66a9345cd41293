"""One foreground on many backgrounds (paper, figure 5)."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data_shards.errors import UserError
from data_shards.sources.images import BrokenPictureError, fit, read_picture
from data_shards.sources.source import existing_folder, picture_names
from models.masks import composite
from pipeline.generation.grid import save_picture
from pipeline.generation.kind import Kind
from pipeline.generation.sample_grid import cutout_on_board, draw_panel, to_uint8_pictures
from pipeline.generation.sampler import Sampler
from pipeline.methods.randomness import Stream


@dataclass(frozen=True, kw_only=True)
class Swap(Kind):
    """Each foreground on the same backgrounds, generated ones or images of yours (figure 5)."""

    name = "swap"
    suffix = ".png"

    count: int = 6
    """How many foregrounds."""
    num_backgrounds: int = 7
    """How many backgrounds; of a folder, the first so many by name."""
    backgrounds: Path | None = None
    """Folder of images to use as backgrounds; generated ones by default."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_backgrounds < 1:
            raise UserError(f"--num-backgrounds {self.num_backgrounds} is invalid: give 1 or more")

    def write(self, sampler: Sampler, out: Path) -> None:
        """See `Kind.write`."""
        given = None if self.backgrounds is None else _read(self.backgrounds, self.num_backgrounds, sampler)
        backgrounds = self._generated(sampler) if given is None else given
        nothing = torch.ones_like(backgrounds[:1])
        rows, labels = [to_uint8_pictures(torch.cat([nothing, backgrounds]))], ["backgrounds"]
        for samples, output in sampler.batches(self.count, label=self.name):
            for i, sample in enumerate(samples):
                pasted = composite(output.foreground[i : i + 1], backgrounds, output.mask[i : i + 1])
                rows.append(to_uint8_pictures(torch.cat([cutout_on_board(output)[i : i + 1], pasted])))
                labels.append(f"sample {sample}")
        title = f"Each foreground on all backgrounds, seed {self.seed}, psi = {self.psi:g}"
        save_picture(draw_panel(rows, labels, title=title), out)

    def _generated(self, sampler: Sampler) -> Tensor:
        """Of latents of their own; the foregrounds that would come with them are not looked at."""
        numbers = range(self.num_backgrounds)
        z = sampler.latents(numbers, Stream.BACKGROUNDS)
        styles = sampler.foreground_styles(z), sampler.background_styles(z)
        return sampler.synthesize(*styles, sampler.noise(numbers)).background


def _read(folder: Path, num: int, sampler: Sampler) -> Tensor:
    """The first images of a folder ``[n, 3, R, R]`` in [-1, 1]."""
    images = []
    for name in picture_names(existing_folder(folder, "give a folder of images as --backgrounds"))[:num]:
        try:
            sample, _ = fit(read_picture(folder / name), sampler.run.config.resolution)
        except BrokenPictureError as error:
            raise UserError(f"{folder / name} cannot be used: {error}; remove it, or mend it") from None
        images.append(sample.image)
    x = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
    return x.to(next(sampler.run.generator.parameters()).device)
