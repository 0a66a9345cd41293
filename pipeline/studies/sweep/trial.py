"""A trial of a sweep: the trainer itself on a changed configuration, in one Ray worker or in a group of them.

Its run directory is the record: a trial that Ray starts again, after a worker died or the whole sweep was killed, tells
what was measured before and resumes from its newest checkpoint.
"""

import math
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from ray import train as ray_train
from ray import tune
from ray.train.torch import TorchConfig, TorchTrainer
from ray.tune.integration.ray_train import TuneReportCallback

from data_shards.errors import UserError
from data_shards.files import whole_directory
from pipeline.config import Config
from pipeline.config.files import config_from_dict, config_to_dict, merge
from pipeline.runs.checkpoints import list_checkpoints
from pipeline.runs.directory import is_finished
from pipeline.runs.tracking import RunFiles
from pipeline.studies.sweep.logs import logged
from pipeline.studies.sweep.space import override
from pipeline.training.interrupt import Interrupt
from pipeline.training.run import train
from pipeline.training.trainer import make_accelerator

ITERATION = "iteration"
FAILED = "failed"
"""In a trial's last result: why it ended early."""

ORIGIN = "origin"
"""Beside a checkpoint that others may take over: file with the name of its run directory."""

Report = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Plan:
    """What all trials of a sweep share; sent to the workers.

    Attributes:
        tree: configuration that the parameters change, as by `config_to_dict`; its paths are absolute.
        directory: of the run directories; all machines see it.
        metric: name of the metric that decides.
        num_workers: processes of a trial; more than one are a Ray Train group.
        cpus: cores of a process.
        gpus: of a process, may be a share.
        hands_over: whether trials take over others' weights, as in population-based training.
    """

    tree: Mapping[str, Any]
    directory: Path
    metric: str
    num_workers: int
    cpus: int
    gpus: float
    hands_over: bool

    def config(self, parameters: Mapping[str, Any], run_dir: Path) -> Config:
        """Of a trial."""
        own = {"run_dir": str(run_dir), "num_threads": self.cpus}
        return override(config_from_dict(merge(dict(self.tree), own)), parameters)


def run_trial(parameters: dict[str, Any], plan: Plan) -> None:
    """Train a trial to its end; Ray Tune calls it, and may end its process at any measurement.

    Args:
        parameters: fields of the configuration by dotted name.
        plan: of the sweep.
    """
    trial_id = tune.get_context().get_trial_id()
    run_dir = newest_run_dir(plan.directory, trial_id)
    if plan.hands_over:
        run_dir = _take_over(run_dir, trial_id)
    config = plan.config(parameters, run_dir)
    for row in measured_rows(config, plan.metric):  # Tune has forgotten those of an earlier start
        tune.report(row)
    if is_finished(config, run_dir):
        return
    if plan.num_workers == 1:
        _train({"config": config_to_dict(config), "plan": plan, "report": _reporter(plan, run_dir)})
        return
    TorchTrainer(
        _train,
        train_loop_config={"config": config_to_dict(config), "plan": plan, "report": ray_train.report},
        torch_config=TorchConfig(backend="nccl" if plan.gpus else "gloo"),
        scaling_config=ray_train.ScalingConfig(
            num_workers=plan.num_workers,
            use_gpu=plan.gpus > 0,
            resources_per_worker={"CPU": plan.cpus, **({"GPU": plan.gpus} if plan.gpus else {})},
        ),
        run_config=ray_train.RunConfig(
            name=run_dir.name, storage_path=str(plan.directory / "ray"), callbacks=[TuneReportCallback()]
        ),
    ).fit()


def _train(given: dict[str, Any]) -> None:
    """What each process of a trial does."""
    config, plan, report = config_from_dict(given["config"]), given["plan"], given["report"]
    if not plan.gpus:
        os.environ["ACCELERATE_USE_CPU"] = "1"  # else accelerate would start CPU ranks by MPI's variables alone
    torch.set_num_threads(plan.cpus)

    def on_measured(iteration: int, measured: dict[str, float]) -> None:
        report({ITERATION: iteration, **{n: v if math.isfinite(v) else 0.0 for n, v in measured.items()}})

    assert config.run_dir is not None
    try:
        with logged(config.run_dir / "trial.log"):
            train(config, make_accelerator(config.collective_timeout_s), Interrupt(), on_measured)
    except UserError as error:  # it would come again: a loss that is not finite, a bad shard
        report({FAILED: str(error), plan.metric: 0.0})


def newest_run_dir(directory: Path, trial_id: str) -> Path:
    """Of a trial; it begins a new one each time that it takes over another trial's weights."""
    first = directory / f"trial-{trial_id}"
    later = sorted(directory.glob(f"{first.name}-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    return later[-1] if later else first


def measured_rows(config: Config, metric: str) -> list[dict[str, Any]]:
    """What a run has measured so far, as it was reported."""
    assert config.run_dir is not None
    return [
        {ITERATION: row.images_seen // config.batch, **row.metrics}
        for row in RunFiles(config.run_dir).rows()
        if metric in row.metrics
    ]


def _reporter(plan: Plan, run_dir: Path) -> Report:
    """How a trial in this process tells what it measured; with its weights, where others may take them over."""
    if not plan.hands_over:
        report: Report = tune.report
        return report

    def report_with_weights(result: dict[str, Any]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            for path in list_checkpoints(run_dir / "checkpoints")[:1]:
                shutil.copy(path, folder)
            (Path(folder) / ORIGIN).write_text(run_dir.name)
            tune.report(result, checkpoint=tune.Checkpoint.from_directory(folder))

    return report_with_weights


def _take_over(run_dir: Path, trial_id: str) -> Path:
    """A new run directory, with the checkpoint that Tune gives; where that is the trial's own, it just resumes."""
    given = tune.get_checkpoint()
    if given is None:
        return run_dir
    with given.as_directory() as folder:
        if (Path(folder) / ORIGIN).read_text() == run_dir.name:
            return run_dir
        number = run_dir.name.removeprefix(f"trial-{trial_id}").removeprefix("-") or "1"
        new = run_dir.with_name(f"trial-{trial_id}-{int(number) + 1}")
        with whole_directory(new) as partial:
            (partial / "checkpoints").mkdir()
            for path in list_checkpoints(Path(folder)):
                shutil.copy(path, partial / "checkpoints")
    return new
