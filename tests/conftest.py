"""What the tests share: small networks whose every parameter matters, and repeatable numbers."""

import os
from typing import TypeVar

# Before torch is loaded: the workers of pytest-xdist share the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch
from torch import Tensor, nn

if not torch.cuda.is_available():  # Triton reads it when it is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

from models.discriminator import Discriminator
from models.generator import FurryGenerator
from models.widths import Widths

# Containers often set this. The tests start hundreds of processes, and each would compile all modules again, which is
# half of the suite's time.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

RESOLUTION = 32
# 24 channels up to 16 px and 16 at 32 px: widths change between layers, the background's are 6 and 4.
WIDTHS = Widths(channel_base=512, channel_max=24)


Module = TypeVar("Module", bound=nn.Module)


def lived_in(module: Module) -> Module:
    """Move every parameter off its start: a bias or noise strength of 0 would hide an error in its use."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return module


def gradients(loss: Tensor, module: nn.Module) -> dict[str, Tensor]:
    """Gradient of every parameter, zero where the loss does not reach."""
    names, parameters = zip(*module.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters, materialize_grads=True), strict=True))


def assert_gradients_agree(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Each within 0.1% of its norm; float32 sums over pixels partly cancel."""
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (actual[name] - gradient).norm() <= 1e-3 * gradient.norm() + 1e-7, name


@pytest.fixture(autouse=True)
def _repeatable() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)  # small tensors: more threads would only wait for one another


@pytest.fixture
def generator() -> FurryGenerator:
    return lived_in(FurryGenerator(RESOLUTION, WIDTHS))


@pytest.fixture
def discriminator() -> Discriminator:
    return lived_in(Discriminator(RESOLUTION, WIDTHS))
