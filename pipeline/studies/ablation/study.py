"""A study of ablations: variants times seeds, each trained and evaluated once, and their tables."""

import contextlib
import hashlib
import json
import logging
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from data_shards.errors import UserError
from data_shards.parallel import num_cores
from pipeline.config import Config
from pipeline.config.files import config_from_dict, config_to_dict, merge
from pipeline.evaluation.evaluate import EvaluationOptions, evaluate
from pipeline.evaluation.features import INCEPTION, ImageMetric, WeightsUnavailableError, load_extractor
from pipeline.evaluation.pseudo_truth import FITTED, load_segmentation
from pipeline.evaluation.results import write_results, write_whole
from pipeline.generation.trained_run import open_run
from pipeline.runs.directory import check_same_run, is_finished
from pipeline.runs.locks import locked
from pipeline.runs.mlflow_mirror import prepare_store
from pipeline.runs.reproducible import make_repeatable
from pipeline.studies.ablation.pictures import comparison
from pipeline.studies.ablation.results import summarise
from pipeline.studies.ablation.tables import to_latex, to_markdown
from pipeline.studies.ablation.variants import VARIANTS, Variant, find_variants
from pipeline.studies.sweep.logs import last_line, logged
from pipeline.training.interrupt import Interrupt
from pipeline.training.run import train
from pipeline.training.trainer import make_accelerator

logger = logging.getLogger(__name__)

NAMES = tuple(variant.name for variant in VARIANTS)
TRIAL, ITERATION = "trial", "iteration"


@dataclass(frozen=True)
class AblationOptions:
    """What to train and how to evaluate it. Each field is an option of the command line."""

    tree: Annotated[Config, tyro.conf.arg(name="")]
    """The configuration of all trials; each has a seed and a run directory of its own."""
    config: Path | None = None
    """YAML file of overrides, complete or partial; every run saves one."""
    variants: tuple[str, ...] = NAMES
    """Which to train: full, no-fine-mask, no-participation, no-consistency, no-dual-fake-input, no-mask-predictor."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Each variant is trained once with each. Verdicts need two or more."""
    out: Path | None = None
    """Directory of the study; runs/ablation-DATASET by default. One that holds a study resumes it."""
    num_parallel: int | None = None
    """Trials at a time; one a GPU by default, and one without. They share the cores."""
    num_samples: int = 5000
    """Samples to generate in each evaluation; the paper has 50,000."""
    psi: float = 1.0
    """Truncation of the evaluation."""
    pseudo_gt: str | None = None
    """Pseudo ground truth, as for pipeline/evaluate.py; by default fitted, where the shards carry alpha."""
    features: str = INCEPTION
    """Feature extractor of the Fréchet distance, as for pipeline/evaluate.py; random-vgg16 needs no download."""
    inception_weights: Path | None = None
    """File of torch-fidelity's Inception weights; downloaded by default. Without them all else is measured."""

    def __post_init__(self) -> None:
        find_variants(self.variants)
        for name, values in (("variants", self.variants), ("seeds", self.seeds)):
            if not values or len(set(values)) < len(values):
                raise UserError(f"--{name} {' '.join(map(str, values))}: give one or more, each once")
        if not math.isfinite(self.psi):
            raise UserError(f"--psi {self.psi} is invalid: give a number")
        for name, value, low in (("num-parallel", self.num_parallel, 1), ("num-samples", self.num_samples, 2)):
            if value is not None and value < low:
                raise UserError(f"--{name} {value} is invalid: give {low} or more")


@dataclass(frozen=True)
class Trial:
    """One training of one variant, and its evaluation.

    Attributes:
        variant: that is trained.
        config: with the trial's own seed and run directory.
        evaluation: how it is evaluated, and where the results go.
    """

    variant: Variant
    config: Config
    evaluation: EvaluationOptions

    @property
    def run_dir(self) -> Path:
        """Of the training."""
        assert self.config.run_dir is not None
        return self.config.run_dir

    def is_trained(self) -> bool:
        """Whether the training has come to its end.

        Raises:
            UserError: it went beyond.
        """
        return is_finished(self.config, self.run_dir)

    @property
    def log(self) -> Path:
        """What it printed."""
        return self.run_dir / "trial.log"

    @property
    def _results(self) -> Path:
        assert self.evaluation.out is not None
        return self.evaluation.out / "evaluation.json"

    def is_done(self) -> bool:
        """Whether it is trained and evaluated."""
        return self.is_trained() and self._results.is_file()

    def results(self) -> dict[str, Any]:
        """Of the evaluation."""
        results: dict[str, Any] = json.loads(self._results.read_text())
        return results


def study(options: AblationOptions, out: Path) -> None:
    """Run what has not been run yet, and write what all trials say."""
    measured = _measured(options)
    num_parallel = options.num_parallel or torch.cuda.device_count() or 1
    num_threads = options.tree.num_threads or max(1, num_cores() // num_parallel)
    trials = make_trials(options, out, measured, num_threads)
    for trial in trials:
        check_same_run(trial.config, trial.run_dir)
    with locked(out, "study"):
        if left := [trial for trial in trials if not trial.is_done()]:
            prepare_store(options.tree)
            _run(left, out, num_parallel, num_threads)
        if done := [trial for trial in trials if trial.is_done()]:
            _publish(done, options, out)
    failed = [trial for trial in trials if not trial.is_done()]
    for trial in failed:
        logger.warning("%s failed: %s", trial.run_dir.name, last_line(trial.log))
    if failed:
        raise UserError(
            f"{len(failed)} of {len(trials)} trials failed, see {', '.join(str(trial.log) for trial in failed)}"
        )


def make_trials(options: AblationOptions, out: Path, measured: EvaluationOptions, num_threads: int) -> list[Trial]:
    """All trials, seed by seed: what is there early compares all variants.

    Args:
        options: of the study.
        out: its directory.
        measured: how all are evaluated; of another run.
        num_threads: of a trial.
    """
    trials = []
    for seed in options.seeds:
        for variant in find_variants(options.variants):
            own = {"seed": seed, "run_dir": str(out / f"{variant.name}-seed{seed}"), "num_threads": num_threads}
            config = config_from_dict(merge(merge(config_to_dict(options.tree), dict(variant.overrides)), own))
            assert config.run_dir is not None
            asked = json.dumps([config.steps, asdict(measured)], default=str).encode()
            results = config.run_dir / "evaluation" / f"ablation-{hashlib.sha256(asked).hexdigest()[:8]}"
            evaluation = replace(measured, run=config.run_dir, out=results, num_threads=num_threads)
            trials.append(Trial(variant, config, evaluation))
    return trials


def _measured(options: AblationOptions) -> EvaluationOptions:
    """How all trials are evaluated."""
    if options.pseudo_gt not in (None, FITTED):
        load_segmentation(options.pseudo_gt, torch.device("cpu"))  # a mistake must not wait for the training
    metrics: tuple[ImageMetric, ...] = ("fid",)
    try:  # once, and not by several trials at a time: it may download
        load_extractor(options.features, options.inception_weights, torch.device("cpu"))
    except WeightsUnavailableError as error:
        logger.warning("no FID or other distance of images: %s", error)
        metrics = ()
    return EvaluationOptions(
        run=Path(),
        checkpoint="latest",
        num_samples=options.num_samples,
        psi=(options.psi,),
        pseudo_gt=None if options.pseudo_gt is None else (options.pseudo_gt,),
        image_metrics=metrics,
        features=options.features,
        inception_weights=options.inception_weights,
    )


def _run(trials: Sequence[Trial], out: Path, num_parallel: int, num_threads: int) -> None:
    """Run all that is left of some trials, side by side."""
    from pipeline.studies.sweep.runner import Resources, Study, Table, grid, num_at_a_time, ray_cluster

    resources = Resources(num_threads, 1.0 if torch.cuda.is_available() else 0.0)
    with tempfile.TemporaryDirectory() as state, ray_cluster(None):  # the run directories are the state
        Study(
            directory=Path(state),
            trainable=partial(run_trial, trials={trial.run_dir.name: trial for trial in trials}, cwd=Path.cwd()),
            space={TRIAL: grid([trial.run_dir.name for trial in trials])},
            num_samples=1,
            metric=None,
            resources=resources,
            num_parallel=min(num_parallel, num_at_a_time(resources)),
            table=Table({ITERATION: ITERATION}, [TRIAL], (ITERATION, trials[0].config.steps), len(trials)),
        ).run()


def run_trial(parameters: Mapping[str, str], trials: Mapping[str, Trial], cwd: Path) -> None:
    """Do what is left of a trial; Ray Tune calls it, in a directory of its own.

    Args:
        parameters: name the trial.
        trials: by name.
        cwd: that paths are relative to.
    """
    from ray import tune

    trial = trials[parameters[TRIAL]]
    # A user's mistake is in the log, and would be there again if Tune started the trial once more.
    with contextlib.chdir(cwd), contextlib.suppress(UserError), logged(trial.log):
        accelerator = make_accelerator(trial.config.collective_timeout_s)
        if not trial.is_trained():
            train(trial.config, accelerator, Interrupt(), lambda iteration, _: tune.report({ITERATION: iteration}))
        make_repeatable(trial.config.num_threads)
        evaluate(trial.evaluation, accelerator)


def _publish(done: Sequence[Trial], options: AblationOptions, out: Path) -> None:
    """Write the files, and tell."""
    variants = find_variants(options.variants)
    results = summarise({v: [trial.results() for trial in done if trial.variant is v] for v in variants})
    markdown = to_markdown(results)
    write_results(results, out / "ablation.json")
    write_whole(out / "tables.md", markdown)
    write_whole(out / "tables.tex", to_latex(results))
    for seed in options.seeds:
        runs = {
            trial.variant.title: open_run(trial.run_dir, "latest", torch.device("cpu"))
            for trial in done
            if trial.config.seed == seed
        }
        if runs:
            grid = comparison(runs, seed=seed, num_columns=options.tree.log.grid_columns)
            grid.save(out / f"grid-seed{seed}.png")
    print(markdown)
    print(f"tables    {out / 'tables.md'}, tables.tex, ablation.json\npictures  {out / 'grid-seed*.png'}", flush=True)
