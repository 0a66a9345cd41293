"""Resampling and activation: plain torch, any device, twice differentiable.

The filter is StyleGAN2's ``[1, 3, 3, 1]`` (Karras et al. 2020), applied as a depthwise convolution: no compiled
extension, and `torch.autograd` knows both of its derivatives, which lazy R1 needs.
"""

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

LEAKY_SLOPE = 0.2
ACTIVATION_GAIN = math.sqrt(2.0)
STDDEV_GROUP_SIZE = 4


def blur(x: Tensor, *, padding: int, stride: int = 1, gain: float = 1.0) -> Tensor:
    """Filter each channel with the outer product of ``[1, 3, 3, 1] / 8``, zero-padded.

    Args:
        x: ``[B, C, H, W]``.
        padding: zeros added on every side.
        stride: keep every n-th output pixel.
        gain: factor on the output.

    Returns:
        ``[B, C, (H + 2 padding - 4) // stride + 1, ...]``.
    """
    y: Tensor = _Blur.apply(x, padding, stride, gain)
    return y


class _Blur(torch.autograd.Function):
    """A linear map and, below, its adjoint: each is the other's derivative, of any order.

    torch's own second derivative of a depthwise convolution loops over the channels, which was most of R1's time.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, padding: int, stride: int, gain: float) -> Tensor:
        ctx.size, ctx.geometry = x.shape[2:], (padding, stride, gain)
        return F.conv2d(x, _kernel(x, gain), stride=stride, padding=padding, groups=x.shape[1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return _BlurAdjoint.apply(gradients[0], ctx.size, *ctx.geometry), None, None, None


class _BlurAdjoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, size: torch.Size, padding: int, stride: int, gain: float) -> Tensor:
        ctx.geometry = (padding, stride, gain)
        kernel, channels = _kernel(y, gain), y.shape[1]
        if stride == 1:  # the kernel is symmetric, and CPUs transpose depthwise convolutions slowly
            return F.conv2d(y, kernel, padding=3 - padding, groups=channels)
        left_over = [n - ((m - 1) * stride + 4 - 2 * padding) for n, m in zip(size, y.shape[2:], strict=True)]
        return F.conv_transpose2d(y, kernel, stride=stride, padding=padding, output_padding=left_over, groups=channels)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return _Blur.apply(gradients[0], *ctx.geometry), None, None, None, None


def _kernel(like: Tensor, gain: float) -> Tensor:
    """``[C, 1, 4, 4]``."""
    return _binomial_filter(like.dtype, like.device, gain).expand(like.shape[1], 1, 4, 4)


@functools.cache  # a new constant at every call would be a copy from host to device, for which the host waits
def _binomial_filter(dtype: torch.dtype, device: torch.device, gain: float) -> Tensor:
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=dtype, device=device) / 8.0
    return torch.outer(taps, taps) * gain


def upsample_conv2d(x: Tensor, weight: Tensor) -> Tensor:
    """Double the resolution with a 3x3 convolution: zero insertion, convolution, blur with gain 4 (StyleGAN2).

    Args:
        x: ``[B, I, H, W]``.
        weight: ``[O, I, 3, 3]``.

    Returns:
        ``[B, O, 2H, 2W]``.
    """
    x = F.conv_transpose2d(x, weight.transpose(0, 1), stride=2)
    return blur(x, padding=1, gain=4.0)


def downsample_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Halve the resolution with a 3x3 or 1x1 convolution: blur, then strided convolution (StyleGAN2).

    Args:
        x: ``[B, I, H, W]``, H and W even.
        weight: ``[O, I, k, k]``, k 3 or 1.
        bias: ``[O]``.

    Returns:
        ``[B, O, H/2, W/2]``.
    """
    if weight.shape[-1] == 1:
        # A 1x1 convolution reads only the pixels that the stride keeps: do not filter the others.
        return F.conv2d(blur(x, padding=1, stride=2), weight, bias)
    return F.conv2d(blur(x, padding=2), weight, bias, stride=2)


def leaky_relu_(x: Tensor) -> Tensor:
    """Leaky ReLU of slope 0.2, in place.

    StyleGAN2 multiplies its output by `ACTIVATION_GAIN`, which keeps the variance of a unit normal near 1. Leaky ReLU
    commutes with a positive factor, so the layers put the gain on their weights and biases: a pass over the
    activations saved.
    """
    return F.leaky_relu(x, LEAKY_SLOPE, inplace=True)


def minibatch_stddev(x: Tensor, group_size: int = STDDEV_GROUP_SIZE) -> Tensor:
    """Append the mean standard deviation over groups of samples as one more channel (Karras et al. 2018).

    Group g of a batch of n holds samples g, g + n/4, g + 2n/4, g + 3n/4.

    Args:
        x: ``[n, C, H, W]``, n at most `group_size` or a multiple of it.
        group_size: samples a group.

    Returns:
        ``[n, C + 1, H, W]``.
    """
    channel = stddev_channel(x, group_size).expand(-1, 1, *x.shape[2:])
    return torch.cat([x, channel.to(x.dtype)], dim=1)


def stddev_channel(x: Tensor, group_size: int = STDDEV_GROUP_SIZE) -> Tensor:
    """What `minibatch_stddev` appends, the same at every pixel: ``[n, 1, 1, 1]``."""
    n = len(x)
    size = min(group_size, n)
    if n % size:
        raise ValueError(f"minibatch stddev needs a batch that is a multiple of {size}, not {n}")
    groups = x.float().reshape(size, n // size, -1)
    stddev = (groups.var(dim=0, correction=0) + 1e-8).sqrt().mean(dim=1)
    return stddev.repeat(size).view(n, 1, 1, 1)


def min_max(x: Tensor, eps: float = 1e-10) -> Tensor:
    """Scale each image to [0, 1] by its own minimum and maximum (Eq. 2), in float32.

    Args:
        x: ``[B, 1, H, W]``.
        eps: keeps a constant image finite (it becomes 0).

    Returns:
        ``[B, 1, H, W]`` float32 in [0, 1].
    """
    x = x.float()
    low = x.amin(dim=(1, 2, 3), keepdim=True)
    high = x.amax(dim=(1, 2, 3), keepdim=True)
    return (x - low) / (high - low + eps)
