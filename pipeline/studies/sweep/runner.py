"""Running of many trials over Ray Tune, on this machine or on a Ray cluster."""

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Before Ray is imported: Tune's table, not its newer one, which cannot be added to; and no statistics sent anywhere.
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")  # the run directories have all of it

import ray
from ray import tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher

from data_shards.errors import UserError
from data_shards.parallel import num_cores

MAX_FAILURES = 2
"""Times that a trial is started again after its process died."""

STATE = "tune"
"""Folder of a study's directory in which Tune keeps how far it is."""

Trainable = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Resources:
    """What a trial takes.

    Attributes:
        cpus: cores of each of its processes.
        gpus: GPUs of each; may be a share.
        num_workers: its processes.
    """

    cpus: int
    gpus: float
    num_workers: int = 1

    def of_driver(self) -> dict[str, float]:
        """What the process takes that Tune starts: the trial itself, or what waits for its group of workers."""
        return {"CPU": self.cpus, "GPU": self.gpus} if self.num_workers == 1 else {"CPU": 0, "memory": 2**28}


@contextmanager
def ray_cluster(address: str | None) -> Iterator[None]:
    """Ray, embedded in this process, or a cluster that runs already.

    Args:
        address: of the cluster, or "auto"; None: embedded.

    Raises:
        UserError: there is no such cluster.
    """
    own = {"num_cpus": num_cores(), "include_dashboard": False} if address is None else {}
    try:
        ray.init(address or "local", log_to_driver=False, logging_level=logging.ERROR, **own)
    except (ConnectionError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"--address {address}: no Ray cluster answers ({reason}); start one, or leave it out") from None
    try:
        yield
    finally:
        ray.shutdown()


def num_at_a_time(resources: Resources) -> int:
    """How many trials the machines can run side by side.

    Raises:
        UserError: not even one.
    """
    each = {"CPU": float(resources.cpus), "GPU": resources.gpus}
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    for kind, option in (("GPU", "--gpus-per-trial"), ("CPU", "--cpus-per-trial")):
        most = max((machine.get(kind, 0.0) for machine in machines), default=0.0)
        if each[kind] > most:
            raise UserError(f"{option} {each[kind]:g} is invalid: no machine here has more than {most:g}")
    fitting = [
        min(int(machine.get(kind, 0.0) / amount + 1e-9) for kind, amount in each.items() if amount)
        for machine in machines
    ]
    if sum(fitting) < resources.num_workers:
        raise UserError(
            f"--workers-per-trial {resources.num_workers} is invalid: the machines here have room for {sum(fitting)}"
        )
    return sum(fitting) // resources.num_workers


class Table(tune.CLIReporter):  # type: ignore[misc]
    """Tune's table of the trials, with the time that is left.

    Args:
        columns: metrics to show, with their titles.
        parameters: that are searched.
        progress: the metric that counts, and how far a trial goes.
        num_trials: in all.
    """

    def __init__(
        self, columns: Mapping[str, str], parameters: Sequence[str], progress: tuple[str, int], num_trials: int
    ) -> None:
        titles = {name: name.rpartition(".")[2] for name in parameters}
        super().__init__(
            metric_columns=dict(columns), parameter_columns=titles, max_report_frequency=15, max_progress_rows=32
        )
        self._progress, self._num_trials = progress, num_trials
        self._start, self._before = 0.0, -1.0

    def setup(self, *args: Any, **kwargs: Any) -> None:
        """Tune calls it when trials begin, or resume."""
        super().setup(*args, **kwargs)
        self._start, self._before = time.monotonic(), -1.0

    def report(self, trials: list[Trial], done: bool, *sys_info: str) -> None:
        """Print."""
        name, end = self._progress
        ended = [trial for trial in trials if trial.is_finished()]
        share = sum(min(1.0, (t.last_result or {}).get(name, 0) / end) for t in trials if t not in ended)
        share = (share + len(ended)) / max(self._num_trials, len(trials))
        if self._before < 0:  # what a resumed study has behind it took none of this process's time
            self._before = share
        seconds = time.monotonic() - self._start
        left = "unknown"
        if share > self._before:
            left = f"{seconds * (1 - share) / (share - self._before) / 60:.0f} min"
        super().report(trials, done, f"{len(ended)} of {self._num_trials} trials ended, time left: {left}", *sys_info)


def grid(values: Sequence[Any]) -> Any:
    """All of some values, each once."""
    return tune.grid_search(list(values))


@dataclass(frozen=True)
class Study:
    """Trials to run.

    Attributes:
        directory: of the study; all machines see it.
        trainable: runs a trial, given its parameters.
        space: of the parameters, as Tune takes it: distributions, grids, plain values.
        num_samples: trials to draw; of a grid, how often it is gone through.
        metric: name of the metric to maximise; None where none decides.
        resources: of a trial.
        num_parallel: most trials at a time.
        table: shows how it goes.
        callbacks: told of the trials.
        scheduler: ends trials early, or moves them; None: all go to their end.
        searcher: chooses parameters; None for a space that leaves nothing to choose.
    """

    directory: Path
    trainable: Trainable
    space: Mapping[str, Any]
    num_samples: int
    metric: str | None
    resources: Resources
    num_parallel: int
    table: Table
    callbacks: Sequence[tune.Callback] = ()
    scheduler: TrialScheduler | None = None
    searcher: Searcher | None = None

    def run(self) -> None:
        """Run what has not been run; after Ctrl-C, trials are left that have not."""
        trainable = tune.with_resources(self.trainable, self.resources.of_driver())
        state = str((self.directory / STATE).absolute())
        if tune.Tuner.can_restore(state):
            tuner = tune.Tuner.restore(state, trainable, resume_unfinished=True, param_space=dict(self.space))
        else:
            tuner = self._new(trainable)
        tuner.fit()

    def _new(self, trainable: Any) -> tune.Tuner:
        return tune.Tuner(
            trainable,
            param_space=dict(self.space),
            tune_config=tune.TuneConfig(
                metric=self.metric,
                mode="max" if self.metric else None,
                num_samples=self.num_samples,
                max_concurrent_trials=self.num_parallel,
                scheduler=self.scheduler,
                search_alg=self.searcher,
                trial_dirname_creator=lambda trial: trial.trial_id,
            ),
            run_config=tune.RunConfig(
                name=STATE,
                storage_path=str(self.directory.absolute()),
                failure_config=tune.FailureConfig(max_failures=MAX_FAILURES),
                callbacks=list(self.callbacks),
                progress_reporter=self.table,
                verbose=1,  # the table, not every result
            ),
        )
