"""The layers are those of StyleGAN2: equal to per-sample and loop readings, and of unit scale at the start."""

from collections.abc import Callable

import pytest
import reference
import torch
from conftest import RESOLUTION, lived_in
from torch import nn

from models.generator import FurryGenerator
from models.layers import EqualizedConv2d, EqualizedLinear, ModulatedConv2d
from models.ops import minibatch_stddev
from models.widths import Widths

B, HALF = 8, 4
# float32 networks against a float64 reference; images and masks are of unit scale.
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.mark.parametrize("upsample", [False, True])
@pytest.mark.parametrize("demodulate", [False, True])
@pytest.mark.parametrize(("in_channels", "out_channels"), [(3, 4), (4, 3)])
def test_modulated_conv_equals_weights_modulated_for_each_sample(
    upsample: bool, demodulate: bool, in_channels: int, out_channels: int
) -> None:
    layer = lived_in(ModulatedConv2d(in_channels, out_channels, 3, 5, demodulate=demodulate, upsample=upsample))
    x, w = torch.randn(3, in_channels, 4, 6), torch.randn(3, 5)
    style = w @ layer.modulation.weight.T / 5**0.5 + layer.modulation.bias
    weight = layer.weight / (9 * in_channels) ** 0.5
    alone = [
        reference.modulated_conv2d(x[i : i + 1], weight, style[i : i + 1], demodulate=demodulate, upsample=upsample)
        for i in range(3)
    ]
    torch.testing.assert_close(layer(x, w), torch.cat(alone), rtol=1e-4, atol=1e-5)


def test_demodulation_undoes_the_scale_of_a_style() -> None:
    layer = ModulatedConv2d(8, 4, 1, 5)
    nn.init.zeros_(layer.modulation.weight)
    x, w = torch.randn(2, 8, 4, 4), torch.randn(2, 5)
    before = layer(x, w)
    nn.init.constant_(layer.modulation.bias, 7.0)
    torch.testing.assert_close(layer(x, w), before, rtol=1e-4, atol=1e-5)


def _unit_input_layers() -> dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], float]]:
    # Leaky ReLU with gain sqrt(2) of a unit normal has the second moment 2 (1 + 0.2^2) / 2 = 1.04.
    return {
        "linear": (lambda: EqualizedLinear(256, 256), (64, 256), 1.0),
        "slow linear": (lambda: EqualizedLinear(256, 256, lr_multiplier=0.01), (64, 256), 1.0),
        "activated linear": (lambda: EqualizedLinear(256, 256, activate=True), (64, 256), 1.04),
        "slow activated linear": (
            lambda: EqualizedLinear(256, 256, lr_multiplier=0.01, activate=True),
            (64, 256),
            1.04,
        ),
        "linear 1x1": (lambda: EqualizedConv2d(64, 64, 1, activate=False), (8, 64, 16, 16), 1.0),
        "linear 3x3": (lambda: EqualizedConv2d(64, 64, 3, activate=False), (8, 64, 16, 16), 1.0),
        "activated 3x3": (lambda: EqualizedConv2d(64, 64, 3), (8, 64, 16, 16), 1.04),
    }


@pytest.mark.parametrize("name", _unit_input_layers())
def test_layers_start_with_unit_second_moment(name: str) -> None:
    make, shape, expected = _unit_input_layers()[name]
    # At least 16,000 outputs of at least 64 channels: 10% is more than four standard errors.
    assert make()(torch.randn(shape)).square().mean().item() == pytest.approx(expected, rel=0.1)


def test_modulated_conv_starts_with_unit_variance() -> None:
    x, w = torch.randn(8, 64, 18, 18), torch.randn(8, 32)
    inner = ModulatedConv2d(64, 64, 3, 32)(x, w)[:, :, 1:-1, 1:-1]
    assert inner.var().item() == pytest.approx(1.0, rel=0.1)


@pytest.mark.parametrize(
    ("lr_multiplier", "activate"), [(1.0, False), (1.0, True), (0.01, False), (0.01, True)], ids=str
)
def test_equalized_linear_scales_weight_and_bias(lr_multiplier: float, activate: bool) -> None:
    layer = lived_in(EqualizedLinear(5, 3, lr_multiplier=lr_multiplier, activate=activate))
    x = torch.randn(7, 5)
    expected = (x @ layer.weight.T / 5**0.5 + layer.bias) * lr_multiplier
    if activate:
        expected = torch.where(expected > 0, expected, 0.2 * expected) * 2**0.5
    torch.testing.assert_close(layer(x), expected)


def test_parameters_start_as_specified() -> None:
    fresh = FurryGenerator(RESOLUTION, Widths(4096, 128))
    for name, parameter in fresh.named_parameters():
        if name.endswith("modulation.bias"):
            assert (parameter == 1.0).all(), name
        elif name.endswith(("bias", "noise_strength")):
            assert (parameter == 0.0).all(), name
        else:
            scale = 100.0 if name.startswith("mapping") else 1.0
            assert abs(parameter.std().item() / scale - 1.0) < 5.0 / (2 * parameter.numel()) ** 0.5, name


def test_stddev_groups_are_every_fourth_of_the_batch() -> None:
    """Twelve samples make three groups: 0 3 6 9, 1 4 7 10 and 2 5 8 11."""
    x = torch.zeros(12, 1, 2, 2)
    for group, spread in enumerate([1.0, 2.0, 5.0]):
        for member, sign in enumerate([1.0, -1.0, 1.0, -1.0]):
            x[group + 3 * member] = sign * spread  # standard deviation = spread
    y = minibatch_stddev(x)
    assert torch.equal(y[:, :1], x)
    expected = torch.tensor([1.0, 2.0, 5.0]).repeat(4)
    torch.testing.assert_close(y[:, 1], expected[:, None, None].expand(12, 2, 2))


@pytest.mark.parametrize("n", [1, 2, 4, 8, 12])
def test_stddev_equals_the_loop_over_groups(n: int) -> None:
    x = torch.randn(n, 3, 4, 4)
    torch.testing.assert_close(minibatch_stddev(x), reference.minibatch_stddev(x))


def test_stddev_refuses_a_batch_with_a_broken_group() -> None:
    with pytest.raises(ValueError, match="multiple of 4"):
        minibatch_stddev(torch.randn(6, 1, 4, 4))
