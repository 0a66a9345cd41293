"""Augmentation by what photographs have and generated images lack: geometry, colour, blur, noise, JPEG.

All numbers are drawn from the `torch.Generator` given, for each image apart.
"""

import io
import math

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

MAX_ROTATION = math.radians(15)
MAX_ZOOM = 4 / 3
MAX_SHIFT = 0.12
"""Of the image's side."""
MAX_BLUR = 1 / 64
"""Standard deviation, of the image's side: 4 px at 256."""
MAX_NOISE = 0.06
"""Standard deviation, where images are in [-1, 1]."""
MIN_JPEG_QUALITY, MAX_JPEG_QUALITY = 50, 95
SHARE = 0.5
"""Of the images that get each of blur, noise and JPEG."""


def augment_geometry(x: Tensor, rng: torch.Generator, *, mirror: bool = True) -> Tensor:
    """Rotate, zoom, shift and, if wanted, mirror half of ``[b, C, R, R]``; what is beyond the border is mirrored in."""
    b = len(x)
    angle = _uniform(b, -MAX_ROTATION, MAX_ROTATION, rng)
    zoom = torch.exp(_uniform(b, -math.log(MAX_ZOOM), math.log(MAX_ZOOM), rng))
    side = torch.where(torch.rand(b, generator=rng) < 0.5, -1.0, 1.0) if mirror else torch.ones(b)
    shift = [_uniform(b, -2 * MAX_SHIFT, 2 * MAX_SHIFT, rng) for _ in range(2)]  # the side is 2 long
    cos, sin = angle.cos() * zoom, angle.sin() * zoom
    rows = [torch.stack([cos * side, -sin, shift[0]], dim=1), torch.stack([sin * side, cos, shift[1]], dim=1)]
    grid = F.affine_grid(torch.stack(rows, dim=1), list(x.shape), align_corners=False).to(x.device)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def augment_colours(images: Tensor, rng: torch.Generator) -> Tensor:
    """Exposure, contrast, white balance and saturation, blur, noise and JPEG, for each of ``[b, 3, R, R]``."""
    b, device = len(images), images.device

    def factors(low: float, high: float, channels: int = 1) -> Tensor:
        return _uniform(b * channels, low, high, rng).view(b, channels, 1, 1).to(device)

    x = (images + 1) / 2
    x = x.clamp(1e-3, 1) ** torch.exp(factors(-0.35, 0.35)) * factors(0.75, 1.25) * factors(0.9, 1.1, 3)
    mean = x.mean(dim=(1, 2, 3), keepdim=True)
    x = mean + (x - mean) * factors(0.7, 1.3)
    grey = x.mean(dim=1, keepdim=True)
    x = grey + (x - grey) * factors(0.5, 1.5)
    x = x * 2 - 1
    blurred = gaussian_blur(x, _uniform(b, 0.0, MAX_BLUR * x.shape[-1], rng).to(device))
    x = torch.where(_some(b, rng).to(device), blurred, x)
    strength = _uniform(b, 0.0, MAX_NOISE, rng).view(b, 1, 1, 1)
    noise = torch.randn(x.shape, generator=rng) * strength * _some(b, rng)
    x = (x + noise.to(device)).clamp(-1, 1)
    return jpeg(x, torch.randint(MIN_JPEG_QUALITY, MAX_JPEG_QUALITY + 1, (b,), generator=rng), _some(b, rng).flatten())


def rotate_hue(images: Tensor, rng: torch.Generator) -> Tensor:
    """Turn the colours of each of ``[b, 3, R, R]`` about the grey axis by any angle; what is grey stays as it is."""
    angle = _uniform(len(images), -math.pi, math.pi, rng).view(-1, 1, 1)
    across = torch.tensor([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]]) / math.sqrt(3)
    turn = torch.eye(3) + angle.sin() * across + (1 - angle.cos()) * (across @ across)  # Rodrigues' formula
    return torch.einsum("bij,bjhw->bihw", turn.to(images.device), images).clamp(-1, 1)


def gaussian_blur(x: Tensor, sigma: Tensor) -> Tensor:
    """Blur each of ``[b, C, H, W]`` by its own standard deviation ``[b]``, pixels; borders repeated."""
    b, channels, height, width = x.shape
    radius = max(1, math.ceil(2.5 * float(sigma.max())))
    at = torch.arange(-radius, radius + 1, device=x.device)
    kernel = torch.exp(-0.5 * (at / sigma.clamp(min=1e-3)[:, None]).square())
    kernel = (kernel / kernel.sum(dim=1, keepdim=True)).repeat_interleave(channels, dim=0)
    y = F.pad(x, [radius] * 4, mode="replicate").reshape(1, b * channels, height + 2 * radius, width + 2 * radius)
    y = F.conv2d(y, kernel[:, None, None, :], groups=b * channels)
    return F.conv2d(y, kernel[:, None, :, None], groups=b * channels).view(x.shape)


def jpeg(images: Tensor, qualities: Tensor, chosen: Tensor) -> Tensor:
    """Save and read the chosen ones of ``[b, 3, H, W]`` in [-1, 1] as JPEG, each of its own quality."""
    from PIL import Image  # here: training imports with torch alone

    out = images.clone()
    pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    for i in chosen.nonzero().flatten().tolist():
        file = io.BytesIO()
        Image.fromarray(pixels[i]).save(file, format="jpeg", quality=int(qualities[i]))
        with Image.open(file) as image:
            out[i] = torch.tensor(np.asarray(image)).permute(2, 0, 1).to(images) / 127.5 - 1
    return out


def _uniform(n: int, low: float, high: float, rng: torch.Generator) -> Tensor:
    return torch.rand(n, generator=rng) * (high - low) + low


def _some(b: int, rng: torch.Generator) -> Tensor:
    return torch.rand(b, 1, 1, 1, generator=rng) < SHARE
