"""How the training command ends on a mistake of its user: at once, with one line and exit code 2."""

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import (
    BATCH,
    RESOLUTION,
    TINY,
    Outcome,
    flags,
    furballs,
    shard_cache,
    tiny,
    train_in_new_process,
    train_in_process,
    training_rows,
    write_noise,
)

from pipeline.runs.checkpoints import list_checkpoints, load_checkpoint
from pipeline.training.trainer import Trainer


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shard_cache(tmp_path_factory)


def refused(outcome: Outcome, cwd: Path) -> str:
    """The one line; nothing was made."""
    assert outcome.code == 2, outcome.err
    assert outcome.err.splitlines() == outcome.errors and len(outcome.errors) == 1, outcome.err
    assert outcome.out == ""
    assert not (cwd / "runs").exists()
    return outcome.errors[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--colour", "red"], ("--colour", "--help")),
        (["--data", "nowhere"], ("nowhere", "does not exist")),
    ],
)
def test_mistake_ends_the_command_with_one_line_and_code_2(
    arguments: list[str], words: tuple[str, ...], tmp_path: Path
) -> None:
    line = refused(train_in_new_process(tmp_path, *arguments), tmp_path)
    for word in words:
        assert word in line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--dataset cats", ("'cats'", "furballs", "compcars")),
        ("--colour red", ("--colour", "--help")),
        ("--loss.phi3 1", ("--loss.phi3", "--help")),
        ("--resolution 33", ("resolution 33", "power of two from 32 to 1024")),
        ("--resolution 16", ("resolution 16", "power of two from 32 to 1024")),
        ("--resolution 2048", ("resolution 2048", "power of two from 32 to 1024")),
        ("--batch 6", ("batch 6", "multiple of 4")),
        ("--batch 0", ("batch", "at least 1")),
        ("--config", ("--config",)),
        ("--config nowhere.yaml", ("nowhere.yaml",)),
        ("--resume nowhere", ("nowhere", "not a run directory")),
        ("--resume .", ("config.yaml", "not a run directory")),
        ("--data nowhere", ("nowhere", "does not exist")),
        ("--evaluation.segmenter-images 1", ("segmenter_images",)),
        ("--evaluation.segmenter-images 3", ("segmenter_images",)),
    ],
)
def test_mistake_in_the_arguments_is_one_line(
    arguments: str, words: tuple[str, ...], cache: Path, tmp_path: Path
) -> None:
    line = refused(train_in_process(tmp_path, *tiny(cache, run_dir="runs/x"), *arguments.split()), tmp_path)
    for word in words:
        assert word in line


@pytest.mark.parametrize(
    ("text", "words"),
    [("a: b: c", ("not YAML",)), ("- 1", ("no mapping",)), ("colour: red", ("'colour'",)), ("", ("no mapping",))],
)
def test_mistake_in_the_config_file_is_one_line(text: str, words: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(text)
    line = refused(train_in_process(tmp_path, "--config", "c.yaml"), tmp_path)
    for word in words:
        assert word in line


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def emptied(data: Path) -> None:
    for path in data.iterdir():
        path.unlink()


BROKEN: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "missing directory": (shutil.rmtree, ("does not exist", "give")),
    "empty directory": (emptied, ("no *.tar", "give")),
    "truncated shard": (lambda data: cut(data / "000000.tar"), ("000000.tar", "truncated", "rebuild")),
    "empty shard": (lambda data: (data / "000000.tar").write_bytes(b""), ("000000.tar", "rebuild")),
    "missing shard": (lambda data: (data / "000000.tar").rename(data / "other.tar"), ("tar", "manifest", "rebuild")),
    "no index or manifest, truncated": (
        lambda data: (
            (data / "000000.idx").unlink(),
            (data / "manifest.json").unlink(),
            cut(data / "000000.tar"),
        ),
        ("000000.tar", "rebuild"),
    ),
    "broken manifest": (lambda data: cut(data / "manifest.json"), ("manifest.json", "rebuild")),
    "broken index": (lambda data: cut(data / "000000.idx"), ("000000.idx", "rebuild")),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_shards_are_one_line(kind: str, cache: Path, tmp_path: Path) -> None:
    damage, words = BROKEN[kind]
    data = tmp_path / "shards" / "mine"
    shutil.copytree(furballs(cache), data)
    damage(data)
    line = refused(train_in_process(tmp_path, *tiny(cache, data=data, run_dir="runs/x")), tmp_path)
    for word in ("shards/mine", *words):
        assert word in line


def test_shards_of_another_resolution_are_one_line(cache: Path, tmp_path: Path) -> None:
    outcome = train_in_process(tmp_path, *tiny(cache, data=furballs(cache), resolution=64, run_dir="runs/x"))
    line = refused(outcome, tmp_path)
    assert str(furballs(cache)) in line and "32 px" in line and "64 px" in line


def test_fewer_pictures_than_a_batch_are_one_line(tmp_path: Path) -> None:
    data = write_noise(tmp_path / "data", RESOLUTION, num=7)
    line = refused(train_in_process(tmp_path, *flags(TINY | {"data": data, "run_dir": "runs/x"})), tmp_path)
    assert "7 images" in line and "batch of 8" in line


LOADERS = ("dali", "webdataset")


def with_loader(loader: str, data: Path, **overrides: Any) -> list[str]:
    if loader == "dali":
        pytest.importorskip("nvidia.dali")
    return flags(TINY | {"data": data, "run_dir": "run", "loader": loader} | overrides)


def damage_pictures(data: Path) -> None:
    tar = bytearray((data / "000000.tar").read_bytes())
    for start in (found.start() for found in re.finditer(b"IDAT", bytes(tar))):
        tar[start + 4 : start + 400] = bytes(396)
    (data / "000000.tar").write_bytes(tar)


def test_damaged_shard_is_one_line_before_training(tmp_path: Path) -> None:
    data = write_noise(tmp_path / "data", RESOLUTION)
    damage_pictures(data)
    line = refused(train_in_process(tmp_path, *flags(TINY | {"data": data, "run_dir": "runs/x"})), tmp_path)
    assert "data/000000.tar is damaged" in line and "sha256" in line and "rebuild" in line


@pytest.mark.parametrize("loader", LOADERS)
def test_picture_that_cannot_be_decoded_is_one_line(loader: str, tmp_path: Path) -> None:
    data = write_noise(tmp_path / "data", RESOLUTION)
    damage_pictures(data)
    outcome = train_in_process(tmp_path, *with_loader(loader, data), "--no-verify-data")
    assert outcome.code == 2, outcome.err
    assert len(outcome.errors) == 1 and "Traceback" not in outcome.err
    assert "000000.tar" in outcome.errors[0] and "cannot be decoded" in outcome.errors[0]


@pytest.mark.parametrize("loader", LOADERS)
def test_shard_truncated_while_training_is_one_line_and_loses_nothing(
    loader: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_noise(tmp_path / "data", RESOLUTION, num=64)
    step = Trainer.step

    def cutting_step(trainer: Trainer) -> None:
        step(trainer)
        if trainer.iteration == 1:
            os.truncate(data / "000000.tar", 2048)

    monkeypatch.setattr(Trainer, "step", cutting_step)
    arguments = with_loader(loader, data, steps=20, log=TINY["log"] | {"checkpoint_interval_images": BATCH})
    outcome = train_in_process(tmp_path, *arguments)
    assert outcome.code == 2, outcome.err
    assert outcome.errors == [f"error: {data}/000000.tar has been truncated while in use; rebuild the set"]
    assert "Traceback" not in outcome.err
    (newest, *_) = list_checkpoints(tmp_path / "run" / "checkpoints")
    assert load_checkpoint(newest)["iteration"] == len(training_rows(tmp_path / "run")) >= 1
