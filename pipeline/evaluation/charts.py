"""Histograms over the samples as SVG for the report."""

import io
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from pipeline.evaluation.measure import Generated

COLOURS = ("#0f8b8d", "#e07a3f", "#7a5ea8", "#5b8c3a")  # told apart by the colour-blind too
INK = "#010203"
"""Stands for the page's own colour of text until the SVG is done."""

NUM_BINS = 30


def distributions(measured: Sequence[Generated]) -> list[tuple[str, str]]:
    """Charts as (title, SVG): mIoU and area of the samples, alpha of the pixels; a curve for each psi."""
    charts = []
    for truth in measured[0].scores:
        values = [generated.scores[truth].miou for generated in measured]
        low = min(0.95, *(float(v.min()) for v in values))
        edges = np.linspace(np.floor(low * 20) / 20, 1, NUM_BINS + 1)
        title = f"mIoU of each sample against {truth}"
        charts.append((title, _histogram(measured, values, edges, "mIoU")))
    edges = np.linspace(0, 1, NUM_BINS + 1)
    areas = [generated.areas for generated in measured]
    charts.append(("Share of each image that is foreground", _histogram(measured, areas, edges, "area")))
    charts.append(("Alpha of all pixels", _alpha(measured)))
    return charts


def _histogram(
    measured: Sequence[Generated], values: Sequence[NDArray[np.float64]], edges: NDArray[np.float64], label: str
) -> str:
    figure, axes = _axes(label, "samples")
    for generated, of_samples, colour in zip(measured, values, COLOURS * len(values), strict=False):
        counts, _ = np.histogram(of_samples, bins=edges)
        _steps(axes, counts, edges, colour, f"psi {generated.psi}")
    axes.legend(frameon=False, labelcolor=INK, loc="upper left")
    return _svg(figure)


def _alpha(measured: Sequence[Generated]) -> str:
    figure, axes = _axes("alpha", "share of pixels")
    for generated, colour in zip(measured, COLOURS * len(measured), strict=False):
        histogram = generated.alpha_histogram
        edges = np.linspace(0, 1, len(histogram) + 1)
        _steps(axes, histogram / histogram.sum(), edges, colour, f"psi {generated.psi}")
    axes.set_yscale("log")
    axes.legend(frameon=False, labelcolor=INK, loc="upper center")
    return _svg(figure)


def _steps(axes: Axes, heights: NDArray[np.generic], edges: NDArray[np.float64], colour: str, label: str) -> None:
    axes.stairs(heights, edges, fill=True, color=colour, alpha=0.22)
    axes.stairs(heights, edges, color=colour, linewidth=1.8, label=label)


def _axes(x: str, y: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(5.2, 3.0), layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(x, color=INK)
    axes.set_ylabel(y, color=INK)
    axes.tick_params(colors=INK, labelsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(INK)
    return figure, axes


def _svg(figure: Figure) -> str:
    drawn = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "furrygan"}):
        figure.savefig(drawn, format="svg", transparent=True, metadata={"Date": None})
    text = drawn.getvalue()
    return text[text.index("<svg") :].replace(INK, "currentColor")
