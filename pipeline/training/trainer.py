"""The training loop over a learner, its data and its gradient synchronization. Callbacks observe it."""

import contextlib
import logging
import time
import warnings
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import nn
from torch.optim import Optimizer

from data_shards.errors import UserError
from data_shards.reading.batches import Loader
from data_shards.reading.order import rank_slots
from models.discriminator import Discriminator
from models.fused import has_triton
from models.generator import FurryGenerator
from pipeline.config import Config
from pipeline.methods.furrygan.phases import Phase, Scribbled
from pipeline.methods.schedules import is_due, linear_ramp
from pipeline.ranks.all_reduce import AllReduceEngine
from pipeline.ranks.collectives import Agreement, num_ranks
from pipeline.ranks.ddp import DdpEngine
from pipeline.ranks.drift import refuse_drift
from pipeline.ranks.engine import Engine
from pipeline.ranks.rendezvous import FRESH
from pipeline.ranks.zero import zero_engine
from pipeline.runs.saving import SaveError
from pipeline.training.interrupt import Interrupt, Interrupted
from pipeline.training.learner import Learner, Measured, uses_graphs
from pipeline.training.metric_meter import MetricMeter
from pipeline.training.trace import named, tracing

logger = logging.getLogger(__name__)

CHECKPOINT_VERSION = 1


class Callback(Protocol):
    """Looks at a run while it trains."""

    def on_step(self, trainer: "Trainer") -> None:
        """After each iteration, on every rank."""

    def on_end(self, trainer: "Trainer") -> None:
        """After the last iteration, on every rank; may be interrupted anywhere."""


class Trainer:
    """Trains G and D on one rank.

    Attributes:
        iteration: iterations done.
        learner: networks and optimizers.
        meter: what the phases measured since it was last read.
        seconds_waiting: time spent waiting for data.

    Args:
        config: of the run.
        accelerator: from `make_accelerator`.
        loader: of this rank's real images.
        scribbled: images with strokes on them; None for none.
    """

    def __init__(
        self, config: Config, accelerator: Accelerator, loader: Loader, scribbled: Scribbled | None = None
    ) -> None:
        self.config = config
        self.accelerator = accelerator
        self.loader = loader
        self.meter = MetricMeter()
        self.iteration = 0
        self.seconds_waiting = 0.0
        self.learner = Learner(config, accelerator.device, scribbled)
        self.learner.synchronise(self._make_engine)
        if (why := why_no_graphs(config, accelerator.device, triton=has_triton())) is not None:
            logger.info("no CUDA graphs: %s; the host starts each kernel, which is slower", why)
        self._agreement = Agreement(config.collective_timeout_s)
        self._slots = rank_slots(config.batch, accelerator.process_index, accelerator.num_processes)

    def _make_engine(self, network: nn.Module, optimizer: Optimizer) -> Engine:
        if self.config.backend == "deepspeed":
            return zero_engine(network, optimizer, self.config, self.accelerator.device)
        if uses_graphs(self.config, self.accelerator.device):
            return (Engine if num_ranks() == 1 else AllReduceEngine)(network, optimizer)
        return DdpEngine(network, optimizer, self.accelerator)

    @property
    def generator(self) -> FurryGenerator:
        """G, bare."""
        return self.learner.generator

    @property
    def discriminator(self) -> Discriminator:
        """D, bare."""
        return self.learner.discriminator

    @property
    def ema(self) -> FurryGenerator:
        """Average of G."""
        return self.learner.ema

    @property
    def images_seen(self) -> int:
        """Real images of all ranks so far."""
        return self.iteration * self.config.batch

    @property
    def fade_in(self) -> float:
        """Gamma of Eq. 3 at this moment."""
        return linear_ramp(self.iteration, 0.0, 1.0, self.config.loss.fade_in_iterations)

    def fit(self, callbacks: Sequence[Callback], interrupt: Interrupt) -> None:
        """Train to the configured number of iterations, or until a rank is interrupted.

        Raises:
            NonFiniteLossError: a loss term became NaN or infinite.
            DriftError: the ranks no longer hold the same weights.
            Interrupted: on all ranks after the same iteration, that of the signal or the next; after the last one, at
                once.
        """
        if (at := self.config.log.profile_at) is not None and at < self.iteration:
            logger.warning("iteration %d was done by an earlier process: this one writes no trace of it", at)
        while self.iteration < self.config.steps:
            with self._traced():
                self.step()
            if is_due(self.iteration, self.config.drift_interval):
                self.refuse_drift()
            for callback in callbacks:
                callback.on_step(self)
            if signal_number := self._agreement.greatest(interrupt.signal_number):
                self._agreement.last()
                raise Interrupted(signal_number)
        if signal_number := self._agreement.last():
            raise Interrupted(signal_number)
        with interrupt.at_once():
            for callback in callbacks:
                callback.on_end(self)

    def step(self) -> None:
        """One iteration: every phase that is due, then the EMA."""
        start = time.perf_counter()
        with named("data"):
            images = next(self.loader).images
        self.seconds_waiting += time.perf_counter() - start
        for phase in self.learner.phases:
            if is_due(self.iteration, phase.interval):
                self._measure(phase, self.learner.run(phase, self.iteration, images, self._slots))
        with named("ema"):
            self.learner.update_ema(self.images_seen)
        self.iteration += 1

    @contextlib.contextmanager
    def _traced(self) -> Iterator[None]:
        """Record a trace of the iteration inside, if it is the one to profile."""
        iteration, log = self.iteration, self.config.log
        if iteration != log.profile_at or not self.accelerator.is_main_process:
            yield
            return
        assert self.config.run_dir is not None
        path = self.config.run_dir / f"trace-{iteration}.json.gz"
        try:
            with tracing(path):
                yield
        except SaveError as error:
            if log.on_save_error == "stop":
                raise
            logger.warning("%s: training continues without the trace", error)
        else:
            logger.info("trace of iteration %d: %s, which ui.perfetto.dev opens", iteration, path)

    def refuse_drift(self) -> None:
        """Compare weights, buffers and average over the ranks.

        Raises:
            DriftError: on all ranks, where one differs.
        """
        networks = {"generator": self.generator, "discriminator": self.discriminator, "ema": self.ema}
        refuse_drift(networks, self._agreement, self.iteration)

    def _measure(self, phase: Phase, result: Measured) -> None:
        names = [f"loss/{phase.name}_{name}" for name in result.terms]
        self.meter.add((*names, *result.observed), result.values)

    def state_dict(self) -> dict[str, Any]:
        """All that training needs to resume exactly.

        Schedules and random numbers are functions of the iteration and the seed (see
        `pipeline/methods/randomness.py`), so those two are their state. All ranks call it; rank 0's is complete.

        Raises:
            NonFiniteLossError: training has broken since the last checkpoint.
        """
        return {
            "version": CHECKPOINT_VERSION,
            "iteration": self.iteration,
            "images_seen": self.images_seen,
            "seed": self.config.seed,
            **self.learner.state_dict(),
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
                "resume with the program that wrote it"
            )
        self.loader.load_state_dict(state["loader"])
        self.iteration = state["iteration"]
        self.learner.load_state_dict(state)


def why_no_graphs(config: Config, device: torch.device, *, triton: bool) -> str | None:
    """Why phases are not recorded as CUDA graphs although the run wants it; None where they are.

    Args:
        config: of the run.
        device: of this rank.
        triton: whether its GPU runs Triton kernels.
    """
    if device.type != "cuda" or not config.cuda_graphs:
        return None
    if config.backend == "deepspeed":
        return "DeepSpeed's hooks run on the host, so --backend deepspeed cannot be recorded"
    if not triton:
        return "they need Triton, a C compiler and a GPU of compute capability 8.0 or more"
    return None


def make_accelerator(collective_timeout_s: float) -> Accelerator:
    """The process group and device as `accelerate launch` set them up.

    Args:
        collective_timeout_s: seconds that a rank waits for another one.
    """
    # Every buffer is a function of what all ranks share: broadcasting them would only cost.
    ddp = DistributedDataParallelKwargs(broadcast_buffers=False)
    # torch has another name for it, which accelerate 1.15 cannot pass on.
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
    warnings.filterwarnings("ignore", "Grad strides do not match", UserWarning)  # in dimensions of size 1 alone
    group = InitProcessGroupKwargs(init_method=FRESH, timeout=timedelta(seconds=collective_timeout_s))
    return Accelerator(kwargs_handlers=[ddp, group])
