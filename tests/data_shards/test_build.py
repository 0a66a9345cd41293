"""The builder: the same bytes however it is run, stopped and resumed, and every image accounted for."""

import json
import multiprocessing
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import psutil
import pytest
import torch
from build_helpers import RESOLUTION, Deadly, build_and_read, hold, noise, read, save

from data_shards import build as command
from data_shards.building.builder import BuildOptions, build
from data_shards.errors import UserError
from data_shards.format.index import index_path, read_index
from data_shards.format.manifest import MANIFEST_NAME, Manifest
from data_shards.parallel import ordered_map
from data_shards.reading.loader import LoaderKind, make_loader
from data_shards.reading.shard_set import ShardSet
from data_shards.reading.verify import verify
from data_shards.sources.folder import Folder

COMMAND = Path(command.__file__)
BIG = 160  # px: noise of that size takes 77 kB, so that some 13 fill a tar of the least size


def write_pictures(folder: Path, num: int = 12, *, side: int = 20) -> Path:
    for number in range(num):
        save(folder / f"{number % 3}" / f"{number:03d}.png", noise(number, side, side + number % 5))
    return folder


def write_noise(folder: Path, num: int = 60) -> Path:
    rng = np.random.default_rng(0)
    for number in range(num):
        save(folder / f"{number:03d}.bmp", rng.integers(256, size=(BIG, BIG, 3), dtype=np.uint8))
    return folder


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture(scope="module")
def rough(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_noise(tmp_path_factory.mktemp("rough"))


@pytest.fixture(scope="module")
def whole(rough: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What one uninterrupted process makes of it."""
    out = tmp_path_factory.mktemp("whole") / "set"
    build(Folder(source=rough, resolution=BIG), out, BuildOptions(shard_mib=1, workers=1))
    return contents(out)


@pytest.mark.parametrize("encoding", ["png", "jpeg", "webp"])
def test_build_is_byte_identical(encoding: str, tmp_path: Path) -> None:
    source = Folder(source=write_pictures(tmp_path / "in", 40), resolution=RESOLUTION)
    (tmp_path / "in" / "broken.png").write_bytes(b"no image")
    built = []
    for workers in (1, 2):
        options = BuildOptions(encoding=encoding, workers=workers, max_skipped=0.1)  # type: ignore[arg-type]
        build(source, tmp_path / str(workers), options)
        built.append(contents(tmp_path / str(workers)))
    assert built[0].keys() == {"000000.tar", "000000.idx", MANIFEST_NAME}
    assert built[0] == built[1]


def test_lossless_encodings_give_the_same_pixels_and_jpeg_nearly(tmp_path: Path) -> None:
    source = Folder(source=write_pictures(tmp_path / "in"), resolution=RESOLUTION)
    built = {name: build_and_read(source, tmp_path / name, encoding=name) for name in ("png", "webp", "jpeg")}
    for name, sample in built["png"].items():
        assert np.array_equal(built["webp"][name].image, sample.image)
        assert np.abs(built["jpeg"][name].image.astype(int) - sample.image).mean() < 4
    assert ShardSet.open(tmp_path / "jpeg").image_extension == "jpg"


def test_shards_are_bounded_whole_and_verified(rough: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    out = tmp_path / "set"
    out.mkdir()
    for name, content in whole.items():
        (out / name).write_bytes(content)
    manifest = Manifest.read(out)
    assert len(manifest.shards) >= 4
    for shard in manifest.shards:
        tar = out / shard.name
        assert (1 << 20) - 3 * 80_000 < tar.stat().st_size <= (1 << 20) + 10_240 or shard == manifest.shards[-1]
        with tarfile.open(tar) as archive:
            members = {member.name: (member.offset_data, member.size) for member in archive}
        index = read_index(tar)
        assert len(index) == shard.num_samples
        assert {entry for sample in index for entry in sample.values()} == {*members.values()}
    assert verify(out) == manifest
    assert {*read(out)} == {path.name for path in rough.iterdir()}
    assert manifest.num_samples == 60 and (manifest.channels, manifest.num_upsampled) == (3, 0)
    assert manifest.preparation["downscale_filter"] == "lanczos" and manifest.preparation["crop"] == "center"


def test_order_is_shuffled_through_all_shards_by_the_seed(rough: Path, tmp_path: Path) -> None:
    orders = {}
    for seed in (0, 1):
        source = Folder(source=rough, resolution=32, seed=seed)
        orders[seed] = list(build_and_read(source, tmp_path / str(seed), shard_mib=1))
    ascending = sorted(orders[0])
    assert sorted(orders[1]) == ascending and orders[0] != ascending and orders[0] != orders[1]
    # A shuffle within a buffer would leave each image near its place; a global one moves it by a third on average.
    distance = np.mean([abs(ascending.index(name) - place) for place, name in enumerate(orders[0])])
    assert 14 < distance < 26


def test_max_images_takes_the_first_by_name_before_the_shuffle(tmp_path: Path) -> None:
    source = Folder(source=write_pictures(tmp_path / "in"), resolution=RESOLUTION, max_images=5)
    first = ["0/000.png", "0/003.png", "0/006.png", "0/009.png", "1/001.png"]
    assert sorted(build_and_read(source, tmp_path / "out")) == first


def test_alpha_of_some_pictures_is_kept_and_counted(tmp_path: Path) -> None:
    save(tmp_path / "in" / "cutout.png", noise(0, 20, 20, channels=4))
    for number in range(3):
        save(tmp_path / "in" / f"{number}.png", noise(number, 20, 20))
    manifest = build(Folder(source=tmp_path / "in", resolution=RESOLUTION), tmp_path / "out")
    assert (manifest.num_alphas, manifest.has_alpha) == (1, False)
    assert not ShardSet.open(tmp_path / "out").has_alpha


def test_small_pictures_are_counted(tmp_path: Path) -> None:
    save(tmp_path / "in" / "small.png", noise(0, RESOLUTION - 1, 30))
    save(tmp_path / "in" / "enough.png", noise(0, RESOLUTION, 30))
    assert build(Folder(source=tmp_path / "in", resolution=RESOLUTION), tmp_path / "out").num_upsampled == 1


def break_some(folder: Path) -> None:
    (folder / "0" / "000.png").write_bytes(b"no image")
    cut = (folder / "1" / "001.png").read_bytes()
    (folder / "1" / "001.png").write_bytes(cut[: len(cut) // 2])


def test_broken_pictures_are_skipped_and_listed(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "in")
    break_some(folder)
    source = Folder(source=folder, resolution=RESOLUTION)
    samples = build_and_read(source, tmp_path / "out", max_skipped=2 / 12)
    skipped = {picture.reference: picture.reason for picture in Manifest.read(tmp_path / "out").skipped}
    assert skipped.keys() == {"0/000.png", "1/001.png"} and len(samples) == 10
    assert skipped["0/000.png"] == "it is no image that Pillow knows" and "truncated" in skipped["1/001.png"]
    assert not skipped.keys() & samples.keys()


def test_too_many_broken_pictures_end_the_build_and_a_higher_limit_goes_on(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "in")
    break_some(folder)
    source = Folder(source=folder, resolution=RESOLUTION)
    with pytest.raises(UserError, match=r"2 of 12 images are broken, more than --max-skipped 0\.1 allows; .*\.png: "):
        build(source, tmp_path / "out", BuildOptions(max_skipped=0.1))
    assert not (tmp_path / "out").exists()
    assert build(source, tmp_path / "out", BuildOptions(max_skipped=0.2)).num_samples == 10
    with pytest.raises(UserError, match="all 1 images are broken"):
        build(Folder(source=folder, max_images=1), tmp_path / "other", BuildOptions(max_skipped=1))
    assert {path.name for path in tmp_path.iterdir()} == {"in", "out"}


def test_rerun_of_a_whole_set_changes_nothing_and_other_options_are_refused(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "in")
    source = Folder(source=folder, resolution=RESOLUTION)
    out = tmp_path / "out"
    manifest = build(source, out)
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert build(source, out, BuildOptions(workers=1, max_skipped=0.5)) == manifest
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before
    for other, options, message in (
        (Folder(source=folder, resolution=8), BuildOptions(), "resolution 16, not 8"),
        (Folder(source=folder, resolution=RESOLUTION, seed=1), BuildOptions(), "seed 0, not 1"),
        (source, BuildOptions(encoding="jpeg"), "encoding .*png.*, not .*jpeg"),
        (source, BuildOptions(shard_mib=1), "shard_mib 256, not 1"),
    ):
        with pytest.raises(UserError, match=f"out was made with {message}.*; delete it, or choose another --out"):
            build(other, out, options)
    save(folder / "new.png", noise(0, 20, 20))
    with pytest.raises(UserError, match="out was made with num_pictures 12, not 13"):
        build(source, out)
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before


def test_what_is_no_shard_set_is_left_alone(tmp_path: Path) -> None:
    source = Folder(source=write_pictures(tmp_path / "in"), resolution=RESOLUTION)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("precious")
    (tmp_path / "empty").mkdir()
    for name in ("full", "full/thesis.txt"):
        with pytest.raises(UserError, match="exists and is not a shard set; choose another --out"):
            build(source, tmp_path / name)
    assert build(source, tmp_path / "empty").num_samples == 12
    assert (tmp_path / "full" / "thesis.txt").read_text() == "precious"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda out: flip_byte(out / "000000.tar"), r"000000\.tar has another sha256"),
        (
            lambda out: swap_lines(index_path(out / "000000.tar")),
            r"000000\.(tar has the index of another|idx is no DALI)",
        ),
        (lambda out: index_path(out / "000000.tar").unlink(), r"000000\.tar has no index"),
        (lambda out: (out / MANIFEST_NAME).unlink(), r"has no manifest\.json to check it against"),
        (lambda out: (out / "000000.tar").unlink(), r"holds no \*\.tar"),
    ],
    ids=["flipped byte", "index", "no index", "no manifest", "no tar"],
)
def test_verify_finds_what_is_not_as_built(damage: object, message: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    build(Folder(source=write_pictures(tmp_path / "in"), resolution=RESOLUTION), out)
    verify(out)
    damage(out)  # type: ignore[operator]
    with pytest.raises(UserError, match=message):
        verify(out)


def flip_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(content)


def swap_lines(path: Path) -> None:
    first, *lines = path.read_text().splitlines()
    path.write_text("\n".join([first, lines[1], lines[0], *lines[2:]]) + "\n")


@pytest.mark.parametrize("encoding", ["png", "webp"])
@pytest.mark.parametrize("loader_kind", ["dali", "webdataset"])
def test_built_set_feeds_the_loaders(loader_kind: LoaderKind, encoding: str, tmp_path: Path) -> None:
    if loader_kind == "dali":
        pytest.importorskip("nvidia.dali")
    for number in range(16):
        save(tmp_path / "in" / f"{number:02d}.png", noise(number, 32, 32, channels=4))
    samples = build_and_read(Folder(source=tmp_path / "in", resolution=RESOLUTION), tmp_path / "out", encoding=encoding)
    shard_set = ShardSet.open(tmp_path / "out", resolution=RESOLUTION)
    loader = make_loader(
        loader_kind,
        shard_set,
        global_batch=8,
        rank=0,
        world_size=1,
        seed=0,
        flip=False,
        with_alpha=True,
        device=torch.device("cpu"),
        num_threads=1,
    )
    batch = next(loader)
    for image, alpha, index in zip(batch.images, batch.alphas, batch.indices, strict=True):
        sample = samples[json.loads(shard_set.read(int(index), "json"))["reference"]]
        assert np.array_equal((image.permute(1, 2, 0).numpy() * 127.5 + 127.5).round(), sample.image)
        assert np.array_equal((alpha[0].numpy() * 255).round(), sample.alpha)
    loader.close()


def start(rough: Path, out: Path) -> "subprocess.Popen[bytes]":
    arguments = ["--source", rough, "--out", out, "--resolution", BIG, "--shard-mib", 1, "--workers", 2]
    return subprocess.Popen([sys.executable, COMMAND, *map(str, arguments)], stderr=subprocess.PIPE)


@pytest.mark.parametrize("num_shards", [0, 1, 3])
def test_killed_build_resumes(num_shards: int, rough: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    """SIGKILL while the first, the second and the fourth tar is written; the next run ends with the same bytes."""
    out, partial = tmp_path / "set", tmp_path / "set.partial"
    process = start(rough, out)
    deadline = time.monotonic() + 60
    while not (list(partial.glob("*.unfinished")) and len(list(partial.glob("*.tar"))) >= num_shards):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.001)
    workers = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    process.stderr.close()  # type: ignore[union-attr]
    assert workers and not psutil.wait_procs(workers, timeout=20)[1], "workers outlived the build"
    tars = sorted(partial.glob("*.tar"))
    assert not out.exists() and num_shards <= len(tars)
    for tar in tars:
        assert tar.read_bytes() == whole[tar.name] and read_index(tar)
    made = {tar: tar.stat().st_mtime_ns for tar in tars[:-1]}
    assert Manifest.read(run_to_the_end(rough, out, made)).num_samples == 60
    assert contents(out) == whole and not partial.exists()


def run_to_the_end(rough: Path, out: Path, made: dict[Path, int]) -> Path:
    build(Folder(source=rough, resolution=BIG), out, BuildOptions(shard_mib=1, workers=1))
    for tar, time_made in made.items():
        assert (out / tar.name).stat().st_mtime_ns == time_made, f"{tar.name} was built twice"
    return out


KILL_AT = """
import os, signal, sys
from pathlib import Path
from data_shards.building.builder import BuildOptions, build
from data_shards.sources.folder import Folder

left = int(sys.argv[1])
fsync = os.fsync

def fsync_or_die(descriptor):
    global left
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
    fsync(descriptor)

os.fsync = fsync_or_die
source = Folder(source=Path(sys.argv[2]), resolution=160, max_images=16)
build(source, Path(sys.argv[3]), BuildOptions(shard_mib=1, workers=1))
"""


def test_build_killed_at_each_durable_step_resumes(rough: Path, tmp_path: Path) -> None:
    """Two shards: killed before each of the file system's synchronisations in turn, and finished after."""
    source = Folder(source=rough, resolution=BIG, max_images=16)
    build(source, tmp_path / "whole", BuildOptions(shard_mib=1, workers=1))
    whole = contents(tmp_path / "whole")
    assert len(whole) == 5
    for step in range(1, 30):
        out = tmp_path / str(step)
        ended = subprocess.run([sys.executable, "-c", KILL_AT, str(step), str(rough), str(out)], check=False)
        if ended.returncode != -signal.SIGKILL:
            assert ended.returncode == 0
            break
        build(source, out, BuildOptions(shard_mib=1, workers=1))
        assert contents(out) == whole, step
    assert step > 10
    assert not list(tmp_path.glob("*.partial"))


def test_build_goes_on_only_with_the_same_options(tmp_path: Path) -> None:
    folder, out = write_noise(tmp_path / "in", 30), tmp_path / "set"
    source = Folder(source=folder, resolution=BIG)
    last = list(build_and_read(source, tmp_path / "whole"))[-1]
    (folder / last).write_bytes(b"no image")
    with pytest.raises(UserError, match="1 of 30 images are broken"):
        build(source, out, BuildOptions(shard_mib=1, max_skipped=0))
    assert (tmp_path / "set.partial" / "000000.tar").exists()
    with pytest.raises(UserError, match=r"set\.partial was made with resolution 160, not 32; delete it"):
        build(Folder(source=folder, resolution=32), out, BuildOptions(shard_mib=1))
    assert build(source, out, BuildOptions(shard_mib=1, max_skipped=0.1)).num_samples == 29


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda partial: (partial / "progress.json").write_text("{"), "is damaged"),
        (lambda partial: (partial / "progress.json").write_text("{}"), "is damaged"),
        (lambda partial: (partial / "000000.tar").unlink(), "is damaged"),
        (lambda partial: (partial / "000000.tar").write_bytes(b"x"), "000000.tar was changed"),
    ],
)
def test_damaged_progress_is_refused(damage: object, message: str, rough: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    source = Folder(source=rough, resolution=BIG)
    save_and_stop(source, out)
    damage(tmp_path / "set.partial")  # type: ignore[operator]
    with pytest.raises(UserError, match=f"{message}.*delete .*, to (build from the start|start again)") as refusal:
        build(source, out, BuildOptions(shard_mib=1, workers=1))
    assert "\n" not in str(refusal.value)


def save_and_stop(source: Folder, out: Path) -> None:
    """A build that ends after its first shard, as when the disk is full."""
    with (
        mock.patch(
            "data_shards.building.builder.shard_name", side_effect=["000000.tar", OSError("No space left on device")]
        ),
        pytest.raises(UserError, match=r"set cannot be written \(No space left on device\); .* to resume"),
    ):
        build(source, out, BuildOptions(shard_mib=1, workers=1))


def test_worker_that_is_killed_is_one_line(tmp_path: Path) -> None:
    source = Deadly(source=write_pictures(tmp_path / "in"), resolution=RESOLUTION)
    with pytest.raises(UserError, match="a worker was killed, perhaps for want of memory; run the same command again"):
        build(source, tmp_path / "out", BuildOptions(workers=2))
    assert build(Folder(source=tmp_path / "in", resolution=RESOLUTION), tmp_path / "out").num_samples == 12


@pytest.mark.parametrize("num_workers", [1, 2])
def test_map_keeps_the_order_and_reads_no_further_ahead_than_its_bound(num_workers: int) -> None:
    num_read = 0

    def items() -> Iterator[int]:
        nonlocal num_read
        for number in range(1000):
            num_read += 1
            yield -number

    with ordered_map(abs, items(), num_workers=num_workers) as results:
        assert next(results) == 0
        time.sleep(0.2)
        assert num_read <= 2 * 3 * 8
        assert list(results) == list(range(1, 1000))


def test_second_builder_of_the_same_set_is_refused(tmp_path: Path) -> None:
    source = Folder(source=write_pictures(tmp_path / "in"), resolution=RESOLUTION)
    context = multiprocessing.get_context("spawn")
    held, done = context.Event(), context.Event()
    other = context.Process(target=hold, args=(tmp_path / "out.partial", held, done))
    other.start()
    assert held.wait(60)
    with pytest.raises(UserError, match=r"another process builds .*out at this moment"):
        build(source, tmp_path / "out")
    done.set()
    other.join()
    assert build(source, tmp_path / "out").num_samples == 12
