"""The networks on a GPU: the same functions of the same parameters, with few passes over memory.

A styled convolution writes what the next convolution reads: its activation times the next style. A residual block
writes its output with the reflected border that the next block's convolution needs. Activations have autocast's type,
bfloat16 in training; RGB, masks and everything from the 4x4 features on are float32. The layers' own ``forward`` is the
plain form, for machines without Triton.
"""

import contextlib
import functools
import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models import fused_ops
from models.fused_ops import HEAD_ROWS, NUM_HEAD_GROUPS
from models.ops import ACTIVATION_GAIN, leaky_relu_, stddev_channel

if TYPE_CHECKING:
    from models.discriminator import Discriminator, ResidualBlock
    from models.generator import FurryGenerator, SynthesisNetwork
    from models.layers import ModulatedConv2d, StyledConv
    from models.masks import MaskNetwork

_everywhere = False


@contextlib.contextmanager
def on_every_device() -> Iterator[None]:
    """Compute so on a CPU too, by the operators' plain forms: for tests, and to count bytes."""
    global _everywhere
    _everywhere = True
    try:
        yield
    finally:
        _everywhere = False


def applies(x: Tensor) -> bool:
    """Whether networks compute so on the device of `x`."""
    return _everywhere or (x.is_cuda and has_triton())


@functools.cache
def has_triton() -> bool:
    """Whether this machine's GPU runs Triton kernels; Triton needs a C compiler to launch them."""
    compiler = os.environ.get("CC") or next(filter(shutil.which, ("cc", "gcc", "clang")), None)
    found = importlib.util.find_spec("triton") is not None and compiler is not None
    return found and torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)


def foreground(generator: "FurryGenerator", w: Tensor, noise: Iterator[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """``x_fg [B, 3, R, R]``, and coarse and fine mask ``[B, 1, R, R]`` before their min-max.

    Args:
        generator: whose parameters to use.
        w: ``[B, D]`` or ``[B, num_styles, D]``.
        noise: maps of the foreground synthesis, then those of the two masks.
    """
    network, dtype = generator.synthesis_foreground, _dtype(w)
    with torch.autocast(w.device.type, enabled=False):
        features, last = _features(network, w, noise, dtype)
        noises = next(noise), next(noise)
        masks = generator.mask_network_coarse, generator.mask_network_fine
        rgb, raw = _heads(network, features, last, masks, noises)
    return rgb, raw[:, :1], raw[:, 1:]


def background(generator: "FurryGenerator", w: Tensor, noise: Iterator[Tensor]) -> Tensor:
    """``x_bg [b, 3, R, R]``; arguments as in `foreground`."""
    network, dtype = generator.synthesis_background, _dtype(w)
    with torch.autocast(w.device.type, enabled=False):
        features, last = _features(network, w, noise, dtype)
        unused = torch.zeros(1, 1, *features.shape[2:], device=w.device).expand(len(w), -1, -1, -1)
        rgb, _ = _heads(network, features, last, (None, None), (unused, unused))
    return rgb


def _features(
    network: "SynthesisNetwork", w: Tensor, noise: Iterator[Tensor], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The features ``f [B, C, R, R]`` of a synthesis network, and the w of ToRGB and the masks."""
    *ws, last = w.unbind(1) if w.ndim == 3 else [w] * network.num_styles
    layers = [cast("StyledConv", layer) for layer in network.layers]
    styles: list[Tensor | None] = [layer.conv.modulation(each) for layer, each in zip(layers, ws, strict=True)]
    assert styles[0] is not None
    x = network.constant * styles[0][:, :, None, None]
    x = x.to(dtype).contiguous(memory_format=torch.channels_last)
    for layer, style, following in zip(layers, styles, [*styles[1:], None], strict=True):
        x = _call(_styled_conv, layer, x, style, following, next(noise), recompute=network.recompute)
    return x, last


def _styled_conv(layer: "StyledConv", x: Tensor, style: Tensor, following: Tensor | None, noise: Tensor) -> Tensor:
    """From the input times its style to the output times the next convolution's."""
    conv = layer.conv
    if conv.upsample:
        weight = conv.weight.transpose(0, 1).to(x.dtype, memory_format=torch.channels_last)
        z = F.conv_transpose2d(x, weight, stride=2)
    else:
        z = F.conv2d(x, conv.weight.to(x.dtype), padding=1)
    demodulation = _demodulation(conv, style)
    return fused_ops.styled(z, demodulation, noise, layer.noise_strength, layer.bias, following, blurred=conv.upsample)


def _demodulation(conv: "ModulatedConv2d", style: Tensor) -> Tensor:
    """Factors of what a convolution with the weight as it is gives, without its scale."""
    return fused_ops.demodulation(style, conv.weight, scale=conv.scale, gain=conv.gain * conv.scale)


def _heads(
    network: "SynthesisNetwork",
    features: Tensor,
    w: Tensor,
    masks: "tuple[MaskNetwork | None, MaskNetwork | None]",
    noises: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    """RGB after its tanh, and what `fused_ops.heads` makes of the masks."""
    rgb = network.to_rgb
    weights: list[Tensor] = [rgb.conv.weight.flatten(1) * rgb.conv.scale * rgb.conv.modulation(w)[:, None]]
    biases: list[Tensor] = [rgb.bias]
    strengths: list[Tensor] = []
    for mask in masks:
        if mask is None:
            weights.append(weights[0].new_zeros(len(w), HEAD_ROWS, features.shape[1]))
            biases.append(rgb.bias.new_zeros(HEAD_ROWS))
            strengths.append(rgb.bias.new_zeros(()))
            continue
        conv = mask.conv.conv
        style = conv.modulation(w)
        demodulation = _demodulation(conv, style)
        weights.append(conv.weight.flatten(1) * style[:, None] * demodulation[:, :, None])
        biases.append(mask.conv.bias * ACTIVATION_GAIN)
        strengths.append(mask.conv.noise_strength)
    padding = [(0, 0, 0, HEAD_ROWS - x.shape[1]) for x in weights]
    weight = torch.cat([F.pad(x, pad) for x, pad in zip(weights, padding, strict=True)], dim=1)
    bias = torch.cat([F.pad(x, [0, HEAD_ROWS - len(x)]) for x in biases])
    rows = NUM_HEAD_GROUPS * HEAD_ROWS
    weight, bias = F.pad(weight, (0, 0, 0, rows - weight.shape[1])), F.pad(bias, (0, rows - len(bias)))
    image, raw = fused_ops.heads(features, weight, bias, *noises, torch.stack(strengths))
    return torch.tanh(image), raw


def features16(discriminator: "Discriminator", images: Tensor) -> tuple[Tensor, Tensor]:
    """The 16x16 features of ``images [n, 3, R, R]`` as the next block reads them.

    Returns:
        ``[n, C, 18, 18]``, padded by reflection, and their blurred half ``[n, C, 8, 8]``.
    """
    dtype = _dtype(images)
    with torch.autocast(images.device.type, enabled=False):
        layer = discriminator.from_rgb
        assert layer.bias is not None
        out, halved = fused_ops.rgb_output(
            images.to(layer.weight.dtype), layer.weight.flatten(1), layer.bias,
            scale=layer.scale, bias_gain=layer.gain, down=True, dtype=dtype,
        )  # fmt: skip
        out, halved = _residual_blocks(discriminator.blocks_to_mask, out, halved, discriminator.recompute)
        assert halved is not None
        return out, halved


def final_features(discriminator: "Discriminator", padded: Tensor, halved: Tensor, judged: Sequence[int]) -> Tensor:
    """The result of the last convolution, ``[n, C, 4, 4]`` float32, of what `features16` gives; `judged` as there."""
    with torch.autocast(padded.device.type, enabled=False):
        blocks, layer = discriminator.blocks_to_logits, discriminator.final_conv
        out, _ = _residual_blocks(blocks, padded, halved, discriminator.recompute, last=True)
        out = _float(out)
        stddev = torch.cat([stddev_channel(part) for part in inner(out).split(list(judged))])
        x = torch.cat([out, stddev.to(out.dtype).expand(-1, 1, *out.shape[2:])], dim=1)
        x = fused_ops.conv2d(x.contiguous(memory_format=torch.channels_last), layer.weight * layer.scale)
        assert layer.bias is not None
        return leaky_relu_(x + (layer.bias * layer.gain)[:, None, None])


def _float(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def inner(padded: Tensor) -> Tensor:
    """What is inside the reflected border, float32."""
    return _float(padded[:, :, 1:-1, 1:-1])


def _residual_blocks(
    blocks: nn.Sequential, x: Tensor, halved: Tensor | None, recompute: bool, *, last: bool = False
) -> tuple[Tensor, Tensor | None]:
    for i, block in enumerate(blocks, start=1):
        down = not (last and i == len(blocks))
        x, halved = _call(_residual_block, block, x, halved, down, recompute=recompute)
    return x, halved


def _residual_block(block: "ResidualBlock", x: Tensor, halved: Tensor, down: bool) -> tuple[Tensor, Tensor | None]:
    """From a block's output as `fused_ops.block_output` writes it to the next one's."""
    conv1, conv2, skip = block.conv1, block.conv2, block.skip
    assert conv1.bias is not None and conv2.bias is not None
    z = fused_ops.conv2d(x, conv1.weight.to(x.dtype))
    z = fused_ops.blur_activated(z, conv1.bias, padding=2, scale=conv1.scale, bias_gain=conv1.gain)
    z = fused_ops.conv2d(z, conv2.weight.to(x.dtype), stride=2)
    skipped = fused_ops.conv2d(halved, skip.weight.to(x.dtype))
    return fused_ops.block_output(
        z, conv2.bias, skipped, scale=conv2.scale, skip_scale=skip.scale, bias_gain=conv2.gain, down=down
    )


def _call(function: Callable[..., Any], *arguments: Any, recompute: bool) -> Any:
    """As `models.layers.call`."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
    return function(*arguments)


def _dtype(like: Tensor) -> torch.dtype:
    """Of activations: autocast's, or that of `like`."""
    device = like.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else like.dtype
