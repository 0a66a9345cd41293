"""What is trained and how a phase trains it: networks, their average, their optimizers. Needs torch alone."""

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from data_shards.errors import UserError
from data_shards.order import GROUP_SIZE
from pipeline.architecture import make_discriminator, make_generator
from pipeline.config import Config, Precision
from pipeline.distributed import global_batch_mean, global_mean
from pipeline.engine import Engine
from pipeline.finite_guard import FiniteGuard
from pipeline.phases import Networks, Phase, Scribbled, Step, training_phases
from pipeline.randomness import draw
from pipeline.schedules import ema_decay

G_LAZY_RATIO = 4 / 5
"""The authors' script scales G's Adam as if path-length regularisation ran every 4 steps, though it has none."""


@dataclass(frozen=True)
class Measured:
    """What an optimizer step measured, on this rank; detached.

    Attributes:
        terms: loss terms by name, without their weights.
        observed: other scalars worth logging, by metric name.
    """

    terms: dict[str, Tensor]
    observed: dict[str, Tensor]


class Learner:
    """G, D and the average of G, on one rank.

    Attributes:
        generator: G, bare.
        discriminator: D, bare.
        ema: exponential moving average of G, with its truncation centres.
        networks: G and D as the phases use them.
        optimizers: Adam by network, "generator" and "discriminator".
        engines: what trains them, likewise.
        phases: of an iteration, in order.
        guard: keeps the optimizers from a step with what is not finite.

    Args:
        config: sizes, losses, optimizers and seed.
        device: where the networks live.
        scribbled: pictures with strokes on them, on that device; None for none.
    """

    def __init__(self, config: Config, device: torch.device, scribbled: Scribbled | None = None) -> None:
        self._config = config
        self._scribbled = scribbled
        self._device = device
        self.phases = training_phases(config.loss)
        torch.backends.cudnn.benchmark = True  # a handful of shapes, over and over
        torch.manual_seed(config.seed)
        self.generator = make_generator(config).to(device)
        self.discriminator = make_discriminator(config).to(device)
        self.ema = copy.deepcopy(self.generator).eval().requires_grad_(False)
        d_lazy_ratio = config.loss.r1_interval / (config.loss.r1_interval + 1)
        self.optimizers: dict[str, torch.optim.Optimizer] = {
            "generator": _adam(self.generator, config.optimizer.learning_rate, G_LAZY_RATIO),
            "discriminator": _adam(self.discriminator, config.optimizer.learning_rate, d_lazy_ratio),
        }
        self.synchronise(Engine)
        self.guard = FiniteGuard(device)
        for optimizer in self.optimizers.values():
            optimizer.found_inf = self.guard.tripped  # type: ignore[attr-defined]
        self._bfloat16 = uses_bfloat16(config.precision, device)
        if config.compile:
            self.generator.compile()
            self.discriminator.compile()

    def synchronise(self, make_engine: Callable[[nn.Module, torch.optim.Optimizer], Engine]) -> None:
        """Train by other engines from now on.

        Args:
            make_engine: takes a network and its Adam.
        """
        self.engines = {
            "generator": make_engine(self.generator, self.optimizers["generator"]),
            "discriminator": make_engine(self.discriminator, self.optimizers["discriminator"]),
        }
        generator, discriminator = (engine.module for engine in self.engines.values())
        self.networks = Networks(self.generator, self.discriminator, generator, discriminator)

    def run(self, phase: Phase, iteration: int, images: Tensor, slots: Sequence[int] | NDArray[np.int64]) -> Measured:
        """One optimizer step of one phase.

        Args:
            phase: one of `phases`.
            iteration: from 0.
            images: real ``[B, 3, R, R]`` in [-1, 1].
            slots: the B positions of this rank's samples in the global batch.

        Returns:
            Means over the micro-batches; the norm of the gradient is among them.

        Raises:
            NonFiniteLossError: a loss term is NaN or infinite; nothing was changed since. On a GPU, the next steps
                may raise for this one.
        """
        self.generator.requires_grad_(phase.trains == "generator")
        self.discriminator.requires_grad_(phase.trains == "discriminator")
        engine = self.engines[phase.trains]
        engine.zero_grad()
        steps = self._micro_steps(phase, iteration, images, np.asarray(slots))
        results = []
        for i, step in enumerate(steps, start=1):
            with contextlib.nullcontext() if i == len(steps) else engine.accumulating():
                results.append(self._gradients(phase, step, len(steps)))
        norm = engine.gradient_norm()
        terms = _means([result.terms for result in results])
        # Weighted: a finite term may overflow with its weight.
        losses = {f"{phase.name}_{name}": results[0].weights[name] * value for name, value in terms.items()}
        self.guard.watch(phase.name, iteration, losses, norm)
        engine.step()
        if codes := [result.codes for result in results if result.codes is not None]:
            w_foreground, w_background = (torch.cat(parts) for parts in zip(*codes, strict=True))
            self.generator.mapping_foreground.update_average(global_batch_mean(w_foreground))
            self.generator.mapping_background.update_average(global_batch_mean(w_background))
        observed = _means([result.observed for result in results])
        return Measured(terms, {**observed, f"grad_norm/{phase.name}": norm})

    def _gradients(self, phase: Phase, step: Step, num: int) -> "_MicroBatch":
        """Add the gradients of a micro-batch, one of `num`; its pictures are gone when the next one begins."""
        with self._modes(phase):
            result = phase.compute(step)
        self.engines[phase.trains].backward(result.loss / num)
        out = result.generated
        return _MicroBatch(
            terms={name: value.detach() for name, value in result.terms.items()},
            weights=result.weights,
            observed=result.observed,
            codes=None if out is None else (out.w_foreground.detach(), out.w_background.detach()),
        )

    def _micro_steps(self, phase: Phase, iteration: int, images: Tensor, slots: NDArray[np.int64]) -> list[Step]:
        """What each micro-batch works on.

        A micro-batch takes whole columns of its rank's batch, as a rank does of the global batch
        (`data_shards.order.rank_slots`): minibatch-stddev groups and halves are the same.
        """
        num, num_columns = self._config.accumulate, self._config.batch // GROUP_SIZE
        sizes = {"z_dim": self.generator.z_dim, "num_noise": self.generator.num_noise}
        steps = []
        for k in range(num):
            given = scribbled = None
            part = slots.reshape(GROUP_SIZE, num, -1)[:, k]
            if phase.stream is not None:
                given = draw(self._config.seed, phase.stream, iteration, part.reshape(-1), **sizes, device=self._device)
            if self._scribbled is not None:  # one a column of the global batch, in turn
                numbers = iteration * num_columns + part[0]
                scribbled = self._scribbled.taken(numbers, seed=self._config.seed, mirror=self._config.flip)
            pictures = images.unflatten(0, (GROUP_SIZE, num, -1))[:, k].flatten(0, 1)
            steps.append(Step(self.networks, self._config.loss, iteration, pictures, given, scribbled=scribbled))
        if phase.survey is None or num == 1:
            return steps
        with self._modes(phase), torch.no_grad():
            area = global_mean(torch.stack([phase.survey(step) for step in steps]))
        return [replace(step, area=area) for step in steps]

    @contextlib.contextmanager
    def _modes(self, phase: Phase) -> Iterator[None]:
        """How a phase is computed: eagerly, in half precision, or as it is."""
        with contextlib.ExitStack() as modes:
            if phase.second_order:
                modes.enter_context(torch.compiler.set_stance("force_eager"))
            elif self._bfloat16:
                modes.enter_context(torch.autocast(self._device.type, torch.bfloat16))
            yield

    def state_dict(self) -> dict[str, Any]:
        """Weights, buffers and what the optimizers remember; not a copy. All ranks call it; rank 0's is complete.

        Raises:
            NonFiniteLossError: training has broken since the last call.
        """
        self.guard.wait()
        return {
            "generator": self.generator.state_dict(),
            "discriminator": self.discriminator.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizers": {name: engine.optimizer_state() for name, engine in self.engines.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken."""
        self.generator.load_state_dict(state["generator"])
        self.discriminator.load_state_dict(state["discriminator"])
        self.ema.load_state_dict(state["ema"])
        for name, engine in self.engines.items():
            engine.load_optimizer_state(state["optimizers"][name])

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


@dataclass(frozen=True)
class _MicroBatch:
    """What is kept of a `PhaseResult`; detached."""

    terms: Mapping[str, Tensor]
    weights: Mapping[str, float]
    observed: Mapping[str, Tensor]
    codes: tuple[Tensor, Tensor] | None


def _means(rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Means by name."""
    return {name: torch.stack([row[name] for row in rows]).mean() for name in rows[0]}


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
