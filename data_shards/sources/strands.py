"""Fur as geometry: outlines that strands grow on, and the supersampled canvas they are drawn on.

All positions and lengths are in units of the image's side, x to the right and y down, so that one scene can be
drawn at any resolution. The canvas holds *inks* (palette indices), not colours: ink 0 is the background, so
"is this subpixel foreground?" is exact, and colours and coverage are averaged from the same drawing.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from data_shards.sources.supersampling import downscaled

Points = NDArray[np.float64]  # [..., 2]
Inks = NDArray[np.int64]
InkOf = Callable[[Points, Points], Inks]  # (positions [n, 2], shades [n] in 0..1) -> inks [n]

NUM_OUTLINE_POINTS = 48
LIGHT = (-0.5, -0.866)  # towards the light: from the upper left
UNDERFUR_DEPTHS = (0.98, 0.85, 0.7, 0.5)


def shade(depth: Points, facing: Points | float) -> Points:
    """Shade of fur, 1 lit and 0 dark.

    It falls off towards the outline, as on anything round. A mask that is cut too tight loses that rim, and a
    discriminator sees it.

    Args:
        depth: 0 in the middle of a part, 1 on its outline.
        facing: cosine of the angle between the outward direction and the light.
    """
    return 0.9 - 0.65 * depth * depth * depth + 0.2 * facing * depth


def turned(points: Points, angle: float) -> Points:
    """Points ``[..., 2]`` turned about the origin by ``angle`` radians (clockwise on the screen)."""
    c, s = np.cos(angle), np.sin(angle)
    x, y = points[..., 0], points[..., 1]
    return np.stack([x * c - y * s, x * s + y * c], -1)


def ellipse(centre: tuple[float, float], radii: tuple[float, float], angle: float = 0.0, n: int = 24) -> Points:
    """Outline ``[n, 2]`` of an ellipse turned by ``angle`` radians."""
    t = np.arange(n) * (2 * np.pi / n)
    outline: Points = turned(np.stack([np.cos(t) * radii[0], np.sin(t) * radii[1]], -1), angle) + np.array(centre)
    return outline


@dataclass(frozen=True)
class Pelt:
    """A closed outline with fur on it.

    Attributes:
        outline: ``[m, 2]``, in order around the shape.
        centre: ``[2]``; the straight line from it to any outline point stays inside.
        flow: ``[2]``; the way the fur is combed, added to the outward direction (of length 1).
        fur: ``[m]``; mean length of a strand rooted in line with each outline point.
        num_strands: how many at density 1.
        strand_width: width at the root at density 1.
    """

    outline: Points
    centre: Points
    flow: Points
    fur: Points
    num_strands: int
    strand_width: float


@dataclass(frozen=True)
class Strands:
    """``n`` curved, tapering strands: roots, middles, tips ``[n, 2]``, half widths ``[n]``, shades ``[n]`` in 0..1."""

    roots: Points
    middles: Points
    tips: Points
    half_widths: Points
    shades: Points


def grow(pelt: Pelt, rng: np.random.Generator, density: float) -> Strands:
    """Strands of a pelt, outermost first: fur lies like shingles, tips over the roots further out.

    The strands at a lower density are a subset of those at a higher one, and their width makes up for their number,
    so that coverage at the edge does not depend on the density.
    """
    n = round(pelt.num_strands * density)
    # One row a strand: generators fill rows in order, which is what makes the subset hold.
    u = rng.random((n, 8))
    u = u[np.argsort(-u[:, 1], kind="stable")]
    m = len(pelt.outline)
    k = (u[:, 0] * m).astype(np.int64)
    t = (u[:, 0] * m - k)[:, None]
    edge = pelt.outline[k] * (1 - t) + pelt.outline[(k + 1) % m] * t
    spoke = edge - pelt.centre
    reach = np.hypot(spoke[:, 0], spoke[:, 1])[:, None]
    outward = spoke / reach
    depth = np.sqrt(u[:, 1:2])  # uniform over the area
    roots = pelt.centre + spoke * depth * 0.98

    # A tenth are guard hairs, longer and finer: the edge fades out instead of ending.
    guard = u[:, 7] < 0.1
    # Neighbours lean the same way (locks of hair), each with some will of its own.
    lean = 0.35 * np.sin(u[:, 0] * 69.1 + depth[:, 0] * 9.0) + 0.85 * (u[:, 2] - u[:, 3])
    aside = np.stack([-outward[:, 1], outward[:, 0]], -1)
    way = outward + pelt.flow + aside * lean[:, None]
    way /= np.maximum(np.hypot(way[:, 0], way[:, 1]), 0.2)[:, None]
    length = (pelt.fur[k] * (0.5 + u[:, 4]) * np.where(guard, 1.5, 1.0))[:, None]
    curl = np.stack([-way[:, 1], way[:, 0]], -1) * (u[:, 5:6] - 0.5) * 0.6
    shades = shade(depth[:, 0], (outward * LIGHT).sum(1)) + 0.06 * (u[:, 6] - 0.5)
    return Strands(
        roots=roots,
        middles=roots + (way * 0.55 + curl * 0.5) * length,
        tips=roots + (way + curl * -0.4) * length,
        half_widths=(pelt.strand_width * 0.5 / density) * np.where(guard, 0.5, 0.7 + 0.6 * u[:, 7]),
        shades=np.clip(shades, 0.0, 1.0),
    )


class Canvas:
    """A square of ink numbers, ``factor`` times finer than the image it becomes."""

    def __init__(self, resolution: int, factor: int) -> None:
        self.resolution, self.factor, self.size = resolution, factor, resolution * factor
        self._inks = Image.new("L", (self.size, self.size), 0)
        self._pen = ImageDraw.Draw(self._inks)

    def _subpixels(self, points: Points) -> NDArray[np.int64]:
        # Whole subpixels: a last-bit difference between two machines' sin() must not reach the drawing.
        return np.floor(points * self.size).astype(np.int64)

    def fill(self, outline: Points, ink: int) -> None:
        """Fills a closed outline ``[m, 2]``."""
        self._pen.polygon(self._subpixels(outline).ravel().tolist(), fill=ink)

    def line(self, points: Points, width: float, ink: int) -> None:
        """Draws an open line ``[m, 2]`` of a given width, at least one subpixel."""
        self._pen.line(self._subpixels(points).ravel().tolist(), fill=ink, width=max(1, round(width * self.size)))

    def draw_strands(self, strands: Strands, inks: Inks) -> None:
        """Draws strands in their order, as curved spikes, each in its ink ``[n]``."""
        ahead = strands.tips - strands.roots
        ahead = ahead / np.maximum(np.hypot(ahead[:, 0], ahead[:, 1]), 1e-6)[:, None]
        # Pillow's polygons include their border, half a subpixel on each side.
        half = np.maximum(strands.half_widths - 0.5 / self.size, 0.0)[:, None]
        side = np.stack([-ahead[:, 1], ahead[:, 0]], -1) * half
        r, m = strands.roots, strands.middles
        spikes = self._subpixels(np.stack([r - side, m - side * 0.8, strands.tips, m + side * 0.8, r + side], 1))
        inside = ((spikes > -self.size // 8) & (spikes < self.size + self.size // 8)).all(axis=(1, 2))
        polygon = self._pen.polygon
        for corners, ink in zip(spikes[inside].reshape(-1, 10).tolist(), inks[inside].tolist(), strict=True):
            polygon(corners, fill=ink)

    def resolve(self, colours: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """The foreground at the image's own resolution (`downscaled`).

        Args:
            colours: ``[256, 3]``, the colour of each ink; that of ink 0 must be black.

        Returns:
            Colour times coverage, ``[R, R, 3]``, and coverage, ``[R, R]``.
        """
        painted = self._inks.copy()
        painted.putpalette(colours.tobytes())
        colour = downscaled(painted.convert("RGB"), self.resolution)
        alpha = downscaled(self._inks.point([0] + [255] * 255), self.resolution)
        return np.asarray(colour), np.asarray(alpha)

    def grow_on(self, pelt: Pelt, rng: np.random.Generator, density: float, ink_of: InkOf) -> None:
        """Underfur, then the strands of a pelt; ``ink_of`` says which ink a place has at a shade."""
        for depth in UNDERFUR_DEPTHS:
            under = ink_of(pelt.centre[None], shade(np.array([depth]), 0.0) - 0.05)
            self.fill(pelt.centre + (pelt.outline - pelt.centre) * depth, int(under[0]))
        strands = grow(pelt, rng, density)
        self.draw_strands(strands, ink_of(strands.roots, strands.shades))
