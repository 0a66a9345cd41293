"""Generation: the same command writes the same bytes, and what it writes is what the generator makes."""

from itertools import chain
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from evaluating import train_tiny_run
from helpers import RESOLUTION, Outcome, run_in_process, shard_cache, tiny, train_in_process
from numpy.typing import NDArray
from PIL import Image

from data_shards.reading.shard_set import ShardSet
from models.generator import FurryGenerator
from pipeline import generate
from pipeline.evaluation.pictures import RealPictures
from pipeline.generation.interpolate import Interpolate
from pipeline.generation.kinds import KINDS
from pipeline.generation.mix import LEVELS, styles_of
from pipeline.generation.sample_grid import CELL, MARGIN
from pipeline.generation.sampler import NoiseMode, Sampler
from pipeline.generation.trained_run import open_run

PITCH = CELL + MARGIN
# Small, and not the default, so that it is seen whether they are obeyed.
SMALL = {
    "grid": ("--count", "3"),
    "cutouts": ("--count", "5", "--batch", "2"),
    "dataset": ("--count", "16", "--psi", "0.7"),
    "swap": ("--count", "2", "--num-backgrounds", "3"),
    "interpolate": ("--count", "2", "--frames", "8"),
    "mix": ("--count", "2"),
    "masks": ("--count", "2"),
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shard_cache(tmp_path_factory)


@pytest.fixture(scope="module")
def cwd(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """A directory with a trained run, and each kind of output in ``first``."""
    cwd = tmp_path_factory.mktemp("generate")
    train_tiny_run(cwd, cache)
    for kind, options in SMALL.items():
        outcome = make(cwd, kind, *options, "--out", f"first/{name(kind)}")
        assert (outcome.code, outcome.out) == (0, f"first/{name(kind)}\n"), outcome.err
    return cwd


def make(cwd: Path, kind: str, *arguments: str) -> Outcome:
    return run_in_process(
        generate.main, Path(generate.__file__), cwd, kind, "--run", "run", "--num-threads", "1", *arguments
    )


def name(kind: str) -> str:
    return f"{kind}{KINDS[kind].suffix}"


def sampler(cwd: Path, *, seed: int = 0, psi: float = 1.0, noise_mode: NoiseMode = "random") -> Sampler:
    run = open_run(cwd / "run", "best", torch.device("cpu"))
    return Sampler(run, seed=seed, psi=psi, noise_mode=noise_mode, batch=4)


def contents(path: Path) -> dict[str, bytes]:
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    return {str(file.relative_to(path.parent)): file.read_bytes() for file in files}


def cell(grid: Image.Image, row: int, column: int, *, rows: int, columns: int) -> NDArray[np.float64]:
    """An image of a one-panel grid, in its own resolution: panels fill the lower right corner."""
    x, y = grid.width - (columns - column) * PITCH, grid.height - (rows - row) * PITCH
    step = CELL // RESOLUTION
    return np.asarray(grid.crop((x, y, x + CELL, y + CELL)), np.float64)[::step, ::step]


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_command_writes_the_same_bytes_and_another_seed_others(kind: str, cwd: Path) -> None:
    for directory, seed in (("again", "0"), ("other", "1")):
        outcome = make(cwd, kind, *SMALL[kind], "--seed", seed, "--out", f"{directory}/{name(kind)}")
        assert outcome.code == 0, outcome.err
    first, again, other = (contents(cwd / directory / name(kind)) for directory in ("first", "again", "other"))
    assert first == again and first != other


def test_a_cutout_pasted_on_its_own_background_is_the_composite_within_a_255th(cwd: Path) -> None:
    output = sampler(cwd).generate(range(5))
    background = ((output.background + 1) * 127.5).round().permute(0, 2, 3, 1).double().numpy()
    composite = ((output.composite + 1) * 127.5).permute(0, 2, 3, 1).double().numpy()
    files = sorted((cwd / "first" / "cutouts").iterdir())
    assert [file.name for file in files] == [f"{i:08d}.png" for i in range(5)]
    for file, own, expected in zip(files, background, composite, strict=True):
        with Image.open(file) as image:
            assert image.mode == "RGBA"
            pixels = np.asarray(image, np.float64)
        alpha = pixels[..., 3:] / 255
        pasted = alpha * pixels[..., :3] + (1 - alpha) * own
        assert np.abs(pasted - expected).max() <= 1 + 1e-3
        assert 0.02 < alpha.mean() < 0.98 and np.abs(pixels[..., :3] - own).max() > 20  # else anything would pass


def test_a_generated_data_set_holds_the_samples_and_trains_again(cwd: Path, cache: Path) -> None:
    shard_set = ShardSet.open(cwd / "first" / "dataset", resolution=RESOLUTION)
    shard_set.verify()
    assert (shard_set.num_samples, shard_set.has_alpha) == (16, True)
    output = sampler(cwd, psi=0.7).generate([0, 7])
    pictures = RealPictures(shard_set, num_threads=1)
    torch.testing.assert_close(
        pictures.images([0, 7]) / 127.5 - 1, output.composite, rtol=0, atol=0.51 / 127.5, check_dtype=False
    )
    torch.testing.assert_close(pictures.alphas([0, 7]), output.mask, rtol=0, atol=0.51 / 255)
    pictures.close()
    shard_set.close()
    outcome = train_in_process(cwd, *tiny(cache, run_dir="child", data=cwd / "first" / "dataset"))
    assert outcome.code == 0, outcome.err
    assert (cwd / "child" / "summary.json").is_file()


def test_swapped_backgrounds_are_behind_the_foreground_alone(cwd: Path) -> None:
    with Image.open(cwd / "first" / "swap.png") as grid:
        output = sampler(cwd).generate(range(2))
        for row in range(2):
            alpha = output.mask[row].permute(1, 2, 0).double().numpy()
            colours = (output.foreground[row].permute(1, 2, 0).double().numpy() + 1) * 127.5
            for column in range(1, 4):
                background = cell(grid, 0, column, rows=3, columns=4)
                expected = alpha * colours + (1 - alpha) * background
                assert np.abs(cell(grid, row + 1, column, rows=3, columns=4) - expected).max() <= 1.01
        backgrounds = [cell(grid, 0, column, rows=3, columns=4) for column in (1, 2, 3)]
    assert all(np.abs(a - b).max() > 3 for a, b in ((backgrounds[0], backgrounds[1]), (backgrounds[1], backgrounds[2])))


def test_own_pictures_are_used_as_backgrounds(cwd: Path, tmp_path: Path) -> None:
    for i, colour in enumerate(("red", "blue")):
        Image.new("RGB", (50, 40), colour).save(tmp_path / f"{i}.png")
    out = tmp_path / "swap.png"
    outcome = make(cwd, "swap", "--count", "1", "--backgrounds", str(tmp_path), "--out", str(out))
    assert outcome.code == 0, outcome.err
    with Image.open(out) as grid:
        assert (cell(grid, 0, 1, rows=2, columns=3) == (255, 0, 0)).all()
        assert (cell(grid, 0, 2, rows=2, columns=3) == (0, 0, 255)).all()


def test_interpolation_visits_the_samples_and_ends_where_it_began(cwd: Path) -> None:
    with Image.open(cwd / "first" / "interpolate" / "film.gif") as film:
        assert film.n_frames == 2 * 8 and film.info["loop"] == 0
    const = sampler(cwd, noise_mode="const")
    styles = const.foreground_styles(const.latents(range(2)))
    background = const.background_styles(const.latents([0])).expand(2, -1)
    output = const.synthesize(styles, background, const.noise(range(2)))
    expected = ((output.foreground + 1) * 127.5).round().permute(0, 2, 3, 1).numpy()
    with Image.open(cwd / "first" / "interpolate" / "strips.png") as strips:
        panel = strips.crop((0, strips.height // 2, strips.width, strips.height))  # from sample 1 back to 0
    starts, ends = (cell(panel, 0, column, rows=3, columns=9) for column in (0, 8))
    assert np.abs(starts - expected[1]).max() <= 1 and np.abs(ends - expected[0]).max() <= 1


def test_a_film_may_be_mp4(cwd: Path) -> None:
    av = pytest.importorskip("av")
    outcome = make(cwd, "interpolate", *SMALL["interpolate"], "--film", "mp4", "--fps", "10", "--out", "film")
    assert outcome.code == 0, outcome.err
    with av.open(str(cwd / "film" / "film.mp4")) as film:
        assert len(list(film.decode(video=0))) == 16 and film.streams.video[0].average_rate == 10


def test_levels_of_mixing_are_all_styles_each_once(generator: FurryGenerator) -> None:
    network = generator.synthesis_foreground
    by_level = [styles_of(network, level) for level in LEVELS]
    assert list(chain(*by_level)) == list(range(network.num_styles)) and all(by_level)
    assert [network.noise_resolutions[i] for i in by_level[0]] == [4]


def test_styles_of_all_layers_alike_are_one_style(generator: FurryGenerator) -> None:
    z, noise = torch.randn(3, generator.z_dim), torch.randn(3, generator.num_noise)
    whole = generator(z, noise=noise, fade_in=0.5, psi=0.8)
    w_foreground = whole.w_foreground[:, None].expand(-1, generator.synthesis_foreground.num_styles, -1)
    w_background = whole.w_background[:, None].expand(-1, generator.synthesis_background.num_styles, -1)
    apart = generator.synthesize(w_foreground, w_background, noise, fade_in=0.5)
    for picture in ("composite", "foreground", "background", "mask_coarse", "mask_fine", "mask"):
        assert torch.equal(getattr(apart, picture), getattr(whole, picture)), picture


def test_each_layer_has_the_style_of_its_number_and_the_masks_the_last(generator: FurryGenerator) -> None:
    network = generator.synthesis_foreground
    noise = torch.randn(1, generator.num_noise)
    w = torch.randn(1, network.num_styles, generator.z_dim)
    w_background = torch.randn(1, generator.z_dim_background)
    before = generator.synthesize(w, w_background, noise)
    for i in range(network.num_styles):
        changed = w.clone()
        changed[:, i] += 1
        seen: list[int] = []
        modulations = [layer.conv.modulation for layer in network.layers] + [network.to_rgb.conv.modulation]  # type: ignore[union-attr]
        hooks = [
            module.register_forward_hook(  # type: ignore[operator,union-attr]
                lambda _m, given, _o, at=at: seen.append(at) if torch.equal(given[0], changed[:, i]) else None  # noqa: B023
            )
            for at, module in enumerate(modulations)
        ]
        after = generator.synthesize(changed, w_background, noise)
        for hook in hooks:
            hook.remove()
        assert seen == [i]
        assert not torch.equal(after.foreground, before.foreground)
    assert not torch.equal(after.mask, before.mask)  # by the last style, which is not of the features before


def test_noise_is_of_each_sample_or_the_same_or_none(cwd: Path) -> None:
    random, const, none = (sampler(cwd, noise_mode=mode).noise([0, 3]) for mode in ("random", "const", "none"))  # type: ignore[arg-type]
    assert torch.equal(random[0], const[0]) and torch.equal(const[0], const[1]) and not torch.equal(*random)
    assert not none.any()
    assert abs(random.mean().item()) < 0.05 and random.std().item() == pytest.approx(1, abs=0.05)


def test_psi_of_0_makes_every_sample_the_centre(cwd: Path) -> None:
    output = sampler(cwd, psi=0.0, noise_mode="none").generate([0, 1, 2])
    assert torch.equal(output.w_foreground[0], output.w_foreground[2])
    torch.testing.assert_close(output.composite[0], output.composite[2])


def test_what_is_there_is_never_overwritten(cwd: Path) -> None:
    before = contents(cwd / "first")
    for kind in KINDS:
        outcome = make(cwd, kind, *SMALL[kind], "--out", f"first/{name(kind)}")
        assert outcome.code == 2 and outcome.err.splitlines() == outcome.errors
        assert f"first/{name(kind)} exists already" in outcome.errors[0]
    assert contents(cwd / "first") == before


@pytest.mark.parametrize("kind", KINDS)
def test_stopped_half_way_nothing_bears_the_name(kind: str, cwd: Path) -> None:
    out = cwd / "stopped" / name(kind)
    with (
        mock.patch.object(FurryGenerator, "synthesize", side_effect=KeyboardInterrupt),
        pytest.raises(KeyboardInterrupt),
    ):
        make(cwd, kind, *SMALL[kind], "--out", str(out))
    assert not out.parent.exists() or not list(out.parent.iterdir())


def test_by_default_it_is_written_into_the_run(cwd: Path) -> None:
    outcome = make(cwd, "masks", "--count", "1")
    assert outcome.out == "run/generated/masks.png\n" and (cwd / "run/generated/masks.png").is_file()


def test_a_film_needs_frames_enough_for_its_strip(cwd: Path) -> None:
    assert Interpolate(run=cwd / "run", frames=8).frames == 8
    outcome = make(cwd, "interpolate", "--frames", "7")
    assert outcome.code == 2 and "--frames 7" in outcome.errors[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("grid --count 0", ("--count 0", "1 or more")),
        ("grid --psi nan", ("--psi nan",)),
        ("grid --seed -1", ("--seed -1",)),
        ("grid --batch 0", ("--batch 0",)),
        ("grid --num-threads -1", ("--num-threads -1",)),
        ("grid --checkpoint none.pt", ("none.pt", "does not exist")),
        ("grid --out grid.jpg", ("grid.jpg", ".png")),
        ("grid --out run/config.yaml/grid.png", ("cannot be written",)),
        ("cutouts --out run/config.yaml/cutouts", ("cannot be made",)),
        ("grid --noise loud", ("loud",)),
        ("swap --num-backgrounds 0", ("--num-backgrounds 0",)),
        ("swap --backgrounds nowhere", ("nowhere", "does not exist")),
        ("interpolate --count 1", ("--count 1", "2 or more")),
        ("interpolate --noise random", ("random",)),
        ("dataset --samples-per-shard 0", ("--samples-per-shard 0",)),
        ("mix --levels", ("--levels",)),
        ("poster", ("poster", "cutouts")),
    ],
)
def test_mistake_is_one_line_and_code_2(arguments: str, words: tuple[str, ...], cwd: Path) -> None:
    outcome = make(cwd, *arguments.split())
    assert outcome.code == 2, outcome.err
    lines = [line for line in outcome.err.splitlines() if "img/s" not in line and line]
    assert outcome.out == "" and lines == outcome.errors and len(lines) == 1, outcome.err
    for word in words:
        assert word in outcome.errors[0]
