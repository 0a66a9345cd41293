"""Each Triton kernel computes its operator's plain form, in both derivatives, and compiles for an H100.

Without a GPU the kernels run in Triton's interpreter (`conftest.py`), with small blocks: it takes a millisecond an
instruction. `test_fused_ops.py` compares the plain forms with closed forms.
"""

import importlib
import importlib.util
import inspect
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from differentiable import BIAS_GAIN, DIFFERENTIABLE, SCALE, SKIP_SCALE, off_zero
from helpers import PIPES
from numpy.typing import NDArray
from torch import Tensor

from models import fused_ops

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
# Odd sides and one channel; several blocks of channels, of pixels and of rows, the last of each not full.
SHAPES = pytest.mark.parametrize("shape", [(2, 1, 5, 3), (1, 33, 4, 5)], ids=str)
Launch = Any


@pytest.fixture
def launch(monkeypatch: pytest.MonkeyPatch) -> Launch:
    """The module `models.launch`."""
    module = importlib.import_module("models.launch")
    if not ON_GPU:
        blocks = {"ROWS": 3, "BLOCK_ELEMENTS": 128, "HEADS_PIXELS": 8, "HEADS_CHANNELS": 16, "HEADS_TILES": 2}
        for name, value in blocks.items():
            monkeypatch.setattr(module, name, value)
    return module


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(*shape).to(dtype)
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x


def check(launch: Launch, name: str, *arguments: Any, accuracy: float = 1e-5) -> None:
    """The kernel's results are the plain form's. Sums of float32 have an order of their own: hence `accuracy`."""
    expected = getattr(fused_ops, f"_{name}")(*arguments)
    on_device = [x.to(DEVICE) if isinstance(x, Tensor) else x for x in arguments]
    actual = getattr(launch, name)(*on_device)
    pairs = zip(*((x,) if isinstance(x, Tensor) else x for x in (actual, expected)), strict=True)
    for found, wanted in pairs:
        assert found.shape == wanted.shape and found.dtype == wanted.dtype
        # Rounding to bfloat16 is once, to 8 bits; what reads such a result (a block's half) may find a neighbour.
        tolerance = 2**-6 if found.dtype == torch.bfloat16 else accuracy
        scale = max(1.0, float(wanted.abs().max())) if wanted.numel() else 1.0
        torch.testing.assert_close(found.double().cpu(), wanted.double(), rtol=tolerance, atol=tolerance * scale)


@DTYPES
@SHAPES
def test_blurs_of_activations(launch: Launch, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    n, c, h, w = shape
    z, x, bias = random(*shape, dtype=dtype), random(*shape, dtype=dtype), random(c)
    for padding in (1, 2):
        check(launch, "blur", x, padding, 4.0)
    check(launch, "blur_activated", z, bias, 2, SCALE, BIAS_GAIN)
    check(launch, "blur_linearized", x, z, bias, 2, SCALE, BIAS_GAIN)
    check(launch, "blur_adjoint", random(n, c, h + 1, w + 1, dtype=dtype), z, bias, 2, SCALE, BIAS_GAIN)


@DTYPES
@pytest.mark.parametrize("down", [True, False])
@SHAPES
def test_output_of_a_residual_block(launch: Launch, shape: tuple[int, ...], down: bool, dtype: torch.dtype) -> None:
    n, c, h, w = shape
    z, x, bias = random(*shape, dtype=dtype), random(*shape, dtype=dtype), random(c)
    grad = random(n, c, h + 2, w + 2, dtype=dtype)
    grad_down = random(n, c, (h - 2) // 2 + 1, (w - 2) // 2 + 1, dtype=dtype) if down else None
    for skip in (None, random(*shape, dtype=dtype)):
        check(launch, "block_output", z, bias, skip, SCALE, SKIP_SCALE, BIAS_GAIN, down)
        check(launch, "block_output_linearized", x, skip, z, bias, SCALE, SKIP_SCALE, BIAS_GAIN, down)
        check(launch, "block_output_adjoint", grad, grad_down, z, bias, SCALE, SKIP_SCALE, BIAS_GAIN, skip is not None)


@DTYPES
@pytest.mark.parametrize("down", [True, False])
@SHAPES
def test_output_of_the_first_layer(launch: Launch, shape: tuple[int, ...], down: bool, dtype: torch.dtype) -> None:
    n, c, h, w = shape
    image, x, weight, bias = random(n, 3, h, w), random(n, 3, h, w), random(c, 3), random(c)
    check(launch, "rgb_output", image, weight, bias, SCALE, BIAS_GAIN, down, dtype)
    check(launch, "rgb_output_linearized", x, image, weight, bias, SCALE, BIAS_GAIN, down, dtype)
    grad = random(n, c, h + 2, w + 2, dtype=dtype)
    grad_down = random(n, c, (h - 2) // 2 + 1, (w - 2) // 2 + 1, dtype=dtype) if down else None
    check(launch, "rgb_output_adjoint", grad, grad_down, image, x, weight, bias, SCALE, BIAS_GAIN)


@DTYPES
@pytest.mark.parametrize("blurred", [True, False])
@SHAPES
def test_output_of_a_styled_convolution(
    launch: Launch, shape: tuple[int, ...], blurred: bool, dtype: torch.dtype
) -> None:
    n, c, h, w = shape
    height, width = h - blurred, w - blurred
    z, bias, demodulation = random(*shape, dtype=dtype), random(c), torch.rand(n, c) + 0.5
    noise = random(n, 3 + height * width)[:, 3:].view(n, 1, height, width)  # as `noise_maps` gives it
    strength, grad = torch.tensor(0.3), random(n, c, height, width, dtype=dtype)
    for style in (None, random(n, c)):
        others = (z, demodulation, noise, strength, bias, style, blurred)
        check(launch, "styled", *others)
        check(launch, "styled_adjoint", grad, *others)


@DTYPES
@SHAPES
def test_rgb_and_masks(launch: Launch, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    n, c, h, w = shape
    rows = fused_ops.NUM_HEAD_GROUPS * fused_ops.HEAD_ROWS
    # Values that bfloat16 holds: products on tensor cores are of bfloat16.
    features, weight = random(*shape, dtype=dtype), torch.randn(n, rows, c).bfloat16().float()
    weight[:, 3:32] = weight[:, 96:] = 0.0
    coarse, fine, strengths = random(n, 1, h, w), random(n, 1, h, w), torch.tensor([0.3, 0.5])
    others = features, weight, torch.randn(rows), coarse, fine, strengths
    # Beside activations of bfloat16, float32 numbers are split into two of bfloat16: 16 bits.
    accuracy = 2**-14 if dtype == torch.bfloat16 else 1e-5
    check(launch, "heads", *others, accuracy=accuracy)
    check(launch, "heads_adjoint", random(n, 3, h, w), torch.randn(n, 2, h, w), *others, accuracy=accuracy)


@pytest.mark.parametrize(("samples", "num_out", "num_in", "size"), [(3, 4, 70, 3), (1, 1, 1, 1)])
def test_demodulation(launch: Launch, samples: int, num_out: int, num_in: int, size: int) -> None:
    style, weight = random(samples, num_in), random(num_out, num_in, size, size)
    check(launch, "demodulation", style, weight, SCALE, BIAS_GAIN)
    out, power = fused_ops._demodulation(style, weight, SCALE, BIAS_GAIN)
    check(launch, "demodulation_adjoint", random(samples, num_out), out, power, style, weight, SCALE, BIAS_GAIN)


# Derivatives

KERNELS = [name for name in DIFFERENTIABLE if "convolution" not in name]


def with_derivatives(function: Callable[..., Any], inputs: Sequence[Tensor]) -> list[Tensor]:
    """Results, the gradient of a function of them, and the gradient of a function of that."""
    leaves = [x.detach().to(DEVICE).requires_grad_() for x in inputs]
    out = function(*leaves)
    outs = [out] if isinstance(out, Tensor) else list(out)
    first = torch.autograd.grad([x.sin().sum() for x in outs], leaves, create_graph=True)
    return [x.cpu() for x in [*outs, *first, *torch.autograd.grad([x.sin().sum() for x in first], leaves)]]


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_have_both_derivatives_of_the_plain_form_in_any_memory_format(
    name: str, launch: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64, where `test_fused_ops.py` compares those of the plain form with finite differences.

    Triton passes the scales as float32. The products of `heads` are of float32 at most.
    """
    function, shapes = DIFFERENTIABLE[name]
    dtype, tolerance = (torch.float32, 1e-4) if name == "heads" else (torch.float64, 1e-6)
    inputs = [off_zero(*shape).to(dtype) for shape in shapes]
    expected = with_derivatives(function, inputs)
    use_kernels(launch, monkeypatch)
    transposed = [x.mT.contiguous().mT if x.ndim == 4 else x for x in inputs]
    actual = with_derivatives(function, transposed)
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def use_kernels(launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the operators launch their kernels, as they do on a GPU."""
    for name, operator in vars(fused_ops).items():
        if isinstance(operator, torch.library.CustomOpDef):
            monkeypatch.setattr(fused_ops, name, getattr(launch, name.removeprefix("_")))


# Random numbers


def philox(seed: int, counter: NDArray[np.uint64]) -> list[NDArray[np.uint64]]:
    """Philox-4x32-10 (Salmon et al. 2011): four words of 32 bits a counter."""
    words = [counter, np.zeros_like(counter), np.zeros_like(counter), np.zeros_like(counter)]
    low, high, mask = np.uint64(seed & 0xFFFFFFFF), np.uint64(seed >> 32), np.uint64(0xFFFFFFFF)
    for _ in range(10):
        first, second = words[0] * np.uint64(0xD2511F53), words[2] * np.uint64(0xCD9E8D57)
        words = [
            (second >> np.uint64(32)) ^ words[1] ^ low,
            second & mask,
            (first >> np.uint64(32)) ^ words[3] ^ high,
            first & mask,
        ]
        low, high = (low + np.uint64(0x9E3779B9)) & mask, (high + np.uint64(0xBB67AE85)) & mask
    return words


def uniform(word: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Triton's: the magnitude of a signed word over 2^31."""
    signed = word.astype(np.uint32).view(np.int32)
    return np.where(signed < 0, -signed.astype(np.int64) - 1, signed) * 4.6566127342e-10


def test_normal_numbers_are_philox_and_box_muller_by_seed(launch: Launch) -> None:
    seeds, num = [5, 2**62 + 12345], 1537
    rows = launch.normal(torch.tensor(seeds, device=DEVICE), num).cpu().double().numpy()
    for seed, row in zip(seeds, rows, strict=True):
        a, b, c, d = (uniform(word) for word in philox(seed, np.arange(num // 4 + 1, dtype=np.uint64)))
        expected = []
        for one, other in ((a, b), (c, d)):
            radius, angle = np.sqrt(-2.0 * np.log(np.maximum(one, 1e-7))), 2.0 * np.pi * other
            expected += [radius * np.cos(angle), radius * np.sin(angle)]
        np.testing.assert_allclose(row, np.stack(expected, axis=1).ravel()[:num], atol=2e-5)
    again = launch.normal(torch.tensor(seeds[::-1], device=DEVICE), num).cpu().double().numpy()
    np.testing.assert_array_equal(again[::-1], rows)  # a row is a function of its own seed
    assert abs(rows.mean()) < 0.1 and abs(rows.std() - 1.0) < 0.1


# Compilation


def test_every_kernel_compiles_for_an_h100(tmp_path: Path) -> None:
    """Ahead of time, with the arguments of real launches; what the interpreter lets pass and a compiler does not."""
    script = Path(__file__).parent / "compile_kernels.py"
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run([sys.executable, str(script)], env=environment, timeout=500, **PIPES)
    assert done.returncode == 0, done.stderr
    kernels = {
        line.split("(")[0].removeprefix("def ")
        for line in inspect.getsource(importlib.import_module("models.kernels")).splitlines()
        if line.startswith("def ") and not line.startswith("def _")
    }
    assert set(done.stdout.split()) == kernels
