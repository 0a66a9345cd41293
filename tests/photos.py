"""Files that people give for photographs."""

import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from models.discriminator import Discriminator
from models.generator import FurryGenerator
from pipeline.config.files import config_from_dict
from pipeline.generation.trained_run import TrainedRun


def run_of(generator: FurryGenerator, discriminator: Discriminator) -> TrainedRun:
    """A trained run without the training."""
    return TrainedRun(
        run_dir=Path("run"),
        config=config_from_dict({"resolution": generator.resolution}),
        checkpoint=Path("run/checkpoints/best.pt"),
        generator=generator.eval().requires_grad_(False),
        discriminator=discriminator.eval().requires_grad_(False),
        iteration=1500,
        images_seen=24_000,
    )


def write_photo(path: Path, width: int, height: int, seed: int = 0) -> Path:
    """Smooth colours."""
    pixels = np.random.default_rng(seed).integers(256, size=(4, 5, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC).save(path)
    return path


def write_hostile(folder: Path) -> dict[str, Path]:
    """No image, half an image, no content, and 20,000 px a side in a few bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {name: folder / f"{name}.png" for name in ("text", "truncated", "empty", "enormous")}
    files["text"].write_text("not an image")
    files["truncated"].write_bytes(write_photo(folder / "whole.jpg", 200, 200).read_bytes()[:1500])
    files["empty"].write_bytes(b"")

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0))
    files["enormous"].write_bytes(
        b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    )
    return files


def picture(path: Path) -> torch.Tensor:
    """``[H, W]`` or ``[H, W, C]`` of a file."""
    with Image.open(path) as image:
        return torch.tensor(np.asarray(image))
