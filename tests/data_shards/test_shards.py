"""The shard format: what is written is whole and repeatable, and what is broken is refused in one line."""

import io
import json
import multiprocessing
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_shards.building.builtin import furballs_shards
from data_shards.building.writer import write_shards
from data_shards.errors import UserError
from data_shards.format.index import index_path, read_index, scan_index, write_index
from data_shards.format.manifest import MANIFEST_NAME, Manifest
from data_shards.format.sample import Sample
from data_shards.reading.shard_set import ShardSet

RESOLUTION = 16


def make_samples(num_samples: int, *, resolution: int = RESOLUTION, alpha: bool = True) -> list[Sample]:
    generator = np.random.default_rng(0)
    shape = (num_samples, resolution, resolution)
    images = generator.integers(256, size=(*shape, 3), dtype=np.uint8)
    alphas = generator.integers(256, size=shape, dtype=np.uint8)
    return [Sample(images[i], alphas[i] if alpha else None, {"number": i}) for i in range(num_samples)]


def write(out: Path, num_samples: int = 11, samples_per_shard: int = 4) -> Path:
    write_shards(
        make_samples(num_samples),
        out,
        resolution=RESOLUTION,
        source={"kind": "test"},
        samples_per_shard=samples_per_shard,
    )
    return out


def write_foreign(
    directory: Path, *, extension: str = "jpg", directory_in_tar: bool = True, resolution: int = 24
) -> Path:
    """A tar as others make them: no manifest, no index, members in a directory, hidden files, labels."""
    directory.mkdir()
    with tarfile.open(directory / "some.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        if directory_in_tar:
            member = tarfile.TarInfo("data.v1")
            member.type = tarfile.DIRTYPE
            tar.addfile(member)
        for number in range(5):
            buffer = io.BytesIO()
            Image.new("RGB", (resolution, resolution), (number, 0, 0)).save(
                buffer, "png" if extension == "png" else "jpeg"
            )
            for name, content in (
                (f"{number}.cls", b"7"),
                (f"{number}.{extension}", buffer.getvalue()),
                (".hidden", b"x"),
            ):
                member = tarfile.TarInfo(f"data.v1/{name}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return directory


@pytest.mark.parametrize("foreign", [False, True])
def test_index_equals_that_of_dali(tmp_path: Path, foreign: bool) -> None:
    wds2idx = pytest.importorskip("wds2idx")
    tar = write_foreign(tmp_path / "set") / "some.tar" if foreign else write(tmp_path / "set") / "000001.tar"
    with wds2idx.IndexCreator(str(tar), str(tmp_path / "dali.idx"), verbose=False) as creator:
        creator.create_index()
    assert write_index(tar).read_bytes() == (tmp_path / "dali.idx").read_bytes()
    assert read_index(tar) == scan_index(tar.open("rb"), str(tar))


def test_two_writes_are_equal_to_the_byte(tmp_path: Path) -> None:
    first, second = write(tmp_path / "first"), write(tmp_path / "second")
    names = sorted(path.name for path in first.iterdir())
    assert names == ["000000.idx", "000000.tar", "000001.idx", "000001.tar", "000002.idx", "000002.tar", MANIFEST_NAME]
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    shard_set = ShardSet.open(write(tmp_path / "set"), resolution=RESOLUTION)
    manifest = Manifest.read(tmp_path / "set")
    assert (shard_set.num_samples, shard_set.resolution, shard_set.has_alpha) == (11, RESOLUTION, True)
    assert manifest.source == {"kind": "test"} and manifest.digest == shard_set.digest
    for number, sample in enumerate(make_samples(11)):
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(shard_set.image_bytes(number)))), sample.image)
        alpha = Image.open(io.BytesIO(shard_set.alpha_bytes(number)))
        assert alpha.mode == "L" and np.array_equal(np.asarray(alpha), sample.alpha)
        assert json.loads(shard_set.read(number, "json")) == {"number": number}
    with pytest.raises(UserError, match=r"000001\.tar: sample 2 has no \.jpg; it has"):
        shard_set.read(6, "jpg")


def test_digest_tells_content_not_place(tmp_path: Path) -> None:
    first = ShardSet.open(write(tmp_path / "first")).digest
    write(tmp_path / "second").rename(tmp_path / "moved")
    assert ShardSet.open(tmp_path / "moved").digest == first
    assert ShardSet.open(write(tmp_path / "third", num_samples=10)).digest != first


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([], "no images"),
        ([*make_samples(2), *make_samples(1, resolution=8)], r"\[8, 8, 3\]"),
        ([*make_samples(2), *make_samples(1, alpha=False)], "image 2 has no alpha"),
        ([*make_samples(1, alpha=False), *make_samples(1)], "image 1 has an alpha"),
    ],
    ids=["none", "other size", "alpha lacks", "alpha extra"],
)
def test_failed_write_leaves_nothing(tmp_path: Path, samples: list[Sample], message: str) -> None:
    with pytest.raises(UserError, match=message):
        write_shards(samples, tmp_path / "set", resolution=RESOLUTION, source={})
    assert not list(tmp_path.iterdir())


def test_write_refuses_a_name_that_is_taken(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="exists already"):
        write(write(tmp_path / "set"))


def edit_manifest(directory: Path, **fields: object) -> None:
    path = directory / MANIFEST_NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def cut(path: Path, num_bytes: int) -> None:
    path.write_bytes(path.read_bytes()[:num_bytes])


BREAKAGES = {
    "missing directory": (lambda d: d.rename(d.with_name("away")), "set does not exist"),
    "no tar": (lambda d: [tar.unlink() for tar in d.glob("*.tar")], r"set holds no \*\.tar"),
    "missing tar": (lambda d: (d / "000001.tar").unlink(), r"000001\.tar is missing"),
    "truncated": (lambda d: cut(d / "000001.tar", 2048), r"000001\.tar is truncated: 2048 bytes where its manifest"),
    "foreign tar": (lambda d: (d / "7.tar").write_bytes(b"x"), r"7\.tar is not in its manifest"),
    "no JSON": (lambda d: cut(d / MANIFEST_NAME, 50), r"manifest\.json cannot be read"),
    "lost field": (lambda d: edit_manifest(d, resolution=None), r"manifest\.json has no valid field 'resolution'"),
    "other version": (lambda d: edit_manifest(d, version=2), r"manifest\.json is version 2, not 1"),
    "no index": (lambda d: (d / "000000.idx").write_text("nonsense"), r"000000\.idx is no DALI index"),
    "short index": (lambda d: index_of_one(d / "000000.tar"), r"000000\.tar lists 1 samples where the manifest says 4"),
    "other extension": (
        lambda d: edit_manifest(d, image_extension="jpg"),
        r"000000\.tar: sample 0 has no \.jpg, only",
    ),
}


def index_of_one(tar: Path) -> None:
    lines = index_path(tar).read_text().splitlines()
    index_path(tar).write_text(f"v1.2 1\n{lines[1]}\n")


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_broken_set_is_refused_by_name(tmp_path: Path, breakage: str) -> None:
    damage, message = BREAKAGES[breakage]
    damage(write(tmp_path / "set"))
    with pytest.raises(UserError, match=message) as refusal:
        ShardSet.open(tmp_path / "set")
    assert str(tmp_path) in str(refusal.value) and "\n" not in str(refusal.value)


def test_other_resolution_is_refused_with_both_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"set holds images of 16 px, not 32 px"):
        ShardSet.open(write(tmp_path / "set"), resolution=32)


@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize("extension", ["png", "jpg"])
def test_foreign_tars_need_no_manifest(tmp_path: Path, extension: str, indexed: bool) -> None:
    directory = write_foreign(tmp_path / "set", extension=extension)
    inferred = ShardSet.open(directory)
    if indexed:
        write_index(directory / "some.tar")
    shard_set = ShardSet.open(directory, resolution=24)
    assert (shard_set.num_samples, shard_set.image_extension, shard_set.has_alpha) == (5, extension, False)
    assert shard_set.digest == inferred.digest
    assert shard_set.read(3, "cls") == b"7"
    assert np.asarray(Image.open(io.BytesIO(shard_set.image_bytes(4))))[0, 0, 0] == pytest.approx(4, abs=2)


@pytest.mark.parametrize(
    ("num_bytes", "indexed", "message"),
    [
        (0, False, "is empty: 0 bytes"),
        (1024, False, "is truncated"),
        (1500, True, "is truncated"),
        (3000, False, "is truncated"),
    ],
)
def test_broken_foreign_tar_is_refused_by_name(tmp_path: Path, num_bytes: int, indexed: bool, message: str) -> None:
    tar = write_foreign(tmp_path / "set") / "some.tar"
    if indexed:
        write_index(tar)
    cut(tar, num_bytes)
    with pytest.raises(UserError, match=rf"some\.tar {message}"):
        ShardSet.open(tmp_path / "set")


def test_tar_of_zeros_is_empty_and_other_files_are_no_tar(tmp_path: Path) -> None:
    (tmp_path / "some.tar").write_bytes(bytes(10240))
    with pytest.raises(UserError, match=r"some\.tar is empty: it holds no sample"):
        ShardSet.open(tmp_path)
    (tmp_path / "some.tar").write_bytes(b"no tar".ljust(10240, b"\0"))
    with pytest.raises(UserError, match=r"some\.tar cannot be read as a tar"):
        ShardSet.open(tmp_path)


def test_index_of_another_tar_is_refused(tmp_path: Path) -> None:
    directory = write_foreign(tmp_path / "set")
    index = write_index(directory / "some.tar").read_bytes()
    other = write_foreign(tmp_path / "other", directory_in_tar=False, resolution=100)
    index_path(other / "some.tar").write_bytes(index)
    with pytest.raises(UserError, match=r"some\.idx is not the index of some\.tar"):
        ShardSet.open(other)


def test_extension_that_matches_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"set holds no image \.png, \.jpg, .*, only \.cls, \.bmp"):
        ShardSet.open(write_foreign(tmp_path / "set", extension="bmp"))


FURBALLS = {"resolution": 32, "num_images": 6, "seed": 3}


def test_furballs_are_drawn_once_and_again_when_broken(tmp_path: Path) -> None:
    path = furballs_shards(tmp_path, **FURBALLS)
    tar = path / "000000.tar"
    content, made = tar.read_bytes(), tar.stat().st_mtime_ns
    assert path.name == "furballs-v3-32px-6-seed3" and ShardSet.open(path).has_alpha
    assert furballs_shards(tmp_path, **FURBALLS) == path and tar.stat().st_mtime_ns == made
    cut(tar, 2048)
    assert furballs_shards(tmp_path, **FURBALLS) == path and tar.read_bytes() == content


def draw_when_both_are_ready(root: Path, barrier: Any, digests: Any) -> None:
    barrier.wait()
    digests.put(ShardSet.open(furballs_shards(root, **FURBALLS, num_workers=1)).digest)


def test_two_processes_at_once_leave_one_whole_set(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    barrier, digests = context.Barrier(2), context.Queue()
    processes = [context.Process(target=draw_when_both_are_ready, args=(tmp_path, barrier, digests)) for _ in range(2)]
    for process in processes:
        process.start()
    found = {digests.get(timeout=60) for _ in processes}
    for process in processes:
        process.join()
    assert [path.name for path in tmp_path.iterdir()] == ["furballs-v3-32px-6-seed3"]
    assert found == {ShardSet.open(tmp_path / "furballs-v3-32px-6-seed3").digest}


def test_bytes_do_not_depend_on_the_number_of_workers(tmp_path: Path) -> None:
    sizes = FURBALLS | {"num_images": 40}
    one = furballs_shards(tmp_path / "one", **sizes, num_workers=1)
    two = furballs_shards(tmp_path / "two", **sizes, num_workers=2)
    assert (one / MANIFEST_NAME).read_bytes() == (two / MANIFEST_NAME).read_bytes()
