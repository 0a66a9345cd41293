"""Operators that pass over activations once, each with its derivatives: what the networks compute with on a GPU.

Each operator has a plain form in torch, which runs on CPUs and is what the tests compare with, and a Triton kernel for
GPUs, launched by the function of the same name in `models/launch.py`. Both sum in float32 and round once, when they
store their result (the plain form of a float64 input in float64). Tensors ``[N, C, H, W]`` are channels-last, of any
floating-point type; biases, demodulations, styles and the results of sums over pixels are float32.

The discriminator is piecewise linear in its activations, and R1 differentiates its gradient. So the derivative of an
operator of the discriminator is a linear map, the derivative of that map's adjoint is the map itself, and three kernels
(operator, map, adjoint) serve every order. Operators of the generator have a kernel for their first derivative; higher
ones are taken of the plain form.
"""

import contextlib
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.library import custom_op

from models.ops import ACTIVATION_GAIN, LEAKY_SLOPE

HEAD_ROWS = 32
"""Rows of each group in the weight of `heads`: RGB (3 are used), coarse mask, fine mask, nothing."""
NUM_HEAD_GROUPS = 4
UPSAMPLING_GAIN = 4.0

Operator = Callable[..., Any]

_inputs_alone = False


@contextlib.contextmanager
def input_gradients_alone() -> Iterator[None]:
    """Compute no gradients of weights and biases: R1's inner derivative is that of the images.

    torch tells a `torch.autograd.Function` which inputs require a gradient, not which gradients were asked for.
    """
    global _inputs_alone  # of all threads: on a GPU, backward passes run in one of their own
    _inputs_alone = True
    try:
        yield
    finally:
        _inputs_alone = False


def _operator(fake: Operator) -> Callable[[Operator], Operator]:
    """Register a plain form, its kernel, and what `fake` says of the results without computing them."""

    def register(plain: Operator) -> Operator:
        name = plain.__name__.lstrip("_")

        def kernel(*arguments: Any) -> Any:
            return getattr(importlib.import_module("models.launch"), name)(*arguments)

        operator = custom_op(f"furrygan::{name}", plain, mutates_args=(), device_types="cpu")
        operator.register_kernel("cuda", kernel)
        operator.register_fake(fake)
        return operator

    return register


def _empty(like: Tensor, height: int, width: int, channels: int | None = None) -> Tensor:
    shape = (like.shape[0], channels or like.shape[1], height, width)
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def _sums(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _stored(x: Tensor, like: Tensor) -> Tensor:
    return x.to(like.dtype).contiguous(memory_format=torch.channels_last)


def _per_channel(x: Tensor, like: Tensor) -> Tensor:
    """``[C]`` or ``[N, C]`` as a factor or term of ``[N, C, H, W]``."""
    return x.to(like.dtype)[..., None, None]


def _filtered(x: Tensor, padding: int, stride: int = 1, gain: float = 1.0) -> Tensor:
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=x.dtype, device=x.device) / 8.0
    kernel = (torch.outer(taps, taps) * gain).expand(x.shape[1], 1, 4, 4)
    return F.conv2d(x, kernel, stride=stride, padding=padding, groups=x.shape[1])


def _filtered_adjoint(x: Tensor, size: torch.Size) -> Tensor:
    """Adjoint of `_filtered` with padding 1 and stride 2, for an input of that size."""
    left_over = [n - 2 * m for n, m in zip(size, x.shape[2:], strict=True)]
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=x.dtype, device=x.device) / 8.0
    kernel = torch.outer(taps, taps).expand(x.shape[1], 1, 4, 4)
    return F.conv_transpose2d(x, kernel, stride=2, padding=1, output_padding=left_over, groups=x.shape[1])


def _before_activation(z: Tensor, bias: Tensor, scale: float, bias_gain: float) -> Tensor:
    z = _wide(z)
    return z * scale + _per_channel(bias, z) * bias_gain


def _slope(pre: Tensor, scale: float = 1.0) -> Tensor:
    """Derivative of leaky ReLU, times `scale`."""
    return torch.full_like(pre, scale).masked_fill_(pre <= 0, scale * LEAKY_SLOPE)  # not float32 numbers in float64


# --- blur ---


@_operator(lambda x, padding, gain: _empty(x, x.shape[2] + 2 * padding - 3, x.shape[3] + 2 * padding - 3))
def _blur(x: Tensor, padding: int, gain: float) -> Tensor:
    return _stored(_filtered(_wide(x), padding, gain=gain), x)


# --- blur of an activation: between the two convolutions of a residual block ---


@_operator(lambda z, bias, padding, *_: _empty(z, z.shape[2] + 2 * padding - 3, z.shape[3] + 2 * padding - 3))
def _blur_activated(z: Tensor, bias: Tensor, padding: int, scale: float, bias_gain: float) -> Tensor:
    activation = F.leaky_relu(_before_activation(z, bias, scale, bias_gain), LEAKY_SLOPE)
    return _stored(_filtered(activation, padding), z)


@_operator(lambda x, z, bias, padding, *_: _empty(x, x.shape[2] + 2 * padding - 3, x.shape[3] + 2 * padding - 3))
def _blur_linearized(x: Tensor, z: Tensor, bias: Tensor, padding: int, scale: float, bias_gain: float) -> Tensor:
    slope = _slope(_before_activation(z, bias, scale, bias_gain), scale)
    return _stored(_filtered(_wide(x) * slope, padding), x)


@_operator(lambda grad, z, *_: (torch.empty_like(z), _sums(z, z.shape[1])))
def _blur_adjoint(
    grad: Tensor, z: Tensor, bias: Tensor, padding: int, scale: float, bias_gain: float
) -> tuple[Tensor, Tensor]:
    slope = _slope(_before_activation(z, bias, scale, bias_gain), scale)
    out = _filtered(_wide(grad), 3 - padding) * slope
    return _stored(out, z), out.sum(dim=(0, 2, 3))


class _BlurActivated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, bias: Tensor, *options: Any) -> Tensor:
        ctx.save_for_backward(z, bias)
        ctx.options = options
        out: Tensor = _blur_activated(z, bias, *options)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        z, bias = ctx.saved_tensors
        grad_z, grad_bias = _BlurAdjoint.apply(_last(gradients[0]), z, bias, *ctx.options)
        return grad_z, None if _inputs_alone else grad_bias, None, None, None


class _BlurLinearized(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, z: Tensor, bias: Tensor, *options: Any) -> Tensor:
        ctx.save_for_backward(z, bias)
        ctx.options = options
        out: Tensor = _blur_linearized(x, z, bias, *options)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        z, bias = ctx.saved_tensors
        return _BlurAdjoint.apply(_last(gradients[0]), z, bias, *ctx.options)[0], None, None, None, None, None


class _BlurAdjoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, grad: Tensor, z: Tensor, bias: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(z, bias)
        ctx.options = options
        ctx.set_materialize_grads(False)
        _, scale, bias_gain = options
        grad_z, sums = _blur_adjoint(grad, z, bias, *options)
        return grad_z, sums * (bias_gain / scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        z, bias = ctx.saved_tensors
        _, scale, bias_gain = ctx.options
        x = _joined(gradients[0], gradients[1], bias_gain / scale, z)
        return _BlurLinearized.apply(x, z, bias, *ctx.options), None, None, None, None, None


def blur_activated(z: Tensor, bias: Tensor, *, padding: int, scale: float, bias_gain: float) -> Tensor:
    """``blur(leaky_relu(z * scale + bias * bias_gain))``.

    Args:
        z: ``[N, C, H, W]``, a convolution's result.
        bias: ``[C]``.
        padding: zeros around the activation.
        scale: of z.
        bias_gain: of the bias.

    Returns:
        ``[N, C, H + 2 padding - 3, W + 2 padding - 3]``.
    """
    out: Tensor = _BlurActivated.apply(_last(z), bias, padding, scale, bias_gain)
    return out


# --- output of a residual block: activation, skip, reflection padding, and the next block's blurred skip ---


def _half(size: int) -> int:
    return (size - 2) // 2 + 1


def _fake_block_output(z: Tensor, down: bool) -> tuple[Tensor, Tensor]:
    height, width = z.shape[2:]
    halved = _empty(z, _half(height), _half(width)) if down else z.new_empty(0)
    return _empty(z, height + 2, width + 2), halved


def _padded_and_halved(x: Tensor, like: Tensor, down: bool) -> tuple[Tensor, Tensor]:
    x = _stored(x, like)  # what the blur reads is what was stored
    padded = _stored(F.pad(x, [1] * 4, mode="reflect"), like)
    return padded, _stored(_filtered(_wide(x), 1, 2), like) if down else like.new_empty(0)


@_operator(lambda z, bias, skip, scale, skip_scale, bias_gain, down: _fake_block_output(z, down))
def _block_output(
    z: Tensor, bias: Tensor, skip: Tensor | None, scale: float, skip_scale: float, bias_gain: float, down: bool
) -> tuple[Tensor, Tensor]:
    out = F.leaky_relu(_before_activation(z, bias, scale, bias_gain), LEAKY_SLOPE)
    if skip is not None:
        out = out + _wide(skip) * skip_scale
    return _padded_and_halved(out, z, down)


@_operator(lambda x, skip, z, bias, scale, skip_scale, bias_gain, down: _fake_block_output(z, down))
def _block_output_linearized(
    x: Tensor,
    skip: Tensor | None,
    z: Tensor,
    bias: Tensor,
    scale: float,
    skip_scale: float,
    bias_gain: float,
    down: bool,
) -> tuple[Tensor, Tensor]:
    out = _wide(x) * _slope(_before_activation(z, bias, scale, bias_gain), scale)
    if skip is not None:
        out = out + _wide(skip) * skip_scale
    return _padded_and_halved(out, z, down)


def _fake_block_output_adjoint(grad: Tensor, down: Any, z: Tensor, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(z), torch.empty_like(z) if options[-1] else z.new_empty(0), _sums(z, z.shape[1])


@_operator(_fake_block_output_adjoint)
def _block_output_adjoint(
    grad: Tensor, grad_down: Tensor | None, z: Tensor, bias: Tensor,
    scale: float, skip_scale: float, bias_gain: float, with_skip: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    out = torch.ops.aten.reflection_pad2d_backward(_wide(grad), _wide(z), [1] * 4)
    if grad_down is not None:
        out = out + _filtered_adjoint(_wide(grad_down), z.shape[2:])
    grad_z = out * _slope(_before_activation(z, bias, scale, bias_gain), scale)
    grad_skip = _stored(out * skip_scale, z) if with_skip else z.new_empty(0)
    return _stored(grad_z, z), grad_skip, grad_z.sum(dim=(0, 2, 3))


class _BlockOutput(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, bias: Tensor, skip: Tensor | None, *options: Any) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(z, bias)
        ctx.options, ctx.with_skip = options, skip is not None
        ctx.set_materialize_grads(False)
        out: tuple[Tensor, Tensor] = _block_output(z, bias, skip, *options)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        z, bias = ctx.saved_tensors
        grad_z, grad_skip, grad_bias = _block_adjoint(gradients, z, bias, ctx)
        return grad_z, None if _inputs_alone else grad_bias, grad_skip, None, None, None, None


class _BlockOutputLinearized(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, skip: Tensor | None, z: Tensor, bias: Tensor, *options: Any) -> Any:
        ctx.save_for_backward(z, bias)
        ctx.options, ctx.with_skip = options, skip is not None
        ctx.set_materialize_grads(False)
        return _block_output_linearized(x, skip, z, bias, *options)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        z, bias = ctx.saved_tensors
        grad_x, grad_skip, _ = _block_adjoint(gradients, z, bias, ctx)
        return grad_x, grad_skip, None, None, None, None, None, None


class _BlockOutputAdjoint(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, grad: Tensor, grad_down: Tensor | None, z: Tensor, bias: Tensor, with_skip: bool, *options: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(z, bias)
        ctx.options, ctx.with_skip, ctx.with_down = options, with_skip, grad_down is not None
        ctx.set_materialize_grads(False)
        scale, skip_scale, bias_gain, _ = options
        grad_z, grad_skip, sums = _block_output_adjoint(
            grad, grad_down, z, bias, scale, skip_scale, bias_gain, with_skip
        )
        return grad_z, grad_skip, sums * (bias_gain / scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        z, bias = ctx.saved_tensors
        scale, skip_scale, bias_gain, _ = ctx.options
        x = _joined(gradients[0], gradients[2], bias_gain / scale, z)
        skip = _last(gradients[1]) if ctx.with_skip and gradients[1] is not None else None
        out, down = _BlockOutputLinearized.apply(x, skip, z, bias, scale, skip_scale, bias_gain, ctx.with_down)
        return out, down if ctx.with_down else None, None, None, None, None, None, None, None


def _block_adjoint(
    gradients: tuple[Tensor | None, ...], z: Tensor, bias: Tensor, ctx: Any
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Gradients at z, the skip and the bias."""
    grad, grad_down = gradients
    height, width = z.shape[2:]
    grad = _empty(z, height + 2, width + 2).zero_() if grad is None else _last(grad)
    grad_down = _last(grad_down) if grad_down is not None and ctx.options[-1] else None
    grad_z, grad_skip, grad_bias = _BlockOutputAdjoint.apply(grad, grad_down, z, bias, ctx.with_skip, *ctx.options)
    return grad_z, grad_skip if ctx.with_skip else None, grad_bias


def block_output(
    z: Tensor, bias: Tensor, skip: Tensor | None, *, scale: float, skip_scale: float, bias_gain: float, down: bool
) -> tuple[Tensor, Tensor | None]:
    """``out = leaky_relu(z * scale + bias * bias_gain) + skip * skip_scale``, as the next residual block reads it.

    Args:
        z: ``[N, C, H, W]``, a convolution's result.
        bias: ``[C]``.
        skip: ``[N, C, H, W]``, or None for no such term.
        scale: of z.
        skip_scale: of the skip.
        bias_gain: of the bias.
        down: whether the second result is wanted.

    Returns:
        ``[N, C, H + 2, W + 2]``, out padded by reflection, and ``[N, C, H/2, W/2]``, every second pixel of the blurred
        out (padding 1).
    """
    skip = None if skip is None else _last(skip)
    out, halved = _BlockOutput.apply(_last(z), bias, skip, scale, skip_scale, bias_gain, down)
    return out, halved if down else None


# --- output of the first layer, from RGB, in the same form ---


def _fake_rgb_output(image: Tensor, weight: Tensor, down: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    like = torch.empty(0, dtype=dtype, device=image.device).expand(len(image), 0, 0, 0)
    height, width = image.shape[2:]
    halved = _empty(like, _half(height), _half(width), len(weight)) if down else like.new_empty(0)
    return _empty(like, height + 2, width + 2, len(weight)), halved


def _rgb_product(image: Tensor, weight: Tensor) -> Tensor:
    return F.conv2d(image, weight.to(image.dtype)[:, :, None, None])


@_operator(lambda image, weight, bias, scale, gain, down, dtype: _fake_rgb_output(image, weight, down, dtype))
def _rgb_output(
    image: Tensor, weight: Tensor, bias: Tensor, scale: float, bias_gain: float, down: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    out = F.leaky_relu(_before_activation(_rgb_product(image, weight), bias, scale, bias_gain), LEAKY_SLOPE)
    return _padded_and_halved(out, torch.empty(0, dtype=dtype, device=image.device), down)


@_operator(lambda x, image, weight, bias, scale, gain, down, dtype: _fake_rgb_output(image, weight, down, dtype))
def _rgb_output_linearized(
    x: Tensor, image: Tensor, weight: Tensor, bias: Tensor,
    scale: float, bias_gain: float, down: bool, dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    slope = _slope(_before_activation(_rgb_product(image, weight), bias, scale, bias_gain), scale)
    return _padded_and_halved(_rgb_product(x, weight) * slope, torch.empty(0, dtype=dtype, device=image.device), down)


@_operator(lambda grad, down, image, factor, weight, *_: (torch.empty_like(image), _sums(image, 4, len(weight))))
def _rgb_output_adjoint(
    grad: Tensor, grad_down: Tensor | None, image: Tensor, factor: Tensor, weight: Tensor, bias: Tensor,
    scale: float, bias_gain: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    pre = _before_activation(_rgb_product(image, weight), bias, scale, bias_gain)
    h = torch.ops.aten.reflection_pad2d_backward(grad.to(pre.dtype), pre, [1] * 4)
    if grad_down is not None:
        h = h + _filtered_adjoint(grad_down.to(pre.dtype), pre.shape[2:])
    h = h * _slope(pre)
    grad_image = F.conv_transpose2d(h, weight.to(h.dtype)[:, :, None, None]) * scale
    sums = [*torch.einsum("nchw,nkhw->kc", h, factor.to(h.dtype)), h.sum(dim=(0, 2, 3))]
    return _stored(grad_image, image), torch.stack(sums)


class _RgbOutput(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, image: Tensor, weight: Tensor, bias: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(image, weight, bias)
        ctx.options = options
        ctx.set_materialize_grads(False)
        out: tuple[Tensor, Tensor] = _rgb_output(image, weight, bias, *options)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        image, weight, bias = ctx.saved_tensors
        grad, grad_down = gradients
        *_, down, dtype = ctx.options
        height, width = image.shape[2:]
        grad = grad if grad is not None else _empty(image, height + 2, width + 2, len(weight)).to(dtype).zero_()
        grad_down = _last(grad_down) if down and grad_down is not None else None
        grads = _RgbOutputAdjoint.apply(_last(grad), grad_down, image, weight, bias, *ctx.options)
        of_image, of_weight, of_bias = grads
        wanted = not _inputs_alone
        return of_image, of_weight if wanted else None, of_bias if wanted else None, None, None, None, None


class _RgbOutputAdjoint(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, grad: Tensor, grad_down: Tensor | None, image: Tensor, weight: Tensor, bias: Tensor, *options: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(grad, grad_down, image, weight, bias)
        ctx.options = options
        ctx.set_materialize_grads(False)
        scale, bias_gain, _, _ = options
        of_image, sums = _rgb_output_adjoint(grad, grad_down, image, image, weight, bias, scale, bias_gain)
        return of_image, (sums[:3].T * scale).to(weight.dtype), (sums[3] * bias_gain).to(bias.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, x: Tensor | None, of_weight: Tensor | None, of_bias: Tensor | None) -> Any:
        grad, grad_down, image, weight, bias = ctx.saved_tensors
        scale, bias_gain, _, dtype = ctx.options
        # The gradient is linear in h = slope * (adjoint of padding and blur), which is linear in grad.
        direction = torch.zeros_like(image) if x is None else _last(x)
        options = (scale, bias_gain, grad_down is not None, dtype)
        out, down = _rgb_output_linearized(direction, image, weight, bias, *options)
        _, sums = _rgb_output_adjoint(grad, grad_down, image, direction, weight, bias, scale, bias_gain)
        grad_weight, grad_image = (sums[:3].T * scale).to(weight.dtype), None
        if of_weight is not None or of_bias is not None:
            more = _of_weight_gradient(ctx, of_weight, of_bias)
            out, grad_image = out + more[0], more[2]
            down = down + more[1] if grad_down is not None else down
        return out, down if grad_down is not None else None, grad_image, grad_weight, None, None, None, None, None


def _of_weight_gradient(ctx: Any, of_weight: Tensor | None, of_bias: Tensor | None) -> list[Tensor]:
    """What `_RgbOutputAdjoint`'s gradients at weight and bias depend on: grad, grad_down and image."""
    grad, grad_down, image, weight, bias = ctx.saved_tensors
    scale, bias_gain, _, dtype = ctx.options
    pre = _before_activation(_rgb_product(image, weight), bias, scale, bias_gain)
    h = torch.ops.aten.reflection_pad2d_backward(grad.to(pre.dtype), pre, [1] * 4)
    if grad_down is not None:
        h = h + _filtered_adjoint(grad_down.to(pre.dtype), pre.shape[2:])
    slope = _slope(pre)
    value = torch.zeros_like(pre) if of_weight is None else _rgb_product(image, of_weight) * scale
    if of_bias is not None:
        value = value + _per_channel(of_bias, value) * bias_gain
    out, down = _padded_and_halved(value * slope, torch.empty(0, dtype=dtype, device=image.device), True)
    of_image = torch.zeros_like(image)
    if of_weight is not None:
        of_image = F.conv_transpose2d(h * slope, of_weight.to(h.dtype)[:, :, None, None]) * scale
    return [out, down, of_image.to(image.dtype)]


def rgb_output(
    image: Tensor, weight: Tensor, bias: Tensor, *, scale: float, bias_gain: float, down: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """``leaky_relu(weight @ image * scale + bias * bias_gain)`` in the form of `block_output`.

    Args:
        image: ``[N, 3, H, W]`` float32 or float64.
        weight: ``[C, 3]``.
        bias: ``[C]``.
        scale: of the product.
        bias_gain: of the bias.
        down: whether the second result is wanted.
        dtype: of the results.
    """
    out, halved = _RgbOutput.apply(_last(image), weight.contiguous(), bias, scale, bias_gain, down, dtype)
    return out, halved if down else None


# --- output of a styled convolution ---


def _styled_size(z: Tensor, blurred: bool) -> tuple[int, int]:
    return z.shape[2] - blurred, z.shape[3] - blurred


def _plain_styled(
    z: Tensor, demodulation: Tensor, noise: Tensor, strength: Tensor, bias: Tensor, style: Tensor | None, blurred: bool
) -> Tensor:
    """Differentiable, in the wide type."""
    z = _wide(z)
    z = _filtered(z, 1, gain=UPSAMPLING_GAIN) if blurred else z
    loudness, offset = (x.to(z.dtype) * ACTIVATION_GAIN for x in (strength, bias))
    pre = z * _per_channel(demodulation, z) + noise.to(z.dtype) * loudness + _per_channel(offset, z)
    out = F.leaky_relu(pre, LEAKY_SLOPE)
    return out if style is None else out * _per_channel(style, z)


@_operator(lambda z, *others: _empty(z, *_styled_size(z, others[-1])))
def _styled(
    z: Tensor, demodulation: Tensor, noise: Tensor, strength: Tensor, bias: Tensor, style: Tensor | None, blurred: bool
) -> Tensor:
    return _stored(_plain_styled(z, demodulation, noise, strength, bias, style, blurred), z)


@_operator(lambda grad, z, *_: (torch.empty_like(grad), _sums(z, z.shape[0], 4, z.shape[1])))
def _styled_adjoint(
    grad: Tensor, z: Tensor, demodulation: Tensor, noise: Tensor, strength: Tensor, bias: Tensor,
    style: Tensor | None, blurred: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    wide, h = _wide(z), _wide(grad)
    wide = _filtered(wide, 1, gain=UPSAMPLING_GAIN) if blurred else wide
    pre = _plain_styled(z, demodulation, noise, strength, bias, None, blurred)
    pre = torch.where(pre > 0, pre, pre / LEAKY_SLOPE)
    of_style = torch.zeros_like(h) if style is None else h * F.leaky_relu(pre, LEAKY_SLOPE)
    h = (h if style is None else h * _per_channel(style, h)) * _slope(pre)
    sums = [x.sum(dim=(2, 3)) for x in (h, h * wide, h * noise.to(h.dtype), of_style)]
    return _stored(h * _per_channel(demodulation, h), grad), torch.stack(sums, dim=1)


class _Styled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        *tensors, ctx.blurred = arguments
        ctx.save_for_backward(*tensors)
        out: Tensor = _styled(*arguments)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        tensors = ctx.saved_tensors
        z, demodulation, noise, strength, bias, style = tensors
        grad = _last(gradients[0])
        if torch.is_grad_enabled():
            wanted = [needed and x is not None for needed, x in zip(ctx.needs_input_grad, tensors, strict=False)]
            out = _plain_styled(z, demodulation, noise, strength, bias, style, ctx.blurred)
            return *_differentiably((out,), (grad,), tensors, wanted), None
        grad_z, sums = _styled_adjoint(grad, *tensors, ctx.blurred)
        if ctx.blurred:
            grad_z = _blur(grad_z, 2, UPSAMPLING_GAIN)
        of_bias, of_demodulation, of_noise, of_style = sums.unbind(dim=1)
        return (
            grad_z,
            of_demodulation.to(demodulation.dtype),
            None,
            (of_noise.sum() * ACTIVATION_GAIN).to(strength.dtype),
            (of_bias.sum(dim=0) * ACTIVATION_GAIN).to(bias.dtype),
            None if style is None else of_style.to(style.dtype),
            None,
        )


def styled(
    z: Tensor,
    demodulation: Tensor,
    noise: Tensor,
    strength: Tensor,
    bias: Tensor,
    style: Tensor | None,
    *,
    blurred: bool,
) -> Tensor:
    """``leaky_relu(blur(z) * demodulation + (noise * strength + bias) * sqrt(2)) * style``.

    Args:
        z: ``[N, C, H, W]``, a convolution's result.
        demodulation: ``[N, C]``.
        noise: ``[N, 1, H', W']``; carries no gradient.
        strength: scalar.
        bias: ``[C]``.
        style: ``[N, C]``, that of the next convolution; None for no such factor.
        blurred: blur z (padding 1, gain 4), which is of an upsampling convolution; H' is H - 1 then, and H else.

    Returns:
        ``[N, C, H', W']``.
    """
    demodulation = demodulation.contiguous()
    style = None if style is None else style.contiguous()
    out: Tensor = _Styled.apply(_last(z), demodulation, _maps(noise), strength, bias, style, blurred)
    return out


def _maps(noise: Tensor) -> Tensor:
    """Noise whose maps are contiguous, as those of `FurryGenerator.noise_maps` are; any stride between samples."""
    return noise if noise.stride()[2:] == (noise.shape[3], 1) else noise.contiguous()


# --- demodulation ---


def _plain_demodulation(style: Tensor, weight: Tensor, scale: float, gain: float) -> tuple[Tensor, Tensor]:
    power = weight.square().sum(dim=(2, 3))
    return torch.rsqrt(style.square() @ power.T * scale**2 + 1e-8) * gain, power


@_operator(lambda style, weight, *_: (style.new_empty(len(style), len(weight)), style.new_empty(weight.shape[:2])))
def _demodulation(style: Tensor, weight: Tensor, scale: float, gain: float) -> tuple[Tensor, Tensor]:
    return _plain_demodulation(style, weight, scale, gain)


@_operator(lambda grad, out, power, style, weight, *_: (torch.empty_like(style), torch.empty_like(weight)))
def _demodulation_adjoint(
    grad: Tensor, out: Tensor, power: Tensor, style: Tensor, weight: Tensor, scale: float, gain: float
) -> tuple[Tensor, Tensor]:
    h = -grad * out**3 * (scale / gain) ** 2
    return style * (h @ power), weight * (h.T @ style.square())[:, :, None, None]


class _Demodulation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, style: Tensor, weight: Tensor, scale: float, gain: float) -> Tensor:
        out, power = _demodulation(style, weight, scale, gain)
        ctx.save_for_backward(style, weight, out, power)
        ctx.options = scale, gain
        result: Tensor = out
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        style, weight, out, power = ctx.saved_tensors
        if torch.is_grad_enabled():
            plain, _ = _plain_demodulation(style, weight, *ctx.options)
            return *_differentiably((plain,), gradients, (style, weight), ctx.needs_input_grad), None, None
        return *_demodulation_adjoint(gradients[0].contiguous(), out, power, style, weight, *ctx.options), None, None


def demodulation(style: Tensor, weight: Tensor, *, scale: float, gain: float) -> Tensor:
    """``gain`` over the expected standard deviation of each output channel of a modulated convolution.

    Args:
        style: ``[N, I]`` float32.
        weight: ``[O, I, k, k]`` float32, channels-last.
        scale: of the weight.
        gain: factor on the result.

    Returns:
        ``[N, O]``.
    """
    out: Tensor = _Demodulation.apply(style.contiguous(), _last(weight), scale, gain)
    return out


# --- RGB and masks from the features ---


def _plain_heads(
    features: Tensor, weight: Tensor, bias: Tensor, noise_coarse: Tensor, noise_fine: Tensor, strengths: Tensor
) -> tuple[Tensor, Tensor]:
    x = _wide(features)
    pre = torch.einsum("nchw,noc->nohw", x, weight.to(x.dtype)) + _per_channel(bias, x)
    _, coarse, fine, _ = pre.split(HEAD_ROWS, dim=1)
    masks = [
        F.relu(group + noise.to(x.dtype) * strength.to(x.dtype) * ACTIVATION_GAIN).mean(dim=1)
        for group, noise, strength in zip((coarse, fine), (noise_coarse, noise_fine), strengths, strict=True)
    ]
    return pre[:, :3].contiguous(memory_format=torch.channels_last), torch.stack(masks, dim=1)


def _fake_heads(features: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    n, height, width = features.shape[0], *features.shape[2:]
    dtype = torch.promote_types(features.dtype, torch.float32)
    rgb = features.new_empty(n, height, width, 3, dtype=dtype).permute(0, 3, 1, 2)
    return rgb, features.new_empty(n, 2, height, width, dtype=dtype)


@_operator(_fake_heads)
def _heads(
    features: Tensor, weight: Tensor, bias: Tensor, noise_coarse: Tensor, noise_fine: Tensor, strengths: Tensor
) -> tuple[Tensor, Tensor]:
    return _plain_heads(features, weight, bias, noise_coarse, noise_fine, strengths)


def _fake_heads_adjoint(rgb: Tensor, masks: Tensor, features: Tensor, weight: Tensor, *_: Any) -> Any:
    return torch.empty_like(features), _sums(weight, *weight.shape), _sums(weight, 2, weight.shape[1])


@_operator(_fake_heads_adjoint)
def _heads_adjoint(
    grad_rgb: Tensor, grad_masks: Tensor, features: Tensor, weight: Tensor, bias: Tensor,
    noise_coarse: Tensor, noise_fine: Tensor, strengths: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    x = _wide(features)
    w, of_pre = weight.to(x.dtype), x.new_zeros(len(x), weight.shape[1], *x.shape[2:])
    pre = torch.einsum("nchw,noc->nohw", x, w) + _per_channel(bias, x)
    noise = torch.zeros_like(of_pre)
    of_pre[:, :3] = grad_rgb
    for i, (each, strength) in enumerate(zip((noise_coarse, noise_fine), strengths, strict=True)):
        rows = slice((i + 1) * HEAD_ROWS, (i + 2) * HEAD_ROWS)
        noise[:, rows] = each
        positive = pre[:, rows] + each.to(x.dtype) * strength.to(x.dtype) * ACTIVATION_GAIN > 0
        of_pre[:, rows] = positive * grad_masks[:, i : i + 1] / HEAD_ROWS
    of_features = torch.einsum("nohw,noc->nchw", of_pre, w)
    of_weight = torch.einsum("nohw,nchw->noc", of_pre, x)
    sums = torch.stack([of_pre.sum(dim=(0, 2, 3)), (of_pre * noise).sum(dim=(0, 2, 3))])
    return _stored(of_features, features), of_weight, sums


class _Heads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(*tensors)
        out: tuple[Tensor, Tensor] = _heads(*tensors)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        tensors = ctx.saved_tensors
        grad_rgb, grad_masks = _last(gradients[0]), gradients[1].contiguous()
        if torch.is_grad_enabled():
            found = _differentiably(_plain_heads(*tensors), (grad_rgb, grad_masks), tensors, ctx.needs_input_grad)
            return tuple(found)
        _, weight, bias, _, _, strengths = tensors
        grad_features, grad_weight, (of_bias, of_noise) = _heads_adjoint(grad_rgb, grad_masks, *tensors)
        of_strengths = of_noise.view(NUM_HEAD_GROUPS, HEAD_ROWS).sum(dim=1)[1:3] * ACTIVATION_GAIN
        return (
            *(grad_features, grad_weight.to(weight.dtype), of_bias.to(bias.dtype), None, None),
            of_strengths.to(strengths.dtype),
        )


def heads(
    features: Tensor, weight: Tensor, bias: Tensor, noise_coarse: Tensor, noise_fine: Tensor, strengths: Tensor
) -> tuple[Tensor, Tensor]:
    """RGB, and the masks before their min-max (Eq. 2), in one pass over the features.

    Args:
        features: ``[N, C, H, W]``.
        weight: ``[N, 4 * HEAD_ROWS, C]``, those of each sample: RGB in the first 3 rows, then the coarse mask's in the
            second group of `HEAD_ROWS`, the fine mask's in the third.
        bias: ``[4 * HEAD_ROWS]``.
        noise_coarse: ``[N, 1, H, W]``; carries no gradient.
        noise_fine: likewise.
        strengths: ``[2]``, of the noise.

    Returns:
        RGB ``[N, 3, H, W]``, linear, and for the coarse and the fine mask the mean over its channels of ``relu(weight @
        features + bias + noise * strength * sqrt(2))``, ``[N, 2, H, W]``; float32.
    """
    noise_coarse, noise_fine = _maps(noise_coarse), _maps(noise_fine)
    if noise_coarse.stride(0) != noise_fine.stride(0):
        noise_coarse, noise_fine = noise_coarse.contiguous(), noise_fine.contiguous()
    out: tuple[Tensor, Tensor] = _Heads.apply(
        _last(features), weight.contiguous(), bias, noise_coarse, noise_fine, strengths
    )
    return out


# --- convolution ---


class _Conv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride = stride
        return F.conv2d(x, weight, stride=stride)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        grad = gradients[0]
        of_x = _Conv2dInput.apply(grad, weight, x.shape, ctx.stride) if ctx.needs_input_grad[0] else None
        wanted = ctx.needs_input_grad[1] and not _inputs_alone
        return of_x, _Conv2dWeight.apply(grad, x, weight.shape, ctx.stride) if wanted else None, None


class _Conv2dInput(torch.autograd.Function):
    """The gradient at the input, bilinear in the output's gradient and the weight."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, weight: Tensor, shape: torch.Size, stride: int) -> Tensor:
        ctx.save_for_backward(grad, weight)
        ctx.stride = stride
        return _convolution_backward(grad, _like_shape(grad, shape), weight, stride, 0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        grad, weight = ctx.saved_tensors
        x = _last(gradients[0])
        of_grad = _Conv2d.apply(x, weight, ctx.stride) if ctx.needs_input_grad[0] else None
        of_weight = _Conv2dWeight.apply(grad, x, weight.shape, ctx.stride) if ctx.needs_input_grad[1] else None
        return of_grad, of_weight, None, None


class _Conv2dWeight(torch.autograd.Function):
    """The gradient at the weight, bilinear in the output's gradient and the input."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, x: Tensor, shape: torch.Size, stride: int) -> Tensor:
        ctx.save_for_backward(grad, x)
        ctx.stride = stride
        return _convolution_backward(grad, x, _like_shape(grad, shape), stride, 1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        grad, x = ctx.saved_tensors
        weight = _last(gradients[0])
        of_grad = _Conv2d.apply(x, weight, ctx.stride) if ctx.needs_input_grad[0] else None
        of_x = _Conv2dInput.apply(grad, weight, x.shape, ctx.stride) if ctx.needs_input_grad[1] else None
        return of_grad, of_x, None, None


def _convolution_backward(grad: Tensor, x: Tensor, weight: Tensor, stride: int, which: int) -> Tensor:
    options = ([stride, stride], [0, 0], [1, 1], False, [0, 0], 1)
    mask = [which == 0, which == 1, False]
    out: Tensor = torch.ops.aten.convolution_backward(grad, x, weight, None, *options, mask)[which]
    return out


def _like_shape(like: Tensor, shape: torch.Size) -> Tensor:
    """A tensor of which only shape, type and memory format matter."""
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def conv2d(x: Tensor, weight: Tensor, *, stride: int = 1) -> Tensor:
    """Convolution without padding whose weight gradients are weight-gradient kernels at every order.

    torch's second derivative of a convolution computes them as convolutions whose kernel is as large as the image, for
    which cuDNN has no good algorithm.

    Args:
        x: ``[N, I, H, W]``.
        weight: ``[O, I, k, k]``, of the same type.
        stride: of the output pixels.
    """
    out: Tensor = _Conv2d.apply(x, weight, stride)
    return out


# --- random numbers ---


@_operator(lambda seeds, num: torch.empty(len(seeds), num, device=seeds.device))
def _normal(seeds: Tensor, num: int) -> Tensor:
    rows = [torch.randn(num, generator=torch.Generator().manual_seed(seed)) for seed in seeds.tolist()]
    return torch.stack(rows)


def normal(seeds: Tensor, num: int) -> Tensor:
    """Standard normal numbers ``[B, num]`` float32; a row is a function of its seed, and of the kind of device.

    Args:
        seeds: ``[B]`` int64, on the device that draws.
        num: of a row.
    """
    out: Tensor = _normal(seeds, num)
    return out


def _last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _joined(grad_z: Tensor | None, grad_bias: Tensor | None, gain: float, z: Tensor) -> Tensor:
    """What the adjoint's gradients at its two results, the gradient at z and its sums, say of the gradient at z."""
    x = torch.zeros_like(z) if grad_z is None else grad_z
    if grad_bias is not None:
        x = x + (grad_bias * gain).to(x.dtype)[:, None, None]
    return _last(x)


def _differentiably(
    outputs: tuple[Tensor, ...], gradients: tuple[Tensor, ...], inputs: tuple[Tensor, ...], wanted: Any
) -> list[Tensor | None]:
    """Gradients that can be differentiated again; None where none is wanted."""
    chosen = [x for x, want in zip(inputs, wanted, strict=False) if want]
    given = [g.to(out.dtype) for g, out in zip(gradients, outputs, strict=True)]
    found = iter(torch.autograd.grad(outputs, chosen, given, create_graph=True, allow_unused=True))
    return [next(found) if want else None for want in list(wanted)[: len(inputs)]]
