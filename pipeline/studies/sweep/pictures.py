"""Figures of a sweep: parallel coordinates by Optuna, and the objective over each parameter."""

import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import optuna
from matplotlib.ticker import NullFormatter
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.visualization import matplotlib as optuna_plots

from data_shards.files import whole_file
from pipeline.studies.sweep.records import Record
from pipeline.studies.sweep.space import MIOU, UNLABELLED, ends, is_logarithmic


def draw_parallel_coordinates(records: Sequence[Record], space: Mapping[str, str], metric: str, path: Path) -> None:
    """Each trial a line through its parameters, coloured by the objective.

    Args:
        records: of trials that were measured.
        space: that was searched.
        metric: the objective.
        path: PNG to write.
    """
    with _quiet():
        axes = optuna_plots.plot_parallel_coordinate(_study(records, space, metric), target_name=metric)
    axes.figure.set_size_inches(3 + 2 * len(space), 6)
    _save(axes.figure, path)


def draw_slices(records: Sequence[Record], space: Mapping[str, str], metric: str, path: Path) -> None:
    """The objective over each parameter; arguments as above."""
    figure, row = plt.subplots(1, len(space), figsize=(1 + 2.6 * len(space), 3.2), sharey=True, squeeze=False)
    for axes, (field, distribution) in zip(row[0], space.items(), strict=True):
        axes.scatter([r.parameters[field] for r in records], [r.metrics[metric] for r in records], s=24)
        if is_logarithmic(distribution):
            axes.set_xscale("log")
            axes.xaxis.set_minor_formatter(NullFormatter())  # they would run into each other
        axes.set_xlabel(field)
        axes.grid(alpha=0.3)
    row[0, 0].set_ylabel(metric)
    figure.tight_layout()
    _save(figure, path)


def draw_scatter(scores: Sequence[float], true: Sequence[float], rho: float, path: Path) -> None:
    """The score that needs no labels over the mIoU that does, each trial a point.

    Args:
        scores: without labels.
        true: mIoU.
        rho: Spearman's, of the two.
        path: PNG to write.
    """
    figure, axes = plt.subplots(figsize=(5, 5))
    axes.scatter(true, scores, s=24)
    axes.set_xlabel(MIOU)
    axes.set_ylabel(UNLABELLED)
    axes.set_title(f"{len(scores)} trials, Spearman's rho {rho:.2f}")
    axes.grid(alpha=0.3)
    figure.tight_layout()
    _save(figure, path)


def _study(records: Sequence[Record], space: Mapping[str, str], metric: str) -> optuna.Study:
    study = optuna.create_study(direction="maximize")
    names = {field: field.rpartition(".")[2] for field in space}  # Optuna cuts long ones off
    distributions = {names[field]: _distribution(field, space[field], records) for field in space}
    for record in records:
        params = {name: record.parameters[field] for field, name in names.items()}
        study.add_trial(
            optuna.trial.create_trial(params=params, distributions=distributions, value=record.metrics[metric])
        )
    return study


def _distribution(field: str, distribution: str, records: Sequence[Record]) -> BaseDistribution:
    """As Optuna has it; wide enough for what population-based training made of it."""
    if distribution.startswith("choice"):
        return CategoricalDistribution(ends(field, distribution))
    values: list[Any] = [*ends(field, distribution), *(record.parameters[field] for record in records)]
    kind: Any = IntDistribution if all(isinstance(value, int) for value in values) else FloatDistribution
    return kind(min(values), max(values), log=is_logarithmic(distribution))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Optuna says of each of its matplotlib functions that it may change."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    logging.getLogger("matplotlib").setLevel(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        warnings.filterwarnings("ignore", "Attempting to set identical")  # a field of one value
        yield


def _save(figure: Any, path: Path) -> None:
    with whole_file(path) as partial:
        figure.savefig(partial, dpi=110, format="png", bbox_inches="tight")
    plt.close(figure)
