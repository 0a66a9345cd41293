"""The report of an evaluation: one self-contained HTML page."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from models.generator import GeneratorOutput
from pipeline.evaluation.charts import distributions
from pipeline.evaluation.measure import Generated, Plan
from pipeline.evaluation.pictures import generate, to_uint8
from pipeline.evaluation.pseudo_truth import Segmentation
from pipeline.evaluation.tables import make_tables

NUM_RANDOM, NUM_EXTREME = 8, 4

AGREED, MASK_ONLY, TRUTH_ONLY = (15, 139, 141), (240, 120, 40), (122, 70, 200)
"""Tints of the overlay."""

ZOOM_SHARE, MIN_ZOOM = 1 / 4, 12
LOSSY_FROM = 256
"""Side in pixels from which images are compressed with loss."""

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Tile:
    """An image of a sample, and what it is."""

    label: str
    uri: str
    kind: str = "plain"


@dataclass(frozen=True)
class Strip:
    """All that is shown of one sample."""

    caption: str
    tiles: tuple[Tile, ...]


@dataclass(frozen=True)
class Gallery:
    """Samples under a heading."""

    title: str
    note: str
    strips: tuple[Strip, ...]


def render_report(
    results: Mapping[str, Any], measured: Sequence[Generated], plan: Plan, truths: Mapping[str, Segmentation]
) -> str:
    """The page.

    Args:
        results: the figures.
        measured: what they come from, by truncation.
        plan: run and seed, from which the samples shown are drawn again.
        truths: pseudo ground truths; the first one decides which samples are best and worst.
    """
    environment = Environment(
        loader=PackageLoader("pipeline.evaluation", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template = environment.get_template("report.html")
    truth = next(iter(truths.items()), None)
    return template.render(
        results=results,
        headline=_headline(results, truth and truth[0]),
        tables=make_tables(results),
        charts=distributions(measured),
        galleries=_galleries(measured, plan, truth),
        truth=truth and truth[0],
        tints={
            "both": _css(AGREED),
            "the mask alone": _css(MASK_ONLY),
            "the pseudo ground truth alone": _css(TRUTH_ONLY),
        },
    )


def _headline(results: Mapping[str, Any], truth: str | None) -> list[tuple[str, str, str]]:
    """The first figures that one wants to know: name, value, and what of."""
    at = results["generated"][0]
    psi = f"psi {at['psi']}"
    tiles = []
    if truth is not None:
        figures = at["masks"][truth]
        tiles += [
            ("mIoU", f"{figures['miou']:.3f}", f"against {truth}, {psi}"),
            ("IoU", f"{figures['iou_fg']:.3f} / {figures['iou_bg']:.3f}", "foreground / background"),
            ("MSE in the unknown band", f"{figures['mse_unknown'] * 1000:.1f} × 10⁻³", "hair, fur, whiskers"),  # noqa: RUF001
        ]
    images = at["images"].get("foreground", {})
    for name, title in (("fid", "FID"), ("frechet_distance", "Fréchet distance")):
        if name in images:
            tiles.append((title, f"{images[name]:.4g}", f"foregrounds, {psi}"))
    tiles.append(("Foreground", f"{at['area_mean']:.0%}", f"of an image, ± {at['area_std']:.0%}"))
    return tiles


def _galleries(measured: Sequence[Generated], plan: Plan, truth: tuple[str, Segmentation] | None) -> list[Gallery]:
    galleries = []
    num_random = min(NUM_RANDOM, plan.num_samples)
    for generated in measured:
        strips = _strips(range(num_random), generated, plan, truth)
        note = "The first samples as they come; the same latents at each psi."
        galleries.append(Gallery(f"Random samples, psi {generated.psi}", note, strips))
    if truth is not None:
        generated = measured[0]
        order = np.argsort(generated.scores[truth[0]].miou, kind="stable")
        num = min(NUM_EXTREME, len(order))
        note = f"Of {len(order):,} samples, by mIoU against {truth[0]}."
        for title, chosen in (("Best", order[::-1][:num]), ("Worst", order[:num])):
            strips = _strips([int(i) for i in chosen], generated, plan, truth)
            galleries.append(Gallery(f"{title} samples, psi {generated.psi}", note, strips))
    return galleries


def _strips(
    samples: Sequence[int], generated: Generated, plan: Plan, truth: tuple[str, Segmentation] | None
) -> tuple[Strip, ...]:
    out = generate(plan.run, samples, psi=generated.psi, seed=plan.seed)
    mask = (out.mask > plan.threshold)[:, 0].cpu().numpy()
    true = None if truth is None else (truth[1](out.foreground) > plan.threshold)[:, 0].cpu().numpy()
    strips = []
    for i, sample in enumerate(samples):
        caption = f"#{sample} · area {generated.areas[sample]:.0%}"
        if truth is not None:
            caption = f"#{sample} · mIoU {generated.scores[truth[0]].miou[sample]:.3f} · {caption.split(' · ')[1]}"
        strips.append(Strip(caption, _tiles(out, i, mask[i], None if true is None else true[i])))
    return tuple(strips)


def _tiles(out: GeneratorOutput, i: int, mask: NDArray[np.bool_], true: NDArray[np.bool_] | None) -> tuple[Tile, ...]:
    """Images of sample `i`; its mask and that of the pseudo ground truth are thresholded."""
    foreground, composite = (
        to_uint8(images[i : i + 1])[0].permute(1, 2, 0).cpu().numpy() for images in (out.foreground, out.composite)
    )
    alpha = (out.mask[i, 0].float() * 255).round().to(torch.uint8).cpu().numpy()
    cutout = np.dstack([foreground, alpha])
    tiles = [Tile("foreground", _uri(foreground)), Tile("alpha", _uri(alpha))]
    if true is not None:
        tiles.append(Tile("overlay", _uri(_overlay(foreground, mask, true))))
    return (
        *tiles,
        Tile("cut-out", _uri(cutout), "cutout"),
        Tile("hair", _uri(_zoom(cutout)), "cutout"),
        Tile("composite", _uri(composite)),
    )


def _overlay(image: Pixels, mask: NDArray[np.bool_], true: NDArray[np.bool_]) -> Pixels:
    grey = np.repeat(image.mean(axis=2, keepdims=True), 3, axis=2)
    tinted = 0.75 * grey + 40
    for where, tint, strength in (
        (mask & true, AGREED, 0.4),
        (mask & ~true, MASK_ONLY, 0.75),
        (~mask & true, TRUTH_ONLY, 0.75),
    ):
        tinted[where] = (1 - strength) * tinted[where] + strength * np.array(tint)
    return np.asarray(tinted.clip(0, 255).round(), np.uint8)


def _zoom(cutout: Pixels) -> Pixels:
    """The part of the cut-out with the most pixels that are neither opaque nor transparent."""
    size = len(cutout)
    side = min(size, max(MIN_ZOOM, round(size * ZOOM_SHARE)))
    alpha = cutout[..., 3] / 255.0
    softness = ndimage.uniform_filter(alpha * (1 - alpha), side, mode="constant")
    y, x = (min(max(int(at) - side // 2, 0), size - side) for at in divmod(int(softness.argmax()), size))
    return cutout[y : y + side, x : x + side]


def _uri(pixels: Pixels) -> str:
    encoded = io.BytesIO()
    lossless = len(pixels) < LOSSY_FROM
    Image.fromarray(pixels).save(encoded, format="webp", lossless=lossless, quality=90 if not lossless else 60)
    return "data:image/webp;base64," + base64.b64encode(encoded.getvalue()).decode()


def _css(colour: tuple[int, int, int]) -> str:
    return f"rgb{colour}"
