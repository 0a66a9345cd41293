"""Triton kernels of the operators in `models/fused_ops.py`; `models/launch.py` launches them.

All activations are channels-last: element ``[n, c, y, x]`` of a tensor ``[N, C, H, W]`` lies at
``((n * H + y) * W + x) * C + c``. A program works on `BLOCK_W` pixels of a row times `BLOCK_C` channels, and goes down
`ROWS` rows. It sums in float32 (in float64 where the input is float64, for the tests). Sums over pixels leave each
program as partial sums, which torch adds up: the same bits every time, unlike atomic additions.
"""

import os

import triton
import triton.language as tl

from models.ops import LEAKY_SLOPE

# What `blur` does with its input, and with its result.
PLAIN, ACTIVATE, LINEARIZED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
SLOPE = tl.constexpr(LEAKY_SLOPE)
# Of products on tensor cores; Triton's interpreter multiplies no bfloat16.
HALF = tl.constexpr(tl.float32 if os.environ.get("TRITON_INTERPRET") == "1" else tl.bfloat16)


@triton.jit
def _wide(x):
    """The type that sums are computed in."""
    if x.dtype == tl.float64:
        return x
    return x.to(tl.float32)


@triton.jit
def _row(pointer, n, y, height, width, channels):
    """Pointer to pixel 0 of row y of image n."""
    return pointer + (n.to(tl.int64) * height + y) * width * channels


@triton.jit
def _load(row, y, xs, cs, height, width, channels):
    """``[BLOCK_W, BLOCK_C]`` of a row, 0 beyond the border, and where it lies within."""
    inside = ((y + xs * 0 >= 0) & (y + xs * 0 < height) & (xs >= 0) & (xs < width))[:, None] & (cs < channels)[None, :]
    return _wide(tl.load(row + xs[:, None] * channels + cs[None, :], mask=inside, other=0.0)), inside


@triton.jit
def _store(row, value, y, xs, cs, height, width, channels):
    inside = ((y + xs * 0 < height) & (xs < width))[:, None] & (cs < channels)[None, :]
    tl.store(row + xs[:, None] * channels + cs[None, :], value.to(row.dtype.element_ty), mask=inside)


@triton.jit
def _leaky(pre):
    return tl.where(pre > 0, pre, pre * SLOPE)


@triton.jit
def _slope(pre):
    return tl.where(pre > 0, 1.0, SLOPE)


@triton.jit
def _filtered_row(x, z, bias, n, y, xs, cs, height, width, channels, scale, MODE: tl.constexpr):
    """Row y under the taps ``[1, 3, 3, 1] / 8``, at the output pixels whose first tap is at `xs`."""
    row = _row(x, n, y, height, width, channels)
    total = tl.zeros((xs.shape[0], cs.shape[0]), tl.float32)
    for tap in tl.static_range(4):
        value, inside = _load(row, y, xs + tap, cs, height, width, channels)
        if MODE == ACTIVATE:
            value = tl.where(inside, _leaky(value * scale + bias), 0.0)
        if MODE == LINEARIZED:
            pre, _ = _load(_row(z, n, y, height, width, channels), y, xs + tap, cs, height, width, channels)
            value = value * (_slope(pre * scale + bias) * scale)
        total += value * (0.375 if tap == 1 or tap == 2 else 0.125)
    return total


@triton.jit
def _bias(bias, cs, channels, gain):
    return (_wide(tl.load(bias + cs, mask=cs < channels, other=0.0)) * gain)[None, :]


@triton.jit(do_not_specialize=["height", "width", "out_height", "out_width", "padding"])
def blur(
    x, z, bias, y, sums, height, width, channels, out_height, out_width, padding, gain, scale, bias_gain,
    MODE: tl.constexpr, MASKED: tl.constexpr, ROWS: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Blur with stride 1.

    `MODE` is what happens to an input pixel before: nothing, ``leaky(x * scale + bias)``, or its derivative at z times
    x. `MASKED` multiplies the result by that derivative at z, of the output's size, and sums it over the pixels.
    """
    tiles = tl.cdiv(out_width, BLOCK_W)
    tile, n, strip = tl.program_id(0) % tiles, tl.program_id(2), tl.program_id(1)
    cs = (tl.program_id(0) // tiles) * BLOCK_C + tl.arange(0, BLOCK_C)
    out_xs = tile * BLOCK_W + tl.arange(0, BLOCK_W)
    xs = out_xs - padding
    b = _bias(bias, cs, channels, bias_gain)
    top = strip * ROWS - padding
    # Each row of the input is loaded and filtered once, and serves four rows of the output.
    row0 = _filtered_row(x, z, b, n, top, xs, cs, height, width, channels, scale, MODE)
    row1 = _filtered_row(x, z, b, n, top + 1, xs, cs, height, width, channels, scale, MODE)
    row2 = _filtered_row(x, z, b, n, top + 2, xs, cs, height, width, channels, scale, MODE)
    total = tl.zeros((BLOCK_W, BLOCK_C), tl.float32)
    for i in range(ROWS):
        at = strip * ROWS + i
        row3 = _filtered_row(x, z, b, n, top + 3 + i, xs, cs, height, width, channels, scale, MODE)
        value = ((row0 + row3) * 0.125 + (row1 + row2) * 0.375) * gain
        if MASKED:
            pre, inside = _load(
                _row(z, n, at, out_height, out_width, channels), at, out_xs, cs, out_height, out_width, channels
            )
            value = tl.where(inside, value * (_slope(pre * scale + b) * scale), 0.0)
            total += value.to(tl.float32)
        _store(_row(y, n, at, out_height, out_width, channels), value, at, out_xs, cs, out_height, out_width, channels)
        row0, row1, row2 = row1, row2, row3
    if MASKED:
        program = (n * tl.num_programs(1) + strip) * tiles + tile
        tl.store(sums + program * channels + cs, tl.sum(total, axis=0), mask=cs < channels)


@triton.jit(do_not_specialize=["height", "width"])
def add_reflect(
    z, value_z, skip, bias, y, height, width, channels, scale, skip_scale, bias_gain,
    LINEAR: tl.constexpr, SKIP: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """``leaky(z * scale + bias) + skip * skip_scale``, padded by one reflected pixel on each side.

    With `LINEAR`, the derivative of the first term at z times `value_z` instead of it.
    """
    tiles = tl.cdiv(width + 2, BLOCK_W)
    n, out_y = tl.program_id(2), tl.program_id(1)
    out_xs = (tl.program_id(0) % tiles) * BLOCK_W + tl.arange(0, BLOCK_W)
    cs = (tl.program_id(0) // tiles) * BLOCK_C + tl.arange(0, BLOCK_C)
    at = tl.abs(out_y - 1)
    at = tl.where(at >= height, 2 * height - 2 - at, at)
    xs = tl.abs(out_xs - 1)
    xs = tl.where(xs >= width, 2 * width - 2 - xs, xs)
    pre, _ = _load(_row(z, n, at, height, width, channels), at, xs, cs, height, width, channels)
    pre = pre * scale + _bias(bias, cs, channels, bias_gain)
    if LINEAR:
        value, _ = _load(_row(value_z, n, at, height, width, channels), at, xs, cs, height, width, channels)
        value = value * (_slope(pre) * scale)
    else:
        value = _leaky(pre)
    if SKIP:
        skipped, _ = _load(_row(skip, n, at, height, width, channels), at, xs, cs, height, width, channels)
        value += skipped * skip_scale
    row = _row(y, n, out_y, height + 2, width + 2, channels)
    _store(row, value, out_y, out_xs, cs, height + 2, width + 2, channels)


@triton.jit
def _inner_filtered_row(x, n, y, xs, cs, height, width, channels):
    """As `_filtered_row`, of the ``[height, width]`` inside a tensor that is padded by one pixel on each side."""
    row = _row(x, n, y + 1, height + 2, width + 2, channels) + channels
    total = tl.zeros((xs.shape[0], cs.shape[0]), tl.float32)
    for tap in tl.static_range(4):
        value, _ = _load(row, y, xs + tap, cs, height, width, channels)
        total += value * (0.375 if tap == 1 or tap == 2 else 0.125)
    return total


@triton.jit(do_not_specialize=["height", "width", "out_height", "out_width"])
def inner_blur_down(
    x, y, height, width, channels, out_height, out_width,
    ROWS: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Blur with padding 1 and stride 2 of what is inside a tensor that is padded by one pixel on each side."""
    tiles = tl.cdiv(out_width, BLOCK_W)
    n, strip = tl.program_id(2), tl.program_id(1)
    out_xs = (tl.program_id(0) % tiles) * BLOCK_W + tl.arange(0, BLOCK_W)
    cs = (tl.program_id(0) // tiles) * BLOCK_C + tl.arange(0, BLOCK_C)
    xs, top = out_xs * 2 - 1, strip * ROWS * 2 - 1
    row0 = _inner_filtered_row(x, n, top, xs, cs, height, width, channels)
    row1 = _inner_filtered_row(x, n, top + 1, xs, cs, height, width, channels)
    for i in range(ROWS):
        at = strip * ROWS + i
        row2 = _inner_filtered_row(x, n, top + 2 + 2 * i, xs, cs, height, width, channels)
        row3 = _inner_filtered_row(x, n, top + 3 + 2 * i, xs, cs, height, width, channels)
        value = (row0 + row3) * 0.125 + (row1 + row2) * 0.375
        _store(_row(y, n, at, out_height, out_width, channels), value, at, out_xs, cs, out_height, out_width, channels)
        row0, row1 = row2, row3


@triton.jit
def _folded_columns(grad, n, y, valid, xs, cs, height, width, channels):
    """Row y of a padded gradient with its outer columns added where they were reflected from; 0 unless `valid`."""
    row = _row(grad, n, y, height + 2, width + 2, channels)
    valid = valid & (xs < width)
    total = tl.load(
        row + (xs + 1)[:, None] * channels + cs[None, :], mask=valid[:, None] & (cs < channels)[None, :], other=0.0
    )
    left = (valid & (xs == 1))[:, None] & (cs < channels)[None, :]
    right = (valid & (xs == width - 2))[:, None] & (cs < channels)[None, :]
    left_value = tl.load(row + xs[:, None] * 0 + cs[None, :], mask=left, other=0.0)
    right_value = tl.load(row + (xs * 0 + width + 1)[:, None] * channels + cs[None, :], mask=right, other=0.0)
    return _wide(total) + _wide(left_value) + _wide(right_value)


@triton.jit
def _spread_down(grad, n, y, xs, cs, height, width, channels):
    """Adjoint of the blur with padding 1 and stride 2, at pixels `xs` of row y of its input."""
    odd_y, odd_x = (y + 1) % 2, (xs + 1) % 2
    below, right = (y + 1 - odd_y) // 2, (xs + 1 - odd_x) // 2
    total, _ = _load(_row(grad, n, below, height, width, channels), below, right, cs, height, width, channels)
    # The taps of the near neighbour are 1 and 3, of the far one 3 and 1.
    near_y, near_x = tl.where(odd_y == 0, 0.125, 0.375), tl.where(odd_x == 0, 0.125, 0.375)[:, None]
    total = total * (near_y * near_x)
    for t in tl.static_range(1, 4):
        at, pixel = below - t // 2, right - t % 2
        value, _ = _load(_row(grad, n, at, height, width, channels), at, pixel, cs, height, width, channels)
        weight_y = 0.5 - near_y if t // 2 else near_y
        weight_x = 0.5 - near_x if t % 2 else near_x
        total += value * (weight_y * weight_x)
    return total


@triton.jit(do_not_specialize=["height", "width", "down_height", "down_width"])
def block_output_backward(
    grad, grad_down, z, bias, grad_z, grad_skip, sums,
    height, width, channels, down_height, down_width, scale, skip_scale, bias_gain,
    DOWN: tl.constexpr, SKIP: tl.constexpr, ROWS: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Adjoint of `add_reflect` followed by `inner_blur_down`."""
    tiles = tl.cdiv(width, BLOCK_W)
    tile, n, strip = tl.program_id(0) % tiles, tl.program_id(2), tl.program_id(1)
    xs = tile * BLOCK_W + tl.arange(0, BLOCK_W)
    cs = (tl.program_id(0) // tiles) * BLOCK_C + tl.arange(0, BLOCK_C)
    b = _bias(bias, cs, channels, bias_gain)
    total = tl.zeros((BLOCK_W, BLOCK_C), tl.float32)
    for i in range(ROWS):
        y = strip * ROWS + i
        ys = y + xs * 0
        value = _folded_columns(grad, n, y + 1, ys < height, xs, cs, height, width, channels)
        value += _folded_columns(grad, n, 0, (ys == 1) & (ys < height), xs, cs, height, width, channels)
        value += _folded_columns(grad, n, height + 1, ys == height - 2, xs, cs, height, width, channels)
        if DOWN:
            value += _spread_down(grad_down, n, y, xs, cs, down_height, down_width, channels)
        if SKIP:
            row = _row(grad_skip, n, y, height, width, channels)
            _store(row, value * skip_scale, y, xs, cs, height, width, channels)
        pre, inside = _load(_row(z, n, y, height, width, channels), y, xs, cs, height, width, channels)
        value = tl.where(inside, value * (_slope(pre * scale + b) * scale), 0.0)
        total += value.to(tl.float32)
        _store(_row(grad_z, n, y, height, width, channels), value, y, xs, cs, height, width, channels)
    program = (n * tl.num_programs(1) + strip) * tiles + tile
    tl.store(sums + program * channels + cs, tl.sum(total, axis=0), mask=cs < channels)


@triton.jit
def _rgb_product(image, weight, n, y, xs, cs, height, width, channels):
    """``weight @ image`` at pixels `xs` of row y, the pixels' three values, and which pixels lie within."""
    inside = (y + xs * 0 >= 0) & (y + xs * 0 < height) & (xs >= 0) & (xs < width)
    row = _row(image, n, y, height, width, 3)
    red = _wide(tl.load(row + xs * 3, mask=inside, other=0.0))
    green = _wide(tl.load(row + xs * 3 + 1, mask=inside, other=0.0))
    blue = _wide(tl.load(row + xs * 3 + 2, mask=inside, other=0.0))
    w_red = _wide(tl.load(weight + cs * 3, mask=cs < channels, other=0.0))[None, :]
    w_green = _wide(tl.load(weight + cs * 3 + 1, mask=cs < channels, other=0.0))[None, :]
    w_blue = _wide(tl.load(weight + cs * 3 + 2, mask=cs < channels, other=0.0))[None, :]
    product = red[:, None] * w_red + green[:, None] * w_green + blue[:, None] * w_blue
    return product, red, green, blue, inside


@triton.jit(do_not_specialize=["height", "width"])
def rgb_reflect(
    image, value_image, weight, bias, y, height, width, channels, scale, bias_gain,
    LINEAR: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """``leaky(weight @ image * scale + bias)``, padded by one reflected pixel on each side.

    With `LINEAR`, its derivative at `image`, applied to `value_image`.
    """
    tiles = tl.cdiv(width + 2, BLOCK_W)
    n, out_y = tl.program_id(2), tl.program_id(1)
    out_xs = (tl.program_id(0) % tiles) * BLOCK_W + tl.arange(0, BLOCK_W)
    cs = (tl.program_id(0) // tiles) * BLOCK_C + tl.arange(0, BLOCK_C)
    at = tl.abs(out_y - 1)
    at = tl.where(at >= height, 2 * height - 2 - at, at)
    xs = tl.abs(out_xs - 1)
    xs = tl.where(xs >= width, 2 * width - 2 - xs, xs)
    pre, _, _, _, _ = _rgb_product(image, weight, n, at, xs, cs, height, width, channels)
    pre = pre * scale + _bias(bias, cs, channels, bias_gain)
    if LINEAR:
        value, _, _, _, _ = _rgb_product(value_image, weight, n, at, xs, cs, height, width, channels)
        value = value * (_slope(pre) * scale)
    else:
        value = _leaky(pre)
    row = _row(y, n, out_y, height + 2, width + 2, channels)
    _store(row, value, out_y, out_xs, cs, height + 2, width + 2, channels)


@triton.jit(do_not_specialize=["height", "width", "down_height", "down_width"])
def rgb_output_backward(
    grad, grad_down, image, factor, weight, bias, grad_image, sums,
    height, width, channels, down_height, down_width, scale, bias_gain,
    DOWN: tl.constexpr, ROWS: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Adjoint of `rgb_reflect` followed by `inner_blur_down`.

    With h the gradient before the leaky ReLU: ``weight.T @ h`` of each pixel, and the sums over pixels of h times each
    value of `factor`, an image, and of h. A program works on all channels of its pixels.
    """
    tile, n, strip = tl.program_id(0), tl.program_id(2), tl.program_id(1)
    xs, cs = tile * BLOCK_W + tl.arange(0, BLOCK_W), tl.arange(0, BLOCK_C)
    b = _bias(bias, cs, channels, bias_gain)
    w_red = _wide(tl.load(weight + cs * 3, mask=cs < channels, other=0.0))[None, :]
    w_green = _wide(tl.load(weight + cs * 3 + 1, mask=cs < channels, other=0.0))[None, :]
    w_blue = _wide(tl.load(weight + cs * 3 + 2, mask=cs < channels, other=0.0))[None, :]
    sum_h = tl.zeros((BLOCK_W, BLOCK_C), tl.float32)
    sum_red, sum_green, sum_blue = sum_h, sum_h, sum_h
    for i in range(ROWS):
        y = strip * ROWS + i
        ys = y + xs * 0
        h = _folded_columns(grad, n, y + 1, ys < height, xs, cs, height, width, channels)
        h += _folded_columns(grad, n, 0, (ys == 1) & (ys < height), xs, cs, height, width, channels)
        h += _folded_columns(grad, n, height + 1, ys == height - 2, xs, cs, height, width, channels)
        if DOWN:
            h += _spread_down(grad_down, n, y, xs, cs, down_height, down_width, channels)
        pre, _, _, _, inside = _rgb_product(image, weight, n, y, xs, cs, height, width, channels)
        h = tl.where(inside[:, None], h * _slope(pre * scale + b), 0.0)
        _, red, green, blue, _ = _rgb_product(factor, weight, n, y, xs, cs, height, width, channels)
        sum_h += h.to(tl.float32)
        sum_red += (h * red[:, None]).to(tl.float32)
        sum_green += (h * green[:, None]).to(tl.float32)
        sum_blue += (h * blue[:, None]).to(tl.float32)
        row = _row(grad_image, n, y, height, width, 3)
        tl.store(row + xs * 3, tl.sum(h * w_red, axis=1) * scale, mask=inside)
        tl.store(row + xs * 3 + 1, tl.sum(h * w_green, axis=1) * scale, mask=inside)
        tl.store(row + xs * 3 + 2, tl.sum(h * w_blue, axis=1) * scale, mask=inside)
    at = sums + ((n * tl.num_programs(1) + strip) * tl.num_programs(0) + tile) * 4 * channels + cs
    tl.store(at, tl.sum(sum_red, axis=0), mask=cs < channels)
    tl.store(at + channels, tl.sum(sum_green, axis=0), mask=cs < channels)
    tl.store(at + 2 * channels, tl.sum(sum_blue, axis=0), mask=cs < channels)
    tl.store(at + 3 * channels, tl.sum(sum_h, axis=0), mask=cs < channels)


@triton.jit
def _per_sample(pointer, n, cs, channels):
    """Row n of ``[N, C]``."""
    return _wide(tl.load(pointer + n * channels + cs, mask=cs < channels, other=0.0))[None, :]


@triton.jit
def _noise_row(noise, n, stride, y, xs, height, width):
    inside = (y + xs * 0 < height) & (xs < width)
    return _wide(tl.load(noise + n.to(tl.int64) * stride + y * width + xs, mask=inside, other=0.0))[:, None]


@triton.jit(do_not_specialize=["height", "width", "out_height", "out_width", "noise_stride"])
def styled_forward(
    z, demodulation, noise, strength, bias, style, y,
    height, width, channels, out_height, out_width, noise_stride, blur_gain, gain,
    BLUR: tl.constexpr, STYLE: tl.constexpr, ROWS: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """``leaky(blur(z) * demodulation + noise * strength + bias) * style``."""
    tiles = tl.cdiv(out_width, BLOCK_W)
    n, strip = tl.program_id(2), tl.program_id(1)
    xs = (tl.program_id(0) % tiles) * BLOCK_W + tl.arange(0, BLOCK_W)
    cs = (tl.program_id(0) // tiles) * BLOCK_C + tl.arange(0, BLOCK_C)
    b, d = _bias(bias, cs, channels, gain), _per_sample(demodulation, n, cs, channels)
    loudness = _wide(tl.load(strength)) * gain
    if STYLE:
        s = _per_sample(style, n, cs, channels)
    if BLUR:  # padding 1
        top = strip * ROWS - 1
        row0 = _filtered_row(z, z, b, n, top, xs - 1, cs, height, width, channels, 1.0, PLAIN)
        row1 = _filtered_row(z, z, b, n, top + 1, xs - 1, cs, height, width, channels, 1.0, PLAIN)
        row2 = _filtered_row(z, z, b, n, top + 2, xs - 1, cs, height, width, channels, 1.0, PLAIN)
    for i in range(ROWS):
        at = strip * ROWS + i
        if BLUR:
            row3 = _filtered_row(z, z, b, n, at + 2, xs - 1, cs, height, width, channels, 1.0, PLAIN)
            value = ((row0 + row3) * 0.125 + (row1 + row2) * 0.375) * blur_gain
            row0, row1, row2 = row1, row2, row3
        else:
            value, _ = _load(_row(z, n, at, height, width, channels), at, xs, cs, height, width, channels)
        pre = value * d + _noise_row(noise, n, noise_stride, at, xs, out_height, out_width) * loudness + b
        value = _leaky(pre)
        if STYLE:
            value *= s
        _store(_row(y, n, at, out_height, out_width, channels), value, at, xs, cs, out_height, out_width, channels)


@triton.jit(do_not_specialize=["height", "width", "out_height", "out_width", "noise_stride"])
def styled_backward(
    grad, z, demodulation, noise, strength, bias, style, grad_blurred, sums,
    height, width, channels, out_height, out_width, noise_stride, blur_gain, gain,
    BLUR: tl.constexpr, STYLE: tl.constexpr, ROWS: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Gradient of `styled_forward` at the output of its blur, and its sums over the pixels.

    The sums are, with h the gradient before the leaky ReLU: of h, of ``h * blur(z)``, of ``h * noise``, and of the
    incoming gradient times the activation.
    """
    tiles = tl.cdiv(out_width, BLOCK_W)
    tile, n, strip = tl.program_id(0) % tiles, tl.program_id(2), tl.program_id(1)
    xs = tile * BLOCK_W + tl.arange(0, BLOCK_W)
    cs = (tl.program_id(0) // tiles) * BLOCK_C + tl.arange(0, BLOCK_C)
    b, d = _bias(bias, cs, channels, gain), _per_sample(demodulation, n, cs, channels)
    loudness = _wide(tl.load(strength)) * gain
    if STYLE:
        s = _per_sample(style, n, cs, channels)
    if BLUR:
        top = strip * ROWS - 1
        row0 = _filtered_row(z, z, b, n, top, xs - 1, cs, height, width, channels, 1.0, PLAIN)
        row1 = _filtered_row(z, z, b, n, top + 1, xs - 1, cs, height, width, channels, 1.0, PLAIN)
        row2 = _filtered_row(z, z, b, n, top + 2, xs - 1, cs, height, width, channels, 1.0, PLAIN)
    sum_h = tl.zeros((BLOCK_W, BLOCK_C), tl.float32)
    sum_d, sum_noise, sum_style = sum_h, sum_h, sum_h
    for i in range(ROWS):
        at = strip * ROWS + i
        if BLUR:
            row3 = _filtered_row(z, z, b, n, at + 2, xs - 1, cs, height, width, channels, 1.0, PLAIN)
            value = ((row0 + row3) * 0.125 + (row1 + row2) * 0.375) * blur_gain
            row0, row1, row2 = row1, row2, row3
        else:
            value, _ = _load(_row(z, n, at, height, width, channels), at, xs, cs, height, width, channels)
        noise_row = _noise_row(noise, n, noise_stride, at, xs, out_height, out_width)
        pre = value * d + noise_row * loudness + b
        row = _row(grad, n, at, out_height, out_width, channels)
        h, _ = _load(row, at, xs, cs, out_height, out_width, channels)
        if STYLE:
            sum_style += (h * _leaky(pre)).to(tl.float32)
            h *= s
        h *= _slope(pre)
        sum_h += h.to(tl.float32)
        sum_d += (h * value).to(tl.float32)
        sum_noise += (h * noise_row).to(tl.float32)
        row = _row(grad_blurred, n, at, out_height, out_width, channels)
        _store(row, h * d, at, xs, cs, out_height, out_width, channels)
    program = (n * tl.num_programs(1) + strip) * tiles + tile
    at = sums + program * 4 * channels + cs
    tl.store(at, tl.sum(sum_h, axis=0), mask=cs < channels)
    tl.store(at + channels, tl.sum(sum_d, axis=0), mask=cs < channels)
    tl.store(at + 2 * channels, tl.sum(sum_noise, axis=0), mask=cs < channels)
    tl.store(at + 3 * channels, tl.sum(sum_style, axis=0), mask=cs < channels)


@triton.jit
def _exact_dot(x, w, total):
    """``total + x @ w`` of activations and float32 numbers, on tensor cores, with the accuracy of float32."""
    if x.dtype == tl.bfloat16:  # w as the sum of two of its type
        high = w.to(tl.bfloat16)
        low = (w - high.to(tl.float32)).to(tl.bfloat16)
        total = tl.dot(x.to(HALF), high.to(HALF), total)
        return tl.dot(x.to(HALF), low.to(HALF), total)
    return tl.dot(x.to(tl.float32), w, total, input_precision="tf32x3")


@triton.jit
def _head_inputs(
    features, weight, bias, noise_coarse, noise_fine, strengths, n, pixels, num_pixels, channels, stride, gain,
    OUT: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """What the heads compute before their activation, ``[pixels, OUT]``, and the noise of each."""
    outs = tl.arange(0, OUT)
    total = tl.zeros((pixels.shape[0], OUT), tl.float32)
    here = pixels < num_pixels
    for k in range(0, channels, BLOCK_K):
        cs = k + tl.arange(0, BLOCK_K)
        x = tl.load(
            features + (n.to(tl.int64) * num_pixels + pixels)[:, None] * channels + cs[None, :],
            mask=here[:, None] & (cs < channels)[None, :],
            other=0.0,
        )
        w = tl.load(
            weight + (n * OUT + outs)[None, :] * channels + cs[:, None], mask=((cs < channels)[:, None]), other=0.0
        )
        total = _exact_dot(x, w, total)
    coarse = tl.load(noise_coarse + n.to(tl.int64) * stride + pixels, mask=here, other=0.0).to(tl.float32)
    fine = tl.load(noise_fine + n.to(tl.int64) * stride + pixels, mask=here, other=0.0).to(tl.float32)
    group = outs // 32
    noise = tl.where((group == 1)[None, :], coarse[:, None], tl.where((group == 2)[None, :], fine[:, None], 0.0))
    loud = tl.where(
        group == 1, tl.load(strengths).to(tl.float32), tl.where(group == 2, tl.load(strengths + 1).to(tl.float32), 0.0)
    )
    b = tl.load(bias + outs).to(tl.float32)
    return total + noise * (loud * gain)[None, :] + b[None, :], noise


@triton.jit(do_not_specialize=["num_pixels", "stride"])
def heads_forward(
    features, weight, bias, noise_coarse, noise_fine, strengths, rgb, masks,
    num_pixels, channels, stride, gain,
    OUT: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """RGB ``[N, pixels, 3]``, and for each mask the mean over 32 channels of what is positive, ``[N, 2, pixels]``."""
    n, pixels = tl.program_id(1), tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    pre, _ = _head_inputs(
        features, weight, bias, noise_coarse, noise_fine, strengths, n, pixels, num_pixels, channels, stride, gain,
        OUT, BLOCK_K,
    )  # fmt: skip
    outs, here = tl.arange(0, OUT), pixels < num_pixels
    at = n.to(tl.int64) * num_pixels + pixels
    tl.store(rgb + at[:, None] * 3 + outs[None, :], pre, mask=here[:, None] & (outs < 3)[None, :])
    positive = tl.maximum(pre, 0.0)
    at = n.to(tl.int64) * 2 * num_pixels + pixels
    for group in tl.static_range(1, 3):
        mean = tl.sum(tl.where((outs // 32 == group)[None, :], positive, 0.0), axis=1) / 32
        tl.store(masks + at + (group - 1) * num_pixels, mean, mask=here)


@triton.jit(do_not_specialize=["num_pixels", "stride"])
def heads_backward(
    grad_rgb, grad_masks, features, weight, bias, noise_coarse, noise_fine, strengths,
    grad_features, sums_weight, sums, num_pixels, channels, stride, gain,
    OUT: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Gradient of `heads_forward` at the features, and partial sums of those at weight, bias and noise strength."""
    n, strip = tl.program_id(2), tl.program_id(0)
    outs, cs = tl.arange(0, OUT), tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    block_w = tl.load(
        weight + (n * OUT + outs)[:, None] * channels + cs[None, :], mask=((cs < channels)[None, :]), other=0.0
    ).to(tl.float32)
    sum_weight = tl.zeros((BLOCK_K, OUT), tl.float32)
    sum_bias = tl.zeros((OUT,), tl.float32)
    sum_noise = tl.zeros((OUT,), tl.float32)
    for tile in range(TILES):
        pixels = (strip * TILES + tile) * BLOCK_P + tl.arange(0, BLOCK_P)
        here = pixels < num_pixels
        pre, noise = _head_inputs(
            features, weight, bias, noise_coarse, noise_fine, strengths, n, pixels, num_pixels, channels, stride, gain,
            OUT, BLOCK_K,
        )  # fmt: skip
        at = n.to(tl.int64) * num_pixels + pixels
        grad = tl.load(
            grad_rgb + at[:, None] * 3 + outs[None, :], mask=here[:, None] & (outs < 3)[None, :], other=0.0
        ).to(tl.float32)
        at_masks = grad_masks + n.to(tl.int64) * 2 * num_pixels + pixels
        for group in tl.static_range(1, 3):
            at_mask = tl.load(at_masks + (group - 1) * num_pixels, mask=here, other=0.0).to(tl.float32) / 32
            grad += tl.where((outs // 32 == group)[None, :] & (pre > 0), at_mask[:, None], 0.0)
        pointers = at[:, None] * channels + cs[None, :]
        inside = here[:, None] & (cs < channels)[None, :]
        x = tl.load(features + pointers, mask=inside, other=0.0)
        if x.dtype == tl.bfloat16:
            value = tl.dot(grad.to(tl.bfloat16).to(HALF), block_w.to(tl.bfloat16).to(HALF))  # is rounded to it anyway
        else:
            value = tl.dot(grad, block_w, input_precision="tf32x3")
        tl.store(grad_features + pointers, value.to(grad_features.dtype.element_ty), mask=inside)
        sum_weight = _exact_dot(tl.trans(x), grad, sum_weight)
        sum_bias += tl.sum(grad, axis=0)
        sum_noise += tl.sum(grad * noise, axis=0)
    program = strip * tl.num_programs(2) + n
    tl.store(
        sums_weight + (program * OUT + outs)[None, :] * channels + cs[:, None],
        sum_weight,
        mask=((cs < channels)[:, None]),
    )
    if tl.program_id(1) == 0:
        tl.store(sums + program * 2 * OUT + outs, sum_bias)
        tl.store(sums + (program * 2 + 1) * OUT + outs, sum_noise)


@triton.jit(do_not_specialize=["n", "num_out"])
def demodulation(
    style, weight, out, power, n, num_out, num_in, scale, gain,
    TAPS: tl.constexpr, SAMPLES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``gain / sqrt(sum over i of style^2 power * scale^2)``; power: the sum over the taps of the squared weight."""
    o, samples = tl.program_id(0), tl.arange(0, SAMPLES)
    total = tl.zeros((SAMPLES,), tl.float32)
    for first in range(0, num_in, BLOCK):
        inputs = first + tl.arange(0, BLOCK)
        squares = tl.zeros((BLOCK,), tl.float32)
        for tap in tl.static_range(TAPS):
            w = tl.load(weight + (o * TAPS + tap) * num_in + inputs, mask=inputs < num_in, other=0.0).to(tl.float32)
            squares += w * w
        tl.store(power + o * num_in + inputs, squares, mask=inputs < num_in)
        inside = (samples < n)[:, None] & (inputs < num_in)[None, :]
        s = tl.load(style + samples[:, None] * num_in + inputs[None, :], mask=inside, other=0.0).to(tl.float32)
        total += tl.sum(s * s * squares[None, :], axis=1)
    tl.store(out + samples * num_out + o, gain / tl.sqrt(total * scale * scale + 1e-8), mask=samples < n)


@triton.jit
def _before_root(grad, out, at, inside, scale, gain):
    """Gradient at the sum under the root, twice over, times ``scale^2``."""
    d = tl.load(out + at, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    return -g * d * d * d * (scale * scale) / (gain * gain)


@triton.jit(do_not_specialize=["n", "num_out"])
def demodulation_weight_gradient(
    grad, out, style, weight, grad_weight, n, num_out, num_in, scale, gain,
    TAPS: tl.constexpr, SAMPLES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``weight * sum over n of h style^2``, with h the result of `_before_root`."""
    o, samples = tl.program_id(0), tl.arange(0, SAMPLES)
    h = _before_root(grad, out, samples * num_out + o, samples < n, scale, gain)
    for first in range(0, num_in, BLOCK):
        inputs = first + tl.arange(0, BLOCK)
        inside = (samples < n)[:, None] & (inputs < num_in)[None, :]
        s = tl.load(style + samples[:, None] * num_in + inputs[None, :], mask=inside, other=0.0).to(tl.float32)
        factor = tl.sum(h[:, None] * s * s, axis=0)
        for tap in tl.static_range(TAPS):
            at = (o * TAPS + tap) * num_in + inputs
            w = tl.load(weight + at, mask=inputs < num_in, other=0.0).to(tl.float32)
            tl.store(grad_weight + at, w * factor, mask=inputs < num_in)


@triton.jit(do_not_specialize=["num_out"])
def demodulation_style_gradient(
    grad, out, style, power, grad_style, num_out, num_in, scale, gain, BLOCK_O: tl.constexpr, BLOCK: tl.constexpr
):
    """``style * sum over o of h power``."""
    sample, inputs = tl.program_id(1), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, num_out, BLOCK_O):
        outs = first + tl.arange(0, BLOCK_O)
        h = _before_root(grad, out, sample * num_out + outs, outs < num_out, scale, gain)
        inside = (outs < num_out)[:, None] & (inputs < num_in)[None, :]
        p = tl.load(power + outs[:, None] * num_in + inputs[None, :], mask=inside, other=0.0)
        total += tl.sum(h[:, None] * p, axis=0)
    s = tl.load(style + sample * num_in + inputs, mask=inputs < num_in, other=0.0).to(tl.float32)
    tl.store(grad_style + sample * num_in + inputs, s * total, mask=inputs < num_in)


@triton.jit(do_not_specialize=["num"])
def normal(out, seeds, num, BLOCK: tl.constexpr):
    """Standard normal numbers ``[B, num]``, each row a function of its seed: Philox and Box-Muller."""
    row, at = tl.program_id(1), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    numbers = tl.randn4x(tl.load(seeds + row), at)
    pointers = out + row.to(tl.int64) * num + at * 4
    for i in tl.static_range(4):
        tl.store(pointers + i, numbers[i], mask=at * 4 + i < num)
