"""The operators' plain forms compute what they say, and their derivatives of both orders are those of differences.

`test_kernels.py` compares the kernels with the plain forms.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from differentiable import BIAS_GAIN, DIFFERENTIABLE, SCALE, SKIP_SCALE, off_zero
from numpy.typing import NDArray
from test_ops import scipy_blur, scipy_correlate
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from models import fused_ops

Array = NDArray[np.float64]
SHAPE = (2, 3, 5, 4)
N, C, H, W = SHAPE
# Computed in float32 at least; a result in bfloat16 is then rounded once, to 8 bits.
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2**-8}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCES, ids=str)


def random(*shape: int, dtype: torch.dtype) -> Tensor:
    x = torch.randn(shape).to(dtype)
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x


def parameter(*shape: int, dtype: torch.dtype) -> Tensor:
    """Not an activation: float32 where those are bfloat16."""
    return torch.randn(shape).to(torch.promote_types(dtype, torch.float32))


def exact(x: Tensor) -> Array:
    found: Array = x.double().numpy()
    return found


def stored(x: Array, dtype: torch.dtype) -> Array:
    """As a tensor of that type holds it."""
    return exact(torch.from_numpy(x).to(dtype))


def leaky(x: Array) -> Array:
    return np.maximum(x, 0.0) + 0.2 * np.minimum(x, 0.0)


def by_channel(x: Array) -> Array:
    return x[..., None, None]


def agrees(actual: Tensor | None, expected: Array, dtype: torch.dtype, result: torch.dtype | None = None) -> None:
    """`dtype` is that of the activations, `result` that of this result where it is another."""
    assert actual is not None and actual.dtype == (result or dtype)
    tolerance = TOLERANCES[result or dtype]
    torch.testing.assert_close(actual.double(), torch.from_numpy(expected), rtol=tolerance, atol=tolerance)


@DTYPES
@pytest.mark.parametrize("padding", [1, 2])
def test_blur_of_an_activation(dtype: torch.dtype, padding: int) -> None:
    z, bias = random(*SHAPE, dtype=dtype), parameter(C, dtype=dtype)
    activation = leaky(exact(z) * SCALE + by_channel(exact(bias)) * BIAS_GAIN)
    actual = fused_ops.blur_activated(z, bias, padding=padding, scale=SCALE, bias_gain=BIAS_GAIN)
    agrees(actual, scipy_blur(activation, padding), dtype)
    agrees(fused_ops._blur(z, padding, 4.0), scipy_blur(exact(z), padding, gain=4.0), dtype)


def padded_and_halved(x: Array, dtype: torch.dtype) -> tuple[Array, Array]:
    """What the next block's convolution and its skip read."""
    x = stored(x, dtype)
    return np.pad(x, [(0, 0), (0, 0), (1, 1), (1, 1)], mode="reflect"), scipy_blur(x, 1, stride=2)


@DTYPES
@pytest.mark.parametrize("with_skip", [True, False])
def test_output_of_a_residual_block(dtype: torch.dtype, with_skip: bool) -> None:
    z, skip, bias = random(*SHAPE, dtype=dtype), random(*SHAPE, dtype=dtype), parameter(C, dtype=dtype)
    out = leaky(exact(z) * SCALE + by_channel(exact(bias)) * BIAS_GAIN)
    out += exact(skip) * SKIP_SCALE if with_skip else 0.0
    options = {"scale": SCALE, "skip_scale": SKIP_SCALE, "bias_gain": BIAS_GAIN}
    for down in (True, False):
        padded, halved = fused_ops.block_output(z, bias, skip if with_skip else None, down=down, **options)
        expected = padded_and_halved(out, dtype)
        # A value near the middle between two of bfloat16 may be stored as either; the blur reads what was stored.
        agrees(padded, expected[0], dtype)
        if down:
            agrees(halved, expected[1], dtype)
        else:
            assert halved is None


@DTYPES
def test_output_of_the_first_layer(dtype: torch.dtype) -> None:
    image, weight, bias = (parameter(*shape, dtype=dtype) for shape in [(N, 3, H, W), (C, 3), (C,)])
    out = np.zeros(SHAPE)
    for n, c, y, x in np.ndindex(*SHAPE):
        product = sum(exact(weight)[c, k] * exact(image)[n, k, y, x] for k in range(3))
        out[n, c, y, x] = leaky(product * SCALE + exact(bias)[c] * BIAS_GAIN)
    padded, halved = fused_ops.rgb_output(image, weight, bias, scale=SCALE, bias_gain=BIAS_GAIN, down=True, dtype=dtype)
    expected = padded_and_halved(out, dtype)
    agrees(padded, expected[0], dtype)
    agrees(halved, expected[1], dtype)


@DTYPES
@pytest.mark.parametrize("blurred", [True, False])
@pytest.mark.parametrize("with_style", [True, False])
def test_output_of_a_styled_convolution(dtype: torch.dtype, blurred: bool, with_style: bool) -> None:
    z, height, width = random(*SHAPE, dtype=dtype), H - blurred, W - blurred
    shapes = [(N, C), (N, 1, height, width), (), (C,), (N, C)]
    demodulation, noise, strength, bias, style = (parameter(*shape, dtype=dtype) for shape in shapes)
    out = scipy_blur(exact(z), 1, gain=4.0) if blurred else exact(z)
    out = out * by_channel(exact(demodulation))
    out = leaky(out + 2**0.5 * (exact(noise) * exact(strength) + by_channel(exact(bias))))
    out = out * by_channel(exact(style)) if with_style else out
    given = style if with_style else None
    agrees(fused_ops.styled(z, demodulation, noise, strength, bias, given, blurred=blurred), out, dtype)


def test_demodulation_is_over_the_norm_of_each_sample_s_weights() -> None:
    style, weight = torch.randn(2, 3, dtype=torch.float64), torch.randn(4, 3, 3, 3, dtype=torch.float64)
    actual = fused_ops.demodulation(style, weight, scale=SCALE, gain=BIAS_GAIN)
    expected = np.zeros((2, 4))
    for n, o in np.ndindex(2, 4):
        own = exact(weight)[o] * exact(style)[n][:, None, None] * SCALE
        expected[n, o] = BIAS_GAIN / np.sqrt((own**2).sum() + 1e-8)
    agrees(actual, expected, torch.float64)


@DTYPES
def test_rgb_and_masks(dtype: torch.dtype) -> None:
    features, rows = random(*SHAPE, dtype=dtype), 4 * 32
    weight, bias, strengths = (parameter(*shape, dtype=dtype) for shape in [(N, rows, C), (rows,), (2,)])
    maps = [parameter(N, 1, H, W, dtype=dtype) for _ in range(2)]
    rgb, masks = np.zeros((N, 3, H, W)), np.zeros((N, 2, H, W))
    for n, y, x in np.ndindex(N, H, W):
        out = exact(weight)[n] @ exact(features)[n, :, y, x] + exact(bias)
        rgb[n, :, y, x] = out[:3]
        for i, (noise, strength) in enumerate(zip(maps, exact(strengths), strict=True)):
            units = out[32 * (i + 1) : 32 * (i + 2)] + exact(noise)[n, 0, y, x] * strength * 2**0.5
            masks[n, i, y, x] = np.maximum(units, 0.0).mean()
    wide = torch.promote_types(dtype, torch.float32)
    for actual, expected in zip(fused_ops.heads(features, weight, bias, *maps, strengths), (rgb, masks), strict=True):
        agrees(actual, expected, dtype, wide)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [1, 3])
def test_convolution(stride: int, size: int) -> None:
    x, weight = torch.randn(2, 3, 5, 6, dtype=torch.float64), torch.randn(4, 3, size, size, dtype=torch.float64)
    expected = scipy_correlate(exact(x), exact(weight))[:, :, ::stride, ::stride]
    agrees(fused_ops.conv2d(x, weight, stride=stride), expected, torch.float64)


def test_normal_numbers_are_torch_s_by_seed() -> None:
    seeds = [3, 2**62 + 5, 4]
    rows = fused_ops.normal(torch.tensor(seeds), 7)
    for seed, row in zip(seeds, rows, strict=True):
        torch.manual_seed(seed)
        assert torch.equal(row, torch.randn(7))


def test_shapes_and_types_are_known_without_computing() -> None:
    """As `torch.library` compares them: those that fake tensors have, in which bytes are counted."""
    z, bias = random(*SHAPE, dtype=torch.bfloat16), torch.randn(C)
    grad, half = random(N, C, H + 2, W + 2, dtype=torch.bfloat16), random(N, C, 2, 2, dtype=torch.bfloat16)
    image, weight = random(N, 3, H, W, dtype=torch.float32), torch.randn(C, 3)
    noise, style, heads_weight = torch.randn(N, 1, H, W), torch.randn(N, C), torch.randn(N, 128, C)
    styling = (z, style, noise, torch.tensor(0.3), bias, style, False)
    heading = (z, heads_weight, torch.randn(128), noise, noise, torch.randn(2))
    weight4 = random(4, C, 3, 3, dtype=torch.float32)
    calls: Sequence[tuple[Any, tuple[Any, ...]]] = [
        (fused_ops._blur, (z, 1, 4.0)),
        (fused_ops._blur_activated, (z, bias, 2, SCALE, BIAS_GAIN)),
        (fused_ops._blur_linearized, (z, z, bias, 2, SCALE, BIAS_GAIN)),
        (fused_ops._blur_adjoint, (random(N, C, H + 1, W + 1, dtype=torch.bfloat16), z, bias, 2, SCALE, BIAS_GAIN)),
        (fused_ops._block_output, (z, bias, z, SCALE, SKIP_SCALE, BIAS_GAIN, True)),
        (fused_ops._block_output_linearized, (z, None, z, bias, SCALE, SKIP_SCALE, BIAS_GAIN, False)),
        (fused_ops._block_output_adjoint, (grad, half, z, bias, SCALE, SKIP_SCALE, BIAS_GAIN, True)),
        (fused_ops._rgb_output, (image, weight, bias, SCALE, BIAS_GAIN, True, torch.bfloat16)),
        (fused_ops._rgb_output_linearized, (image, image, weight, bias, SCALE, BIAS_GAIN, True, torch.bfloat16)),
        (fused_ops._rgb_output_adjoint, (grad, half, image, image, weight, bias, SCALE, BIAS_GAIN)),
        (fused_ops._styled, styling),
        (fused_ops._styled_adjoint, (z, *styling)),
        (fused_ops._heads, heading),
        (fused_ops._heads_adjoint, (image, torch.randn(N, 2, H, W), *heading)),
        (fused_ops._demodulation, (style, weight4, SCALE, BIAS_GAIN)),
        (
            fused_ops._demodulation_adjoint,
            (torch.randn(N, 4), torch.rand(N, 4), torch.rand(4, C), style, weight4, SCALE, BIAS_GAIN),
        ),
        (fused_ops._normal, (torch.tensor([1, 2]), 5)),
    ]
    operators = {x for x in vars(fused_ops).values() if isinstance(x, torch.library.CustomOpDef)}
    assert operators == {operator for operator, _ in calls}
    for operator, arguments in calls:
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


# Derivatives


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_first_and_second_derivatives_are_those_of_finite_differences(name: str) -> None:
    function, shapes = DIFFERENTIABLE[name]
    inputs = [off_zero(*shape).requires_grad_() for shape in shapes]
    assert gradcheck(function, inputs, atol=1e-6)
    assert gradgradcheck(function, inputs, atol=1e-6)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_any_memory_format_gives_the_same(name: str) -> None:
    function, shapes = DIFFERENTIABLE[name]
    inputs = [off_zero(*shape) for shape in shapes]
    transposed = [x.mT.contiguous().mT if x.ndim == 4 else x for x in inputs]

    def run(function: Callable[..., Any], inputs: Sequence[Tensor]) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in inputs]
        out = function(*leaves)
        outs = [out] if isinstance(out, Tensor) else list(out)
        first = torch.autograd.grad([x.sin().sum() for x in outs], leaves, create_graph=True)
        return [*outs, *first, *torch.autograd.grad([x.sin().sum() for x in first], leaves)]

    torch.testing.assert_close(run(function, transposed), run(function, inputs), rtol=1e-10, atol=1e-10)
