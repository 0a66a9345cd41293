"""Each kind of source: a small tree of its shape gives the right images, crops and masks."""

import io
import os
import zipfile
from pathlib import Path

import lmdb
import numpy as np
import pytest
from build_helpers import RESOLUTION, assert_resampled, build_and_read, lanczos, noise, save, triangle
from PIL import Image

from data_shards.building.builder import BuildOptions, build
from data_shards.errors import UserError
from data_shards.sources.afhq import Afhq
from data_shards.sources.celebamask import CelebaMask
from data_shards.sources.compcars import Compcars
from data_shards.sources.cub import Cub
from data_shards.sources.cutouts import Cutouts
from data_shards.sources.ffhq import Ffhq
from data_shards.sources.folder import Folder
from data_shards.sources.furballs import Furballs, draw
from data_shards.sources.kinds import KINDS
from data_shards.sources.lmdb import Lmdb
from data_shards.sources.zip import Zip

ALL_SKIPPED = BuildOptions(max_skipped=1.0)


def encoded(pixels: np.ndarray, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, **options)
    return buffer.getvalue()


def test_folder_gives_all_pictures_of_all_subfolders(tmp_path: Path) -> None:
    wide, tall = noise(1, 30, 51), noise(2, 47, 20)
    save(tmp_path / "in" / "wide.PNG", wide)
    save(tmp_path / "in" / "a" / "b" / "tall.webp", tall, lossless=True)
    save(tmp_path / "in" / "a" / "tall.bmp", tall)
    save(tmp_path / "in" / "é ü.tif", wide)
    save(tmp_path / "in" / os.fsdecode(b"caf\xe9.png"), wide)  # of another encoding than UTF-8
    save(tmp_path / "in" / ".hidden" / "x.png", wide)
    save(tmp_path / "in" / "._x.png", wide)
    (tmp_path / "in" / "notes.txt").write_text("no image")
    built = build_and_read(Folder(source=tmp_path / "in", resolution=RESOLUTION), tmp_path / "out")
    assert sorted(built) == ["a/b/tall.webp", "a/tall.bmp", "caf\udce9.png", "wide.PNG", "é ü.tif"]
    for name, sample in built.items():
        square = tall[13:33] if "tall" in name else wide[:, 10:40]
        assert_resampled(sample.image, square, lanczos)
        assert sample.alpha is None
    assert (built["wide.PNG"].metadata["width"], built["wide.PNG"].metadata["height"]) == (51, 30)


def test_zip_gives_what_its_folder_would(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "in.zip", "w") as archive:
        for number in range(3):
            pixels = noise(number, 20, 20 + number)
            save(tmp_path / "in" / "sub" / f"{number}.png", pixels)
            archive.writestr(f"sub/{number}.png", encoded(pixels, format="png"))
        archive.writestr("readme.txt", "no image")
        archive.writestr("__MACOSX/sub/._0.png", "no image")
    from_zip = build_and_read(Zip(source=tmp_path / "in.zip", resolution=RESOLUTION), tmp_path / "zip")
    from_folder = build_and_read(Folder(source=tmp_path / "in", resolution=RESOLUTION), tmp_path / "folder")
    assert from_zip.keys() == from_folder.keys() == {f"sub/{number}.png" for number in range(3)}
    for name, sample in from_zip.items():
        assert np.array_equal(sample.image, from_folder[name].image)
    assert {path.name for path in tmp_path.iterdir()} == {"in", "in.zip", "zip", "folder"}


@pytest.mark.parametrize(
    "name", ["../evil.png", "a/../../evil.png", "/evil.png", "a\\..\\..\\evil.png", "C:\\evil.png"]
)
def test_zip_with_a_name_outside_itself_is_refused(name: str, tmp_path: Path) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    with zipfile.ZipFile(inner / "in.zip", "w") as archive:
        archive.writestr("fine.png", encoded(noise(0, 20, 20), format="png"))
        archive.writestr(name, encoded(noise(1, 20, 20), format="png"))
    with pytest.raises(UserError, match=r"in\.zip names a file outside itself .*evil\.png"):
        build(Zip(source=inner / "in.zip", resolution=RESOLUTION), inner / "out")
    assert [path.name for path in tmp_path.rglob("*")] == ["inner", "in.zip"]


def test_zip_bomb_is_skipped_with_its_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_shards.sources.zip.MAX_FILE_BYTES", 100_000)
    with zipfile.ZipFile(tmp_path / "in.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb.png", bytes(1_000_000))
        archive.writestr("fine.png", encoded(noise(0, 20, 20), format="png"))
    source = Zip(source=tmp_path / "in.zip", resolution=RESOLUTION)
    (skipped,) = build(source, tmp_path / "out", ALL_SKIPPED).skipped
    assert (skipped.reference, skipped.reason) == ("bomb.png", "it unpacks to 1,000,000 bytes, more than 100,000")


def write_lmdb(path: Path, values: dict[bytes, bytes]) -> Path:
    with lmdb.open(str(path), map_size=8 << 20) as environment, environment.begin(write=True) as transaction:
        for key, value in values.items():
            transaction.put(key, value)
    (path / "lock.mdb").unlink()
    return path


def test_lmdb_gives_webp_and_jpeg_values_and_the_first_by_key(tmp_path: Path) -> None:
    pixels = {f"{number:04x}": noise(number, 24, 32) for number in (9, 3, 255, 16, 4)}
    values = {
        key.encode(): encoded(value, format="webp", lossless=True)
        if int(key, 16) % 2
        else encoded(value, format="jpeg", quality=90)
        for key, value in pixels.items()
    }
    write_lmdb(tmp_path / "horse_train_lmdb", values)
    source = Lmdb(source=tmp_path / "horse_train_lmdb", resolution=RESOLUTION, max_images=4)
    built = build_and_read(source, tmp_path / "out")
    assert sorted(built) == ["0003", "0004", "0009", "0010"]
    for key, sample in built.items():
        decoded = np.asarray(Image.open(io.BytesIO(values[key.encode()])))
        assert_resampled(sample.image, decoded[:, 4:28], lanczos)
    assert sorted(path.name for path in (tmp_path / "horse_train_lmdb").iterdir()) == ["data.mdb"]


def test_truncated_lmdb_is_refused_instead_of_killing_the_process(tmp_path: Path) -> None:
    values = {b"%04d" % number: encoded(noise(number, 64, 64), format="png") for number in range(40)}
    data = write_lmdb(tmp_path / "in", values) / "data.mdb"
    data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    with pytest.raises(UserError, match=r"data\.mdb is truncated: \d+ bytes of \d+; fetch it again"):
        build(Lmdb(source=tmp_path / "in"), tmp_path / "out")
    data.write_bytes(b"no database" * 1000)
    with pytest.raises(UserError, match=r"data\.mdb cannot be read as an LMDB"):
        build(Lmdb(source=tmp_path / "in"), tmp_path / "out")
    with pytest.raises(UserError, match=r"holds no data\.mdb; give the folder"):
        build(Lmdb(source=tmp_path), tmp_path / "out")


@pytest.mark.parametrize("inner", [False, True])
def test_ffhq_gives_the_aligned_faces_alone(inner: bool, tmp_path: Path) -> None:
    faces = {f"{number // 1000 * 1000:05d}/{number:05d}.png": noise(number, 32, 32) for number in (0, 999, 1000)}
    for name, pixels in faces.items():
        save(tmp_path / "ffhq" / "images1024x1024" / name, pixels)
    save(tmp_path / "ffhq" / "thumbnails128x128" / "00000" / "00000.png", noise(9, 8, 8))
    save(tmp_path / "ffhq" / "images1024x1024" / "contact_sheet.png", noise(9, 64, 64))
    folder = tmp_path / "ffhq" / "images1024x1024" if inner else tmp_path / "ffhq"
    built = build_and_read(Ffhq(source=folder, resolution=RESOLUTION), tmp_path / "out")
    assert built.keys() == faces.keys()
    for name, sample in built.items():
        assert_resampled(sample.image, faces[name], lanczos)


@pytest.mark.parametrize(
    ("split", "names"), [("train", {"train/cat/1.png"}), ("all", {"train/cat/1.png", "test/cat/2.png"})]
)
def test_afhq_gives_one_class_of_one_split(split: str, names: set[str], tmp_path: Path) -> None:
    for number, name in enumerate(("train/dog/0.png", "train/cat/1.png", "test/cat/2.png", "train/wild/3.png")):
        save(tmp_path / "in" / name, noise(number, 32, 32))
    built = build_and_read(Afhq(source=tmp_path / "in", split=split, resolution=RESOLUTION), tmp_path / "out")
    assert built.keys() == names
    for name, sample in built.items():
        assert_resampled(sample.image, noise(int(name[-5]), 32, 32), lanczos)


def write_cub(root: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Two birds, with the greys of 0 to 5 annotators as segmentations, one of them of three channels."""
    pictures = {}
    lines, boxes = [], []
    for number, name in ((1, "001.Albatross/Albatross_0001.jpg"), (2, "002.Auk/Auk_0002.jpg")):
        picture = save(root / "images" / name, noise(number, 40, 60), quality=95)
        mask = (np.random.default_rng(number).integers(6, size=(8, 12)) * 51).astype(np.uint8).repeat(5, 0).repeat(5, 1)
        path = root / "segmentations" / Path(name).with_suffix(".png")
        save(path, mask if number == 1 else np.repeat(mask[..., None], 3, 2))
        pictures[name] = np.asarray(Image.open(picture)), mask
        lines.append(f"{number} {name}\n")
        boxes.append(f"{number} {10.0 + 20 * number:.1f} 6.0 20.0 15.0\n")
    (root / "images.txt").write_text("".join(lines))
    (root / "bounding_boxes.txt").write_text("".join(boxes))
    return pictures


def test_cub_gives_its_segmentations_as_alphas(tmp_path: Path) -> None:
    pictures = write_cub(tmp_path / "CUB_200_2011")
    built = build_and_read(Cub(source=tmp_path / "CUB_200_2011", resolution=RESOLUTION), tmp_path / "out")
    assert built.keys() == pictures.keys()
    for name, sample in built.items():
        image, mask = pictures[name]
        assert_resampled(sample.image, image[:, 10:50], lanczos)
        assert_resampled(sample.alpha, mask[:, 10:50], triangle)


def test_cub_crops_to_the_box_with_its_margin(tmp_path: Path) -> None:
    pictures = write_cub(tmp_path / "CUB_200_2011")
    # Where the archive with the segmentations unpacks to when it lies beside the other.
    (tmp_path / "CUB_200_2011" / "segmentations").rename(tmp_path / "segmentations")
    source = Cub(source=tmp_path / "CUB_200_2011", crop="box", resolution=RESOLUTION)
    built = build_and_read(source, tmp_path / "out")
    # Boxes of 20x15 px at (30, 6) and (50, 6): squares of 24 px about their centres, the second moved into the image.
    for name, left in zip(pictures, (28, 36), strict=True):
        image, mask = pictures[name]
        assert_resampled(built[name].image, image[1:25, left : left + 24], lanczos)
        assert_resampled(built[name].alpha, mask[1:25, left : left + 24], triangle)


def test_cub_without_segmentations_must_be_asked_for(tmp_path: Path) -> None:
    pictures = write_cub(tmp_path / "in")
    mask = next((tmp_path / "in" / "segmentations").rglob("*.png"))
    mask.unlink()
    manifest = build(Cub(source=tmp_path / "in", resolution=RESOLUTION), tmp_path / "one", ALL_SKIPPED)
    assert [skipped.reason for skipped in manifest.skipped] == ["it has no segmentation"]
    (tmp_path / "in" / "segmentations").rename(tmp_path / "away")
    with pytest.raises(UserError, match=r"has no segmentations: unpack segmentations\.tgz in it, or .* --no-masks"):
        build(Cub(source=tmp_path / "in"), tmp_path / "out")
    built = build_and_read(Cub(source=tmp_path / "in", masks=False, resolution=RESOLUTION), tmp_path / "out")
    assert built.keys() == pictures.keys() and all(sample.alpha is None for sample in built.values())


@pytest.mark.parametrize("crop", ["center", "box"])
def test_compcars_crops_to_the_centre_or_the_box(crop: str, tmp_path: Path) -> None:
    pictures = {}
    for number in (1, 2):
        name = f"78/1/201{number}/car{number}.jpg"
        path = save(tmp_path / "data" / "image" / name, noise(number, 40, 60), quality=95)
        pictures[name] = np.asarray(Image.open(path))
        label = tmp_path / "data" / "label" / Path(name).with_suffix(".txt")
        label.parent.mkdir(parents=True)
        label.write_text("-1\n1\n11 6 30 20\n")  # counted from 1: 20x15 px
    source = Compcars(source=tmp_path / "data", crop=crop, resolution=RESOLUTION)
    built = build_and_read(source, tmp_path / "out")
    assert built.keys() == pictures.keys()
    for name, sample in built.items():
        square = pictures[name][:, 10:50] if crop == "center" else pictures[name][:24, 8:32]
        assert_resampled(sample.image, square, lanczos)


def test_celebamask_gives_the_union_of_the_parts(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    unions, pictures = {}, {}
    for number in (0, 7, 2001):
        path = save(tmp_path / "in" / "CelebA-HQ-img" / f"{number}.jpg", noise(number, 64, 64), quality=95)
        pictures[f"{number}.jpg"] = np.asarray(Image.open(path))
        union = np.zeros((32, 32), dtype=bool)
        for part in ("skin", "hair", "l_eye", "cloth"):
            mask = rng.random((8, 8)).repeat(4, 0).repeat(4, 1) < 0.2
            union |= mask
            name = f"CelebAMask-HQ-mask-anno/{number // 2000}/{number:05d}_{part}.png"
            pixels = np.where(mask, 255, 0).astype(np.uint8)
            save(tmp_path / "in" / name, np.repeat(pixels[..., None], 3, 2) if part == "hair" else pixels)
        unions[f"{number}.jpg"] = np.where(union, 255, 0).astype(np.uint8)
    save(tmp_path / "in" / "CelebA-HQ-img" / "3.jpg", noise(3, 64, 64))
    built = build_and_read(CelebaMask(source=tmp_path / "in", resolution=RESOLUTION), tmp_path / "out", max_skipped=1.0)
    assert built.keys() == unions.keys()  # number 3 has no parts
    for name, sample in built.items():
        assert_resampled(sample.image, pictures[name], lanczos)
        assert_resampled(sample.alpha, unions[name], triangle)


def test_cutouts_are_composites_of_their_exact_alpha(tmp_path: Path) -> None:
    """Of one colour each, image = alpha * colour + (1 - alpha) * background can be checked at every pixel."""
    colours, grounds = (
        {"a.png": (200, 30, 90), "b/b.png": (10, 220, 160)},
        {"x.jpg": (90, 90, 90), "y.png": (0, 40, 255)},
    )
    for number, (name, colour) in enumerate(colours.items()):
        cutout = np.zeros((60, 80, 4), dtype=np.uint8)
        cutout[..., :3] = (255, 255, 0)  # hidden, must not show
        cutout[10:50, 20:70] = (*colour, 255)
        cutout[10:50, 20:30, 3] = 77 + number
        save(tmp_path / "cutouts" / name, cutout)
    for name, colour in grounds.items():
        save(tmp_path / "backgrounds" / name, np.full((70, 90, 3), colour, dtype=np.uint8))
    source = Cutouts(
        source=tmp_path / "cutouts",
        backgrounds=tmp_path / "backgrounds",
        num_images=40,
        resolution=32,
        sizes=(0.3, 0.9),
    )
    built = build_and_read(source, tmp_path / "out")
    assert len(built) == 40
    used, corners, sides, flips = set(), set(), [], set()
    for sample in built.values():
        assert sample.alpha is not None
        cutout, background = sample.metadata["cutout"], sample.metadata["background"]
        alpha = sample.alpha[..., None] / 255.0
        expected = alpha * np.array(colours[cutout]) + (1 - alpha) * np.array(grounds[background])
        # 1 for each rounding: of the premultiplied colour, of the background's share; 2 more for JPEG's colour.
        assert np.abs(sample.image - expected).max() <= 4
        rows, columns = np.nonzero(sample.alpha)
        height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
        assert abs(width / height - 50 / 40) < 0.25 and 0.3 * 32 - 1 <= width <= 0.9 * 32 + 1
        assert sample.alpha.max() == 255  # whole, not cut at the border
        left = sample.alpha[rows[len(rows) // 2], columns.min() : columns.min() + 2].max()
        flips.add(bool(left < 100))
        used.add((cutout, background))
        corners.add((rows.min(), columns.min()))
        sides.append(width)
    assert len(used) == 4 and len(corners) > 25 and flips == {False, True} and np.ptp(sides) > 10


def test_cutouts_keep_their_area_and_soft_edges(tmp_path: Path) -> None:
    rows, columns = np.indices((101, 101)) - 50
    disc = np.where(rows**2 + columns**2 <= 40**2, 255, 0).astype(np.uint8)
    save(tmp_path / "cutouts" / "disc.png", np.stack([disc] * 4, -1))
    save(tmp_path / "backgrounds" / "x.png", noise(0, 60, 60))
    source = Cutouts(source=tmp_path / "cutouts", backgrounds=tmp_path / "backgrounds", num_images=8, resolution=64)
    for sample in build_and_read(source, tmp_path / "out").values():
        assert sample.alpha is not None
        diameter = np.ptp(np.nonzero(sample.alpha.max(0))[0]) + 1
        assert sample.alpha.sum() / 255 == pytest.approx(np.pi / 4 * diameter**2, rel=0.06)
        assert len(np.unique(sample.alpha)) > 12


def test_cutouts_refuse_what_is_no_cutout(tmp_path: Path) -> None:
    save(tmp_path / "cutouts" / "opaque.png", noise(0, 20, 20))
    save(tmp_path / "backgrounds" / "x.png", noise(0, 20, 20))
    source = Cutouts(source=tmp_path / "cutouts", backgrounds=tmp_path / "backgrounds", num_images=3, resolution=32)
    with pytest.raises(UserError, match=r"cut-out opaque\.png: it has no transparency"):
        build(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_furballs_are_those_of_the_training_command(tmp_path: Path) -> None:
    built = build_and_read(Furballs(resolution=32, num_images=5, seed=4), tmp_path / "out")
    assert sorted(built) == [f"{number:08d}" for number in range(5)]
    for name, sample in built.items():
        drawn = draw(int(name), seed=4, resolution=32)
        assert np.array_equal(sample.image, drawn.image)
        assert sample.alpha is not None and drawn.alpha is not None and np.array_equal(sample.alpha, drawn.alpha)


def test_every_kind_is_tested_here_and_says_what_it_reads() -> None:
    assert set(KINDS) == {
        *("folder", "zip", "lmdb", "ffhq", "afhq", "cub", "compcars", "celebamask", "cutouts", "furballs"),
        "shadows",
    }
    for kind, source in KINDS.items():
        assert kind in ("furballs", "shadows") or "SOURCE" in (source.__doc__ or "")
