"""How the training command ends on a mistake of its user: at once, with one line and exit code 2."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import (
    RESOLUTION,
    TINY,
    Outcome,
    flags,
    furballs,
    shard_cache,
    tiny,
    train_in_new_process,
    train_in_process,
    write_noise,
)


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
    assert "7 pictures" in line and "batch of 8" in line


@pytest.mark.parametrize("loader", ["dali", "webdataset"])
def test_picture_that_cannot_be_decoded_is_one_line(loader: str, tmp_path: Path) -> None:
    if loader == "dali":
        pytest.importorskip("nvidia.dali")
    data = write_noise(tmp_path / "data", RESOLUTION)
    tar = bytearray((data / "000000.tar").read_bytes())
    for start in (found.start() for found in re.finditer(b"IDAT", bytes(tar))):
        tar[start + 4 : start + 400] = bytes(396)
    (data / "000000.tar").write_bytes(tar)
    outcome = train_in_process(tmp_path, *flags(TINY | {"data": data, "run_dir": "run", "loader": loader}))
    assert outcome.code == 2, outcome.err
    assert len(outcome.errors) == 1 and "Traceback" not in outcome.err
    assert "000000.tar" in outcome.errors[0] and "cannot be decoded" in outcome.errors[0]
