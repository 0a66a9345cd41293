"""Layers of StyleGAN2 with equalised learning rate (Karras et al. 2018, 2020).

Every weight starts as N(0, 1) and is scaled at run time by ``1 / sqrt(fan_in)``, so that Adam moves all layers alike.
"""

import functools
import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models import ops


class EqualizedLinear(nn.Module):
    """Linear layer, ``[B, I] -> [B, O]``, never in half precision: styles and logits need more, and cost little.

    Args:
        in_features: I.
        out_features: O.
        bias_init: initial bias.
        lr_multiplier: the layer learns this much slower; weights start divided by it, so the output scale is the same.
        activate: apply leaky ReLU with gain sqrt(2).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias_init: float = 0.0,
        lr_multiplier: float = 1.0,
        activate: bool = False,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_features, in_features) / lr_multiplier)
        self.bias = nn.Parameter(torch.full((out_features,), bias_init))
        self.bias_scale = lr_multiplier * (ops.ACTIVATION_GAIN if activate else 1.0)
        self.scale = self.bias_scale / math.sqrt(in_features)
        self.activate = activate

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            bias = self.bias if self.bias_scale == 1.0 else self.bias * self.bias_scale
            x = F.linear(x.to(self.weight.dtype), self.weight * self.scale, bias)
        return ops.leaky_relu_(x) if self.activate else x


class EqualizedConv2d(nn.Module):
    """Convolution of the discriminator, ``[B, I, H, W] -> [B, O, H', W']``.

    Args:
        in_channels: I.
        out_channels: O.
        kernel_size: 1 or 3. A 3x3 convolution without stride pads by reflection, as the authors' script does.
        downsample: blur and halve the resolution.
        activate: add a bias and apply leaky ReLU with gain sqrt(2); without it the layer is linear and has no bias.
        gain: factor on the output.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Literal[1, 3],
        *,
        downsample: bool = False,
        activate: bool = True,
        gain: float = 1.0,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.zeros(out_channels)) if activate else None
        self.gain = gain * (ops.ACTIVATION_GAIN if activate else 1.0)
        self.scale = self.gain / math.sqrt(in_channels * kernel_size**2)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight * self.scale
        bias = None if self.bias is None else self.bias * self.gain
        if self.downsample:
            x = ops.downsample_conv2d(x, weight, bias)
        else:
            margin = weight.shape[-1] // 2
            x = F.conv2d(F.pad(x, [margin] * 4, mode="reflect") if margin else x, weight, bias)
        return x if bias is None else ops.leaky_relu_(x)


class ModulatedConv2d(nn.Module):
    """Convolution whose input channels are scaled by a style, ``[B, I, H, W], [B, W] -> [B, O, H', W']``.

    The style scales the activations and demodulation scales the result. That equals StyleGAN2's per-sample weights
    (convolution is linear in both) with one weight shared by the batch.

    Args:
        in_channels: I.
        out_channels: O.
        kernel_size: 1 or 3.
        w_dim: W.
        demodulate: divide each output channel by its expected standard deviation.
        upsample: double the resolution (3x3 only).
        gain: factor on the demodulated output.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Literal[1, 3],
        w_dim: int,
        *,
        demodulate: bool = True,
        upsample: bool = False,
        gain: float = 1.0,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, kernel_size, kernel_size))
        self.modulation = EqualizedLinear(w_dim, in_channels, bias_init=1.0)
        self.scale = 1.0 / math.sqrt(in_channels * kernel_size**2)
        self.demodulate = demodulate
        self.upsample = upsample
        self.gain = gain

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        style = self.modulation(w)
        weight = self.weight * self.scale
        x = x * style[:, :, None, None].to(x.dtype)
        x = ops.upsample_conv2d(x, weight) if self.upsample else F.conv2d(x, weight, padding=weight.shape[-1] // 2)
        if not self.demodulate:
            return x
        return x * self._demodulation(style, weight)[:, :, None, None].to(x.dtype)

    def _demodulation(self, style: Tensor, weight: Tensor) -> Tensor:
        """``[B, O]``, in float32 whatever the autocast: a sum of squares overflows or cancels in half precision."""
        with torch.autocast(style.device.type, enabled=False):
            power = weight.float().square().sum(dim=(2, 3))
            return torch.rsqrt(style.float().square() @ power.T + 1e-8) * self.gain


class StyledConv(nn.Module):
    """Modulated convolution, per-pixel noise with a learned strength, bias, leaky ReLU.

    ``[B, I, H, W], w [B, W], noise [B, 1, H', W'] -> [B, O, H', W']``. Arguments as in `ModulatedConv2d`.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: Literal[1, 3], w_dim: int, *, upsample: bool = False
    ) -> None:
        super().__init__()
        gain = ops.ACTIVATION_GAIN
        self.conv = ModulatedConv2d(in_channels, out_channels, kernel_size, w_dim, upsample=upsample, gain=gain)
        self.noise_strength = nn.Parameter(torch.zeros(()))
        self.bias = nn.Parameter(torch.zeros(out_channels))

    def forward(self, x: Tensor, w: Tensor, noise: Tensor) -> Tensor:
        x = self.conv(x, w)
        noise = noise * (self.noise_strength * ops.ACTIVATION_GAIN)
        bias = self.bias[:, None, None] * ops.ACTIVATION_GAIN
        return ops.leaky_relu_(x.add_(noise).add_(bias))


class ToRGB(nn.Module):
    """1x1 modulated convolution to RGB without demodulation, then tanh: ``[B, I, H, W] -> [B, 3, H, W]`` in [-1, 1].

    Never in half precision. The bound keeps the blend of Eq. 1 honest: without it mask and images could trade scale
    (paper, section 3.2).
    """

    def __init__(self, in_channels: int, w_dim: int) -> None:
        super().__init__()
        self.conv = ModulatedConv2d(in_channels, 3, 1, w_dim, demodulate=False)
        self.bias = nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return torch.tanh(self.conv(x.to(self.bias.dtype), w) + self.bias[:, None, None])


def call(layer: nn.Module, *inputs: Tensor, recompute: bool) -> Tensor:
    """The layer's output; with `recompute`, what is inside it is computed again when its gradient is wanted."""
    forward: Callable[..., Tensor] = layer
    if recompute and torch.is_grad_enabled():
        forward = functools.partial(checkpoint, layer, use_reentrant=False, preserve_rng_state=False)
    return forward(*inputs)
