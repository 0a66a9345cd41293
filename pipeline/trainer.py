"""The training loop: networks, optimizers, loader and the step; what is seen of it is left to callbacks."""

import copy
import time
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn

from data_shards.errors import UserError
from data_shards.loader import Loader
from data_shards.order import rank_slots
from models.discriminator import Discriminator
from models.generator import FurryGenerator
from models.widths import Widths
from pipeline.config import Config
from pipeline.distributed import global_batch_mean
from pipeline.metrics import MetricMeter
from pipeline.phases import Networks, Phase, PhaseResult, Step, training_phases
from pipeline.randomness import draw
from pipeline.schedules import ema_decay, is_due, linear_ramp

CHECKPOINT_VERSION = 1
G_LAZY_RATIO = 4 / 5
"""The authors' script scales G's Adam as if path-length regularisation ran every 4 steps, though it has none."""


class NonFiniteLossError(UserError):
    """A loss term became NaN or infinite; raised before the optimizer step."""


class Callback(Protocol):
    """Looks at a run while it trains."""

    def on_step(self, trainer: "Trainer") -> None:
        """After each iteration, on every rank."""

    def on_end(self, trainer: "Trainer") -> None:
        """After the last iteration, on every rank."""


class Trainer:
    """Trains G and D on one rank.

    Attributes:
        iteration: iterations done.
        generator: G, bare.
        discriminator: D, bare.
        ema: exponential moving average of G, with its truncation centres.
        meter: what the phases measured since it was last read.
        seconds_waiting: time spent waiting for data.

    Args:
        config: of the run.
        accelerator: from `make_accelerator`.
        loader: of this rank's real images.
    """

    def __init__(self, config: Config, accelerator: Accelerator, loader: Loader) -> None:
        self.config = config
        self.accelerator = accelerator
        self.loader = loader
        self.phases = training_phases(config.loss)
        self.meter = MetricMeter()
        self.iteration = 0
        self.seconds_waiting = 0.0

        torch.manual_seed(config.seed)
        widths = Widths(config.model.channel_base, config.model.channel_max)
        self.generator = FurryGenerator(
            config.resolution, widths, z_dim=config.model.z_dim, z_dim_background=config.model.z_dim_background
        ).to(accelerator.device)
        self.discriminator = Discriminator(config.resolution, widths).to(accelerator.device)
        self.ema = copy.deepcopy(self.generator).eval().requires_grad_(False)
        d_lazy_ratio = config.loss.r1_interval / (config.loss.r1_interval + 1)
        self.networks, self.optimizers = self._prepare(
            _adam(self.generator, config.optimizer.learning_rate, G_LAZY_RATIO),
            _adam(self.discriminator, config.optimizer.learning_rate, d_lazy_ratio),
        )
        self._slots = rank_slots(config.batch, accelerator.process_index, accelerator.num_processes)

    def _prepare(
        self, adam_generator: torch.optim.Optimizer, adam_discriminator: torch.optim.Optimizer
    ) -> tuple[Networks, dict[str, Any]]:
        generator, discriminator, *optimizers = self.accelerator.prepare(
            self.generator, self.discriminator, adam_generator, adam_discriminator
        )
        networks = Networks(self.generator, self.discriminator, generator, discriminator)
        return networks, dict(zip(("generator", "discriminator"), optimizers, strict=True))

    @property
    def images_seen(self) -> int:
        """Real images of all ranks so far."""
        return self.iteration * self.config.batch

    @property
    def fade_in(self) -> float:
        """Gamma of Eq. 3 at this moment."""
        return linear_ramp(self.iteration, 0.0, 1.0, self.config.loss.fade_in_iterations)

    def fit(self, callbacks: Sequence[Callback]) -> None:
        """Train to the configured number of iterations.

        Raises:
            NonFiniteLossError: a loss term became NaN or infinite.
        """
        while self.iteration < self.config.steps:
            self.step()
            for callback in callbacks:
                callback.on_step(self)
        for callback in callbacks:
            callback.on_end(self)

    def step(self) -> None:
        """One iteration: every phase that is due, then the EMA."""
        start = time.perf_counter()
        images = next(self.loader).images
        self.seconds_waiting += time.perf_counter() - start
        for phase in self.phases:
            if is_due(self.iteration, phase.interval):
                self._run(phase, images)
        self._update_ema()
        self.iteration += 1

    def _run(self, phase: Phase, images: Tensor) -> None:
        self.generator.requires_grad_(phase.trains == "generator")
        self.discriminator.requires_grad_(phase.trains == "discriminator")
        optimizer = self.optimizers[phase.trains]
        optimizer.zero_grad()
        given = None
        if phase.stream is not None:
            given = draw(
                self.config.seed,
                phase.stream,
                self.iteration,
                self._slots,
                z_dim=self.generator.z_dim,
                num_noise=self.generator.num_noise,
                device=self.accelerator.device,
            )
        result = phase.compute(Step(self.networks, self.config.loss, self.iteration, images, given))
        self._check_finite(phase, result)
        self.accelerator.backward(result.loss)
        optimizer.step()
        if result.generated is not None:
            self.generator.mapping_foreground.update_average(global_batch_mean(result.generated.w_foreground))
            self.generator.mapping_background.update_average(global_batch_mean(result.generated.w_background))
        self._measure(phase, result)

    def _check_finite(self, phase: Phase, result: PhaseResult) -> None:
        # Weighted too: a finite term may overflow with its weight.
        terms = [(value.detach().float(), result.weights[name]) for name, value in result.terms.items()]
        finite = torch.stack([value.isfinite() & (weight * value).isfinite() for value, weight in terms])
        if not finite.all():
            broken = [name for name, ok in zip(result.terms, finite.tolist(), strict=True) if not ok]
            raise NonFiniteLossError(
                f"loss {' and '.join(f'{phase.name}_{name}' for name in broken)} is not finite at iteration "
                f"{self.iteration}; its step was not taken, and the last checkpoint is whole: go on from there with a "
                "lower --optimizer.learning-rate or a higher --loss.r1"
            )

    def _measure(self, phase: Phase, result: PhaseResult) -> None:
        for name, value in result.terms.items():
            self.meter.add(f"loss/{phase.name}_{name}", value)
        for name, value in result.observed.items():
            self.meter.add(name, value)
        parameters = getattr(self, phase.trains).parameters()
        gradients = [p.grad for p in parameters if p.grad is not None]
        self.meter.add(f"grad_norm/{phase.name}", torch.nn.utils.get_total_norm(gradients))

    @torch.no_grad()
    def _update_ema(self) -> None:
        optimizer = self.config.optimizer
        decay = ema_decay(self.config.batch, optimizer.ema_halflife_images, self.images_seen, optimizer.ema_rampup)
        torch._foreach_lerp_(list(self.ema.parameters()), list(self.generator.parameters()), 1.0 - decay)
        for average, current in zip(self.ema.buffers(), self.generator.buffers(), strict=True):
            average.copy_(current)

    def state_dict(self) -> dict[str, Any]:
        """All that training needs to go on exactly.

        Schedules and random numbers are functions of the iteration and the seed (see `pipeline/randomness.py`), so
        those two are their state.
        """
        return {
            "version": CHECKPOINT_VERSION,
            "iteration": self.iteration,
            "images_seen": self.images_seen,
            "seed": self.config.seed,
            "generator": self.generator.state_dict(),
            "discriminator": self.discriminator.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "loader": self.loader.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken.

        Raises:
            UserError: the state is of another version or of other data.
        """
        if state.get("version") != CHECKPOINT_VERSION:
            raise UserError(
                f"checkpoint is of version {state.get('version')}, this program reads {CHECKPOINT_VERSION}: "
                "go on with the program that wrote it"
            )
        self.loader.load_state_dict(state["loader"])
        self.iteration = state["iteration"]
        self.generator.load_state_dict(state["generator"])
        self.discriminator.load_state_dict(state["discriminator"])
        self.ema.load_state_dict(state["ema"])
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])


def make_accelerator() -> Accelerator:
    """The process group and device as `accelerate launch` set them up."""
    # Every buffer is a function of what all ranks share: broadcasting them would only cost.
    return Accelerator(kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)])


def _adam(network: nn.Module, learning_rate: float, lazy_ratio: float) -> torch.optim.Adam:
    """Adam of StyleGAN2 with betas (0, 0.99), scaled for a network that takes ``1 / lazy_ratio`` steps an iteration."""
    return torch.optim.Adam(
        network.parameters(), lr=learning_rate * lazy_ratio, betas=(0.0, float(0.99**lazy_ratio)), fused=True
    )
