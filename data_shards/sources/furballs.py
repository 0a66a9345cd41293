"""The built-in data set: furry creatures on textured backgrounds, with their ground-truth alpha.

An image is a pure function of (seed, index): no files and no licence, and every machine gets the same bytes.
The creature is drawn with hard edges on a canvas several times finer than the image, then averaged. Alpha is
therefore exact coverage, and ``image = alpha * foreground + (1 - alpha) * background`` holds at fur and whiskers.

What lets a small GAN separate the animals within minutes, found by trial: grounds are near mid-grey and animals far
from it, all of them. A contrast of each animal to its own ground takes far longer to learn; and the mask networks start
on whatever the foreground's features are strong on, which are the colours far from grey. Fur darkens towards the
outline, so that a mask which is cut too tight shows. Coats and faces are soft: were they the only fine detail in a
small image, the background's noise inputs would imitate it before anything else could, and the two generators would
swap roles.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_shards.errors import UserError
from data_shards.format.sample import Sample
from data_shards.sources.images import Picture
from data_shards.sources.source import Source
from data_shards.sources.strands import (
    NUM_OUTLINE_POINTS,
    Canvas,
    Inks,
    Pelt,
    Points,
    Strands,
    ellipse,
    turned,
)
from data_shards.sources.textures import any_colour, draw_background, vary

VERSION = 3
"""Of the look: raised when the same (seed, index) draws another image, so that no stale set is reused."""

MIN_RESOLUTION, MAX_RESOLUTION = 32, 512

POSES = ("portrait", "ball", "sitting")
EARS = ("round", "pointed", "floppy", "long")
COATS = ("plain", "patches", "stripes", "mask", "split")

MIN_DENSITY = 2.5  # of strands, relative to `Pelt.num_strands`

# Inks: fur is (coat colour, shade), then one ink for each other thing.
NUM_SHADES = 24
MAIN, SECOND, PALE, SKIN = range(4)
EYE_RIM, IRIS, PUPIL, GLINT, NOSE, NOSE_SHINE, MOUTH, WHISKER = range(200, 208)


@dataclass(frozen=True)
class Creature:
    """Everything that is decided before drawing. Head coordinates: origin at its centre, head radius 1, tilt 0."""

    pose: str
    ears: str
    coat: str
    centre: Points  # [2], of the head
    radius: float  # of the head
    tilt: float  # radians
    aspect: float  # width over height of the head
    fur: float  # strand length, in head radii
    spots: Points  # [n, 3]: x, y, radius of patches, in head coordinates
    stripe: tuple[float, float, float]  # waves per radius, phase, wobble
    pale_muzzle: bool
    eye: tuple[float, float, float]  # distance from the middle, height, radius, in head coordinates
    slit_pupils: bool
    num_whiskers: int  # on each side
    colours: NDArray[np.uint8]  # [256, 3], of the inks

    def place(self, points: Points) -> Points:
        """From head coordinates to the image."""
        return self.centre + turned(points, self.tilt) * self.radius

    def ink_of(self, positions: Points, shades: Points) -> Inks:
        """The fur's ink at places in the image ``[n, 2]`` for shades ``[n]``."""
        x, y = np.moveaxis(turned((positions - self.centre) / self.radius, -self.tilt), -1, 0)
        if self.coat == "patches":
            second = (np.hypot(x[:, None] - self.spots[:, 0], y[:, None] - self.spots[:, 1]) < self.spots[:, 2]).any(1)
        elif self.coat == "stripes":
            waves, phase, wobble = self.stripe
            second = np.sin(waves * y + phase + wobble * np.abs(x)) > 0.25
        elif self.coat == "mask":
            second = (np.hypot(np.abs(x) - self.eye[0], y - self.eye[1]) < 0.42) | (y < -0.85) | (y > 1.5)
        elif self.coat == "split":
            second = x + 0.15 * np.sin(5 * y) > 0.1
        else:
            second = np.zeros(x.shape, bool)
        colour = np.where(second, SECOND, MAIN)
        if self.pale_muzzle:
            colour = np.where(np.hypot(x / 0.5, (y - 0.42) / 0.4) < 1, PALE, colour)
        return fur_ink(colour, shades)


def fur_ink(colour: Inks, shades: Points) -> Inks:
    """The ink of a coat colour (MAIN, SECOND, ...) at a shade in 0..1."""
    return 1 + colour * NUM_SHADES + np.minimum((shades * NUM_SHADES).astype(np.int64), NUM_SHADES - 1)


def _dark(rng: np.random.Generator, colour: NDArray[np.float64]) -> NDArray[np.float64]:
    """The colour ``[3]`` more vivid, at a brightness that no ground has."""
    vivid = np.clip(colour.mean() + (colour - colour.mean()) * 1.4, 10, 255)
    return np.asarray(np.clip(vivid * (rng.uniform(35, 75) / float(vivid.mean())), 5, 200), np.float64)


def _colours(rng: np.random.Generator) -> NDArray[np.uint8]:
    """The colour of each ink ``[256, 3]``."""
    main = _dark(rng, any_colour(rng, natural=0.7))
    second = _dark(rng, any_colour(rng, natural=1.0))
    if np.linalg.norm(second - main) < 40:
        second = main * 0.45 if main.mean() > 55 else main * 0.7 + 35
    # Muzzle and ears take after the fur. In colours of their own, the same on all animals, they would go well
    # with any head, and a background could wear them.
    pale = main * 0.8 + 20
    skin = main * 0.6 + np.array([60.0, 38, 36]) * rng.uniform(0.75, 1.05)

    table = np.zeros((256, 3))
    shade = (np.arange(NUM_SHADES) + 0.5)[:, None] / NUM_SHADES
    for i, colour in enumerate((main, second, pale, skin)):
        # Lit tips go towards warm white, not just brighter: dark fur would show no strands otherwise.
        lift = np.array([32, 30, 26]) * (1 - colour.mean() / 255)
        lit = colour * (0.5 + 0.75 * shade) + lift * shade**2
        table[1 + i * NUM_SHADES : 1 + (i + 1) * NUM_SHADES] = lit
    irises = ((178, 130, 40), (92, 140, 70), (80, 130, 176), (110, 72, 40), (56, 42, 34))
    noses = ((206, 120, 122), (150, 92, 76), (34, 28, 28))

    def soft(colour: NDArray[np.float64] | tuple[int, ...], strength: float) -> NDArray[np.float64]:
        """Tinted by the fur around it."""
        fur = table[1 + MAIN * NUM_SHADES + NUM_SHADES // 2]
        return np.asarray(fur * (1 - strength) + np.asarray(colour) * strength, np.float64)

    table[EYE_RIM] = soft(main * 0.3, 0.2)
    table[IRIS] = soft(vary(rng, irises[rng.integers(5)], 12), 0.4)
    table[PUPIL] = soft((10, 8, 10), 0.4)
    table[GLINT] = soft((250, 250, 250), 0.1)
    table[NOSE] = soft(vary(rng, noses[rng.integers(3)], 10), 0.4)
    table[NOSE_SHINE] = table[NOSE] * 0.8 + 30
    table[MOUTH] = soft(main * 0.25, 0.3)
    table[WHISKER] = soft((244, 242, 236) if rng.random() < 0.3 else (40, 36, 36), 0.6)
    return table.clip(0, 255).round().astype(np.uint8)


def design(rng: np.random.Generator) -> Creature:
    """Decides on a creature."""
    pose = POSES[rng.choice(3, p=(0.3, 0.35, 0.35))]
    ears = EARS[rng.choice(4, p=(0.3, 0.35, 0.22, 0.13))]
    radius, centre_y = {"portrait": (0.235, 0.48), "ball": (0.29, 0.51), "sitting": (0.198, 0.37)}[pose]
    if ears == "long":
        radius, centre_y = radius * 0.92, centre_y + 0.07
    colours = _colours(rng)
    return Creature(
        pose=pose,
        ears=ears,
        coat=COATS[rng.choice(5, p=(0.6, 0.1, 0.12, 0.1, 0.08))],
        centre=np.array([0.5, centre_y]) + rng.uniform(-0.045, 0.045, 2),
        radius=radius * rng.uniform(1.0, 1.23),
        tilt=rng.uniform(-0.3, 0.3),
        aspect=rng.uniform(1.0, 1.2),
        fur=rng.uniform(0.13, 0.3),
        spots=np.stack([rng.uniform(-1.1, 1.1, 6), rng.uniform(-1.2, 2.6, 6), rng.uniform(0.35, 0.7, 6)], -1),
        stripe=(rng.uniform(7, 12), rng.uniform(0, 6.28), rng.uniform(-3, 3)),
        pale_muzzle=bool(rng.random() < 0.6),
        eye=(rng.uniform(0.36, 0.46), rng.uniform(-0.2, -0.05), rng.uniform(0.18, 0.25)),
        slit_pupils=bool(rng.random() < 0.3),
        num_whiskers=int(rng.integers(2, 7)),
        colours=colours,
    )


def _pelt(creature: Creature, outline: Points, flow: tuple[float, float], fur: float | Points = 1.0) -> Pelt:
    """A pelt from an outline and a flow in head coordinates; ``fur`` is relative to the creature's."""
    placed = creature.place(outline)
    x, y = placed[:, 0], placed[:, 1]
    area = abs(float(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1)))) / 2
    return Pelt(
        outline=placed,
        centre=placed.mean(0),
        flow=turned(np.array(flow), creature.tilt),
        fur=np.broadcast_to(np.asarray(fur) * creature.fur * creature.radius, len(placed)),
        num_strands=round(20 + 1500 * area),
        strand_width=0.08 * creature.radius,
    )


def _ear(kind: str, side: int) -> tuple[Points, tuple[float, float]]:
    """Outline and flow of an ear in head coordinates; ``side`` is -1 or 1."""
    if kind == "round":
        return ellipse((side * 0.74, -0.76), (0.4, 0.38)), (side * 0.3, -0.3)
    if kind == "floppy":
        return ellipse((side * 1.02, -0.02), (0.3, 0.68), -side * 0.25), (side * 0.2, 0.9)
    if kind == "long":
        return ellipse((side * 0.5, -1.15), (0.32, 0.62), side * 0.22), (side * 0.2, -0.9)
    corners = np.array([[0.22, -0.72], [0.5, -1.2], [0.82, -1.5], [1.0, -1.05], [1.02, -0.3], [0.6, -0.4]])
    at = np.arange(24) / 4
    outline = np.stack([np.interp(at, np.arange(7), np.append(c, c[0])) for c in corners.T], -1)
    return outline * np.array([side, 1.0]), (side * 0.3, -0.8)


def _draw_ears(canvas: Canvas, creature: Creature, rng: np.random.Generator, density: float) -> None:
    for side in (-1, 1):
        outline, flow = _ear(creature.ears, side)
        canvas.grow_on(_pelt(creature, outline, flow, 0.55), rng, density, creature.ink_of)
        if creature.ears != "floppy":
            middle = outline.mean(0) * np.array([1.0, 1.03])
            inner = _pelt(creature, middle + (outline - outline.mean(0)) * 0.55, flow, 0.4)
            canvas.grow_on(inner, rng, density, lambda at, shades: fur_ink(np.full(len(at), SKIN), shades))


def _draw_body(canvas: Canvas, creature: Creature, rng: np.random.Generator, density: float) -> None:
    """What is behind or below the head: a chest that leaves the image, feet, or a sitting body."""
    parts: list[tuple[Points, tuple[float, float], float]] = []
    if creature.pose == "ball":
        parts = [(ellipse((side * 0.42, 0.98), (0.3, 0.2)), (0.0, 0.4), 0.4) for side in (-1, 1)]
    elif creature.pose == "portrait":
        parts = [(ellipse((0.0, 1.75), (1.0, 1.25), n=NUM_OUTLINE_POINTS), (0.0, 1.0), 1.1)]
    else:
        parts = [
            (ellipse((0.0, 1.55), (1.02, 1.2), n=NUM_OUTLINE_POINTS), (0.0, 1.0), 1.0),
            (ellipse((-0.45, 2.55), (0.36, 0.24)), (0.0, 0.6), 0.4),
            (ellipse((0.45, 2.55), (0.36, 0.24)), (0.0, 0.6), 0.4),
        ]
    for outline, flow, fur in parts:
        canvas.grow_on(_pelt(creature, outline, flow, fur), rng, density, creature.ink_of)


def _draw_face(canvas: Canvas, creature: Creature) -> None:
    """Eyes, nose and mouth."""
    eye_x, eye_y, eye_r = creature.eye
    for side in (-1, 1):
        x = side * eye_x
        pupil = (0.3, 0.75) if creature.slit_pupils else (0.6, 0.62)
        canvas.fill(creature.place(ellipse((x, eye_y), (eye_r * 1.22, eye_r * 1.22))), EYE_RIM)
        canvas.fill(creature.place(ellipse((x, eye_y), (eye_r, eye_r))), IRIS)
        canvas.fill(creature.place(ellipse((x, eye_y), (eye_r * pupil[0], eye_r * pupil[1]))), PUPIL)
        canvas.fill(creature.place(ellipse((x - 0.35 * eye_r, eye_y - 0.4 * eye_r), (0.3 * eye_r, 0.3 * eye_r))), GLINT)
    smile = np.array([[-0.24, 0.6], [-0.12, 0.66], [0.0, 0.56], [0.0, 0.42], [0.0, 0.56], [0.12, 0.66], [0.24, 0.6]])
    canvas.line(creature.place(smile), 0.045 * creature.radius, MOUTH)
    nose = np.array([[-0.17, 0.27], [-0.08, 0.23], [0.08, 0.23], [0.17, 0.27], [0.1, 0.38], [0.0, 0.45], [-0.1, 0.38]])
    canvas.fill(creature.place(nose), NOSE)
    canvas.fill(creature.place(ellipse((-0.04, 0.275), (0.07, 0.025), n=10)), NOSE_SHINE)


def _draw_whiskers(canvas: Canvas, creature: Creature, rng: np.random.Generator) -> None:
    n = 2 * creature.num_whiskers
    u = rng.random((n, 4))
    side = np.where(np.arange(n) % 2, 1.0, -1.0)
    rank = np.arange(n) // 2 / (creature.num_whiskers - 1) - 0.5
    roots = np.stack([side * (0.26 + 0.14 * u[:, 0]), 0.45 + 0.24 * rank], -1)
    angle = 0.75 * rank + 0.3 * (u[:, 1] - 0.5)
    ahead = np.stack([side * np.cos(angle), np.sin(angle)], -1) * (1.0 + 0.5 * u[:, 2:3])
    droop = np.array([0.0, 1.0]) * (0.35 * u[:, 3:] - 0.1)
    # Thinner than a pixel at every resolution: matting is about what no pixel shows whole.
    width = min(0.01, 0.9 / canvas.resolution)
    whiskers = Strands(
        roots=creature.place(roots),
        middles=creature.place(roots + ahead * 0.55 - droop * 0.5),
        tips=creature.place(roots + ahead + droop),
        half_widths=np.full(n, width / 2),
        shades=np.ones(n),
    )
    canvas.draw_strands(whiskers, np.full(n, WHISKER))


def _draw_creature(creature: Creature, rng: np.random.Generator, resolution: int) -> Canvas:
    canvas = Canvas(resolution, factor=8 if resolution <= 64 else 4)
    # Below 128 pixels more strands than could be told apart: fur that is finer than a pixel is smooth.
    times = resolution / MIN_RESOLUTION
    density = max(MIN_DENSITY, float(np.sqrt(times) * np.sqrt(np.sqrt(times))))
    # One generator a part: a finer image draws more numbers in a part and must not shift the next one.
    body, ears, head, whiskers = rng.spawn(4)
    _draw_body(canvas, creature, body, density)
    if creature.ears != "floppy":
        _draw_ears(canvas, creature, ears, density)
    outline = ellipse((0.0, 0.0), (creature.aspect, 1.0), n=NUM_OUTLINE_POINTS)
    cheeks = 0.65 + 0.55 * np.abs(outline[:, 0]) * (outline[:, 1] > -0.3)
    canvas.grow_on(_pelt(creature, outline, (0.0, 0.25), cheeks), head, density, creature.ink_of)
    if creature.ears == "floppy":
        _draw_ears(canvas, creature, ears, density)
    _draw_face(canvas, creature)
    _draw_whiskers(canvas, creature, whiskers)
    return canvas


@dataclass(frozen=True, eq=False)
class Layers:
    """An image before it is put together.

    Attributes:
        foreground: the creature's colour times its coverage, uint8 ``[R, R, 3]``.
        alpha: its coverage, uint8 ``[R, R]``.
        background: uint8 ``[R, R, 3]``.
        dark_fur: the coat's colour where little light falls, uint8 ``[3]``.
        metadata: what was drawn.
    """

    foreground: NDArray[np.uint8]
    alpha: NDArray[np.uint8]
    background: NDArray[np.uint8]
    dark_fur: NDArray[np.uint8]
    metadata: Mapping[str, Any]

    def image(self) -> NDArray[np.uint8]:
        """The composite, uint8 ``[R, R, 3]``."""
        rest = (255 - self.alpha.astype(np.int32))[..., None]
        image = self.foreground + (self.background * rest + 127) // 255
        return image.clip(0, 255).astype(np.uint8)


def draw_layers(index: int, *, seed: int, resolution: int) -> Layers:
    """One creature and what is behind it: a pure function of its arguments, which are those of `draw`."""
    if not MIN_RESOLUTION <= resolution <= MAX_RESOLUTION:
        raise UserError(f"furballs: resolution {resolution} is outside {MIN_RESOLUTION} to {MAX_RESOLUTION}")
    if index < 0 or seed < 0:
        raise UserError(f"furballs: index {index} and seed {seed} must not be negative")
    scene, fur, behind = np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, index)))).spawn(3)
    creature = design(scene)
    foreground, alpha = _draw_creature(creature, fur, resolution).resolve(creature.colours)
    background, kind = draw_background(behind, resolution)
    metadata = {
        "source": "furballs",
        "seed": seed,
        "index": index,
        "background": kind,
        "pose": creature.pose,
        "ears": creature.ears,
        "coat": creature.coat,
    }
    return Layers(foreground, alpha, background, creature.colours[1 + MAIN * NUM_SHADES], metadata)


def draw(index: int, *, seed: int, resolution: int) -> Sample:
    """One creature with its ground-truth alpha: a pure function of its arguments.

    Args:
        index: which image; any number from 0.
        seed: which data set, from 0.
        resolution: side in pixels, 32 to 512. The same creature is drawn at each, more or less finely.

    Returns:
        ``image`` uint8 ``[R, R, 3]``, ``alpha`` uint8 ``[R, R]`` (255 is opaque) and what was drawn as metadata.
    """
    layers = draw_layers(index, seed=seed, resolution=resolution)
    return Sample(layers.image(), layers.alpha, layers.metadata)


@dataclass(frozen=True, kw_only=True)
class Furballs(Source):
    """The built-in creatures, drawn with their ground-truth alpha; they need no files."""

    kind = "furballs"

    num_images: int = 4096
    """How many to draw."""

    def references(self) -> Sequence[str]:
        """See `Source.references`: numbers."""
        if not MIN_RESOLUTION <= self.resolution <= MAX_RESOLUTION:
            raise UserError(
                f"--resolution {self.resolution}: furballs are drawn at {MIN_RESOLUTION} to {MAX_RESOLUTION}"
            )
        if self.num_images < 1:
            raise UserError(f"--num-images {self.num_images} is not positive; give 1 or more")
        return [f"{number:08d}" for number in range(self.num_images)]

    def other_inputs(self) -> Sequence[str]:
        """See `Source.other_inputs`: the way of drawing."""
        return [f"furballs version {VERSION}"]

    def read(self, reference: str) -> Picture:
        """See `Source.read`."""
        sample = draw(int(reference), seed=self.seed, resolution=self.resolution)
        alpha = None if sample.alpha is None else Image.fromarray(sample.alpha)
        return Picture(Image.fromarray(sample.image), alpha, metadata=sample.metadata)
