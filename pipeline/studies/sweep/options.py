"""The options of a sweep, and the file in which it keeps them."""

import math
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro
import yaml

from data_shards.errors import UserError
from pipeline.config import Config
from pipeline.config.files import load_config
from pipeline.runs.directory import write_config
from pipeline.runs.saving import saving

SWEEP_FILE = "sweep.yaml"


@dataclass(frozen=True)
class SweepOptions:
    """What to search, and with what. Each field is an option of the command line."""

    tree: Annotated[Config, tyro.conf.arg(name="")]
    """The configuration that is searched around; --steps is that of the full training afterwards."""
    config: Path | None = None
    """YAML file of overrides, complete or partial; every run saves one."""
    resume: Path | None = None
    """Directory of a sweep to resume, as it was begun."""
    num_trials: int = 8
    """Trainings."""
    trial_steps: int | None = None
    """Iterations of each; 600 for furballs, 30,000 otherwise."""
    search: Annotated[tuple[str, ...], tyro.conf.arg(metavar="FIELD=DISTRIBUTION ...")] = ()
    """What is searched besides or instead: loss.phi1=uniform(0.1,0.5), loss.r1=loguniform(0.1,10),
    loss.fade_in_iterations=randint(100,5000), optimizer.learning_rate=choice(0.001,0.002). FIELD=none leaves out one of
    those that are searched by default: loss.phi1, .phi2, .binarization_start, .binarization_end,
    .binarization_iterations."""
    metric: Literal["auto", "mask/miou", "unlabelled/score"] = "auto"
    """What decides. auto: the masks' mIoU where the shards carry alpha, else a score that needs no labels
    (docs/objective.md)."""
    scheduler: Literal["asha", "pbt", "none"] = "asha"
    """asha ends poor trials early; pbt (population-based training) lets them take over the weights of good ones, with
    other R1 weights and binarization floors; none lets all train to their end."""
    searcher: Literal["random", "optuna"] = "random"
    """Who chooses parameters: chance, or Optuna by the trials before."""
    gpus_per_trial: float | None = None
    """GPUs of each process of a trial, may be a share such as 0.5; 1 by default, 0 where there are none."""
    cpus_per_trial: int | None = None
    """Cores of each process of a trial; its share of the machine by default."""
    workers_per_trial: int = 1
    """Processes that train one trial together, as a Ray Train group."""
    num_parallel: int | None = None
    """Most trials at a time; as many as there is room for by default."""
    address: str | None = None
    """Of a Ray cluster, or auto for the one on this machine; by default Ray runs inside this command."""
    out: Path | None = None
    """Directory of the sweep; runs/sweep-DATASET-TIME by default."""

    def __post_init__(self) -> None:
        for name, value, low in (
            ("num-trials", self.num_trials, 1),
            ("trial-steps", self.trial_steps, 1),
            ("cpus-per-trial", self.cpus_per_trial, 1),
            ("workers-per-trial", self.workers_per_trial, 1),
            ("num-parallel", self.num_parallel, 1),
        ):
            if value is not None and value < low:
                raise UserError(f"--{name} {value} is invalid: give {low} or more")
        if self.gpus_per_trial is not None and not (math.isfinite(self.gpus_per_trial) and self.gpus_per_trial >= 0):
            raise UserError(f"--gpus-per-trial {self.gpus_per_trial} is invalid: give 0 or more")
        if self.scheduler == "pbt" and self.workers_per_trial > 1:
            raise UserError("--scheduler pbt moves weights between single processes: leave out --workers-per-trial")
        if self.scheduler == "pbt" and self.searcher == "optuna":
            raise UserError("--scheduler pbt searches by itself: leave out --searcher optuna")


def save_options(options: SweepOptions, out: Path) -> None:
    """Write what `--resume` needs.

    Raises:
        SaveError: it cannot be.
    """
    values = {k: v for k, v in asdict(options).items() if k not in ("tree", "config", "resume", "out")}
    values["search"] = list(options.search)
    with saving(out / SWEEP_FILE) as temporary:
        temporary.write_text(yaml.safe_dump(values, sort_keys=False))
    write_config(options.tree, out)


def saved_options(options: SweepOptions) -> SweepOptions:
    """Those that a sweep was begun with."""
    assert options.resume is not None
    if len(sys.argv[1:]) > 2:
        raise UserError("a sweep resumes as it was begun: give --resume DIRECTORY alone")
    path = options.resume / SWEEP_FILE
    if not path.is_file():
        raise UserError(f"--resume {options.resume}: there is no {SWEEP_FILE} in it, so it is no sweep")
    values = load_config(path)
    tree = replace(options.tree, run_dir=None)
    return SweepOptions(**values | {"search": tuple(values["search"])}, tree=tree, resume=options.resume)
