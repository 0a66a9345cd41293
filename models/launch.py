"""Launches of the Triton kernels: shapes, grids and buffers. The functions are those of `models/fused_ops.py`, by name.

Needs Triton, which comes with torch on Linux. Triton compiles a kernel at its first launch and keeps the result in
`TRITON_CACHE_DIR` (~/.triton/cache by default).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from models import kernels
from models.fused_ops import UPSAMPLING_GAIN
from models.ops import ACTIVATION_GAIN

ROWS = 8
"""Rows that a program goes down: as many again are loaded for the first three taps."""
BLOCK_ELEMENTS = 1024
"""Elements of a row that a program works on at a time: 16 bytes of bfloat16 a thread."""
BLOCKS_C = (64, 32)
NUM_WARPS = 4
DEMODULATION_BLOCK = 64
HEADS_PIXELS, HEADS_CHANNELS, HEADS_TILES = 64, 32, 16
HEADS_OPTIONS = {"num_warps": 8, "num_stages": 2}  # with 99 KB of shared memory at most, which consumer GPUs have


def blur(x: Tensor, padding: int, gain: float) -> Tensor:
    """`models.ops.blur` with stride 1."""
    return _launch_blur(x, x, x, padding, gain, 1.0, 0.0, mode=kernels.PLAIN)[0]


def blur_activated(z: Tensor, bias: Tensor, padding: int, scale: float, bias_gain: float) -> Tensor:
    """See `models.fused_ops.blur_activated`."""
    return _launch_blur(z, z, bias, padding, 1.0, scale, bias_gain, mode=kernels.ACTIVATE)[0]


def blur_linearized(x: Tensor, z: Tensor, bias: Tensor, padding: int, scale: float, bias_gain: float) -> Tensor:
    """The derivative of `blur_activated` at z, applied to x."""
    return _launch_blur(x, z, bias, padding, 1.0, scale, bias_gain, mode=kernels.LINEARIZED)[0]


def blur_adjoint(
    grad: Tensor, z: Tensor, bias: Tensor, padding: int, scale: float, bias_gain: float
) -> tuple[Tensor, Tensor]:
    """The adjoint of `blur_linearized`, and its sum over images and pixels."""
    return _launch_blur(grad, z, bias, 3 - padding, 1.0, scale, bias_gain, mode=kernels.PLAIN, masked=True)


def _launch_blur(
    x: Tensor, z: Tensor, bias: Tensor, padding: int, gain: float, scale: float, bias_gain: float,
    *, mode: tl.constexpr, masked: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    n, channels, height, width = x.shape
    out_height, out_width = height + 2 * padding - 3, width + 2 * padding - 3
    y = _empty(x, channels, out_height, out_width)
    grid, block = _strips(n, channels, out_height, out_width)
    sums = _partial_sums(x, channels, out_width, grid, block) if masked else x
    kernels.blur[grid](
        x, z, bias, y, sums, height, width, channels, out_height, out_width, padding, gain, scale, bias_gain,
        MODE=mode, MASKED=masked, **block,
    )  # fmt: skip
    return y, sums.sum(dim=0) if masked else sums


def block_output(
    z: Tensor, bias: Tensor, skip: Tensor | None, scale: float, skip_scale: float, bias_gain: float, down: bool
) -> tuple[Tensor, Tensor]:
    """See `models.fused_ops.block_output`."""
    return _launch_block_output(z, None, bias, skip, scale, skip_scale, bias_gain, down)


def block_output_linearized(
    x: Tensor, skip: Tensor | None, z: Tensor, bias: Tensor,
    scale: float, skip_scale: float, bias_gain: float, down: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Its derivative at z, applied to x and skip."""
    return _launch_block_output(z, x, bias, skip, scale, skip_scale, bias_gain, down)


def _launch_block_output(
    z: Tensor, x: Tensor | None, bias: Tensor, skip: Tensor | None,
    scale: float, skip_scale: float, bias_gain: float, down: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    n, channels, height, width = z.shape
    y = _empty(z, channels, height + 2, width + 2)
    (across, _, _), block = _strips(n, channels, height + 2, width + 2)
    del block["ROWS"]
    kernels.add_reflect[across, height + 2, n](
        z, x, skip, bias, y, height, width, channels, scale, skip_scale, bias_gain,
        LINEAR=x is not None, SKIP=skip is not None, **block,
    )  # fmt: skip
    return y, _inner_blur_down(y) if down else z.new_empty(0)


def _inner_blur_down(y: Tensor) -> Tensor:
    """Blur with stride 2 of what is inside a border of one pixel."""
    n, channels, height, width = y.shape
    half_height, half_width = (height - 4) // 2 + 1, (width - 4) // 2 + 1
    halved = _empty(y, channels, half_height, half_width)
    grid, block = _strips(n, channels, half_height, half_width)
    kernels.inner_blur_down[grid](y, halved, height - 2, width - 2, channels, half_height, half_width, **block)
    return halved


def block_output_adjoint(
    grad: Tensor, grad_down: Tensor | None, z: Tensor, bias: Tensor,
    scale: float, skip_scale: float, bias_gain: float, skip: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The adjoint of that, and its sum over images and pixels."""
    n, channels, height, width = z.shape
    grad_z = torch.empty_like(z)
    grad_skip = torch.empty_like(z) if skip else z.new_empty(0)
    grid, block = _strips(n, channels, height, width)
    sums = _partial_sums(z, channels, width, grid, block)
    down_height, down_width = (1, 1) if grad_down is None else grad_down.shape[2:]
    kernels.block_output_backward[grid](
        grad, grad_down, z, bias, grad_z, grad_skip, sums, height, width, channels, down_height, down_width,
        scale, skip_scale, bias_gain, DOWN=grad_down is not None, SKIP=skip, **block,
    )  # fmt: skip
    return grad_z, grad_skip, sums.sum(dim=0)


def rgb_output(
    image: Tensor, weight: Tensor, bias: Tensor, scale: float, bias_gain: float, down: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """See `models.fused_ops.rgb_output`."""
    return _launch_rgb_output(image, None, weight, bias, scale, bias_gain, down, dtype)


def rgb_output_linearized(
    x: Tensor, image: Tensor, weight: Tensor, bias: Tensor,
    scale: float, bias_gain: float, down: bool, dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Its derivative at the image, applied to x."""
    return _launch_rgb_output(image, x, weight, bias, scale, bias_gain, down, dtype)


def _launch_rgb_output(
    image: Tensor, x: Tensor | None, weight: Tensor, bias: Tensor,
    scale: float, bias_gain: float, down: bool, dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    n, _, height, width = image.shape
    channels = len(weight)
    y = _empty(image, channels, height + 2, width + 2, dtype)
    (across, _, _), block = _strips(n, channels, height + 2, width + 2)
    del block["ROWS"]
    kernels.rgb_reflect[across, height + 2, n](
        image, x, weight, bias, y, height, width, channels, scale, bias_gain, LINEAR=x is not None, **block
    )
    return y, _inner_blur_down(y) if down else y.new_empty(0)


def rgb_output_adjoint(
    grad: Tensor, grad_down: Tensor | None, image: Tensor, factor: Tensor, weight: Tensor, bias: Tensor,
    scale: float, bias_gain: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradient at the image, and the sums over images and pixels ``[4, C]`` of `models.kernels.rgb_output_backward`."""
    n, _, height, width = image.shape
    channels = len(weight)
    grad_image = torch.empty_like(image)
    block_c = triton.next_power_of_2(channels)
    block = {"ROWS": ROWS, "BLOCK_W": max(1, BLOCK_ELEMENTS // block_c), "BLOCK_C": block_c, "num_warps": NUM_WARPS}
    grid = triton.cdiv(width, block["BLOCK_W"]), triton.cdiv(height, ROWS), n
    sums = _partial_sums(grad, 4 * channels, width, grid, block)
    down_height, down_width = (1, 1) if grad_down is None else grad_down.shape[2:]
    kernels.rgb_output_backward[grid](
        grad, grad_down, image, factor, weight, bias, grad_image, sums,
        height, width, channels, down_height, down_width, scale, bias_gain, DOWN=grad_down is not None, **block,
    )  # fmt: skip
    return grad_image, sums.sum(dim=0).view(4, channels)


def styled(
    z: Tensor, demodulation: Tensor, noise: Tensor, strength: Tensor, bias: Tensor, style: Tensor | None, blurred: bool
) -> Tensor:  # fmt: skip
    """See `models.fused_ops.styled`."""
    n, channels, height, width = z.shape
    out_height, out_width = (height - 1, width - 1) if blurred else (height, width)
    y = _empty(z, channels, out_height, out_width)
    grid, block = _strips(n, channels, out_height, out_width)
    kernels.styled_forward[grid](
        z, demodulation, noise, strength, bias, style, y, height, width, channels, out_height, out_width,
        noise.stride(0), UPSAMPLING_GAIN, ACTIVATION_GAIN, BLUR=blurred, STYLE=style is not None, **block,
    )  # fmt: skip
    return y


def styled_adjoint(
    grad: Tensor, z: Tensor, demodulation: Tensor, noise: Tensor, strength: Tensor, bias: Tensor,
    style: Tensor | None, blurred: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradient at the output of the blur, and the sums ``[N, 4, C]`` of `models.kernels.styled_backward`."""
    n, channels, height, width = z.shape
    out_height, out_width = grad.shape[2:]
    grad_blurred = torch.empty_like(grad)
    grid, block = _strips(n, channels, out_height, out_width)
    sums = _partial_sums(z, 4 * channels, out_width, grid, block)
    kernels.styled_backward[grid](
        grad, z, demodulation, noise, strength, bias, style, grad_blurred, sums,
        height, width, channels, out_height, out_width, noise.stride(0), UPSAMPLING_GAIN, ACTIVATION_GAIN,
        BLUR=blurred, STYLE=style is not None, **block,
    )  # fmt: skip
    return grad_blurred, sums.view(n, -1, 4, channels).sum(dim=1)


def heads(
    features: Tensor, weight: Tensor, bias: Tensor, noise_coarse: Tensor, noise_fine: Tensor, strengths: Tensor
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `models.fused_ops.heads`."""
    n, channels, height, width = features.shape
    dtype = torch.promote_types(features.dtype, torch.float32)
    rgb = features.new_empty(n, height, width, 3, dtype=dtype).permute(0, 3, 1, 2)
    masks = features.new_empty(n, 2, height, width, dtype=dtype)
    kernels.heads_forward[triton.cdiv(height * width, HEADS_PIXELS), n](
        features, weight, bias, noise_coarse, noise_fine, strengths, rgb, masks,
        height * width, channels, noise_coarse.stride(0), ACTIVATION_GAIN,
        OUT=weight.shape[1], BLOCK_P=HEADS_PIXELS, BLOCK_K=HEADS_CHANNELS, **HEADS_OPTIONS,
    )  # fmt: skip
    return rgb, masks


def heads_adjoint(
    grad_rgb: Tensor, grad_masks: Tensor, features: Tensor, weight: Tensor, bias: Tensor,
    noise_coarse: Tensor, noise_fine: Tensor, strengths: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients at features and weight; sums over images and pixels, for bias and noise strength, ``[2, OUT]``."""
    n, channels, height, width = features.shape
    out = weight.shape[1]
    strips = triton.cdiv(height * width, HEADS_PIXELS * HEADS_TILES)
    grad_features = torch.empty_like(features)
    sums_weight = weight.new_empty(strips, n, out, channels)
    sums = weight.new_empty(strips * n, 2, out)
    kernels.heads_backward[strips, triton.cdiv(channels, HEADS_CHANNELS), n](
        grad_rgb, grad_masks, features, weight, bias, noise_coarse, noise_fine, strengths,
        grad_features, sums_weight, sums, height * width, channels, noise_coarse.stride(0), ACTIVATION_GAIN,
        OUT=out, BLOCK_P=HEADS_PIXELS, BLOCK_K=HEADS_CHANNELS, TILES=HEADS_TILES, **HEADS_OPTIONS,
    )  # fmt: skip
    return grad_features, sums_weight.sum(dim=0), sums.sum(dim=0)


def demodulation(style: Tensor, weight: Tensor, scale: float, gain: float) -> tuple[Tensor, Tensor]:
    """See `models.fused_ops.demodulation`; with the sums over the taps of the squared weight ``[O, I]``."""
    (n, num_in), (num_out, _, height, width) = style.shape, weight.shape
    out, power = style.new_empty(n, num_out), style.new_empty(num_out, num_in)
    kernels.demodulation[num_out,](
        style, weight, out, power, n, num_out, num_in, scale, gain,
        TAPS=height * width, SAMPLES=triton.next_power_of_2(n), BLOCK=DEMODULATION_BLOCK,
    )  # fmt: skip
    return out, power


def demodulation_adjoint(
    grad: Tensor, out: Tensor, power: Tensor, style: Tensor, weight: Tensor, scale: float, gain: float
) -> tuple[Tensor, Tensor]:
    """Gradients at style and weight."""
    (n, num_in), (num_out, _, height, width) = style.shape, weight.shape
    grad_style, grad_weight = torch.empty_like(style), torch.empty_like(weight)
    kernels.demodulation_weight_gradient[num_out,](
        grad, out, style, weight, grad_weight, n, num_out, num_in, scale, gain,
        TAPS=height * width, SAMPLES=triton.next_power_of_2(n), BLOCK=DEMODULATION_BLOCK,
    )  # fmt: skip
    kernels.demodulation_style_gradient[triton.cdiv(num_in, 32), n](
        grad, out, style, power, grad_style, num_out, num_in, scale, gain, BLOCK_O=64, BLOCK=32
    )
    return grad_style, grad_weight


def normal(seeds: Tensor, num: int) -> Tensor:
    """Standard normal numbers ``[B, num]`` float32, row b a function of ``seeds[b]`` (int64) alone."""
    out = torch.empty(len(seeds), num, device=seeds.device)
    kernels.normal[triton.cdiv(num, 4 * BLOCK_ELEMENTS), len(seeds)](out, seeds, num, BLOCK=BLOCK_ELEMENTS)
    return out


def _empty(like: Tensor, channels: int, height: int, width: int, dtype: torch.dtype | None = None) -> Tensor:
    shape = len(like), channels, height, width
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device, memory_format=torch.channels_last)


def _strips(n: int, channels: int, height: int, width: int) -> tuple[tuple[int, int, int], dict[str, int]]:
    """Grid (blocks of a row, strips of rows, images) and block sizes.

    Block sizes follow from the channels alone, and from few properties of them: Triton compiles each combination again.
    """
    block_c = next((size for size in BLOCKS_C if channels % size == 0), BLOCKS_C[-1])
    block_w = BLOCK_ELEMENTS // block_c
    across = triton.cdiv(width, block_w) * triton.cdiv(channels, block_c)
    block = {"ROWS": ROWS, "BLOCK_W": block_w, "BLOCK_C": block_c, "num_warps": NUM_WARPS}
    return (across, triton.cdiv(height, ROWS), n), block


def _partial_sums(like: Tensor, columns: int, width: int, grid: tuple[int, int, int], block: dict[str, int]) -> Tensor:
    """A row for each strip and block of pixels of each image, in this order."""
    _, strips, n = grid
    dtype = torch.promote_types(like.dtype, torch.float32)
    return like.new_empty(n * strips * triton.cdiv(width, block["BLOCK_W"]), columns, dtype=dtype)
