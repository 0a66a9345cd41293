"""From any image file to 8-bit RGB and alpha: orientations, modes, depths, animations, and what is refused."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from build_helpers import assert_resampled, cubic, lanczos, noise, resampled, triangle
from PIL import Image

from data_shards.sources.images import BrokenPictureError, Picture, fit, picture_extensions, read_picture, square


def stored(image: Image.Image, **options: object) -> io.BytesIO:
    buffer = io.BytesIO()
    image.save(buffer, **options)
    buffer.seek(0)
    return buffer


def read(image: Image.Image, **options: object) -> tuple[np.ndarray, np.ndarray | None]:
    picture = read_picture(stored(image, **options))
    assert picture.image.mode == "RGB"
    return np.asarray(picture.image), None if picture.alpha is None else np.asarray(picture.alpha)


UPRIGHT = {
    1: lambda pixels: pixels,
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: pixels[::-1].swapaxes(0, 1),
    7: lambda pixels: pixels[::-1, ::-1].swapaxes(0, 1),
    8: lambda pixels: pixels[:, ::-1].swapaxes(0, 1),
}
"""What EXIF 2.3 says of row 0 and column 0 as stored, for each value of its tag 274."""


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_picture_is_upright_by_its_exif(orientation: int) -> None:
    pixels = noise(0, 6, 9, channels=4)
    exif = Image.Exif()
    exif[274] = orientation
    image, alpha = read(Image.fromarray(pixels), format="webp", lossless=True, exact=True, exif=exif)
    assert alpha is not None and np.array_equal(alpha, UPRIGHT[orientation](pixels)[..., 3])
    image, _ = read(Image.fromarray(pixels[..., :3]), format="png", exif=exif)
    assert np.array_equal(image, UPRIGHT[orientation](pixels[..., :3]))


def test_grey_one_bit_and_palette_become_rgb() -> None:
    grey = noise(0, 5, 7, channels=1)
    assert np.array_equal(read(Image.fromarray(grey), format="png")[0], np.stack([grey] * 3, -1))
    bits = grey > 127
    assert np.array_equal(read(Image.fromarray(bits), format="png")[0], np.stack([bits * np.uint8(255)] * 3, -1))
    colours = np.random.default_rng(0).integers(256, size=(4, 3), dtype=np.uint8)
    indexed = Image.fromarray(grey % 4, mode="P")
    indexed.putpalette(colours.tobytes())
    for container in ("png", "gif"):
        image, alpha = read(indexed, format=container)
        assert alpha is None and np.array_equal(image, colours[grey % 4])


def test_cmyk_becomes_rgb() -> None:
    inks = noise(0, 8, 8, channels=4).astype(np.float64)
    expected = (255 - inks[..., :3]) * (255 - inks[..., 3:]) / 255
    image, alpha = read(Image.fromarray(inks.astype(np.uint8), mode="CMYK"), format="tiff")
    assert alpha is None and np.abs(image - expected).max() <= 1


@pytest.mark.parametrize("container", ["png", "tiff"])
def test_16_bits_are_divided_not_cut_off(container: str) -> None:
    deep = np.random.default_rng(0).integers(65536, size=(9, 5), dtype=np.uint16)
    image, _ = read(Image.fromarray(deep), format=container)
    assert np.array_equal(image, np.stack([np.round(deep / 257).astype(np.uint8)] * 3, -1))


def test_16_bit_rgb_keeps_its_high_bytes() -> None:
    deep = np.random.default_rng(0).integers(65536, size=(4, 6, 3), dtype=np.uint16)

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in deep)
    header = struct.pack(">IIBBBBB", 6, 4, 16, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    image = np.asarray(read_picture(io.BytesIO(png)).image)
    assert np.abs(image - deep / 257).max() <= 1


def on_white(pixels: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    opacity = alpha[..., None] / 255
    return pixels * opacity + 255 * (1 - opacity)


def test_transparency_is_shown_on_white_and_kept() -> None:
    pixels = noise(0, 7, 6, channels=4)
    image, alpha = read(Image.fromarray(pixels), format="png")
    assert np.array_equal(alpha, pixels[..., 3])
    assert np.abs(image - on_white(pixels[..., :3], pixels[..., 3])).max() <= 0.51
    grey = pixels[..., [0, 3]]
    image, alpha = read(Image.fromarray(grey, mode="LA"), format="png")
    assert np.array_equal(alpha, grey[..., 1])
    assert np.abs(image - on_white(grey[..., [0, 0, 0]], grey[..., 1])).max() <= 0.51
    palette = Image.fromarray(pixels[..., 0] % 2, mode="P")
    palette.putpalette([10, 20, 30, 200, 210, 220])
    image, alpha = read(palette, format="png", transparency=1)
    assert np.array_equal(alpha, np.where(pixels[..., 0] % 2, 0, 255))
    assert np.array_equal(image[alpha == 0], np.full_like(image[alpha == 0], 255))
    opaque = pixels.copy()
    opaque[..., 3] = 255
    image, alpha = read(Image.fromarray(opaque), format="png")
    assert alpha is None and np.array_equal(image, opaque[..., :3])


@pytest.mark.parametrize("container", ["gif", "webp", "png", "tiff"])
def test_of_an_animation_the_first_frame_is_taken(container: str) -> None:
    frames = [Image.new("RGB", (5, 5), colour) for colour in ("red", "lime", "blue")]
    image, _ = read(frames[0], format=container, save_all=True, append_images=frames[1:], lossless=True)
    assert (image == (255, 0, 0)).all()


def test_small_pictures_are_enlarged_and_said_to_be() -> None:
    pixels = noise(0, 9, 14)
    sample, is_upsampled = fit(Picture(Image.fromarray(pixels)), 24)
    assert is_upsampled
    assert_resampled(sample.image, pixels[:, 2:11], cubic)
    same, is_upsampled = fit(Picture(Image.fromarray(pixels)), 9)
    assert not is_upsampled and np.array_equal(same.image, pixels[:, 2:11])
    one, is_upsampled = fit(read_picture(stored(Image.new("L", (1, 1), 77), format="png")), 4)
    assert is_upsampled and (one.image == 77).all()


def test_resizing_is_antialiased_and_masks_get_no_rings() -> None:
    """A fine checkerboard becomes grey; a mask's edge stays within 0 and 1 and rises once."""
    checks = np.indices((64, 64)).sum(0) % 2 * 255
    sample, _ = fit(Picture(Image.fromarray(np.stack([checks] * 3, -1).astype(np.uint8))), 16)
    assert np.abs(sample.image[1:-1, 1:-1] - 127.5).max() <= 8
    edge = np.zeros((64, 64), dtype=np.uint8)
    edge[:, 30:] = 255
    sample, _ = fit(Picture(Image.fromarray(np.stack([edge] * 3, -1)), Image.fromarray(edge)), 16)
    assert sample.alpha is not None
    assert_resampled(sample.alpha, edge, triangle)
    assert (np.diff(sample.alpha.astype(int), axis=1) >= 0).all()
    assert sample.alpha[0, 0] == 0 and sample.alpha[0, 6] == 0 and sample.alpha[0, -1] == 255
    assert resampled(edge, 16, lanczos)[0].tolist() != resampled(edge, 16, triangle)[0].tolist()


def test_mask_of_another_size_is_cropped_at_the_same_place() -> None:
    mask = noise(1, 20, 30, channels=1)
    image = noise(2, 40, 60)
    sample, _ = fit(Picture(Image.fromarray(image), Image.fromarray(mask)), 10)
    assert_resampled(sample.alpha, mask[:, 5:25], triangle)
    with pytest.raises(BrokenPictureError, match="its mask is of another shape: 20x30 px for an image of 60x40 px"):
        fit(Picture(Image.fromarray(image), Image.fromarray(mask.T)), 10)


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        (None, (10, 0, 40)),
        ((20, 10, 30, 20), (19, 9, 12)),  # 10 px and a margin of 1 on each side
        ((0, 0, 10, 10), (0, 0, 12)),  # moved into the image
        ((50, 35, 60, 40), (48, 28, 12)),
        ((0, 5, 60, 15), (10, 0, 40)),  # wider than the image is high
        ((30, 30, 30, 30), (29, 29, 1)),
    ],
)
def test_square_holds_the_box_within_the_picture(box: tuple[float, ...] | None, expected: tuple[int, ...]) -> None:
    assert square(60, 40, box) == expected  # type: ignore[arg-type]


def broken(kind: str) -> io.BytesIO:
    whole = stored(Image.fromarray(noise(0, 64, 64)), format="jpeg" if kind == "jpeg" else "png").getvalue()
    if kind in ("jpeg", "png"):
        return io.BytesIO(whole[: len(whole) // 2])
    if kind == "flipped":
        return io.BytesIO(whole[:60] + bytes(40) + whole[100:])
    if kind == "eps":
        return stored(Image.new("RGB", (9, 9)), format="eps")
    if kind == "float":
        return stored(Image.fromarray(np.ones((4, 4), dtype=np.float32)), format="tiff")
    if kind == "int":
        return stored(Image.fromarray(np.full((4, 4), 70_000, dtype=np.int32)), format="tiff")
    return io.BytesIO(b"" if kind == "empty" else b"no image at all")


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("empty", "no image that Pillow knows"),
        ("text", "no image that Pillow knows"),
        ("eps", "no image that Pillow knows"),  # else Ghostscript would run on it
        ("jpeg", "truncated"),
        ("png", "truncated"),
        ("flipped", "."),
        ("float", "floating-point"),
        ("int", "their range is unknown"),
    ],
)
def test_broken_picture_is_refused_with_one_line(kind: str, reason: str) -> None:
    with pytest.raises(BrokenPictureError, match=reason) as refusal:
        read_picture(broken(kind))
    assert "\n" not in str(refusal.value)


def test_decompression_bomb_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40_000)
    for side in (210, 300):  # above the limit Pillow warns, above twice the limit it raises
        with pytest.raises(BrokenPictureError, match=r"^it has more than 0\.04 million pixels, too many to unpack$"):
            read_picture(stored(Image.new("L", (side, side)), format="png"))
    read_picture(stored(Image.new("L", (190, 190)), format="png"))
    with pytest.raises(BrokenPictureError, match="there is no such file"):
        read_picture(tmp_path / "missing.png")


def test_extensions_are_those_of_pictures() -> None:
    extensions = picture_extensions()
    assert {".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".ppm"} <= extensions
    assert not {".eps", ".ps", ".pdf", ".mpg", ".h5", ".txt", ".json", ".wmf"} & extensions
