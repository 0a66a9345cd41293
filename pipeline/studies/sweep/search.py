"""The search of a sweep: preparation, trials, results."""

import contextlib
import logging
import sys
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import ray
from accelerate import Accelerator
from ray.tune.schedulers import ASHAScheduler, PopulationBasedTraining, TrialScheduler
from ray.tune.search import Searcher
from ray.tune.search.basic_variant import BasicVariantGenerator
from ray.tune.search.optuna import OptunaSearch

from data_shards.errors import UserError
from data_shards.parallel import num_cores
from data_shards.reading.shard_set import local_directory
from pipeline.config import Config
from pipeline.config.files import config_to_dict
from pipeline.evaluation.in_training import prepare_pseudo_truth
from pipeline.runs.locks import locked
from pipeline.runs.mlflow_mirror import absolute_uri
from pipeline.runs.reproducible import this_device
from pipeline.runs.shards import open_shards
from pipeline.studies.sweep.options import SweepOptions, save_options
from pipeline.studies.sweep.parent import ParentRun
from pipeline.studies.sweep.records import RecordTrials, read_records
from pipeline.studies.sweep.results import publish
from pipeline.studies.sweep.runner import Resources, Study, Table, num_at_a_time, ray_cluster
from pipeline.studies.sweep.space import MIOU, PBT_MUTATIONS, UNLABELLED, start_of, to_ray, trial_steps
from pipeline.studies.sweep.trial import ITERATION, Plan, run_trial

logger = logging.getLogger(__name__)

MEASUREMENTS = 5
"""Of a trial that may be ended early, at even distances, unless the configuration asks for more."""
GRACE = 2
"""Of these measurements pass before ASHA ends a trial: before that, masks say little about those of the end."""
REDUCTION = 2
"""ASHA lets one in so many continue at each measurement that counts."""
INTERRUPTED = 130
"""Exit code after Ctrl-C."""


class Search:
    """A sweep.

    Args:
        options: of the command line.
        space: fields with their distributions.
        out: directory of the sweep.
    """

    def __init__(self, options: SweepOptions, space: Mapping[str, str], out: Path) -> None:
        self._options = options
        self._space = space
        self._out = out
        self._trials = out / "trials"
        self._steps = options.trial_steps or trial_steps(options.tree.dataset)

    def run(self) -> None:
        """Run the trials that have not been run, and tell what all of them say.

        Raises:
            UserError: the data or the resources are invalid.
            SystemExit: after Ctrl-C.
        """
        options = self._options
        with ray_cluster(options.address):
            resources = self._resources()
            num_parallel = min(num_at_a_time(resources), options.num_parallel or sys.maxsize)
            tree, has_alpha = _prepared(options.tree)
            metric = self._metric(has_alpha)
            with locked(self._out, "sweep"):
                save_options(options, self._out)
                with contextlib.closing(ParentRun(options.tree, self._out, self._space)) as parent:
                    self._study(self._trial_tree(tree, parent), metric, resources, num_parallel).run()
                    records = read_records(self._trials)
                    publish(records, self._space, metric, options.tree, self._out, parent)
                    is_whole = len(records) == options.num_trials
                    parent.status = "FINISHED" if is_whole else "KILLED"
        if not is_whole:
            logger.info("%d of %d trials ended: resume with --resume %s", len(records), options.num_trials, self._out)
            raise SystemExit(INTERRUPTED)

    def _resources(self) -> Resources:
        """Of a trial."""
        options = self._options
        num_gpus = ray.cluster_resources().get("GPU", 0.0)
        gpus = options.gpus_per_trial
        if gpus is None:
            gpus = 1.0 if num_gpus else 0.0
        at_a_time = num_gpus // gpus if gpus else 4  # small enough for two on a laptop, and not one a core of a server
        cpus = options.cpus_per_trial or max(1, int(num_cores() // max(at_a_time, 1)))
        return Resources(cpus, gpus, options.workers_per_trial)

    def _metric(self, has_alpha: bool) -> str:
        metric = self._options.metric
        if metric == MIOU and not has_alpha:
            raise UserError(f"--metric {MIOU} needs ground-truth alpha, and the shards have none: leave it out")
        return metric if metric != "auto" else MIOU if has_alpha else UNLABELLED

    def _trial_tree(self, tree: Config, parent: ParentRun) -> Config:
        """The configuration of all trials, but for what is searched."""
        log = replace(tree.log, keep_checkpoints=1, tags={**tree.log.tags, **parent.tags_of_children})
        if self._options.scheduler != "none":
            every = max(tree.batch, self._steps * tree.batch // MEASUREMENTS)
            log = replace(
                log,
                checkpoint_interval_images=min(log.checkpoint_interval_images, every),
                grid_interval_images=min(log.grid_interval_images, every),
            )
        evaluation = replace(tree.evaluation, unlabelled=True)
        return replace(tree, steps=self._steps, run_dir=None, log=log, evaluation=evaluation)

    def _study(self, tree: Config, metric: str, resources: Resources, num_parallel: int) -> Study:
        options = self._options
        plan = Plan(
            tree=config_to_dict(tree),
            directory=self._trials.absolute(),
            metric=metric,
            num_workers=resources.num_workers,
            cpus=resources.cpus,
            gpus=resources.gpus,
            hands_over=options.scheduler == "pbt",
        )
        columns = {name: name for name in dict.fromkeys((ITERATION, metric, UNLABELLED))}
        return Study(
            directory=self._out,
            trainable=partial(run_trial, plan=plan),
            space=to_ray(self._space),
            num_samples=options.num_trials,
            metric=metric,
            resources=resources,
            num_parallel=num_parallel,
            table=Table(columns, list(self._space), (ITERATION, self._steps), options.num_trials),
            callbacks=[RecordTrials(plan.directory, self._steps)],
            scheduler=self._scheduler(),
            searcher=self._searcher(metric),
        )

    def _scheduler(self) -> TrialScheduler | None:
        every = max(1, self._steps // MEASUREMENTS)
        if self._options.scheduler == "asha":
            grace, beyond = min(GRACE * every, self._steps), self._steps + 1  # a trial that gets there ends by itself
            return ASHAScheduler(time_attr=ITERATION, max_t=beyond, grace_period=grace, reduction_factor=REDUCTION)
        if self._options.scheduler == "pbt":
            mutations = {field: domain for field, domain in to_ray(self._space).items() if field in PBT_MUTATIONS}
            return PopulationBasedTraining(
                time_attr=ITERATION,
                perturbation_interval=every,
                hyperparam_mutations=mutations,
            )
        return None

    def _searcher(self, metric: str) -> Searcher:
        """Begins with the configuration as it is, so that a sweep does not end below where it began."""
        first, seed = [start_of(self._space, self._options.tree)], self._options.tree.seed
        if self._options.searcher == "random":
            return BasicVariantGenerator(points_to_evaluate=first, random_state=seed)
        return OptunaSearch(metric=metric, mode="max", points_to_evaluate=first, seed=seed)


def _prepared(tree: Config) -> tuple[Config, bool]:
    """What trials need of the data is made once: furballs, the check of the shards, the fitted segmenter.

    Returns:
        The configuration with absolute paths, since trials work elsewhere; and whether the shards carry alpha.
    """
    accelerator = Accelerator(cpu=True)
    with contextlib.closing(open_shards(tree, accelerator)) as shard_set:
        has_alpha = shard_set.has_alpha
        if has_alpha:
            prepare_pseudo_truth(shard_set, tree, this_device(), progress=True)
    data = tree.data
    if data is not None and (directory := local_directory(data)) is not None:
        data = str(directory.absolute())
    return (
        replace(
            tree,
            data=data,
            verify_data=False,
            cache_dir=tree.cache_dir.absolute(),
            scribbles=None if tree.scribbles is None else tree.scribbles.absolute(),
            log=replace(tree.log, tracking_uri=absolute_uri(tree.log.tracking_uri)),
        ),
        has_alpha,
    )
