"""Backgrounds for the built-in dataset: varied textures without fur."""

import colorsys
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from data_shards.sources.supersampling import downscaled

Picture = NDArray[np.uint8]  # [R, R, 3]
Palette = NDArray[np.uint8]  # [NUM_COLOURS, 3]

NUM_COLOURS = 4
GRID = 4096  # integer coordinates: stripes fall on the same side of a boundary on every machine

# Colours of nature; furs take their hues from them too, so hue does not tell fur from ground.
NATURAL_COLOURS: tuple[tuple[int, int, int], ...] = (
    (118, 84, 56),  # brown
    (205, 122, 56),  # ginger
    (128, 128, 132),  # grey
    (222, 196, 156),  # cream
    (236, 232, 226),  # white
    (58, 52, 52),  # black
    (190, 150, 92),  # golden
    (92, 58, 42),  # chocolate
    (148, 132, 116),  # taupe
    (96, 108, 128),  # blue-grey
)


def vary(rng: np.random.Generator, colour: tuple[int, int, int], spread: float) -> NDArray[np.float64]:
    """A colour near the given one: brightness and each channel off by up to ``spread`` levels."""
    shift = rng.uniform(-spread, spread) + rng.uniform(-spread, spread, 3) * 0.5
    return np.clip(np.array(colour) + shift, 0, 255)


def any_colour(rng: np.random.Generator, natural: float) -> NDArray[np.float64]:
    """A natural colour with the given probability, else one of any hue. ``[3]`` in 0..255."""
    if rng.random() < natural:
        return vary(rng, NATURAL_COLOURS[rng.integers(len(NATURAL_COLOURS))], 25)
    rgb = colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.15, 0.75), rng.uniform(0.3, 0.95))
    return np.array(rgb) * 255


def draw_palette(rng: np.random.Generator) -> Palette:
    """Muted colours around mid-grey, as of what is out of focus: two of a kind, and two free ones."""
    base = any_colour(rng, natural=0.45)
    near = np.clip(base * rng.uniform(0.5, 1.5) + rng.uniform(-20, 20, 3), 0, 255)
    other = any_colour(rng, natural=0.45)
    mixed = base + (other - base) * rng.uniform(0.2, 0.8)
    return np.asarray((np.stack([base, near, mixed, other]) * 0.36 + 95).round(), np.uint8)


def _scaled(grid: NDArray[np.uint8], resolution: int) -> NDArray[np.uint8]:
    scaled = Image.fromarray(grid).resize((resolution, resolution), Image.Resampling.BICUBIC)
    return np.asarray(scaled, np.uint8)


def smooth_noise(rng: np.random.Generator, resolution: int, cells: int, octaves: int) -> NDArray[np.int32]:
    """Multi-octave value noise ``[R, R]`` in 0..255: each octave has twice the cells and half the weight."""
    total = np.zeros((resolution, resolution), np.int32)
    for octave in range(octaves):
        n = cells << octave
        total += _scaled(rng.integers(0, 256, (n, n), np.uint8), resolution).astype(np.int32) << (octaves - octave)
    return np.asarray(total // ((2 << octaves) - 2), np.int32)


def _blend(palette: Palette, weight: NDArray[np.int32]) -> Picture:
    """Runs through the palette's colours 0, 2, 3 as the weight ``[R, R]`` goes from 0 to 255."""
    ramp = np.arange(256)[:, None]
    first, middle, last = (palette[i].astype(np.int64) for i in (0, 2, 3))
    table = np.where(ramp < 128, first * (127 - ramp) + middle * ramp, middle * (255 - ramp) + last * (ramp - 128))
    colours = (table // 127).clip(0, 255).astype(np.uint8)
    return np.asarray(colours[weight], np.uint8)


def _gradient(rng: np.random.Generator, resolution: int, palette: Palette) -> Picture:
    corners = palette[rng.permutation(NUM_COLOURS)].reshape(2, 2, 3)
    if rng.random() < 0.5:
        corners = np.concatenate([corners, corners[:1, ::-1]])
        corners = np.concatenate([corners, corners[:, :1]], 1)
    return _scaled(np.ascontiguousarray(corners), resolution)


def _noise(rng: np.random.Generator, resolution: int, palette: Palette) -> Picture:
    weight = smooth_noise(rng, resolution, int(rng.integers(2, 7)), int(rng.integers(2, 5)))
    # Means of many octaves crowd around the middle; stretched, they use the whole palette.
    return _blend(palette, ((weight - 128) * 2 + 128).clip(0, 255))


def _bands(rng: np.random.Generator, size: int, angle: float) -> NDArray[np.int32]:
    """Stripes across the whole canvas ``[size, size]``: 0 and 1, of random period, width and phase."""
    at = ((2 * np.arange(size) + 1) * GRID // (2 * size)).astype(np.int32)
    across = (at[None] * round(np.cos(angle) * 256) + at[:, None] * round(np.sin(angle) * 256)) // 256
    period = int(GRID * rng.uniform(0.08, 0.35))
    phase, duty = int(rng.integers(period)), rng.uniform(0.3, 0.7)
    return np.asarray((across + phase) % period < int(period * duty), np.int32)


def _stripes(rng: np.random.Generator, resolution: int, palette: Palette) -> Picture:
    factor = 4 if resolution <= 64 else 2
    angle = rng.uniform(0, np.pi)
    inks = _bands(rng, resolution * factor, angle)
    kind = rng.integers(3)
    if kind:
        other = _bands(rng, resolution * factor, angle + np.pi / 2)
        # Plaid shows both layers; tiles change colour whenever either does.
        inks = inks + 2 * other if kind == 1 else inks ^ other
    canvas = Image.fromarray(inks.astype(np.uint8))
    canvas.putpalette(palette.tobytes())
    return np.asarray(downscaled(canvas.convert("RGB"), resolution))


def _clutter_shape(rng: np.random.Generator, kind: str) -> NDArray[np.float64]:
    """Outline of one shape about the origin, ``[n, 2]``, of radius about 1."""
    t = np.arange(20) * (np.pi / 10)
    if kind == "leaves":
        width = rng.uniform(0.25, 0.5)
        return np.stack([np.cos(t), np.sin(t) * np.abs(np.sin(t)) * width], -1)
    if kind == "rectangles":
        height = rng.uniform(0.2, 1.0)
        return np.array([[-1.0, -height], [1.0, -height], [1.0, height], [-1.0, height]])
    bumps = 1 + 0.18 * np.sin(2 * t + rng.uniform(0, 6)) + 0.12 * np.sin(3 * t + rng.uniform(0, 6))
    radius = np.ones_like(t) if kind == "bokeh" else bumps
    return np.stack([np.cos(t), np.sin(t)], -1) * radius[:, None]


def _clutter(rng: np.random.Generator, resolution: int, palette: Palette, kind: str) -> Picture:
    factor = 4 if resolution <= 64 else 2
    size = resolution * factor
    canvas = Image.fromarray(_gradient(rng, resolution, palette)).resize((size, size), Image.Resampling.NEAREST)
    pen = ImageDraw.Draw(canvas, "RGBA")
    biggest = rng.uniform(0.07, 0.17)
    for _ in range(int(min(70, 0.9 / biggest**2))):
        angle, radius = rng.uniform(0, 2 * np.pi), biggest * rng.uniform(0.4, 1.0)
        c, s = np.cos(angle) * radius, np.sin(angle) * radius
        x, y = _clutter_shape(rng, kind).T
        outline = np.stack([x * c - y * s, x * s + y * c], -1) + rng.uniform(-0.05, 1.05, 2)
        colour = palette[rng.integers(NUM_COLOURS)].astype(np.float64) * rng.uniform(0.75, 1.2)
        opacity = int(rng.integers(60, 140)) if kind == "bokeh" else 255
        ink = (*(int(v) for v in colour.clip(0, 255)), opacity)
        pen.polygon(np.floor(outline * size).astype(np.int64).ravel().tolist(), fill=ink)
    return np.asarray(downscaled(canvas, resolution))


def _hills(rng: np.random.Generator, resolution: int, palette: Palette) -> Picture:
    """A sky that fades to the horizon, and ridges before it."""
    factor = 4 if resolution <= 64 else 2
    size = resolution * factor
    sky = _scaled(np.ascontiguousarray(palette[[0, 2], None].repeat(2, 1)), resolution)
    canvas = Image.fromarray(sky).resize((size, size), Image.Resampling.NEAREST)
    pen = ImageDraw.Draw(canvas)
    x = np.linspace(0, 1, 33)
    top = rng.uniform(0.25, 0.6)
    for ridge in range(int(rng.integers(2, 5))):
        height = np.full(33, top + 0.14 * ridge)
        for waves in (1, 2, 5):
            height = height + rng.uniform(0, 0.09 / waves) * np.sin(x * waves * 6.0 + rng.uniform(0, 6))
        outline = np.concatenate([np.stack([x, height], -1), [[1.0, 1.1], [0.0, 1.1]]])
        colour = palette[3 - ridge % 2 * 2].astype(np.float64) * (1.1 - 0.15 * ridge)
        ink = tuple(int(v) for v in colour.clip(0, 255))
        pen.polygon(np.floor(outline * size).astype(np.int64).ravel().tolist(), fill=ink)
    return np.asarray(downscaled(canvas, resolution))


_KINDS: dict[str, Callable[[np.random.Generator, int, Palette], Picture]] = {
    "gradient": _gradient,
    "stripes": _stripes,
    "noise": _noise,
    "hills": _hills,
    "blobs": lambda rng, resolution, palette: _clutter(rng, resolution, palette, "blobs"),
    "leaves": lambda rng, resolution, palette: _clutter(rng, resolution, palette, "leaves"),
    "rectangles": lambda rng, resolution, palette: _clutter(rng, resolution, palette, "rectangles"),
    "bokeh": lambda rng, resolution, palette: _clutter(rng, resolution, palette, "bokeh"),
}


def draw_background(rng: np.random.Generator, resolution: int) -> tuple[Picture, str]:
    """A background ``[R, R, 3]`` and its kind.

    Args:
        rng: decides everything; the same generator state gives the same background at any resolution.
        resolution: side of the image in pixels.
    """
    kind = list(_KINDS)[rng.integers(len(_KINDS))]
    palette = draw_palette(rng)
    picture = _KINDS[kind](rng, resolution, palette).astype(np.int32)
    # Mottled light on all of them: no background is flat enough to be told by its flatness.
    light = smooth_noise(rng, resolution, 4, 3) - 128
    strength = int(rng.integers(8, 45))
    return (picture + (picture * light[..., None] * strength >> 14)).clip(0, 255).astype(np.uint8), kind
