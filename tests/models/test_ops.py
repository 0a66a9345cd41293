"""Resampling and activation agree with SciPy's filters and differentiate twice."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from numpy.typing import NDArray
from reference import blur_kernel, upfirdn2d
from scipy import signal
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call

from models import ops
from models.layers import ModulatedConv2d

TAPS = np.array([1.0, 3.0, 3.0, 1.0]) / 8.0
# Batch, channels, height, width: odd and even channels, a side that is not the other.
SHAPES = [(1, 1, 4, 4), (2, 3, 6, 8), (3, 4, 10, 4), (2, 5, 8, 8)]


def scipy_blur(x: NDArray[np.float64], padding: int, stride: int = 1, gain: float = 1.0) -> NDArray[np.float64]:
    """One dimension after the other; SciPy pads by 3 of itself, so 3 - padding are cut off."""
    for axis in (2, 3):
        x = signal.upfirdn(TAPS * math.sqrt(gain), x, axis=axis)
        length = x.shape[axis]
        x = x.take(range(3 - padding, length - 3 + padding, stride), axis=axis)
    return x


def scipy_convolve(x: NDArray[np.float64], weight: NDArray[np.float64]) -> NDArray[np.float64]:
    """Full convolution, summed over the input channels one by one."""
    return np.array(
        [[sum(signal.convolve2d(sample[i], out[i], "full") for i in range(len(out))) for out in weight] for sample in x]
    )


def scipy_correlate(x: NDArray[np.float64], weight: NDArray[np.float64]) -> NDArray[np.float64]:
    """The same without padding and without a flip, as layers of networks do."""
    return np.array(
        [
            [sum(signal.correlate2d(sample[i], out[i], "valid") for i in range(len(out))) for out in weight]
            for sample in x
        ]
    )


def double(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def agrees(actual: Tensor, expected: Tensor | NDArray[np.float64]) -> None:
    torch.testing.assert_close(actual, torch.as_tensor(expected), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("padding", "stride", "gain"), [(1, 1, 4.0), (2, 1, 1.0), (1, 2, 1.0), (0, 1, 1.0)])
def test_blur_is_a_separable_filter(shape: tuple[int, ...], padding: int, stride: int, gain: float) -> None:
    x = double(*shape)
    agrees(ops.blur(x, padding=padding, stride=stride, gain=gain), scipy_blur(x.numpy(), padding, stride, gain))


def test_blur_keeps_a_constant_image() -> None:
    agrees(ops.blur(torch.full((1, 2, 6, 6), 0.7, dtype=torch.float64), padding=0), np.full((1, 2, 3, 3), 0.7))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("out_channels", [1, 4])
def test_upsample_conv2d_is_zero_insertion_convolution_blur(shape: tuple[int, ...], out_channels: int) -> None:
    x, weight = double(*shape), double(out_channels, shape[1], 3, 3)
    spread = x.numpy()
    for axis in (2, 3):
        spread = signal.upfirdn([1.0], spread, up=2, axis=axis)
    expected = scipy_blur(scipy_convolve(spread, weight.numpy()), padding=1, gain=4.0)
    assert expected.shape == (shape[0], out_channels, 2 * shape[2], 2 * shape[3])
    agrees(ops.upsample_conv2d(x, weight), expected)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("out_channels", [1, 4])
def test_downsample_conv2d_is_blur_and_strided_convolution(
    shape: tuple[int, ...], size: int, out_channels: int
) -> None:
    x, weight = double(*shape), double(out_channels, shape[1], size, size)
    blurred = scipy_blur(x.numpy(), padding=1 + size // 2)
    expected = scipy_correlate(blurred, weight.numpy())[:, :, ::2, ::2]
    assert expected.shape == (shape[0], out_channels, shape[2] // 2, shape[3] // 2)
    agrees(ops.downsample_conv2d(x, weight), expected)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("up", "down", "padding"), [(1, 1, (0, 0)), (2, 1, (2, 1)), (1, 2, (1, 1)), (3, 2, (4, 2))])
def test_slow_reference_upfirdn2d_agrees_with_scipy(
    shape: tuple[int, ...], up: int, down: int, padding: tuple[int, int]
) -> None:
    x, kernel = double(*shape), torch.outer(double(3), double(3))
    expected = []
    for plane in x.flatten(0, 1).numpy():
        spread = np.zeros((plane.shape[0] * up, plane.shape[1] * up))
        spread[::up, ::up] = plane
        expected.append(signal.convolve2d(np.pad(spread, padding), kernel.numpy(), "valid")[::down, ::down])
    actual = upfirdn2d(x, kernel, up=up, down=down, padding=padding)
    agrees(actual.flatten(0, 1), np.array(expected))
    agrees(blur_kernel(x), np.outer(TAPS, TAPS))


def test_leaky_relu_lets_a_fifth_of_the_negative_through() -> None:
    # The gain of sqrt(2) may sit here or in the layers before: test_models.py holds the layers to it.
    x = torch.tensor([0.0, 1.0, 10.0], dtype=torch.float64)
    agrees(ops.leaky_relu_(-x), -0.2 * ops.leaky_relu_(x.clone()))
    agrees(ops.leaky_relu_(x.clone()), ops.leaky_relu_(torch.ones_like(x)) * x)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_min_max_spans_zero_to_one_in_each_image(scale: float) -> None:
    x = torch.randn(3, 1, 5, 7) * scale
    y = ops.min_max(x)
    assert (y.amin(dim=(1, 2, 3)) == 0.0).all()
    # eps = 1e-10 keeps the top below 1 by at most 1e-10 / range.
    assert (y <= 1.0).all() and (y.amax(dim=(1, 2, 3)) >= 1.0 - 2e-7).all()
    low, high = x[1].min(), x[1].max()
    torch.testing.assert_close(y[1], (x[1] - low) / (high - low))


def test_min_max_of_one_image_ignores_the_others() -> None:
    x = torch.randn(3, 1, 5, 7)
    assert torch.equal(ops.min_max(x)[1:2], ops.min_max(x[1:2]))


def test_min_max_is_float32_whatever_it_is_given() -> None:
    assert ops.min_max(torch.rand(2, 1, 4, 4).bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("level", [0.0, 0.5, 1e4])
def test_min_max_of_a_constant_image_is_zero_with_a_finite_gradient(level: float) -> None:
    x = torch.full((2, 1, 4, 4), level, requires_grad=True)
    y = ops.min_max(x)
    (gradient,) = torch.autograd.grad((y * torch.randn_like(y)).sum(), x)
    assert torch.equal(y, torch.zeros_like(y))
    assert gradient.isfinite().all()


def test_min_max_gradient_is_its_closed_form() -> None:
    x = torch.randn(2, 1, 4, 4, requires_grad=True)
    v = torch.randn_like(x)
    (actual,) = torch.autograd.grad((ops.min_max(x) * v).sum(), x)
    # y = (x - low) / r: every pixel gets v / r; the lowest also -sum(v (1 - y)) / r, the highest -sum(v y) / r.
    with torch.no_grad():
        for image, weights, gradient in zip(x[:, 0], v[:, 0], actual[:, 0], strict=True):
            r = image.max() - image.min()
            y = (image - image.min()) / r
            expected = weights / r
            expected[image == image.min()] -= (weights * (1.0 - y)).sum() / r
            expected[image == image.max()] -= (weights * y).sum() / r
            torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)


def _modulated(demodulate: bool, upsample: bool) -> Callable[..., Tensor]:
    """Modulated convolution as a function of features, w, weight and modulation weight."""
    layer = ModulatedConv2d(2, 3, 3, w_dim=3, demodulate=demodulate, upsample=upsample).double()

    def convolve(x: Tensor, w: Tensor, weight: Tensor, modulation: Tensor) -> Tensor:
        return functional_call(layer, {"weight": weight, "modulation.weight": modulation}, (x, w))

    return convolve


def _leaky_relu_off_zero(x: Tensor) -> Tensor:
    return ops.leaky_relu_(torch.where(x < 0, x - 0.1, x + 0.1))


MODULATED = [(3, 2, 3, 3), (2, 3)]
DIFFERENTIABLE = {
    "blur": (lambda x: ops.blur(x, padding=2, gain=4.0), [(1, 2, 3, 4)]),
    "strided blur": (lambda x: ops.blur(x, padding=1, stride=2), [(1, 2, 4, 4)]),
    "upsample_conv2d": (ops.upsample_conv2d, [(1, 2, 3, 2), (3, 2, 3, 3)]),
    "downsample_conv2d 3x3": (ops.downsample_conv2d, [(1, 2, 4, 4), (2, 2, 3, 3)]),
    "downsample_conv2d 1x1": (ops.downsample_conv2d, [(1, 2, 4, 4), (2, 2, 1, 1)]),
    "modulated": (_modulated(False, False), [(2, 2, 3, 3), (2, 3), *MODULATED]),
    "modulated, upsampling": (_modulated(False, True), [(2, 2, 2, 2), (2, 3), *MODULATED]),
    "leaky_relu": (_leaky_relu_off_zero, [(3, 4)]),
}


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_first_and_second_derivatives_are_those_of_finite_differences(name: str) -> None:
    function, shapes = DIFFERENTIABLE[name]
    inputs = [double(*shape).requires_grad_() for shape in shapes]
    assert gradcheck(function, inputs)
    assert gradgradcheck(function, inputs)


# These calculate in float32 inside, so the differences are coarse and so is the agreement.
COARSELY_DIFFERENTIABLE = {
    "min_max": (ops.min_max, [(1, 1, 3, 3)]),
    "demodulated": (_modulated(True, False), [(1, 2, 3, 3), (1, 3), *MODULATED]),
    "demodulated, upsampling": (_modulated(True, True), [(1, 2, 2, 2), (1, 3), *MODULATED]),
}


@pytest.mark.filterwarnings("ignore:Input #")
@pytest.mark.parametrize("name", COARSELY_DIFFERENTIABLE)
def test_derivatives_of_what_is_float32_inside_are_those_of_finite_differences(name: str) -> None:
    function, shapes = COARSELY_DIFFERENTIABLE[name]
    # Evenly spread values: the extremes stay the extremes while each is moved by eps.
    inputs = [torch.randperm(math.prod(s)).reshape(s).double().div(math.prod(s)).requires_grad_() for s in shapes]
    assert gradcheck(function, inputs, eps=1e-3, atol=2e-3, rtol=2e-3)
    assert gradgradcheck(function, inputs, eps=1e-3, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_memory_format_changes_nothing(name: str) -> None:
    function, shapes = DIFFERENTIABLE[name]
    x, *others = (double(*shape) for shape in shapes)
    if x.ndim != 4:
        x = double(2, 3, 4, 4)
    x_last = x.contiguous(memory_format=torch.channels_last)
    (gradient,) = torch.autograd.grad(function(x.requires_grad_(), *others).square().sum(), x)
    (gradient_last,) = torch.autograd.grad(function(x_last.requires_grad_(), *others).square().sum(), x_last)
    agrees(function(x, *others).detach(), function(x_last, *others).detach())
    agrees(gradient, gradient_last)


def test_upsampling_a_delta_gives_the_hand_made_tent() -> None:
    """A kernel with one entry in the middle: the blur alone, whose 2x upsampling taps are [1, 3, 3, 1] / 4."""
    x = torch.zeros(1, 1, 3, 3, dtype=torch.float64)
    x[0, 0, 1, 1] = 1.0
    weight = F.pad(torch.ones(1, 1, 1, 1, dtype=torch.float64), [1, 1, 1, 1])
    row = np.array([0.0, 1.0, 3.0, 3.0, 1.0, 0.0]) / 4.0
    agrees(ops.upsample_conv2d(x, weight), np.outer(row, row)[None, None])
