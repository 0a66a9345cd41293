"""What is trained and how a phase trains it: networks, their average, their optimizers. Needs torch alone."""

import copy
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from data_shards.errors import UserError
from models.discriminator import Discriminator
from models.generator import FurryGenerator
from models.widths import Widths
from pipeline.config import Config
from pipeline.distributed import global_batch_mean
from pipeline.phases import Networks, Phase, PhaseResult, Step, training_phases
from pipeline.randomness import draw
from pipeline.schedules import ema_decay

G_LAZY_RATIO = 4 / 5
"""The authors' script scales G's Adam as if path-length regularisation ran every 4 steps, though it has none."""


class NonFiniteLossError(UserError):
    """A loss term became NaN or infinite; raised before the optimizer step."""


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

    Args:
        config: sizes, losses, optimizers and seed.
        device: where the networks live.
    """

    def __init__(self, config: Config, device: torch.device) -> None:
        self._config = config
        self._device = device
        self.phases = training_phases(config.loss)
        torch.manual_seed(config.seed)
        model = config.model
        widths = Widths(model.channel_base, model.channel_max)
        self.generator = FurryGenerator(
            config.resolution, widths, z_dim=model.z_dim, z_dim_background=model.z_dim_background
        ).to(device)
        self.discriminator = Discriminator(config.resolution, widths).to(device)
        self.ema = copy.deepcopy(self.generator).eval().requires_grad_(False)
        self.networks = Networks(self.generator, self.discriminator, self.generator, self.discriminator)
        d_lazy_ratio = config.loss.r1_interval / (config.loss.r1_interval + 1)
        self.optimizers: dict[str, torch.optim.Optimizer] = {
            "generator": _adam(self.generator, config.optimizer.learning_rate, G_LAZY_RATIO),
            "discriminator": _adam(self.discriminator, config.optimizer.learning_rate, d_lazy_ratio),
        }
        self.backward: Callable[[Tensor], None] = torch.Tensor.backward

    def run(
        self, phase: Phase, iteration: int, images: Tensor, slots: Sequence[int] | NDArray[np.int64]
    ) -> PhaseResult:
        """One optimizer step of one phase.

        Args:
            phase: one of `phases`.
            iteration: from 0.
            images: real ``[B, 3, R, R]`` in [-1, 1].
            slots: the B positions of this rank's samples in the global batch.

        Raises:
            NonFiniteLossError: a loss term is NaN or infinite; nothing was changed.
        """
        self.generator.requires_grad_(phase.trains == "generator")
        self.discriminator.requires_grad_(phase.trains == "discriminator")
        optimizer = self.optimizers[phase.trains]
        optimizer.zero_grad()
        given = None
        if phase.stream is not None:
            sizes = {"z_dim": self.generator.z_dim, "num_noise": self.generator.num_noise}
            given = draw(self._config.seed, phase.stream, iteration, slots, **sizes, device=self._device)
        result = phase.compute(Step(self.networks, self._config.loss, iteration, images, given))
        _check_finite(phase, iteration, result)
        self.backward(result.loss)
        optimizer.step()
        if result.generated is not None:
            self.generator.mapping_foreground.update_average(global_batch_mean(result.generated.w_foreground))
            self.generator.mapping_background.update_average(global_batch_mean(result.generated.w_background))
        return result

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


def _check_finite(phase: Phase, iteration: int, result: PhaseResult) -> None:
    # Weighted too: a finite term may overflow with its weight.
    terms = [(value.detach().float(), result.weights[name]) for name, value in result.terms.items()]
    finite = torch.stack([value.isfinite() & (weight * value).isfinite() for value, weight in terms])
    if not finite.all():
        broken = [name for name, ok in zip(result.terms, finite.tolist(), strict=True) if not ok]
        raise NonFiniteLossError(
            f"loss {' and '.join(f'{phase.name}_{name}' for name in broken)} is not finite at iteration {iteration}; "
            "its step was not taken, and the last checkpoint is whole: go on from there with a lower "
            "--optimizer.learning-rate or a higher --loss.r1"
        )
