"""The configuration: presets, files and the command line in their order, and one line on each mistake."""

import ast
import inspect
import math
import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import yaml
from helpers import write_noise

from data_shards.errors import UserError
from pipeline.config import PRESETS, Bounds, Config
from pipeline.config import tree as config_module
from pipeline.config.command_line import parse_config
from pipeline.config.files import config_from_dict, config_to_dict, flatten, load_config, save_config

ALIGNED = ("ffhq", "afhqv2_cat")
UNALIGNED = ("lsun_horse", "lsun_church", "lsun_cat", "cub", "compcars")


def preset(name: str) -> Config:
    return config_from_dict({"dataset": name, "data": "shards/mine"})


def docstrings() -> dict[tuple[str, str], str]:
    """Of every dataclass field: (class, field) -> the string below it."""
    found = {}
    for node in ast.parse(inspect.getsource(config_module)).body:
        if not isinstance(node, ast.ClassDef):
            continue
        for field, below in zip(node.body, [*node.body[1:], None], strict=True):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                is_text = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
                found[node.name, field.target.id] = str(below.value.value) if is_text else ""
    return found


def leaves(section: Any = Config, prefix: str = "") -> Iterator[tuple[str, str, Any]]:
    """Dotted name, explanation and type of every field that is no section."""
    hints, explanations = get_type_hints(section, include_extras=True), docstrings()
    for field in fields(section):
        if is_dataclass(hints[field.name]):
            yield from leaves(hints[field.name], f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, explanations[section.__name__, field.name], hints[field.name]


def bounds_of(hint: Any) -> Bounds | None:
    """Also where the hint is one of a union."""
    if isinstance(hint, Bounds):
        return hint
    return next((found for part in get_args(hint) if (found := bounds_of(part))), None)


def nested(dotted: str, value: Any) -> dict[str, Any]:
    for key in reversed(dotted.split(".")):
        value = {key: value}
    return value


def get(config: Config, dotted: str) -> Any:
    return flatten(config_to_dict(config))[dotted]


def from_file(tmp_path: Path, text: str, *arguments: str) -> Config:
    path = tmp_path / "overrides.yaml"
    path.write_text(text)
    return parse_config("", ["--config", str(path), *arguments])


def assert_one_line(error: UserError, *words: str) -> None:
    text = str(error)
    assert "\n" not in text
    for word in words:
        assert word in text


# --- presets ---


def test_presets_are_those_of_the_issue() -> None:
    assert set(PRESETS) == {"furballs", *ALIGNED, *UNALIGNED}


@pytest.mark.parametrize("name", PRESETS)
def test_preset_is_valid_and_survives_yaml(name: str, tmp_path: Path) -> None:
    config = preset(name)
    save_config(config, tmp_path / "config.yaml")
    assert config_from_dict(load_config(tmp_path / "config.yaml")) == config


def test_awkward_values_survive_yaml(tmp_path: Path) -> None:
    config = config_from_dict(
        {
            "seed": 2**32 - 1,
            "run_dir": "runs/a: b #c",
            "cache_dir": "- 1",
            "data": "null",
            "flip": False,
            "optimizer": {"learning_rate": 1e-05, "ema_halflife_images": 1 / 3, "ema_rampup": None},
            "loss": {"r1": 1e22, "phi2": 0.1 + 0.2},
        }
    )
    save_config(config, tmp_path / "config.yaml")
    loaded = config_from_dict(load_config(tmp_path / "config.yaml"))
    assert loaded == config
    assert isinstance(loaded.run_dir, Path) and isinstance(loaded.cache_dir, Path)


@pytest.mark.parametrize("name", [*ALIGNED, *UNALIGNED])
def test_presets_for_photographs_hold_the_papers_constants(name: str) -> None:
    config = preset(name)
    assert (config.resolution, config.batch, config.steps, config.flip) == (256, 16, 300_000, True)
    model = config.model
    assert (model.channel_base, model.channel_max, model.z_dim, model.z_dim_background) == (32768, 512, 384, 128)
    optimizer = config.optimizer
    assert (optimizer.learning_rate, optimizer.ema_halflife_images, optimizer.ema_rampup) == (0.002, 5000, None)
    loss = config.loss
    assert (loss.r1, loss.r1_interval) == (1, 16)
    assert (loss.prediction, loss.consistency, loss.participation) == (1, 1, 1)
    assert (loss.consistency_interval, loss.participation_interval) == (2, 2)
    assert (loss.binarization_start, loss.binarization_iterations, loss.fade_in_iterations) == (5, 5000, 5000)
    assert (loss.area, loss.fine, loss.phi2) == (5, 5, 0.01)


@pytest.mark.parametrize("name", ALIGNED)
def test_aligned_presets_follow_the_aligned_recipe(name: str) -> None:
    loss = preset(name).loss
    assert (loss.binarization_end, loss.consistency_start, loss.area_over_batch, loss.phi1) == (0.5, 0, False, 0.35)


@pytest.mark.parametrize("name", UNALIGNED)
def test_unaligned_presets_follow_the_unaligned_recipe(name: str) -> None:
    loss = preset(name).loss
    assert (loss.binarization_end, loss.consistency_start, loss.area_over_batch) == (2.0, 5000, True)
    assert loss.phi1 == (0.15 if name == "cub" else 0.2)


def test_furballs_leave_the_paper_only_where_the_preset_says_so() -> None:
    paper, ours = (flatten(config_to_dict(preset(name))) for name in ("ffhq", "furballs"))
    sizes = {"dataset", "resolution", "steps", "model.channel_base", "model.channel_max"}
    schedules = {"loss.binarization_iterations", "loss.fade_in_iterations", "optimizer.ema_rampup"}
    weaker = {"loss.r1", "loss.phi1", "loss.binarization_start", "loss.binarization_end"}
    changed = {key for key in paper if paper[key] != ours[key] and not key.startswith(("log.", "evaluation."))}
    assert changed <= sizes | schedules | weaker


# --- the order of sources ---


def test_command_line_goes_over_file_goes_over_preset(tmp_path: Path) -> None:
    text = yaml.safe_dump({"dataset": "cub", "batch": 32, "loss": {"phi1": 0.3, "phi2": 0.02}})
    config = from_file(tmp_path, text, "--data", "x", "--batch", "64", "--loss.phi2", "0.03")
    assert (config.batch, config.loss.phi2) == (64, 0.03)  # command line
    assert (config.dataset, config.loss.phi1) == ("cub", 0.3)  # file
    assert (config.loss.consistency_start, config.loss.binarization_end) == (5000, 2.0)  # preset
    assert config.loss.area == 5.0  # default


def test_dataset_of_the_command_line_goes_over_that_of_the_file(tmp_path: Path) -> None:
    config = from_file(tmp_path, "dataset: ffhq\nsteps: 7", "--dataset", "lsun_cat", "--data", "x")
    assert (config.dataset, config.steps, config.loss.phi1) == ("lsun_cat", 7, 0.2)


def test_without_arguments_it_is_the_furballs_preset() -> None:
    assert parse_config("", []) == config_from_dict({})


def test_saved_configuration_is_accepted_back(tmp_path: Path) -> None:
    config = parse_config("", ["--dataset", "cub", "--data", "x", "--run-dir", "runs/a", "--no-flip"])
    save_config(config, tmp_path / "config.yaml")
    assert parse_config("", ["--config", str(tmp_path / "config.yaml")]) == config


def test_resume_takes_the_runs_own_configuration(tmp_path: Path) -> None:
    saved = config_from_dict({"dataset": "cub", "data": "x", "seed": 5, "run_dir": "elsewhere"})
    save_config(saved, tmp_path / "config.yaml")
    config = parse_config("", ["--resume", str(tmp_path), "--steps", "9"])
    assert (config.dataset, config.seed, config.steps, config.run_dir) == ("cub", 5, 9, tmp_path)


@pytest.mark.parametrize(
    ("flag", "text", "value"),
    [
        ("--data", "shards/x", "shards/x"),
        ("--resolution", "64", 64),
        ("--batch", "32", 32),
        ("--steps", "7", 7),
        ("--seed", "3", 3),
        ("--run-dir", "runs/x", "runs/x"),
    ],
)
def test_common_overrides_are_short(flag: str, text: str, value: Any) -> None:
    assert get(parse_config("", [flag, text]), flag.removeprefix("--").replace("-", "_")) == value


def test_every_field_can_be_set_from_the_command_line() -> None:
    before = config_from_dict({"data": "x"})
    chosen = {"dataset": "cub", "loader": "webdataset", "precision": "bf16"}
    chosen |= {"resolution": "64", "model.z_dim_background": "64", "backend": "deepspeed", "log.on_save_error": "stop"}
    chosen |= {"log.profile_at": "7"}
    besides = {"zero_stage": ["--backend", "deepspeed"]}
    tagged = parse_config("", ["--data", "x", "--log.tags", "who", "me", "why", "to see"])
    assert tagged.log.tags == {"who": "me", "why": "to see"}
    for name, _, hint in leaves():
        if name == "log.tags":  # the one that takes any number of values
            continue
        flag, old = "--" + name.replace("_", "-"), get(before, name)
        if hint is bool:
            section, _, leaf = flag.removeprefix("--").rpartition(".")
            flag = f"--{section}.{'no-' if old else ''}{leaf}" if section else f"--{'no-' if old else ''}{leaf}"
            assert get(parse_config("", ["--data", "x", flag]), name) is not old
            continue
        new = chosen.get(name)
        if new is None:
            new = str(old * 2 or 1) if isinstance(old, int) else "0.25" if isinstance(old, float) else "other"
        arguments = ["--data", "x", flag, new, *besides.get(name, [])]
        assert str(get(parse_config("", arguments), name)) == new, name


def test_resolution_is_that_of_the_shards_unless_said(tmp_path: Path) -> None:
    shards = write_noise(tmp_path / "set", 64)
    assert parse_config("", ["--data", str(shards)]).resolution == 64
    assert parse_config("", ["--data", f"file://{shards}", "--dataset", "ffhq"]).resolution == 64
    assert parse_config("", ["--data", str(shards), "--resolution", "128"]).resolution == 128
    saved = tmp_path / "saved.yaml"
    saved.write_text(f"data: {shards}\nresolution: 256\n")
    assert parse_config("", ["--config", str(saved)]).resolution == 256
    assert parse_config("", ["--data", str(tmp_path)]).resolution == 32  # no manifest


# --- explanations ---


def test_every_field_has_an_explanation() -> None:
    assert [name for name, explanation, _ in leaves() if not explanation.endswith(".")] == []


def test_help_shows_every_field_and_its_explanation(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")  # one column of panels
    with pytest.raises(SystemExit) as end:
        parse_config("What it does.", ["--help"])
    assert end.value.code == 0
    shown = " ".join(re.sub("[│╭╮╰╯─]", " ", capsys.readouterr().out).split())
    assert "What it does." in shown
    for name, explanation, _ in leaves():
        flag = "--" + name.replace("_", "-")
        assert f"{flag} " in shown or f"{flag}, " in shown, flag
        assert " ".join(explanation.split()) in shown, flag
    for flag in ("--config", "--resume"):
        assert f"{flag} " in shown


@pytest.mark.parametrize("name", PRESETS)
def test_help_needs_no_data(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parse_config("", ["--dataset", name, "--help"])
    assert end.value.code == 0
    assert "--loss.phi1" in capsys.readouterr().out


# --- mistakes ---


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        pytest.param("--dataset cats", ("dataset", "'cats'", *PRESETS), id="unknown data set"),
        pytest.param("--colour red", ("--colour", "--help"), id="unknown key"),
        pytest.param("--loss.phi3 1", ("--loss.phi3", "--help"), id="unknown nested key"),
        pytest.param("stray", ("stray", "--help"), id="stray word"),
        pytest.param("--resolution 33", ("resolution 33", "power of two", "32", "1024"), id="no power of two"),
        pytest.param("--resolution 16", ("resolution 16", "32", "1024"), id="too small"),
        pytest.param("--resolution 2048", ("resolution 2048", "32", "1024"), id="too large"),
        pytest.param("--batch 6", ("batch 6", "multiple of 4"), id="batch that does not divide"),
        pytest.param("--batch 0", ("batch", "0", "at least 1"), id="no batch"),
        pytest.param("--batch -4", ("batch", "-4", "at least 1"), id="negative batch"),
        pytest.param("--batch many", ("--batch", "'many'", "INT"), id="word for a number"),
        pytest.param("--steps 1.5", ("--steps", "'1.5'", "INT"), id="fraction for a whole number"),
        pytest.param("--steps", ("--steps",), id="value forgotten"),
        pytest.param("--loss.phi1 1.5", ("loss.phi1", "1.5", "0 to 1"), id="share above one"),
        pytest.param("--loss.phi1 nan", ("loss.phi1", "nan", "0 to 1"), id="nan"),
        pytest.param("--loss.r1 inf", ("loss.r1", "inf"), id="infinite weight"),
        pytest.param("--optimizer.learning-rate inf", ("optimizer.learning_rate", "inf"), id="infinite learning rate"),
        pytest.param("--optimizer.learning-rate 0", ("optimizer.learning_rate", "0.0"), id="no learning rate"),
        pytest.param("--seed -1", ("seed", "-1", "0 to"), id="negative seed"),
        pytest.param(f"--seed {2**64}", ("seed", str(2**64)), id="seed beyond what generators take"),
        pytest.param("--loader pil", ("--loader", "'pil'", "auto", "dali", "webdataset"), id="unknown loader"),
        pytest.param("--model.channel-base 64", ("model.channel_base 64", "at least 128"), id="no channels left"),
        pytest.param("--model.z-dim 64", ("model.z_dim_background 128", "model.z_dim 64"), id="longer background"),
        pytest.param("--dataset ffhq", ("ffhq", "--data"), id="data set without data"),
        pytest.param("--config", ("--config",), id="config file forgotten"),
        pytest.param("--resume", ("--resume",), id="run directory forgotten"),
        pytest.param("--data", ("--data",), id="data forgotten"),
        pytest.param("--dataset", ("--dataset",), id="data set forgotten"),
        pytest.param("--config nowhere.yaml", ("nowhere.yaml",), id="no such config file"),
        pytest.param("--resume nowhere", ("--resume nowhere", "config.yaml"), id="no such run"),
    ],
)
def test_mistake_on_the_command_line_is_one_line_that_names_it(arguments: str, words: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as error:
        parse_config("", arguments.split())
    assert_one_line(error.value, *words)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        pytest.param("colour: red", ("'colour'", "--help"), id="unknown key"),
        pytest.param("loss: {phi3: 1}", ("'loss.phi3'", "--help"), id="unknown nested key"),
        pytest.param("loss: {1: 2}", ("'loss.1'",), id="number for a key"),
        pytest.param("loss: 5", ("'loss'", "5"), id="number for a section"),
        pytest.param("loss:", ("'loss'",), id="empty section"),
        pytest.param("dataset: cats", ("'cats'", *PRESETS), id="unknown data set"),
        pytest.param("dataset: [ffhq]", ("dataset", *PRESETS), id="list for a data set"),
        pytest.param("batch: many", ("'batch'", "'many'", "integer"), id="word for a number"),
        pytest.param("batch: 8.5", ("'batch'", "8.5", "integer"), id="fraction for a whole number"),
        pytest.param("batch: [8]", ("'batch'", "[8]", "integer"), id="list for a number"),
        pytest.param("flip: 3", ("'flip'", "3", "boolean"), id="number for a yes or no"),
        pytest.param("loader: pil", ("'loader'", "'pil'", "'auto', 'dali' or 'webdataset'"), id="unknown loader"),
        pytest.param("batch: 6", ("batch 6", "multiple of 4"), id="batch that does not divide"),
        pytest.param("loss: {phi1: .nan}", ("loss.phi1", "nan", "0 to 1"), id="nan"),
        pytest.param("batch: many\nflip: 3", ("'batch'", "'flip'"), id="two at once"),
        pytest.param("a: b: c", ("overrides.yaml", "not YAML"), id="no YAML"),
        pytest.param("- 1", ("overrides.yaml", "no mapping"), id="a list"),
        pytest.param("", ("overrides.yaml", "no mapping"), id="empty file"),
        pytest.param("!!python/name:os.system", ("overrides.yaml", "not YAML"), id="code"),
    ],
)
def test_mistake_in_a_file_is_one_line_that_names_it(text: str, words: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        from_file(tmp_path, text)
    assert_one_line(error.value, *words)


def test_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(UserError) as error:
        parse_config("", ["--config", str(tmp_path / "c.yaml")])
    assert_one_line(error.value, "c.yaml", "not YAML")


@pytest.mark.parametrize(("name", "bounds"), [(name, b) for name, _, hint in leaves() if (b := bounds_of(hint))])
def test_bounds_of_every_field_hold_and_are_told(name: str, bounds: Bounds) -> None:
    beyond = [bounds.low - 1] + ([] if math.isinf(bounds.high) else [2 * bounds.high + 1])
    for value in beyond:
        with pytest.raises(UserError) as error:
            config_from_dict(nested(name, value))
        assert_one_line(error.value, repr(name), f"{bounds.low:g}")
