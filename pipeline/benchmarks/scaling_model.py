"""A model of training on many GPUs: counted work and measured rates. Needs torch alone.

FLOPs, bytes and operators are counted from the networks as a GPU computes them, without computing them (torch's fake
tensors). The rates in `Cluster` were measured on one H100, but for those of the network and of a kernel's start, which
are assumed. An operator takes what its arithmetic, its traffic with memory or its start takes, whichever is longest (a
roofline). Gradients are reduced after the backward pass, as `pipeline/ranks/all_reduce.py` does.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from models import fused
from pipeline.config import Config
from pipeline.config.architecture import make_discriminator, make_generator
from pipeline.methods.furrygan.phases import Networks, Phase, Step, training_phases
from pipeline.methods.randomness import Draw
from pipeline.training.costs import Operators

COUNTED_AT = (8, 16)
"""Batches of a rank that are counted; an operator's work is a straight line in the batch. At 4, where there is but one
minibatch-stddev group, a few copies are not made."""

UPDATE_BYTES = 36
"""Memory traffic of a parameter's update: the gradient read for its norm and cleared, Adam reading 4 and writing 3."""

FLATTEN_BYTES = 20
"""Of a parameter, where its gradient goes into one buffer, is divided and comes back."""

EMA_BYTES = 12
"""Of a parameter of G, for its average."""


@dataclass(frozen=True)
class Cluster:
    """The machines; by default nodes of eight H100 (SXM), one InfiniBand adapter each.

    Attributes:
        gpus_per_node: GPUs in a node.
        bf16_flop_per_s: of convolutions in bfloat16. cuDNN reached 448e12 to 820e12 at most of config f's sizes.
        memory_bytes_per_s: of all other operators: two thirds of the 3.0e12 that a copy reached.
        launch_s: least time of a kernel in a CUDA graph; assumed.
        nvlink_bytes_per_s: of a GPU in a node, in each direction: 80 % of 450e9; assumed.
        adapters: InfiniBand adapters of a node.
        adapter_bytes_per_s: of each of them, in each direction: 90 % of 400 Gb/s; assumed.
        latency_s: of a hop of a reduction; assumed.
        gradient_bytes: of an element of a gradient on its way.
    """

    gpus_per_node: int = 8
    bf16_flop_per_s: float = 650e12
    memory_bytes_per_s: float = 2.0e12
    launch_s: float = 2e-6
    nvlink_bytes_per_s: float = 0.8 * 450e9
    adapters: int = 1
    adapter_bytes_per_s: float = 0.9 * 400e9 / 8
    latency_s: float = 5e-6
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


@dataclass(frozen=True, eq=False)
class PhaseWork:
    """What a rank computes in a phase.

    Attributes:
        name: of the phase.
        interval: iterations between its steps.
        fixed: ``[operators, 2]`` FLOPs and bytes of each that do not depend on the batch; float64.
        per_image: ``[operators, 2]``, those of each image of the rank's batch.
        peak_bytes: of the results alive at a time that do not depend on the batch, and those of each image.
        num_parameters: that it trains.
        num_small_reductions: of a few numbers, which the host waits for one by one.
    """

    name: str
    interval: int
    fixed: Tensor
    per_image: Tensor
    peak_bytes: tuple[float, float]
    num_parameters: int
    num_small_reductions: int

    @property
    def flops_per_image(self) -> float:
        """Of a step."""
        return float(self.per_image[:, 0].sum())

    def compute_s(self, batch: int, cluster: Cluster) -> float:
        """Seconds of a step of `batch` images on a GPU, with its update."""
        flops, num_bytes = (self.fixed + batch * self.per_image).unbind(dim=1)
        seconds = torch.maximum(flops / cluster.bf16_flop_per_s, num_bytes / cluster.memory_bytes_per_s)
        update = self.num_parameters * UPDATE_BYTES / cluster.memory_bytes_per_s
        return float(seconds.clamp(min=cluster.launch_s).sum()) + update

    def reduction_s(self, num_gpus: int, cluster: Cluster) -> float:
        """Seconds of reducing the gradients, and the few numbers that go with them."""
        if num_gpus == 1:
            return 0.0
        num_bytes = self.num_parameters * cluster.gradient_bytes
        small_s = self.num_small_reductions * cluster.all_reduce_s(4.0, num_gpus)
        flattened_s = FLATTEN_BYTES * self.num_parameters / cluster.memory_bytes_per_s
        return cluster.all_reduce_s(num_bytes, num_gpus) + flattened_s + small_s


@dataclass(frozen=True)
class Iteration:
    """The mean iteration on some GPUs.

    Attributes:
        images: of the global batch.
        compute_s: computing.
        reduction_s: reducing gradients, for which the GPUs wait.
    """

    images: int
    compute_s: float
    reduction_s: float

    @property
    def seconds(self) -> float:
        """In all."""
        return self.compute_s + self.reduction_s

    @property
    def img_per_s(self) -> float:
        """Real images a second."""
        return self.images / self.seconds


def memory_bytes(phases: Sequence[PhaseWork], batch: int) -> float:
    """Memory of a rank: weights, gradients and Adam of both networks, G's average, and the largest phase's results.

    Gradients are among the results. What cuDNN and the allocator take besides is left out.
    """
    parameters = {phase.name: phase.num_parameters for phase in phases}
    kept = 4 * (3 * parameters["d_main"] + 4 * parameters["g_main"])
    return kept + max(fixed + batch * per_image for fixed, per_image in (phase.peak_bytes for phase in phases))


def iteration(phases: Iterable[PhaseWork], batch: int, num_gpus: int, cluster: Cluster) -> Iteration:
    """Predict an iteration with `batch` images on each of `num_gpus`."""
    compute_s = reduction_s = 0.0
    for phase in phases:
        compute_s += phase.compute_s(batch, cluster) / phase.interval
        reduction_s += phase.reduction_s(num_gpus, cluster) / phase.interval
        if phase.name == "g_main":
            compute_s += phase.num_parameters * EMA_BYTES / cluster.memory_bytes_per_s
    return Iteration(batch * num_gpus, compute_s, reduction_s)


def count(config: Config) -> list[PhaseWork]:
    """Count what the phases of a configuration do on a GPU, without doing it."""
    generator, discriminator = make_generator(config), make_discriminator(config)
    networks = Networks(generator, discriminator, generator, discriminator)
    counted = []
    for phase in training_phases(config.loss):
        trained = getattr(networks, phase.trains)
        generator.requires_grad_(phase.trains == "generator")
        discriminator.requires_grad_(phase.trains == "discriminator")
        (few, few_bytes), (many, many_bytes) = (_work(phase, networks, trained, config, b) for b in COUNTED_AT)
        assert few.shape == many.shape, "the batch changes which operators run"
        per_image = (many - few) / (COUNTED_AT[1] - COUNTED_AT[0])
        bytes_per_image = (many_bytes - few_bytes) / (COUNTED_AT[1] - COUNTED_AT[0])
        counted.append(
            PhaseWork(
                name=phase.name,
                interval=phase.interval,
                fixed=few - COUNTED_AT[0] * per_image,
                per_image=per_image,
                peak_bytes=(few_bytes - COUNTED_AT[0] * bytes_per_image, bytes_per_image),
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


def _work(phase: Phase, networks: Networks, trained: nn.Module, config: Config, batch: int) -> tuple[Tensor, int]:
    """FLOPs and bytes of all operators, ``[operators, 2]``, and the most bytes of results alive at a time."""
    generator = networks.generator
    with fused.on_every_device(), FakeTensorMode(allow_non_fake_inputs=True):
        images = torch.empty(batch, 3, config.resolution, config.resolution)
        draw = None
        if phase.stream is not None:
            draw = Draw(torch.empty(batch, generator.z_dim), torch.empty(batch, generator.num_noise))
        with Operators() as operators:
            # At iteration 0 every term is due.
            step = Step(networks, replace(config.loss, consistency_start=0), 0, images, draw)
            with torch.autocast("cpu", torch.bfloat16):
                result = phase.compute(step)
            torch.autograd.grad(result.loss, list(trained.parameters()))
    return torch.tensor(operators.work, dtype=torch.float64), operators.peak_bytes
