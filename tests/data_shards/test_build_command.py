"""The builder's command: what it prints, and how it ends on a mistake of its user: with one line and exit code 2."""

import subprocess
import sys
import zipfile
from pathlib import Path
from unittest import mock

from data_shards.command import run_command

import pytest
from build_helpers import noise, save

from data_shards import build as command
from data_shards.sources.kinds import KINDS


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = 0
    with mock.patch.object(sys, "argv", ["build.py", *map(str, arguments)]):
        try:
            run_command(command.main)
        except SystemExit as end:
            code = int(end.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Good sources and bad ones."""
    folder = tmp_path / "inputs"
    for number in range(3):
        save(folder / "good" / f"{number}.png", noise(number, 20, 20))
        save(folder / "broken" / f"{number}.png", noise(number, 20, 20))
    (folder / "broken" / "1.png").write_bytes(b"no image")
    (folder / "empty").mkdir()
    (folder / "texts").mkdir()
    (folder / "texts" / "a.txt").write_text("no image")
    with zipfile.ZipFile(folder / "good.zip", "w") as archive:
        archive.write(folder / "good" / "0.png", "0.png")
    (folder / "cut.zip").write_bytes((folder / "good.zip").read_bytes()[:-30])
    with zipfile.ZipFile(folder / "evil.zip", "w") as archive:
        archive.write(folder / "good" / "0.png", "../../evil.png")
    with zipfile.ZipFile(folder / "texts.zip", "w") as archive:
        archive.writestr("a.txt", "no image")
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--source good", ("--out",)),
        ("--out X", ("source",)),
        ("--source nowhere --out X", ("nowhere", "does not exist")),
        ("--source good.zip --out X", ("good.zip", "is a file", "--kind zip")),
        ("--source empty --out X", ("empty", "holds no images")),
        ("--source texts --out X", ("texts", "holds no images")),
        ("--source broken --out X", ("1 of 3", "--max-skipped", "1.png", "no image that Pillow knows")),
        ("--source good --out good.zip", ("good.zip", "not a shard set")),
        ("--source good --out X --resolution 0", ("--resolution 0",)),
        ("--source good --out X --resolution big", ("--resolution", "big")),
        ("--source good --out X --workers 0", ("--workers 0",)),
        ("--source good --out X --seed -1", ("--seed -1",)),
        ("--source good --out X --max-images 0", ("--max-images 0",)),
        ("--source good --out X --max-skipped 2", ("--max-skipped 2",)),
        ("--source good --out X --shard-mib 0", ("--shard-mib 0",)),
        ("--source good --out X --encoding gif", ("gif", "png", "webp")),
        ("--source good --out X --encoding jpeg --jpeg-quality 80", ("--jpeg-quality 80", "95")),
        ("--source good --out X --backgrounds good", ("--backgrounds",)),
        ("--source good --out X --colour red", ("--colour", "--help")),
        ("--kind cats --source good --out X", ("'cats'", "folder", "celebamask")),
        ("--kind", ("--kind",)),
        ("--kind zip --source good --out X", ("good", "is a folder", "--kind folder")),
        ("--kind zip --source nowhere.zip --out X", ("nowhere.zip", "does not exist")),
        ("--kind zip --source cut.zip --out X", ("cut.zip", "cannot be read as a zip", "fetch it again")),
        ("--kind zip --source texts.zip --out X", ("texts.zip", "no images")),
        ("--kind zip --source evil.zip --out X", ("evil.zip", "outside itself")),
        ("--kind lmdb --source good --out X", ("good", "data.mdb")),
        ("--kind ffhq --source good --out X", ("good", "NNNNN.png")),
        ("--kind afhq --source good --out X", ("train/cat", "does not exist")),
        ("--kind afhq --source good --out X --category cow", ("cow", "cat", "wild")),
        ("--kind cub --source good --out X", ("images.txt", "does not exist", "CUB_200_2011")),
        ("--kind compcars --source good --out X", ("image", "does not exist", "CompCars")),
        ("--kind celebamask --source good --out X", ("CelebAMask-HQ-mask-anno", "does not exist")),
        ("--kind cutouts --source good --out X", ("backgrounds",)),
        ("--kind cutouts --source good --backgrounds empty --out X", ("empty", "no images")),
        ("--kind cutouts --source good --backgrounds good --sizes 0.5 2 --out X", ("--sizes 0.5 2",)),
        ("--kind cutouts --source good --backgrounds good --num-images 0 --out X", ("--num-images 0",)),
        ("--kind furballs --resolution 16 --out X", ("--resolution 16", "32 to 512")),
        ("--verify nowhere", ("nowhere", "does not exist")),
        ("--verify good", ("good", "no *.tar")),
        ("--verify good --out X", ("--verify goes alone",)),
    ],
)
def test_mistake_is_one_line(
    arguments: str, words: tuple[str, ...], inputs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(inputs.rglob("*"))
    code, out, err = run(capsys, *arguments.split())
    lines = [line for line in err.replace("\r", "\n").splitlines() if "img/s" not in line and line.strip()]
    assert code == 2 and out == "", err
    assert lines[-1].startswith("error: ") and all(line.startswith("skipped ") for line in lines[:-1]), err
    for word in words:
        assert word in lines[-1]
    assert sorted(inputs.rglob("*")) == before


def test_build_and_verify_say_what_was_made(inputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--source", "broken", "--out", "set", "--resolution", 24, "--max-skipped", 0.5)
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (
        0,
        "set: 2 images of 24 px; 1 shard, 0.0 MiB; 0 with alpha; 2 enlarged; 1 skipped (manifest.json says why)\n",
    )
    assert "skipped 1.png: it is no image that Pillow knows" in err
    assert run(capsys, *arguments)[:2] == (0, out)
    code, verified, _ = run(capsys, "--verify", "set")
    assert (code, verified) == (0, out.replace("set:", "set is whole:"))


def test_help_tells_each_kinds_tree(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "--help")
    words = out.split()
    assert code == 0
    for kind, source in KINDS.items():
        assert f"{kind}:" in words
        for word in (source.__doc__ or "").split():
            assert word in words
    assert "--backgrounds" not in out
    code, out, _ = run(capsys, "--kind", "cutouts", "--help")
    assert code == 0 and "--backgrounds" in out


def test_command_runs_as_a_script_of_several_processes(inputs: Path) -> None:
    for number in range(80):
        save(inputs / "many" / f"{number}.png", noise(number, 12, 12))
    arguments = ["--source", "many", "--out", "set", "--resolution", "8", "--workers", "2"]
    ended = subprocess.run(
        [sys.executable, command.__file__, *arguments], capture_output=True, text=True, check=False, timeout=100
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith("set: 80 images of 8 px; 1 shard")
    ended = subprocess.run(
        [sys.executable, command.__file__, "--source", "many", "--out", "set"],
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert ended.returncode == 2
    assert ended.stderr == "error: set was made with resolution 8, not 256; delete it, or choose another --out\n"
