"""Variants that the benchmark times: the training code, and a plain implementation of the papers."""

import importlib.util
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from data_shards.errors import UserError
from pipeline.config import Config
from pipeline.methods.furrygan.phases import Phase, generator_weights, schedules
from pipeline.methods.randomness import draw
from pipeline.methods.schedules import is_due, linear_ramp
from pipeline.training.learner import Learner

Step = Callable[[], Any]
REFERENCE = Path(__file__).resolve().parents[2] / "tests" / "reference.py"


@dataclass(frozen=True)
class Variant:
    """One way to compute a training step.

    Attributes:
        name: in the report.
        config: sizes, losses, precision.
        plain: by the reference instead of by the code that trains.
    """

    name: str
    config: Config
    plain: bool = False

    def make(self, device: torch.device) -> "Ours":
        """Networks and optimizers, ready to step."""
        return (Plain if self.plain else Ours)(self.config, device)


class Ours:
    """The code that trains."""

    def __init__(self, config: Config, device: torch.device) -> None:
        self.config, self.device = config, device
        self.learner = Learner(config, device)

    def run(self, phase: Phase, iteration: int, images: Tensor) -> dict[str, Tensor]:
        """One optimizer step; the loss terms."""
        return self.learner.run(phase, iteration, images, range(len(images))).terms

    def update_ema(self, images_seen: int) -> None:
        """Move the average of G."""
        self.learner.update_ema(images_seen)

    def images(self) -> Tensor:
        """What stands for a batch of photographs."""
        side = self.config.resolution
        return torch.rand(self.config.batch, 3, side, side, device=self.device) * 2.0 - 1.0

    def steps(self) -> dict[str, list[Step]]:
        """By phase, in the order of an iteration: a step of each iteration of a period in which all terms are due.

        Some terms of g_main are due at every other iteration only.
        """
        loss, images = self.config.loss, self.images()
        period = math.lcm(loss.consistency_interval, loss.participation_interval)
        first = -(-loss.consistency_start // period) * period
        steps: dict[str, list[Step]] = {}
        for phase in self.learner.phases:
            iterations = range(first, first + (period if phase.trains == "generator" else 1))
            steps[phase.name] = [partial(self.run, phase, iteration, images) for iteration in iterations]
        return steps | {"ema": [partial(self.update_ema, first * self.config.batch)]}

    def intervals(self) -> dict[str, int]:
        """Iterations between the steps of each phase."""
        return {phase.name: phase.interval for phase in self.learner.phases} | {"ema": 1}


class Plain(Ours):
    """The same networks, losses and random numbers, computed and optimized the straightforward way, in float32."""

    def __init__(self, config: Config, device: torch.device) -> None:
        super().__init__(config, device)
        self._reference = load_reference()
        self._optimizers = {
            name: torch.optim.Adam(optimizer.param_groups[0]["params"], lr=1e-3, betas=(0.0, 0.99), foreach=False)
            for name, optimizer in self.learner.optimizers.items()
        }

    def run(self, phase: Phase, iteration: int, images: Tensor) -> dict[str, Tensor]:
        self.learner.generator.requires_grad_(phase.trains == "generator")
        self.learner.discriminator.requires_grad_(phase.trains == "discriminator")
        optimizer = self._optimizers[phase.trains]
        optimizer.zero_grad()
        terms, weights = self._terms(phase, iteration, images)
        torch.stack([weights[name] * value for name, value in terms.items()]).sum().backward()
        optimizer.step()
        return terms

    def _terms(self, phase: Phase, iteration: int, images: Tensor) -> tuple[dict[str, Tensor], dict[str, Any]]:
        loss, reference = self.config.loss, self._reference
        generator, discriminator = self.learner.generator, self.learner.discriminator
        if phase.stream is None:
            return reference.reference_d_r1(discriminator, images), {"r1": loss.r1 / 2 * loss.r1_interval}
        sizes = {"z_dim": generator.z_dim, "num_noise": generator.num_noise}
        given = draw(self.config.seed, phase.stream, iteration, range(len(images)), **sizes, device=self.device)
        fade_in = linear_ramp(iteration, 0.0, 1.0, loss.fade_in_iterations)
        if phase.trains == "discriminator":
            terms = reference.reference_d_main(generator, discriminator, images, given.z, given.noise, fade_in)
            return terms, {"adversarial": 1.0, "prediction": loss.prediction}
        terms = reference.reference_g_main(
            generator,
            discriminator,
            given.z,
            given.noise,
            fade_in,
            phi1=loss.phi1,
            phi2=loss.phi2,
            area_over_batch=loss.area_over_batch,
            with_consistency=iteration >= loss.consistency_start and is_due(iteration, loss.consistency_interval),
            with_participation=is_due(iteration, loss.participation_interval),
        )
        return terms, generator_weights(loss, schedules(loss, iteration)[1])

    @torch.no_grad()
    def update_ema(self, images_seen: int) -> None:
        del images_seen
        averages, parameters = self.learner.ema.parameters(), self.learner.generator.parameters()
        for average, parameter in zip(averages, parameters, strict=True):
            average.copy_(parameter.lerp(average, 0.999))


def load_reference() -> ModuleType:
    """The module `tests/reference.py`, which is in no package.

    Raises:
        UserError: this is not a checkout.
    """
    if not REFERENCE.is_file():
        raise UserError(f"{REFERENCE} is missing: run the benchmark from a checkout, or with --no-reference")
    spec = importlib.util.spec_from_file_location("reference", REFERENCE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["reference"] = module
    spec.loader.exec_module(module)
    return module
