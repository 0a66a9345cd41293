"""The learner: networks, their average, their optimizers, and a step of a phase. Needs torch alone."""

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from data_shards.errors import UserError
from data_shards.reading.order import GROUP_SIZE
from models import fused
from models.fused import has_triton
from pipeline.config import Config, Precision
from pipeline.config.architecture import make_discriminator, make_generator
from pipeline.methods.furrygan.phases import Networks, Phase, Scribbled, Step, due_terms, schedules, training_phases
from pipeline.methods.randomness import draw_from, sample_seeds
from pipeline.methods.schedules import ema_decay
from pipeline.ranks.collectives import global_batch_mean, global_mean
from pipeline.ranks.engine import Engine
from pipeline.runs.determinism import set_deterministic
from pipeline.training.clock import PhaseClock
from pipeline.training.finite_guard import FiniteGuard
from pipeline.training.graphs import Graphs, Inputs

G_LAZY_RATIO = 4 / 5
"""The authors' script scales G's Adam as if path-length regularisation ran every 4 steps, though it has none."""


@dataclass(frozen=True)
class Measured:
    """What an optimizer step measured, on this rank; detached. Good until the next step of the same phase.

    Attributes:
        terms: loss terms by name, without their weights.
        observed: other scalars worth logging, by metric name.
        values: all of them in a row, terms first.
        finite: which weighted terms are finite, and whether the norm of the gradient is.
    """

    terms: dict[str, Tensor]
    observed: dict[str, Tensor]
    values: Tensor
    finite: Tensor


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
        clock: how long the phases take, and what they compute.

    Args:
        config: sizes, losses, optimizers and seed.
        device: where the networks live.
        scribbled: images with strokes on them, on that device; None for none.
    """

    def __init__(self, config: Config, device: torch.device, scribbled: Scribbled | None = None) -> None:
        self._config = config
        self._scribbled = scribbled
        self._device = device
        self.phases = training_phases(config.loss)
        set_deterministic(config.deterministic)
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
        self.clock = PhaseClock(device)
        self._bfloat16 = uses_bfloat16(config.precision, device)

    def synchronise(self, make_engine: Callable[[nn.Module, torch.optim.Optimizer], Engine]) -> None:
        """Train by other engines from now on.

        Args:
            make_engine: takes a network and its Adam.
        """
        self.engines = {
            "generator": make_engine(self.generator, self.optimizers["generator"]),
            "discriminator": make_engine(self.discriminator, self.optimizers["discriminator"]),
        }
        recordable = all(engine.recordable for engine in self.engines.values())
        self._graphs = Graphs(self._device) if uses_graphs(self._config, self._device) and recordable else None
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
        work = functools.partial(self._train, phase, iteration)
        inputs = self._inputs(phase, iteration, images, np.asarray(slots))
        # All that is not among the inputs follows from this.
        due = due_terms(self._config.loss, iteration) if phase.trains == "generator" else ()
        key = (phase.name, due, images.shape)
        with self.clock.timing(phase.name, key):
            if self._graphs is None:
                return work(inputs)
            measured: Measured = self._graphs.run(key, work, inputs)
        self._watch(phase, iteration, measured)
        return measured

    def _train(self, phase: Phase, iteration: int, inputs: Inputs) -> Measured:
        """The step, all on the device."""
        self.generator.requires_grad_(phase.trains == "generator")
        self.discriminator.requires_grad_(phase.trains == "discriminator")
        engine = self.engines[phase.trains]
        engine.zero_grad()
        steps = self._micro_steps(phase, iteration, inputs)
        results = []
        for i, step in enumerate(steps, start=1):
            with contextlib.nullcontext() if i == len(steps) else engine.accumulating():
                results.append(self._gradients(phase, step, len(steps)))
        norm = engine.gradient_norm()
        terms = _means([result.terms for result in results])
        observed = _means([result.observed for result in results]) | {f"grad_norm/{phase.name}": norm}
        # Weighted: a finite term may overflow with its weight.
        finite = self.guard.check((results[0].weights[name] * value for name, value in terms.items()), norm)
        measured = _measured(terms, observed, finite)
        if self._graphs is None:
            self._watch(phase, iteration, measured)
        engine.step()
        if codes := [result.codes for result in results if result.codes is not None]:
            w_foreground, w_background = (torch.cat(parts) for parts in zip(*codes, strict=True))
            self.generator.mapping_foreground.update_average(global_batch_mean(w_foreground))
            self.generator.mapping_background.update_average(global_batch_mean(w_background))
        return measured

    def _watch(self, phase: Phase, iteration: int, measured: Measured) -> None:
        self.guard.watch(phase.name, iteration, (f"{phase.name}_{name}" for name in measured.terms), measured.finite)

    def _gradients(self, phase: Phase, step: Step, num: int) -> "_MicroBatch":
        """Add the gradients of a micro-batch, one of `num`; its images are gone when the next one begins."""
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

    def _inputs(self, phase: Phase, iteration: int, images: Tensor, slots: NDArray[np.int64]) -> dict[str, Tensor]:
        """What changes from iteration to iteration.

        A micro-batch takes whole columns of its rank's batch, as a rank does of the global batch
        (`data_shards.reading.order.rank_slots`): minibatch-stddev groups and halves are the same.
        """
        num = self._config.accumulate
        parts = slots.reshape(GROUP_SIZE, num, -1).swapaxes(0, 1)
        inputs = {"images": images, "scheduled": torch.tensor(schedules(self._config.loss, iteration))}
        if phase.stream is not None:
            seeds = sample_seeds(self._config.seed, phase.stream, iteration, parts.reshape(-1))
            inputs["seeds"] = seeds.view(num, -1)
        if self._scribbled is not None:  # one a column of the global batch, in turn
            numbers = iteration * (self._config.batch // GROUP_SIZE) + parts[:, 0]
            taken = self._scribbled.taken(numbers.reshape(-1), seed=self._config.seed, mirror=self._config.flip)
            inputs |= {"scribbled": taken.images, "strokes": taken.strokes}
        return inputs

    def _micro_steps(self, phase: Phase, iteration: int, inputs: Inputs) -> list[Step]:
        """What each micro-batch works on."""
        num, config = self._config.accumulate, self._config.loss
        sizes = {"z_dim": self.generator.z_dim, "num_noise": self.generator.num_noise}
        steps = []
        for k in range(num):
            given = scribbled = None
            if phase.stream is not None:
                given = draw_from(inputs["seeds"][k], **sizes, device=self._device)
            if "strokes" in inputs:
                scribbled = Scribbled(*(inputs[name].chunk(num)[k] for name in ("scribbled", "strokes")))
            images = inputs["images"].unflatten(0, (GROUP_SIZE, num, -1))[:, k].flatten(0, 1)
            scheduled = inputs["scheduled"]
            steps.append(Step(self.networks, config, iteration, images, given, None, scribbled, scheduled))
        if phase.survey is None or num == 1:
            return steps
        with self._modes(phase), torch.no_grad():
            area = global_mean(torch.stack([phase.survey(step) for step in steps]))
        return [replace(step, area=area) for step in steps]

    @contextlib.contextmanager
    def _modes(self, phase: Phase) -> Iterator[None]:
        """In half precision or as it is; R1 in half precision only where the operators round once a layer."""
        half = self._bfloat16 and (not phase.second_order or fused.applies(self.guard.tripped))
        with torch.autocast(self._device.type, torch.bfloat16, enabled=half):
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
        if self._graphs is not None:
            self._graphs.forget()
        self.generator.load_state_dict(state["generator"])
        self.discriminator.load_state_dict(state["discriminator"])
        self.ema.load_state_dict(state["ema"])
        for name, engine in self.engines.items():
            engine.load_optimizer_state(state["optimizers"][name])
            for group in self.optimizers[name].param_groups:
                group["capturable"] = self._device.type == "cuda"  # of this device, not of the one that saved

    @torch.no_grad()
    def update_ema(self, images_seen: int) -> None:
        """Move the average of G by one iteration.

        Args:
            images_seen: real images of all ranks before this iteration.
        """
        config = self._config
        decay = ema_decay(config.batch, config.optimizer.ema_halflife_images, images_seen, config.optimizer.ema_rampup)
        if self._graphs is None:
            return self._move_ema(1.0 - decay)
        share = torch.tensor(1.0 - decay)
        self._graphs.run("ema", lambda inputs: self._move_ema(inputs["share"]), {"share": share})
        return None

    def _move_ema(self, share: float | Tensor) -> None:
        averages: list[Tensor] = list(self.ema.parameters())
        parameters: list[Tensor] = list(self.generator.parameters())
        if isinstance(share, Tensor):  # as lerp takes no scalar on the device for a list
            differences = torch._foreach_sub(parameters, averages)
            torch._foreach_mul_(differences, share)
            torch._foreach_add_(averages, differences)
        else:
            torch._foreach_lerp_(averages, parameters, share)
        for average, current in zip(self.ema.buffers(), self.generator.buffers(), strict=True):
            average.copy_(current)


@dataclass(frozen=True)
class _MicroBatch:
    """What is kept of a `PhaseResult`; detached."""

    terms: Mapping[str, Tensor]
    weights: Mapping[str, float | Tensor]
    observed: Mapping[str, Tensor]
    codes: tuple[Tensor, Tensor] | None


def _means(rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Means by name."""
    return {name: torch.stack([row[name] for row in rows]).mean() for name in rows[0]}


def _measured(terms: dict[str, Tensor], observed: dict[str, Tensor], finite: Tensor) -> Measured:
    values = torch.stack([x.float() for x in (*terms.values(), *observed.values())])
    parts = values.unbind()
    return Measured(
        terms=dict(zip(terms, parts, strict=False)),
        observed=dict(zip(observed, parts[len(terms) :], strict=True)),
        values=values,
        finite=finite,
    )


def _adam(network: nn.Module, learning_rate: float, lazy_ratio: float) -> torch.optim.Adam:
    """Adam of StyleGAN2 with betas (0, 0.99), scaled for a network that takes ``1 / lazy_ratio`` steps an iteration."""
    parameters = list(network.parameters())
    return torch.optim.Adam(
        parameters,
        lr=learning_rate * lazy_ratio,
        betas=(0.0, float(0.99**lazy_ratio)),
        fused=True,
        capturable=parameters[0].is_cuda,
    )


def uses_graphs(config: Config, device: torch.device) -> bool:
    """Whether steps are recorded as CUDA graphs, where the engines let them."""
    return config.cuda_graphs and device.type == "cuda" and has_triton()


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
