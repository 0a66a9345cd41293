"""Furballs with a shadow: the furballs themselves, and a shadow of known extent; and the scribbles drawn on them."""

import sys
from pathlib import Path
from unittest import mock

from data_shards.command import run_command

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import binary_dilation

from data_shards import draw_scribbles
from data_shards.sources import furballs
from data_shards.sources.shadows import OFFSET, Shadows


def test_creature_is_the_furball_and_all_but_the_shadow_is_as_without() -> None:
    for resolution in (32, 64):
        for index in range(4):
            plain = furballs.draw(index, seed=2, resolution=resolution)
            image, creature, shadow = Shadows(resolution=resolution, seed=2).layers(f"{index:08d}")
            assert plain.alpha is not None and np.array_equal(creature, plain.alpha)
            unlit = shadow == 0
            assert np.abs(image[unlit].astype(int) - plain.image[unlit]).max() <= 1
            deep = shadow == 255
            assert deep.any()
            assert image[deep].mean() < 60 < plain.image[deep].mean()


def test_shadow_is_the_creature_shifted_and_touches_it() -> None:
    _, creature, shadow = Shadows(resolution=64).layers("00000003")
    right, down = (round(shift * 64) for shift in OFFSET)
    shifted = np.zeros((64, 64))
    shifted[down:, right:] = creature[:-down, :-right] / 255
    assert np.abs(shadow / 255 - shifted * (1 - creature / 255)).max() < 0.005
    assert (binary_dilation(creature > 127) & (shadow > 127)).sum() > 10


def test_alpha_is_of_the_creature_or_of_its_shadow_and_the_picture_is_the_same() -> None:
    pictures = [Shadows(resolution=32, alpha_of=kind).read("00000001") for kind in ("creature", "shadow")]
    assert pictures[0].image.tobytes() == pictures[1].image.tobytes()
    _, creature, shadow = Shadows(resolution=32).layers("00000001")
    for picture, expected in zip(pictures, (creature, shadow), strict=True):
        assert picture.alpha is not None and np.array_equal(np.asarray(picture.alpha), expected)


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    code = 0
    with mock.patch.object(sys, "argv", ["draw_scribbles.py", *map(str, arguments)]):
        try:
            run_command(draw_scribbles.main)
        except SystemExit as end:
            code = int(end.code or 0)
    return code, capsys.readouterr().err


@pytest.mark.parametrize("resolution", [32, 128])
def test_strokes_lie_on_what_they_name_and_are_few(
    resolution: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, err = run(capsys, "--out", tmp_path / "s", "--resolution", resolution, "--count", 2, "--seed", 1)
    assert code == 0, err
    scribbles = sorted((tmp_path / "s").glob("*.scribble.png"))
    assert len(scribbles) == 2
    for path in scribbles:
        reference = path.name.removesuffix(".scribble.png")
        image, creature, shadow = Shadows(resolution=resolution, seed=1).layers(reference)
        assert np.array_equal(np.asarray(Image.open(path.with_name(f"{reference}.png"))), image)
        strokes = np.asarray(Image.open(path))
        green, red = (strokes == (0, 255, 0)).all(-1), (strokes == (255, 0, 0)).all(-1)
        assert creature[green].min() > 200 and creature[red].max() < 55
        assert (red & (shadow > 200)).any() and (red & (shadow < 55)).any()
        assert 0.003 < (green | red).mean() < 0.15
        assert (strokes[~(green | red)] == 0).all()


@pytest.mark.parametrize(
    ("arguments", "word"),
    [("--count 0", "--count 0"), ("--out .", "--out . exists"), ("--resolution 8", "8: furballs")],
)
def test_mistake_is_one_line(
    arguments: str, word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code, err = run(capsys, "--out", "s", *arguments.split())
    assert code == 2 and len(err.splitlines()) == 1 and word in err
    assert not Path("s").exists()
