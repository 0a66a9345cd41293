"""Interpolation between foregrounds (paper, figure 6)."""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from data_shards.errors import UserError
from data_shards.files import whole_directory
from data_shards.progress import progress_bar
from pipeline.generation.kind import Kind
from pipeline.generation.sample_grid import CELL, MARGIN, PAPER, PICTURES, draw_panel, stack, to_uint8_pictures
from pipeline.generation.sampler import Sampler

STRIP_COLUMNS = 9
ROWS = ("foreground", "final mask", "composite")
FILM_SCALE = 2
"""Film frames are this much larger than the cells of a strip."""


@dataclass(frozen=True, kw_only=True)
class Interpolate(Kind):
    """Strips and a film on the way from foreground to foreground, before one background (figure 6)."""

    name = "interpolate"
    suffix = ""

    count: int = 4
    """How many foregrounds to visit; the film ends where it began."""
    noise: Literal["const", "none"] = "const"
    """Per-pixel noise, the same for all: noise of each frame's own would flicker."""
    frames: int = 24
    """Frames from one foreground to the next."""
    film: Literal["gif", "mp4"] = "gif"
    """Format of the film; mp4 needs the package av."""
    fps: int = 24
    """Frames a second."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.count < 2:
            raise UserError(f"--count {self.count} leaves nothing between: give 2 or more")
        for option, value, low in (("frames", self.frames, STRIP_COLUMNS - 1), ("fps", self.fps, 1)):
            if value < low:
                raise UserError(f"--{option} {value} is invalid: give {low} or more")

    def write(self, sampler: Sampler, out: Path) -> None:
        """See `Kind.write`: ``strips.png`` and ``film.gif`` or ``film.mp4``."""
        z = sampler.latents(range(self.count))
        keys = sampler.foreground_styles(z)
        steps = torch.linspace(0, 1, self.frames + 1, device=keys.device)[:-1, None]
        ways = [torch.lerp(start, end, steps) for start, end in pairwise([*keys, keys[0]])]
        w = torch.cat(ways)
        background = sampler.background_styles(z[:1])
        parts = []
        for part in progress_bar(w.split(sampler.batch), desc=self.name, unit="batch"):
            n = len(part)
            output = sampler.synthesize(part, background.expand(n, -1), sampler.noise([0] * n))
            parts.append([to_uint8_pictures(PICTURES[row](output)) for row in ROWS])
        rows = [np.concatenate(row) for row in zip(*parts, strict=True)]
        with whole_directory(out) as partial:
            self._strips(rows).save(partial / "strips.png")
            film = _film(rows)
            if self.film == "gif":
                _write_gif(film, partial / "film.gif", self.fps)
            else:
                _write_mp4(film, partial / "film.mp4", self.fps)

    def _strips(self, rows: Sequence[NDArray[np.uint8]]) -> Image.Image:
        panels = []
        for i in range(self.count):
            at = (i * self.frames + np.linspace(0, self.frames, STRIP_COLUMNS).round().astype(int)) % len(rows[0])
            title = f"from sample {i} to sample {(i + 1) % self.count}, seed {self.seed}, psi = {self.psi:g}"
            panels.append(draw_panel([row[at] for row in rows], ROWS, title=title))
        return stack(panels)


def _film(rows: Sequence[NDArray[np.uint8]]) -> list[Image.Image]:
    """The kinds of image side by side, enlarged by a whole factor; even sides, as video codecs want them."""
    size = rows[0].shape[1]
    cell = size * -(-CELL * FILM_SCALE // size)
    frames = []
    for pictures in zip(*rows, strict=True):
        frame = Image.new("RGB", (len(rows) * (cell + MARGIN) + MARGIN, cell + 2 * MARGIN), PAPER)
        for column, picture in enumerate(pictures):
            enlarged = Image.fromarray(picture).resize((cell, cell), Image.Resampling.NEAREST)
            frame.paste(enlarged, (MARGIN + column * (cell + MARGIN), MARGIN))
        frames.append(frame)
    return frames


def _write_gif(frames: Sequence[Image.Image], path: Path, fps: int) -> None:
    # One palette a frame: colours of fur do not fit into 256 for a whole film.
    paletted = [frame.quantize(256, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE) for frame in frames]
    paletted[0].save(path, save_all=True, append_images=paletted[1:], duration=round(1000 / fps), loop=0)


def _write_mp4(frames: Sequence[Image.Image], path: Path, fps: int) -> None:
    try:
        av = importlib.import_module("av")
    except ImportError:
        raise UserError("--film mp4 needs PyAV: pip install av, or take --film gif") from None
    with av.open(str(path), "w") as container:
        # One thread: with more of them the bytes depend on the machine.
        stream = container.add_stream("libx264", rate=Fraction(fps), options={"crf": "18", "threads": "1"})
        stream.width, stream.height = frames[0].size
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode())
