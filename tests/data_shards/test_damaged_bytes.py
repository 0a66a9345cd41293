"""Shard sets whose bytes were flipped, cut or cut off: a clear error or the right images, never anything else."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_shards.building.writer import write_shards
from data_shards.errors import UserError
from data_shards.format.manifest import MANIFEST_NAME
from data_shards.format.sample import Sample
from data_shards.reading.batches import Batch
from data_shards.reading.loader import make_loader
from data_shards.reading.shard_set import ShardSet

RESOLUTION, NUM_SAMPLES = 8, 8
MANY = settings(
    max_examples=150, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)

DAMAGES = st.one_of(
    st.tuples(st.just("flip"), st.floats(0, 1, exclude_max=True), st.integers(1, 255)),
    st.tuples(st.just("cut"), st.floats(0, 1, exclude_max=True), st.integers(1, 600)),
    st.tuples(st.just("truncate"), st.floats(0, 1, exclude_max=True), st.just(0)),
)
"""Kind, place as a share of the file, and what to flip or how much to cut out."""


def damaged(content: bytes, damage: tuple[str, float, int]) -> bytes:
    kind, share, amount = damage
    place = int(share * len(content))
    if kind == "flip":
        return content[:place] + bytes([content[place] ^ amount]) + content[place + 1 :]
    return content[:place] + (content[place + amount :] if kind == "cut" else b"")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    images = np.random.default_rng(0).integers(256, size=(NUM_SAMPLES, RESOLUTION, RESOLUTION, 3), dtype=np.uint8)
    out = tmp_path_factory.mktemp("whole") / "set"
    samples = (Sample(image, image[..., 1].copy(), {"n": number}) for number, image in enumerate(images))
    write_shards(samples, out, resolution=RESOLUTION, source={"kind": "noise"}, samples_per_shard=4)
    return out


@pytest.fixture(scope="module")
def unlisted(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same set without its manifest, so that nothing vouches for its bytes but PNG's own checksums."""
    out = tmp_path_factory.mktemp("unlisted") / "set"
    shutil.copytree(whole, out)
    (out / MANIFEST_NAME).unlink()
    return out


def one_epoch(directory: Path, *, verify: bool = True, kind: str = "webdataset") -> list[Batch]:
    """All images, as training reads them."""
    shard_set = ShardSet.open(directory, resolution=RESOLUTION)
    loader = None
    try:
        if verify:
            shard_set.verify()
        loader = make_loader(
            "dali" if kind == "dali" else "webdataset",
            shard_set,
            global_batch=4,
            rank=0,
            world_size=1,
            seed=0,
            flip=False,
            with_alpha=True,
            device=torch.device("cpu"),
            num_threads=1,
        )
        return [next(loader) for _ in range(NUM_SAMPLES // 4)]
    finally:
        if loader is not None:
            loader.close()
        shard_set.close()


def assert_refused_or_right(broken: Path, whole: Path, **options: bool) -> None:
    try:
        batches = one_epoch(broken, **options)
    except UserError as error:
        assert "set" in str(error) and len(str(error)) > 20
        return
    for batch, expected in zip(batches, one_epoch(whole, **options), strict=True):
        assert torch.equal(batch.images, expected.images) and torch.equal(batch.alphas, expected.alphas)


@pytest.mark.parametrize("name", ["000000.tar", "000001.idx", MANIFEST_NAME])
def test_damaged_set_is_refused_or_gives_the_right_pictures(name: str, whole: Path, tmp_path: Path) -> None:
    broken = tmp_path / "set"
    shutil.copytree(whole, broken)

    @MANY
    @given(DAMAGES)
    def holds(damage: tuple[str, float, int]) -> None:
        (broken / name).write_bytes(damaged((whole / name).read_bytes(), damage))
        assert_refused_or_right(broken, whole)

    holds()


@pytest.mark.parametrize("name", ["000000.tar", "000000.tar without its index", "000000.idx"])
def test_damaged_set_without_manifest_is_refused_or_gives_the_right_pictures(
    name: str, unlisted: Path, tmp_path: Path
) -> None:
    """No digest tells: PNG's checksums, the tar's headers and its end must; a piece cut out of it may be an image."""
    broken = tmp_path / "set"
    shutil.copytree(unlisted, broken)
    name, _, without_index = name.partition(" ")
    if without_index:
        (broken / "000000.idx").unlink()

    @MANY
    @given(DAMAGES.filter(lambda damage: name.endswith("idx") or damage[0] != "cut"))
    def holds(damage: tuple[str, float, int]) -> None:
        (broken / name).write_bytes(damaged((unlisted / name).read_bytes(), damage))
        assert_refused_or_right(broken, unlisted, verify=False)

    holds()


CHILD = """
import sys
from pathlib import Path
import torch
from test_damaged_bytes import one_epoch
from data_shards.errors import UserError
expected = one_epoch(Path(sys.argv[1]), verify=False, kind="dali")
for line in sys.stdin:
    try:
        batches = one_epoch(Path(line.strip()), verify=False, kind="dali")
    except UserError:
        print("refused", flush=True)
    else:
        pairs = zip(batches, expected)
        same = [torch.equal(a.images, b.images) and torch.equal(a.alphas, b.alphas) for a, b in pairs]
        print("right" if all(same) else "wrong", flush=True)
"""


def test_dali_survives_damaged_pictures(unlisted: Path, tmp_path: Path) -> None:
    """In a process of its own, as a decoder in C++ may take its process along."""
    pytest.importorskip("nvidia.dali")
    content = (unlisted / "000000.tar").read_bytes()
    generator = np.random.default_rng(0)
    names = []
    for number in range(40):
        broken = tmp_path / f"set-{number}"
        shutil.copytree(unlisted, broken)
        damage = ("flip", float(generator.random()), int(generator.integers(1, 256)))
        (broken / "000000.tar").write_bytes(damaged(content, damage))
        names.append(str(broken))
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(unlisted)],
        input="\n".join(names),
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])},
        capture_output=True,
        text=True,
        timeout=120,
    )
    answers = done.stdout.split()
    assert done.returncode == 0 and len(answers) == len(names), done.stderr
    assert set(answers) == {"refused", "right"}


def test_every_flip_inside_a_tar_is_told_by_its_digest(whole: Path, tmp_path: Path) -> None:
    """What a decoder may overlook, such as a flip in a JPEG, the digest does not."""
    broken = tmp_path / "set"
    shutil.copytree(whole, broken)
    content = (whole / "000001.tar").read_bytes()
    for place in range(0, len(content), 97):
        (broken / "000001.tar").write_bytes(damaged(content, ("flip", place / len(content), 1)))
        with pytest.raises(UserError, match=r"000001\.tar"):
            ShardSet.open(broken).verify()


def test_parts_of_a_verification_check_every_tar(whole: Path, tmp_path: Path) -> None:
    broken = tmp_path / "set"
    shutil.copytree(whole, broken)
    tar = broken / "000001.tar"
    tar.write_bytes(damaged(tar.read_bytes(), ("flip", 0.2, 1)))
    shard_set = ShardSet.open(broken)
    shard_set.verify(part=0, parts=2)
    with pytest.raises(UserError, match=r"000001\.tar is damaged: it has sha256 .* where its manifest says"):
        shard_set.verify(part=1, parts=2)
    shard_set.close()


def test_flipped_digest_of_a_manifest_is_told(whole: Path, tmp_path: Path) -> None:
    broken = tmp_path / "set"
    shutil.copytree(whole, broken)
    fields = json.loads((broken / MANIFEST_NAME).read_text())
    fields["shards"][0]["sha256"] = "0" * 64
    (broken / MANIFEST_NAME).write_text(json.dumps(fields))
    with pytest.raises(UserError, match=r"000000\.tar is damaged"):
        ShardSet.open(broken).verify()
