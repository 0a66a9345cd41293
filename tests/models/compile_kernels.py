"""Compiles each Triton kernel for an H100 as its launch would, without a GPU, and prints its name.

python tests/models/compile_kernels.py
"""

from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from models import launch

TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int64: "*i64"}
H100 = GPUTarget("cuda", 90, 32)


def compile_instead(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **keywords: Any) -> None:
    """In the place of `JITFunction.run`."""
    names = [parameter.name for parameter in kernel.params]
    given = dict(zip(names, arguments, strict=False)) | {k: v for k, v in keywords.items() if k in names}
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    aligned: dict[tuple[int], Any] = {}
    for i, parameter in enumerate(kernel.params):
        value = given[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = getattr(value, "value", value)
        elif isinstance(value, Tensor):
            signature[parameter.name] = TYPES[value.dtype]
            aligned[i,] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "i32" if isinstance(value, int) else "fp32"
            if isinstance(value, int) and value % 16 == 0 and not parameter.do_not_specialize:
                aligned[i,] = [["tt.divisibility", 16]]
    options = {key: value for key, value in keywords.items() if key not in names}
    triton.compile(ASTSource(kernel, signature, constants, aligned), target=H100, options=options)
    print(kernel.__name__)


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(*shape).to(dtype)
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x


def launch_all(dtype: torch.dtype, c: int) -> None:
    n, h, w = 2, 8, 8
    z, bias, image = random(n, c, h, w, dtype=dtype), random(c), random(n, 3, h, w)
    grad, half = random(n, c, h + 2, w + 2, dtype=dtype), random(n, c, h // 2, w // 2, dtype=dtype)
    launch.blur(z, 2, 4.0)
    launch.blur_activated(z, bias, 2, 0.5, 1.4)
    launch.blur_linearized(z, z, bias, 2, 0.5, 1.4)
    launch.blur_adjoint(random(n, c, h + 1, w + 1, dtype=dtype), z, bias, 2, 0.5, 1.4)
    for skip in (None, z):
        launch.block_output(z, bias, skip, 0.5, 0.7, 1.4, True)
        launch.block_output_linearized(z, skip, z, bias, 0.5, 0.7, 1.4, True)
        launch.block_output_adjoint(grad, half, z, bias, 0.5, 0.7, 1.4, skip is not None)
    launch.rgb_output(image, random(c, 3), bias, 0.5, 1.4, True, dtype)
    launch.rgb_output_linearized(image, image, random(c, 3), bias, 0.5, 1.4, True, dtype)
    launch.rgb_output_adjoint(grad, half, image, image, random(c, 3), bias, 0.5, 1.4)
    for blurred in (False, True):
        size = h - blurred
        others = z, random(n, c), random(n, 1, size, size), torch.tensor(0.3), bias, random(n, c), blurred
        launch.styled(*others)
        launch.styled_adjoint(random(n, c, size, size, dtype=dtype), *others)
    maps = random(n, 1, h, w), random(n, 1, h, w)
    launch.heads(z, random(n, 128, c), random(128), *maps, random(2))
    launch.heads_adjoint(image, random(n, 2, h, w), z, random(n, 128, c), random(128), *maps, random(2))
    style, weight = random(n, c), random(8, c, 3, 3)
    out, power = launch.demodulation(style, weight, 0.1, 1.4)
    launch.demodulation_adjoint(out, out, power, style, weight, 0.1, 1.4)
    launch.normal(torch.tensor([1, 2]), 1000)


if __name__ == "__main__":
    JITFunction.run = compile_instead
    launch_all(torch.bfloat16, 64)
    launch_all(torch.float32, 12)
