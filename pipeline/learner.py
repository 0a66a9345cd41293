"""What is trained and how a phase trains it: networks, their average, their optimizers. Needs torch alone."""

import contextlib
import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from data_shards.errors import UserError
from models.discriminator import Discriminator
from models.generator import FurryGenerator
from models.widths import Widths
from pipeline.config import Config, Precision
from pipeline.distributed import global_batch_mean
from pipeline.finite_guard import FiniteGuard
from pipeline.phases import Networks, Phase, PhaseResult, Step, training_phases
from pipeline.randomness import draw
from pipeline.schedules import ema_decay

G_LAZY_RATIO = 4 / 5
"""The authors' script scales G's Adam as if path-length regularisation ran every 4 steps, though it has none."""


class Learner:
    """G, D and the average of G, on one rank.

    Attributes:
        generator: G, bare.
        discriminator: D, bare.
        ema: exponential moving average of G, with its truncation centres.
        networks: G and D as the phases use them.
        optimizers: Adam by network, "generator" and "discriminator".
        phases: of an iteration, in order.
        backward: computes gradients from a loss; gradient synchronisation puts its own in place.
        guard: keeps the optimizers from a step with what is not finite.

    Args:
        config: sizes, losses, optimizers and seed.
        device: where the networks live.
    """

    def __init__(self, config: Config, device: torch.device) -> None:
        self._config = config
        self._device = device
        self.phases = training_phases(config.loss)
        torch.backends.cudnn.benchmark = True  # a handful of shapes, over and over
        torch.manual_seed(config.seed)
        model = config.model
        widths = Widths(model.channel_base, model.channel_max)
        self.generator = FurryGenerator(
            config.resolution,
            widths,
            z_dim=model.z_dim,
            z_dim_background=model.z_dim_background,
            recompute=config.recompute,
        ).to(device)
        self.discriminator = Discriminator(config.resolution, widths, recompute=config.recompute).to(device)
        self.ema = copy.deepcopy(self.generator).eval().requires_grad_(False)
        self.networks = Networks(self.generator, self.discriminator, self.generator, self.discriminator)
        d_lazy_ratio = config.loss.r1_interval / (config.loss.r1_interval + 1)
        self.optimizers: dict[str, torch.optim.Optimizer] = {
            "generator": _adam(self.generator, config.optimizer.learning_rate, G_LAZY_RATIO),
            "discriminator": _adam(self.discriminator, config.optimizer.learning_rate, d_lazy_ratio),
        }
        self.backward: Callable[[Tensor], None] = torch.Tensor.backward
        self.guard = FiniteGuard(device)
        for optimizer in self.optimizers.values():
            optimizer.found_inf = self.guard.tripped  # type: ignore[attr-defined]
        self._bfloat16 = uses_bfloat16(config.precision, device)
        if config.compile:
            self.generator.compile()
            self.discriminator.compile()

    def run(
        self, phase: Phase, iteration: int, images: Tensor, slots: Sequence[int] | NDArray[np.int64]
    ) -> PhaseResult:
        """One optimizer step of one phase; the norm of its gradient joins what was observed.

        Args:
            phase: one of `phases`.
            iteration: from 0.
            images: real ``[B, 3, R, R]`` in [-1, 1].
            slots: the B positions of this rank's samples in the global batch.

        Raises:
            NonFiniteLossError: a loss term is NaN or infinite; nothing was changed since. On a GPU, the next steps
                may raise for this one.
        """
        self.generator.requires_grad_(phase.trains == "generator")
        self.discriminator.requires_grad_(phase.trains == "discriminator")
        optimizer = self.optimizers[phase.trains]
        optimizer.zero_grad()
        given = None
        if phase.stream is not None:
            sizes = {"z_dim": self.generator.z_dim, "num_noise": self.generator.num_noise}
            given = draw(self._config.seed, phase.stream, iteration, slots, **sizes, device=self._device)
        with contextlib.ExitStack() as modes:
            if phase.second_order:
                modes.enter_context(torch.compiler.set_stance("force_eager"))
            elif self._bfloat16:
                modes.enter_context(torch.autocast(self._device.type, torch.bfloat16))
            result = phase.compute(Step(self.networks, self._config.loss, iteration, images, given))
        self.backward(result.loss)
        network = getattr(self, phase.trains)
        norm = torch.nn.utils.get_total_norm([p.grad for p in network.parameters() if p.grad is not None])
        # Weighted: a finite term may overflow with its weight.
        losses = {f"{phase.name}_{name}": result.weights[name] * value for name, value in result.terms.items()}
        self.guard.watch(phase.name, iteration, losses, norm)
        optimizer.step()
        if result.generated is not None:
            self.generator.mapping_foreground.update_average(global_batch_mean(result.generated.w_foreground))
            self.generator.mapping_background.update_average(global_batch_mean(result.generated.w_background))
        return replace(result, observed={**result.observed, f"grad_norm/{phase.name}": norm})

    def state_dict(self) -> dict[str, Any]:
        """Weights, buffers and what the optimizers remember; not a copy.

        Raises:
            NonFiniteLossError: training has broken since the last call.
        """
        self.guard.wait()
        return {
            "generator": self.generator.state_dict(),
            "discriminator": self.discriminator.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken."""
        self.generator.load_state_dict(state["generator"])
        self.discriminator.load_state_dict(state["discriminator"])
        self.ema.load_state_dict(state["ema"])
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])

    @torch.no_grad()
    def update_ema(self, images_seen: int) -> None:
        """Move the average of G by one iteration.

        Args:
            images_seen: real images of all ranks before this iteration.
        """
        config = self._config
        decay = ema_decay(config.batch, config.optimizer.ema_halflife_images, images_seen, config.optimizer.ema_rampup)
        torch._foreach_lerp_(list(self.ema.parameters()), list(self.generator.parameters()), 1.0 - decay)
        for average, current in zip(self.ema.buffers(), self.generator.buffers(), strict=True):
            average.copy_(current)


def _adam(network: nn.Module, learning_rate: float, lazy_ratio: float) -> torch.optim.Adam:
    """Adam of StyleGAN2 with betas (0, 0.99), scaled for a network that takes ``1 / lazy_ratio`` steps an iteration."""
    return torch.optim.Adam(
        network.parameters(), lr=learning_rate * lazy_ratio, betas=(0.0, float(0.99**lazy_ratio)), fused=True
    )


def uses_bfloat16(precision: Precision, device: torch.device) -> bool:
    """Whether convolutions are computed in bfloat16.

    Raises:
        UserError: it was asked for where the device cannot.
    """
    # CUDA emulates bfloat16 on older GPUs: correct, and slower than float32.
    able = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    if precision == "bf16" and not able:
        raise UserError(f"precision bf16 is not for {torch.cuda.get_device_name(device)}: give --precision fp32")
    return precision == "bf16" or (precision == "auto" and device.type == "cuda" and able)
