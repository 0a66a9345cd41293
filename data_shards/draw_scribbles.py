"""Draws scribbles on furballs with shadows, from what is known of them, as a person would: few strokes.

    python data_shards/draw_scribbles.py --out scribbles --resolution 32

For each image NAME.png and NAME.scribble.png: green on the creature, red on its shadow and on what is behind. It
stands in for a person in the demonstration of `pipeline/train.py --scribbles`; on images of your own, draw yourself.
"""

from dataclasses import dataclass
from pathlib import Path

from data_shards.command import parse_options, run_command

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy.ndimage import minimum_filter

from data_shards.errors import UserError
from data_shards.sources.shadows import Shadows

NUM_TRIED = 300
"""Strokes that are tried in a region; the longest is drawn."""

SHORTEST = 0.12
"""A stroke that cannot be so long is not drawn, in units of the image's side."""

WIDTH = 1 / 16
"""Of a stroke, in units of the image's side."""

MIN_COVERAGE = 230
"""Of a pixel by what the stroke says of it, of 255."""

MAX_LOOKED_AT = 100
"""Images looked at for each one wanted: not every shadow has room for a stroke."""

FOREGROUND, BACKGROUND = (0, 255, 0), (255, 0, 0)

Stroke = tuple[tuple[int, int], tuple[int, int]]


@dataclass(frozen=True)
class Arguments:
    """What the command line says."""

    out: Path
    """Directory to make."""
    count: int = 5
    """Images to scribble on."""
    resolution: int = 256
    """Side of the images, that of the shards."""
    seed: int = 0
    """Of the shadows set; its first images are taken that have room for the strokes."""

    def __post_init__(self) -> None:
        if self.count < 1:
            raise UserError(f"--count {self.count} is not positive; give 1 or more")
        if self.out.exists():
            raise UserError(f"--out {self.out} exists; delete it, or choose another")


def main() -> None:
    """Draw as the command line says."""
    arguments: Arguments = parse_options(Arguments, __doc__)
    names = draw_scribbles(arguments)
    print(f"{arguments.out}: strokes on {', '.join(names)}; next: pipeline/train.py --scribbles {arguments.out}")


def draw_scribbles(arguments: Arguments) -> list[str]:
    """Write the images and their strokes; returns their names.

    Raises:
        UserError: the resolution is invalid, or too few images have room for the strokes.
    """
    source = Shadows(resolution=arguments.resolution, seed=arguments.seed, num_images=arguments.count * MAX_LOOKED_AT)
    drawn: dict[str, tuple[Image.Image, Image.Image]] = {}
    for reference in source.references():
        image, creature, shadow = source.layers(reference)
        behind = 255 - np.maximum(creature, shadow)
        strokes = [_stroke(region, int(reference)) for region in (creature, shadow, behind)]
        if all(strokes):
            drawn[reference] = Image.fromarray(image), _painted(strokes, arguments.resolution)
        if len(drawn) == arguments.count:
            break
    else:
        raise UserError(f"only {len(drawn)} images have room for strokes; give a smaller --count")
    arguments.out.mkdir(parents=True)
    for name, (photo, scribble) in drawn.items():
        photo.save(arguments.out / f"{name}.png")
        scribble.save(arguments.out / f"{name}.scribble.png")
    return list(drawn)


def _stroke(region: NDArray[np.uint8], seed: int) -> Stroke | None:
    """The longest of many straight strokes that stay inside a region ``[R, R]``; None if there is no room."""
    # All of a stroke has to lie inside, not its middle line alone.
    inside = minimum_filter(region, size=_width(len(region)) // 2 * 2 - 1) > MIN_COVERAGE
    places = np.argwhere(inside)
    if not len(places):
        return None
    rng = np.random.default_rng(seed)
    ends = places[rng.integers(len(places), size=(NUM_TRIED, 2))]
    steps = np.linspace(0, 1, 2 * len(region))[None, :, None]
    along = np.rint(ends[:, :1] * (1 - steps) + ends[:, 1:] * steps).astype(np.int64)
    lengths = np.hypot(*(ends[:, 1] - ends[:, 0]).T) * inside[along[..., 0], along[..., 1]].all(axis=1)
    best = int(lengths.argmax())
    if lengths[best] < SHORTEST * len(region):
        return None
    (top, left), (bottom, right) = ends[best].tolist()
    return (left, top), (right, bottom)


def _width(resolution: int) -> int:
    return round(WIDTH * resolution)


def _painted(strokes: list[Stroke | None], resolution: int) -> Image.Image:
    painted = Image.new("RGB", (resolution, resolution))
    pen = ImageDraw.Draw(painted)
    for stroke, colour in zip(strokes, (FOREGROUND, BACKGROUND, BACKGROUND), strict=True):
        if stroke is not None:
            pen.line(stroke, fill=colour, width=_width(resolution))
    return painted


if __name__ == "__main__":
    run_command(main)
