"""The operators of `models/fused_ops.py` as functions of tensors alone, with small shapes to differentiate them at."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from models import fused_ops

SCALE, SKIP_SCALE, BIAS_GAIN = 0.5, 0.7, 1.4


def off_zero(*shape: int) -> Tensor:
    """Float64 numbers that are 0.2 away from the kink of leaky ReLU, channels-last; near zero for a bias ``[C]``."""
    x = torch.randn(shape, dtype=torch.float64)
    x = torch.where(x < 0, x - 0.2, x + 0.2)
    if x.ndim == 1:
        return x * 0.02
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x


def _activated(z: Tensor, bias: Tensor) -> Tensor:
    return fused_ops.blur_activated(z, bias, padding=2, scale=SCALE, bias_gain=BIAS_GAIN)


def _block(z: Tensor, bias: Tensor, skip: Tensor | None = None, *, down: bool = True) -> tuple[Tensor, ...]:
    out = fused_ops.block_output(z, bias, skip, scale=SCALE, skip_scale=SKIP_SCALE, bias_gain=BIAS_GAIN, down=down)
    return tuple(x for x in out if x is not None)


def _first(image: Tensor, weight: Tensor, bias: Tensor, *, down: bool = True) -> tuple[Tensor, ...]:
    out = fused_ops.rgb_output(image, weight, bias, scale=SCALE, bias_gain=BIAS_GAIN, down=down, dtype=image.dtype)
    return tuple(x for x in out if x is not None)


def _noise(like: Tensor, height: int, width: int) -> Tensor:
    """``[N, 1, height, width]``, a view of longer rows, as `FurryGenerator.noise_maps` gives it."""
    rows = torch.linspace(-1.5, 2.0, len(like) * (3 + height * width)).to(like).view(len(like), -1)
    return rows[:, 3:].sin().view(-1, 1, height, width)


def _styled(blurred: bool, with_style: bool = True) -> Callable[..., Tensor]:
    def function(
        z: Tensor, demodulation: Tensor, strength: Tensor, bias: Tensor, style: Tensor | None = None
    ) -> Tensor:
        noise = _noise(z, z.shape[2] - blurred, z.shape[3] - blurred)
        return fused_ops.styled(z, demodulation, noise, strength, bias, style, blurred=blurred)

    return function


def _heads(features: Tensor, weight: Tensor, bias: Tensor, strengths: Tensor) -> tuple[Tensor, ...]:
    """With a row of weights for each group: all rows would be a large Jacobian."""
    noise = _noise(features, *features.shape[2:])
    padding = fused_ops.HEAD_ROWS - 1
    full = torch.cat([F.pad(row[:, None], (0, 0, 0, padding)) for row in weight.unbind(1)], dim=1)
    offset = torch.cat([F.pad(row[None], (0, padding)) for row in bias])
    return fused_ops.heads(features, full, offset, noise, noise * 0.5, strengths)


def _demodulation(style: Tensor, weight: Tensor) -> Tensor:
    return fused_ops.demodulation(style, weight, scale=SCALE, gain=BIAS_GAIN)


STYLED = [(2, 2, 4, 5), (2, 2), (), (2,)]
DIFFERENTIABLE: dict[str, tuple[Callable[..., Any], list[tuple[int, ...]]]] = {
    "blur of an activation": (_activated, [(2, 2, 3, 4), (2,)]),
    "block": (_block, [(2, 2, 3, 4), (2,), (2, 2, 3, 4)]),
    "block without skip": (_block, [(1, 2, 5, 4), (2,)]),
    "block without half": (lambda *x: _block(*x, down=False), [(1, 2, 4, 3), (2,), (1, 2, 4, 3)]),
    "first layer": (_first, [(2, 3, 4, 3), (3, 3), (3,)]),
    "first layer without half": (lambda *x: _first(*x, down=False), [(1, 3, 3, 4), (2, 3), (2,)]),
    "styled": (_styled(blurred=False), [*STYLED, (2, 2)]),
    "styled, blurred": (_styled(blurred=True), [*STYLED, (2, 2)]),
    "styled without style": (_styled(blurred=False), STYLED),
    "heads": (_heads, [(2, 2, 2, 4), (2, 4, 2), (4,), (2,)]),
    "demodulation": (_demodulation, [(2, 3), (4, 3, 3, 3)]),
    "convolution": (fused_ops.conv2d, [(2, 2, 4, 5), (3, 2, 3, 3)]),
    "strided convolution": (lambda x, w: fused_ops.conv2d(x, w, stride=2), [(1, 2, 6, 5), (2, 2, 3, 3)]),
    "1x1 convolution": (fused_ops.conv2d, [(2, 2, 3, 3), (3, 2, 1, 1)]),
    "strided 1x1 convolution": (lambda x, w: fused_ops.conv2d(x, w, stride=2), [(1, 2, 4, 5), (3, 2, 1, 1)]),
}
