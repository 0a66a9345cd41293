"""How a training step would scale over many GPUs: a model on paper, from counted work and assumed rates.

Counted are FLOPs, bytes and operators of the networks as they are, without computing them (torch's fake tensors), and
the bytes of their gradients. Assumed are the rates of `Cluster`. Each operator takes what its arithmetic, its traffic
with memory or its launch takes, whichever is longest (a roofline); gradients are reduced in buckets behind the backward
pass. Nothing of this was measured on a GPU. Needs torch alone.
"""

import contextlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from models import ops
from pipeline.architecture import make_discriminator, make_generator
from pipeline.config import Config
from pipeline.costs import Counter
from pipeline.phases import Networks, Phase, Step, training_phases
from pipeline.randomness import Draw

COUNTED_AT = (8, 16)
"""Batches of a rank that are counted; an operator's work is a straight line in the batch. At 4, where there is but one
minibatch-stddev group, a few copies are not made."""

UPDATE_BYTES = 36
"""Memory traffic of a parameter's update: the gradient read for its norm and cleared, Adam reading 4 and writing 3."""

EMA_BYTES = 12
"""Of a parameter of G, for its average."""


@dataclass(frozen=True)
class Cluster:
    """What is assumed of the machines; by default nodes of eight H100 (SXM), one InfiniBand adapter each.

    Attributes:
        gpus_per_node: GPUs in a node.
        bf16_flop_per_s: of convolutions in bfloat16: 40 % of the peak of 989e12.
        tf32_flop_per_s: of R1's convolutions, float32 in TF32: 40 % of the peak of 495e12.
        memory_bytes_per_s: 70 % of 3.35e12.
        launch_s: least time of an operator, which the host launches one by one.
        nvlink_bytes_per_s: of a GPU in a node, in each direction: 80 % of 450e9.
        adapters: InfiniBand adapters of a node.
        adapter_bytes_per_s: of each of them, in each direction: 90 % of 400 Gb/s.
        latency_s: of a hop of a reduction.
        bucket_bytes: gradients reduced at a time; DDP's default.
        gradient_bytes: of an element of a gradient on its way.
    """

    gpus_per_node: int = 8
    bf16_flop_per_s: float = 0.4 * 989e12
    tf32_flop_per_s: float = 0.4 * 495e12
    memory_bytes_per_s: float = 0.7 * 3.35e12
    launch_s: float = 5e-6
    nvlink_bytes_per_s: float = 0.8 * 450e9
    adapters: int = 1
    adapter_bytes_per_s: float = 0.9 * 400e9 / 8
    latency_s: float = 5e-6
    bucket_bytes: int = 25 * 2**20
    gradient_bytes: int = 4

    def all_reduce_s(self, num_bytes: float, num_gpus: int) -> float:
        """Time of summing `num_bytes` over GPUs: rings inside the nodes, a ring between them, hops as in a tree."""
        if num_gpus == 1:
            return 0.0
        local, nodes = min(num_gpus, self.gpus_per_node), math.ceil(num_gpus / self.gpus_per_node)
        inside = ring_bytes(num_bytes, local) / self.nvlink_bytes_per_s
        between = ring_bytes(num_bytes, nodes) / (self.adapters * self.adapter_bytes_per_s)
        return inside + between + 2 * math.ceil(math.log2(num_gpus)) * self.latency_s


def ring_bytes(num_bytes: float, num: int) -> float:
    """What each of `num` participants sends in a ring all-reduce of `num_bytes`."""
    return 2 * (num - 1) / num * num_bytes


class _Operators(Counter):
    """Counts operator by operator."""

    def __init__(self) -> None:
        super().__init__()
        self.work: list[tuple[int, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        flops, bytes_moved = self.flops, self.bytes_moved
        out = super().__torch_dispatch__(func, types, args, kwargs)
        # No view; and no question about a tensor, which fakes are asked and kernels are not.
        if func.namespace in ("aten", "furrygan") and self.bytes_moved > bytes_moved:
            self.work.append((self.flops - flops, self.bytes_moved - bytes_moved))
        return out


@dataclass(frozen=True, eq=False)
class PhaseWork:
    """What a rank computes in a phase.

    Attributes:
        name: of the phase.
        interval: iterations between its steps.
        second_order: whether it is computed in float32.
        num_forward: operators before the backward pass.
        fixed: ``[operators, 2]`` FLOPs and bytes of each that do not depend on the batch; float64.
        per_image: ``[operators, 2]``, those of each image of the rank's batch.
        num_parameters: that it trains.
        num_small_reductions: of a few numbers, which the host waits for one by one.
    """

    name: str
    interval: int
    second_order: bool
    num_forward: int
    fixed: Tensor
    per_image: Tensor
    num_parameters: int
    num_small_reductions: int

    @property
    def flops_per_image(self) -> float:
        """Of a step."""
        return float(self.per_image[:, 0].sum())

    def compute_s(self, batch: int, cluster: Cluster) -> tuple[float, float]:
        """Seconds of the forward pass and of the backward pass with its update, of `batch` images on a GPU."""
        rate = cluster.tf32_flop_per_s if self.second_order else cluster.bf16_flop_per_s
        flops, num_bytes = (self.fixed + batch * self.per_image).unbind(dim=1)
        seconds = torch.maximum(flops / rate, num_bytes / cluster.memory_bytes_per_s).clamp(min=cluster.launch_s)
        update = self.num_parameters * UPDATE_BYTES / cluster.memory_bytes_per_s
        return float(seconds[: self.num_forward].sum()), float(seconds[self.num_forward :].sum()) + update

    def reduction_s(self, batch: int, num_gpus: int, cluster: Cluster) -> tuple[float, float]:
        """Seconds of reducing the gradients, and the part of them that the backward pass cannot hide."""
        num_bytes = self.num_parameters * cluster.gradient_bytes
        num_buckets = math.ceil(num_bytes / cluster.bucket_bytes)
        bucket_s = cluster.all_reduce_s(num_bytes / num_buckets, num_gpus)
        small_s = self.num_small_reductions * cluster.all_reduce_s(4.0, num_gpus)
        _, backward_s = self.compute_s(batch, cluster)
        # A bucket is ready when its gradients are: the last one when nothing is left to hide it.
        hidden = min(bucket_s, backward_s / num_buckets) * (num_buckets - 1)
        return num_buckets * bucket_s + small_s, num_buckets * bucket_s - hidden + small_s


@dataclass(frozen=True)
class Iteration:
    """The mean iteration on some GPUs.

    Attributes:
        images: of the global batch.
        compute_s: computing.
        reduction_s: reducing gradients.
        exposed_s: the part of it for which the GPUs wait.
    """

    images: int
    compute_s: float
    reduction_s: float
    exposed_s: float

    @property
    def seconds(self) -> float:
        """In all."""
        return self.compute_s + self.exposed_s

    @property
    def img_per_s(self) -> float:
        """Real images a second."""
        return self.images / self.seconds


def iteration(phases: Iterable[PhaseWork], batch: int, num_gpus: int, cluster: Cluster) -> Iteration:
    """Predict an iteration with `batch` images on each of `num_gpus`."""
    compute_s = reduction_s = exposed_s = 0.0
    for phase in phases:
        reducing, exposed = phase.reduction_s(batch, num_gpus, cluster)
        compute_s += sum(phase.compute_s(batch, cluster)) / phase.interval
        reduction_s += reducing / phase.interval
        exposed_s += exposed / phase.interval
        if phase.name == "g_main":
            compute_s += phase.num_parameters * EMA_BYTES / cluster.memory_bytes_per_s
    return Iteration(batch * num_gpus, compute_s, reduction_s, exposed_s)


def count(config: Config) -> list[PhaseWork]:
    """Count what the phases of a configuration do, without doing it; half precision where training has it on a GPU."""
    generator, discriminator = make_generator(config), make_discriminator(config)
    networks = Networks(generator, discriminator, generator, discriminator)
    counted = []
    for phase in training_phases(config.loss):
        trained = getattr(networks, phase.trains)
        generator.requires_grad_(phase.trains == "generator")
        discriminator.requires_grad_(phase.trains == "discriminator")
        few, many = (_work(phase, networks, trained, config, batch) for batch in COUNTED_AT)
        assert few[0] == many[0] and few[1].shape == many[1].shape, "the batch changes which operators run"
        per_image = (many[1] - few[1]) / (COUNTED_AT[1] - COUNTED_AT[0])
        counted.append(
            PhaseWork(
                name=phase.name,
                interval=phase.interval,
                second_order=phase.second_order,
                num_forward=few[0],
                fixed=few[1] - COUNTED_AT[0] * per_image,
                per_image=per_image,
                num_parameters=sum(p.numel() for p in trained.parameters()),
                num_small_reductions=num_small_reductions(phase, config),
            )
        )
    return counted


def num_small_reductions(phase: Phase, config: Config) -> int:
    """Beside the gradients', of a step: the means of w, and those of the hinge on the global batch, there and back."""
    if phase.trains != "generator":
        return 0
    return 4 if config.loss.area_over_batch else 2


@contextlib.contextmanager
def _own_constants() -> Iterator[None]:
    """The filters that `models.ops` makes once are neither counted in one run alone, nor left behind as fakes."""
    ops._binomial_filter.cache_clear()
    try:
        yield
    finally:
        ops._binomial_filter.cache_clear()


def _work(phase: Phase, networks: Networks, trained: nn.Module, config: Config, batch: int) -> tuple[int, Tensor]:
    """Operators of the forward pass, and FLOPs and bytes of all, ``[operators, 2]``."""
    generator = networks.generator
    with _own_constants(), FakeTensorMode(allow_non_fake_inputs=True):
        images = torch.empty(batch, 3, config.resolution, config.resolution)
        draw = None
        if phase.stream is not None:
            draw = Draw(torch.empty(batch, generator.z_dim), torch.empty(batch, generator.num_noise))
        with _Operators() as operators:
            # At iteration 0 every term is due.
            step = Step(networks, replace(config.loss, consistency_start=0), 0, images, draw)
            with torch.autocast("cpu", torch.bfloat16, enabled=not phase.second_order):
                result = phase.compute(step)
            num_forward = len(operators.work)
            torch.autograd.grad(result.loss, list(trained.parameters()))
    return num_forward, torch.tensor(operators.work, dtype=torch.float64)
