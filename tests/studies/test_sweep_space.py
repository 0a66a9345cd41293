"""What a sweep searches is what was asked for, and a mistake in it is named before anything begins."""

from pathlib import Path

import pytest

from data_shards.errors import UserError
from pipeline.config import PRESETS, Config
from pipeline.config.command_line import parse_arguments
from pipeline.config.files import config_from_dict, config_to_dict, flatten
from pipeline.studies.sweep.options import SweepOptions
from pipeline.studies.sweep.space import SEARCHED, ends, make_space, override, start_of, to_ray
from pipeline.studies.sweep.sweep import sweep

DEFAULT = ("loss.phi1", "loss.binarization_start", "loss.binarization_end", "loss.binarization_iterations", "loss.phi2")


def preset(dataset: str) -> Config:
    return config_from_dict({"dataset": dataset, "data": "shards/mine"})


@pytest.mark.parametrize("dataset", PRESETS)
def test_each_data_set_searches_thresholds_and_binarization_around_its_preset(dataset: str) -> None:
    tree = preset(dataset)
    space = make_space(tree, [])
    assert set(space) == set(DEFAULT)
    now = flatten(config_to_dict(tree))
    for field, distribution in space.items():
        low, high = ends(field, distribution)
        assert low <= now[field] <= high, field


def test_fields_are_added_replaced_and_left_out() -> None:
    searched = ["loss.r1=loguniform(0.1, 10)", "loss.phi1=uniform(0.2, 0.3)", "loss.phi2=none"]
    space = make_space(preset("ffhq"), searched)
    assert space == {
        **{field: SEARCHED["ffhq"][field] for field in DEFAULT if field != "loss.phi2"},
        "loss.phi1": "uniform(0.2, 0.3)",
        "loss.r1": "loguniform(0.1, 10)",
    }


def test_draws_stay_within_the_ends_and_are_possible_configurations() -> None:
    tree = preset("ffhq")
    space = make_space(tree, ["loss.r1_interval=choice(8, 16)", "loss.fade_in_iterations=randint(1, 4)"])
    domains = to_ray(space)
    seen: dict[str, set[float]] = {field: set() for field in space}
    for _ in range(100):
        drawn = {field: domain.sample() for field, domain in domains.items()}
        now = flatten(config_to_dict(override(tree, drawn)))
        for field, value in drawn.items():
            assert now[field] == value
            seen[field].add(value)
    for field, values in seen.items():
        assert min(ends(field, space[field])) <= min(values) and max(values) <= max(ends(field, space[field]))
    assert seen["loss.r1_interval"] == {8, 16} and seen["loss.fade_in_iterations"] == {1, 2, 3}
    ratio = max(seen["loss.phi2"]) / min(seen["loss.phi2"])  # evenly over two decades
    assert ratio > 20


def test_a_sweep_begins_with_the_configuration_as_it_is_where_its_space_holds_that() -> None:
    tree = preset("ffhq")
    searched = ["loss.phi1=uniform(0.5, 0.6)", "loss.r1_interval=choice(16, 32)", "loss.consistency_interval=choice(4)"]
    start = start_of(make_space(tree, searched), tree)
    assert start == {
        "loss.binarization_start": 5.0,
        "loss.binarization_end": 0.5,
        "loss.binarization_iterations": 5000,
        "loss.phi2": 0.01,
        "loss.r1_interval": 16,
    }


def test_override_changes_the_named_fields_alone() -> None:
    tree = preset("cub")
    changed = override(tree, {"loss.phi1": 0.3, "seed": 7})
    before, after = flatten(config_to_dict(tree)), flatten(config_to_dict(changed))
    assert {name for name in before if before[name] != after[name]} == {"loss.phi1", "seed"}
    assert (after["loss.phi1"], after["seed"]) == (0.3, 7)


MISTAKES = {
    "loss.phi3=uniform(0,1)": "no loss.phi3",
    "loss.phi1": "write field=distribution",
    "loss.phi1=uniform(0,2)": "2 is invalid",
    "loss.phi1=uniform(0.5,0.1)": "is empty",
    "loss.phi2=loguniform(0,0.1)": "above 0",
    "loss.phi1=uniform(0.1)": "is no distribution",
    "loss.phi1=normal(0,1)": "is no distribution",
    "loss.phi1=__import__('os').getcwd()": "is no distribution",
    "loss.phi1=uniform(a,b)": "is no distribution",
    "loss.r1_interval=uniform(1.5,2.5)": "1.5 is invalid",
    "model.channel_base=choice(16)": "leaves no channels",
}


@pytest.mark.parametrize("searched", MISTAKES)
def test_mistake_in_the_space_is_named_before_anything_is_made(searched: str, tmp_path: Path) -> None:
    arguments = parse_arguments(SweepOptions, "", ["--search", searched])
    with pytest.raises(UserError) as error:
        sweep(arguments, tmp_path / "sweep")
    assert MISTAKES[searched] in str(error.value) and searched.partition("=")[0] in str(error.value)
    assert not (tmp_path / "sweep").exists()


def test_nothing_left_to_search_is_a_mistake() -> None:
    with pytest.raises(UserError, match="nothing is left"):
        make_space(preset("ffhq"), [f"{field}=none" for field in DEFAULT])


def test_optuna_suggests_within_the_space() -> None:
    from ray.tune.search.optuna import OptunaSearch

    space = make_space(preset("ffhq"), ["loss.r1_interval=choice(8, 16)"])
    searcher = OptunaSearch(space=to_ray(space), metric="mask/miou", mode="max", seed=0)
    for number in range(5):
        suggested = searcher.suggest(f"trial-{number}")
        assert suggested is not None and set(suggested) == set(space)
        override(preset("ffhq"), suggested)
        for field, value in suggested.items():
            assert min(ends(field, space[field])) <= value <= max(ends(field, space[field]))
        searcher.on_trial_complete(f"trial-{number}", {"mask/miou": 0.1 * number, "training_iteration": 1})
