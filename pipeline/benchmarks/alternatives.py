"""Benchmark of each operator beside alternative implementations.

python pipeline/benchmarks/alternatives.py                                          # shapes of the default run
python pipeline/benchmarks/alternatives.py --channels 512 --resolution 64 --batch 4
python pipeline/benchmarks/alternatives.py --channels 128 --resolution 256 --batch 16 --device cuda --dtype bfloat16

Prints a table in Markdown: forward, with backward, and with the double backward of R1, in milliseconds, and the
greatest difference from the first line of each group. Needs torch alone.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass

from data_shards.command import run_command

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.utils.benchmark import Timer

from models import ops
from pipeline.benchmarks.variants import load_reference

Operator = Callable[..., Tensor]
TAPS = (1.0, 3.0, 3.0, 1.0)


def blur_by_autograd(x: Tensor) -> Tensor:
    """One depthwise convolution, differentiated by torch."""
    taps = torch.tensor(TAPS, dtype=x.dtype, device=x.device) / 8.0
    return F.conv2d(x, torch.outer(taps, taps).expand(x.shape[1], 1, 4, 4), padding=2, groups=x.shape[1])


def blur_separably(x: Tensor) -> Tensor:
    """Columns, then rows: 8 taps instead of 16, and one more pass."""
    channels, taps = x.shape[1], torch.tensor(TAPS, dtype=x.dtype, device=x.device) / 8.0
    x = F.conv2d(x, taps.view(1, 1, 4, 1).expand(channels, 1, 4, 1), padding=(2, 0), groups=channels)
    return F.conv2d(x, taps.view(1, 1, 1, 4).expand(channels, 1, 1, 4), padding=(0, 2), groups=channels)


def blur_by_pooling(x: Tensor) -> Tensor:
    """[1, 3, 3, 1] is [1, 1] three times over."""
    for padding in (1, 1, 0):
        x = F.avg_pool2d(x, 2, stride=1, padding=padding)
    return x


def blur(x: Tensor) -> Tensor:
    """As it is."""
    return ops.blur(x, padding=2)


def upsample_plainly(x: Tensor, weight: Tensor) -> Tensor:
    """Zeros inserted, convolution at the full size, blur."""
    batch, channels, height, width = x.shape
    x = F.pad(x.reshape(batch, channels, height, 1, width, 1), [0, 1, 0, 0, 0, 1])
    x = x.reshape(batch, channels, 2 * height, 2 * width)[:, :, :-1, :-1]
    return ops.blur(F.conv2d(x, weight.flip(2, 3), padding=2), padding=1, gain=4.0)


def upsample_by_phases(x: Tensor, weight: Tensor) -> Tensor:
    """Convolution and blur as one 6x6 kernel, split into the four 3x3 kernels of the output's phases."""
    taps = torch.tensor(TAPS, dtype=x.dtype, device=x.device) / 4.0
    out_channels, in_channels = weight.shape[:2]
    planes = weight.reshape(-1, 1, 3, 3)
    joint = F.conv2d(planes, torch.outer(taps, taps)[None, None], padding=3).view(out_channels, in_channels, 6, 6)
    # Output 2i + p is the sum over k of joint[2k + p] x[i + 1 - k]; so much for one dimension.
    phases = torch.stack([joint[:, :, p::2, q::2].flip(2, 3) for p in (0, 1) for q in (0, 1)], dim=1)
    y = F.conv2d(x, phases.reshape(-1, in_channels, 3, 3), padding=1)
    return F.pixel_shuffle(y, 2)


def skip_blur_first(x: Tensor, weight: Tensor) -> Tensor:
    """Filter all pixels, then let the stride drop three of four."""
    return F.conv2d(ops.blur(x, padding=1), weight, stride=2)


def activate(x: Tensor, bias: Tensor) -> Tensor:
    """A new tensor at each step."""
    return F.leaky_relu(x * 1.0 + bias, ops.LEAKY_SLOPE)


def activate_in_place(x: Tensor, bias: Tensor) -> Tensor:
    """As it is."""
    return ops.leaky_relu_((x * 1.0).add_(bias))


@dataclass(frozen=True)
class Group:
    """Ways to compute one thing; the first is the plain one, the last the one in use."""

    name: str
    shapes: tuple[tuple[int, ...], ...]
    ways: dict[str, Operator]


def groups(batch: int, channels: int, resolution: int) -> list[Group]:
    """All comparisons, at one size."""
    c, r = channels, resolution
    modulated_conv2d = load_reference().modulated_conv2d

    def modulate_activations(x: Tensor, weight: Tensor, style: Tensor) -> Tensor:
        demodulation = torch.rsqrt(style.square() @ weight.square().sum(dim=(2, 3)).T + 1e-8)
        return F.conv2d(x * style[:, :, None, None], weight, padding=1) * demodulation[:, :, None, None]

    return [
        Group(
            "modulated convolution",
            ((batch, c, r, r), (c, c, 3, 3), (batch, c)),
            {"weights of each sample, grouped": modulated_conv2d, "style on the activations": modulate_activations},
        ),
        Group(
            "upsampling convolution",
            ((batch, c, r // 2, r // 2), (c, c, 3, 3)),
            {
                "zeros, convolution, blur": upsample_plainly,
                "polyphase": upsample_by_phases,
                "transposed convolution, blur": ops.upsample_conv2d,
            },
        ),
        Group(
            "blur",
            ((batch, c, r, r),),
            {
                "depthwise, torch's derivatives": blur_by_autograd,
                "separable": blur_separably,
                "three poolings": blur_by_pooling,
                "depthwise, own derivatives": blur,
            },
        ),
        Group(
            "skip of a residual block",
            ((batch, c, r, r), (c, c, 1, 1)),
            {"blur, strided convolution": skip_blur_first, "strided blur, convolution": ops.downsample_conv2d},
        ),
        Group(
            "bias and leaky ReLU",
            ((batch, c, r, r), (1, c, 1, 1)),
            {"new tensors": activate, "in place": activate_in_place},
        ),
    ]


def time_group(group: Group, device: torch.device, dtype: torch.dtype, min_seconds: float) -> list[str]:
    """Lines of the table."""
    inputs = [torch.randn(shape, device=device).to(dtype) for shape in group.shapes]
    inputs = [x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x for x in inputs]

    def forward(way: Operator) -> None:
        with torch.no_grad():
            way(*inputs)

    def backward(way: Operator) -> None:
        leaves = [x.requires_grad_() for x in inputs]
        torch.autograd.grad(way(*leaves).square().sum(), leaves)

    def double_backward(way: Operator) -> None:
        leaves = [x.requires_grad_() for x in inputs]
        (slope,) = torch.autograd.grad(way(*leaves).square().sum(), leaves[:1], create_graph=True)
        torch.autograd.grad(slope.square().sum(), leaves)

    kinds = (forward, backward, double_backward)
    with torch.no_grad():
        results = [way(*inputs).float() for way in group.ways.values()]
    lines = []
    for (name, way), result in zip(group.ways.items(), results, strict=True):
        timers = [
            Timer("kind(way)", globals={"kind": kind, "way": way}, num_threads=torch.get_num_threads())
            for kind in kinds
        ]
        times = " | ".join(f"{timer.blocked_autorange(min_run_time=min_seconds).median * 1e3:.2f}" for timer in timers)
        difference = (result - results[0]).abs().max() / results[0].abs().max()
        lines.append(f"| {group.name} | {name} | {times} | {float(difference):.0e} |")
    return lines


def main() -> None:
    """Measure as the command line says."""
    parser = argparse.ArgumentParser(description="Time operators beside the other ways to compute them.")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--channels", type=int, default=32)
    parser.add_argument("--resolution", type=int, default=32)
    parser.add_argument("--min-seconds", type=float, default=0.2, help="how long each is timed at least")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    arguments = parser.parse_args()
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    print("| what | how | forward ms | with backward ms | with double backward ms | relative difference |")
    print("| --- | --- | --- | --- | --- | --- |")
    for group in groups(arguments.batch, arguments.channels, arguments.resolution):
        print("\n".join(time_group(group, device, dtype, arguments.min_seconds)), flush=True)


if __name__ == "__main__":
    run_command(main, memory_remedy="give a smaller --batch")
