"""The search space: fields of the configuration tree, each with a distribution.

A distribution is written as in Ray Tune: ``uniform(0.1, 0.5)``, ``loguniform(1e-3, 1)``, ``quniform``, ``randint``,
``lograndint`` (the upper end is not drawn), ``choice(0.2, 0.35)``.
"""

import ast
from collections.abc import Mapping, Sequence
from typing import Any

from data_shards.errors import UserError
from pipeline.config import Config
from pipeline.config.files import config_from_dict, config_to_dict, flatten, merge

MIOU, UNLABELLED = "mask/miou", "unlabelled/score"
"""Metrics that decide: against pseudo ground truth, and without labels."""

DISTRIBUTIONS = {"uniform": 2, "loguniform": 2, "quniform": 3, "randint": 2, "lograndint": 2, "choice": None}
"""Of `ray.tune`, and how many numbers each takes; None: one or more."""

_ALIGNED = {
    "loss.phi1": "uniform(0.1, 0.6)",
    "loss.binarization_start": "loguniform(0.5, 20)",
    "loss.binarization_end": "loguniform(0.1, 5)",
    "loss.binarization_iterations": "lograndint(500, 20000)",
    "loss.phi2": "loguniform(0.001, 0.1)",
}
_UNALIGNED = _ALIGNED | {"loss.phi1": "uniform(0.05, 0.4)"}

SEARCHED: dict[str, dict[str, str]] = {
    "furballs": _ALIGNED,
    "ffhq": _ALIGNED,
    "afhqv2_cat": _ALIGNED,
    "lsun_horse": _UNALIGNED,
    "lsun_church": _UNALIGNED,
    "lsun_cat": _UNALIGNED,
    "cub": _UNALIGNED,
    "compcars": _UNALIGNED,
}
"""What is searched by default, by dataset: area threshold, start, floor and length of binarization, fine threshold.
Objects in unaligned images are smaller, so their area thresholds are."""

PBT_MUTATIONS = {"loss.r1": "loguniform(0.01, 10)", "loss.binarization_end": "loguniform(0.1, 5)"}
"""What population-based training changes of a trial that takes over another one's weights."""

TRIAL_STEPS: dict[str, int] = {"furballs": 600}
"""Iterations of a trial by default, by data set."""
DEFAULT_TRIAL_STEPS = 30_000
"""A tenth of the paper's training: masks are there long before images are sharp."""


def trial_steps(dataset: str) -> int:
    """Iterations of a trial on a data set, unless told otherwise."""
    return TRIAL_STEPS.get(dataset, DEFAULT_TRIAL_STEPS)


def make_space(tree: Config, searched: Sequence[str]) -> dict[str, str]:
    """Fields with their distributions: those of the data set, and those that are asked for besides or instead.

    Args:
        tree: what the searched fields are changed of.
        searched: ``field=distribution`` each; ``field=none`` leaves one of the data set's out.

    Raises:
        UserError: a field or a distribution does not exist, or a field cannot take an end of its distribution.
    """
    space = dict(SEARCHED[tree.dataset])
    for one in searched:
        field, _, distribution = one.partition("=")
        if not distribution:
            raise UserError(f"--search {one}: write field=distribution, such as loss.phi1=uniform(0.1,0.5)")
        if distribution == "none":
            space.pop(field, None)
        else:
            space[field] = distribution
    if not space:
        raise UserError("nothing is left to search: give --search field=distribution")
    known = flatten(config_to_dict(tree))
    for field, distribution in space.items():
        if field not in known:
            raise UserError(f"--search {field}={distribution}: the configuration has no {field}, see --help")
        for value in ends(field, distribution):
            try:
                override(tree, {field: value})
            except UserError as error:
                raise UserError(f"--search {field}={distribution}: {value} is invalid ({error})") from None
    return space


def ends(field: str, distribution: str) -> list[Any]:
    """Least and greatest value of a distribution; all of a choice.

    Raises:
        UserError: it is no distribution.
    """
    name, numbers = _parse(field, distribution)
    if name == "choice":
        return numbers
    low, high = numbers[:2]
    return [low, high - 1] if name.endswith("randint") else [low, high]


def start_of(space: Mapping[str, str], tree: Config) -> dict[str, Any]:
    """Values of the configuration as it is, of the fields whose distributions hold them."""
    now, start = flatten(config_to_dict(tree)), {}
    for field, distribution in space.items():
        values = ends(field, distribution)
        is_held = now[field] in values if distribution.startswith("choice") else values[0] <= now[field] <= values[1]
        if is_held:
            start[field] = now[field]
    return start


def to_ray(space: Mapping[str, str]) -> dict[str, Any]:
    """The space as Ray Tune takes it."""
    from ray import tune

    domains = {}
    for field, distribution in space.items():
        name, numbers = _parse(field, distribution)
        domains[field] = tune.choice(numbers) if name == "choice" else getattr(tune, name)(*numbers)
    return domains


def is_logarithmic(distribution: str) -> bool:
    """Whether values are drawn evenly on a logarithmic scale."""
    return distribution.startswith("log")


def override(tree: Config, fields: Mapping[str, Any]) -> Config:
    """The configuration with some fields changed.

    Args:
        tree: stays as it is.
        fields: by dotted name.

    Raises:
        UserError: a value is invalid.
    """
    values = config_to_dict(tree)
    for field, value in fields.items():
        nested: Any = value
        for key in reversed(field.split(".")):
            nested = {key: nested}
        values = merge(values, nested)
    return config_from_dict(values)


def _parse(field: str, distribution: str) -> tuple[str, list[Any]]:
    """Name and numbers of ``name(number, ...)``."""
    wrong = UserError(
        f"--search {field}={distribution} is no distribution: write one of "
        f"{', '.join(DISTRIBUTIONS)} with its numbers, such as uniform(0.1,0.5)"
    )
    try:
        call = ast.parse(distribution, mode="eval").body
        assert isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and not call.keywords
        name, numbers = call.func.id, [ast.literal_eval(argument) for argument in call.args]
        size = DISTRIBUTIONS[name]
    except (SyntaxError, ValueError, AssertionError, KeyError):
        raise wrong from None
    if not numbers or (size is not None and len(numbers) != size):
        raise wrong
    if name != "choice":
        if not all(isinstance(x, int | float) and not isinstance(x, bool) for x in numbers):
            raise wrong
        if not numbers[0] < numbers[1] or (is_logarithmic(name) and numbers[0] <= 0):
            raise UserError(
                f"--search {field}={distribution} is empty: give a lower and then an upper end"
                + (", both above 0" if is_logarithmic(name) else "")
            )
    return name, numbers
