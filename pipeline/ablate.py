"""Train and evaluate the method without each of its parts: Table 1 and figures 7 and 8 of the paper.

python pipeline/ablate.py                                               # on furballs
python pipeline/ablate.py --dataset ffhq --data shards/ffhq --seeds 0 --num-parallel 8 --num-samples 50000
python pipeline/ablate.py --steps 500 --variants full no-dual-fake-input
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import math
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from data_shards.command import run_command
from data_shards.errors import UserError
from data_shards.parallel import num_cores
from data_shards.progress import progress_bar
from pipeline.ablation.pictures import comparison
from pipeline.ablation.results import summarise
from pipeline.ablation.tables import to_latex, to_markdown
from pipeline.ablation.variants import VARIANTS, Variant, find_variants
from pipeline.cli import parse_arguments
from pipeline.config import Config
from pipeline.config_io import config_from_dict, config_to_dict, merge
from pipeline.evaluation.features import INCEPTION, WeightsUnavailableError, load_extractor
from pipeline.evaluation.pseudo_truth import FITTED, load_segmentation
from pipeline.evaluation.results import write_results, write_whole
from pipeline.interrupt import Interrupt
from pipeline.jobs import Job, run_jobs
from pipeline.mlflow_mirror import prepare_store
from pipeline.run_directory import check_same_run, write_config
from pipeline.trained import open_run

logger = logging.getLogger(__name__)

DESCRIPTION = "Train and evaluate the method, and the method without each of its parts, over several seeds."
NAMES = tuple(variant.name for variant in VARIANTS)


@dataclass(frozen=True)
class Arguments:
    """What the command line says."""

    tree: Annotated[Config, tyro.conf.arg(name="")]
    """The configuration of all trials; each has a seed and a run directory of its own."""
    config: Path | None = None
    """YAML file of overrides, complete or partial; every run saves one."""
    variants: tuple[str, ...] = NAMES
    """Which to train: full, no-fine-mask, no-participation, no-consistency, no-dual-fake-input, no-mask-predictor."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Each variant is trained once with each. Verdicts need two or more."""
    out: Path | None = None
    """Directory of the study; runs/ablation-DATASET by default. One that holds a study goes on with it."""
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
            raise UserError(f"--psi {self.psi} is impossible: give a number")
        for name, value, low in (("num-parallel", self.num_parallel, 1), ("num-samples", self.num_samples, 2)):
            if value is not None and value < low:
                raise UserError(f"--{name} {value} is impossible: give {low} or more")


@dataclass(frozen=True)
class Trial:
    """One training of one variant, and its evaluation.

    Attributes:
        variant: that is trained.
        config: with the trial's own seed and run directory.
        evaluation: directory of its results.
    """

    variant: Variant
    config: Config
    evaluation: Path

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
        path = self.run_dir / "summary.json"
        iterations = json.loads(path.read_text())["iterations"] if path.is_file() else 0
        if iterations > self.config.steps:
            raise UserError(
                f"{self.run_dir} is trained to iteration {iterations}, beyond --steps {self.config.steps}: "
                "choose another --out, or as many --steps"
            )
        return bool(iterations == self.config.steps)

    def is_evaluated(self) -> bool:
        """Whether the results are there."""
        return (self.evaluation / "evaluation.json").is_file()

    def results(self) -> dict[str, Any]:
        """Of the evaluation."""
        results: dict[str, Any] = json.loads((self.evaluation / "evaluation.json").read_text())
        return results


def main() -> None:
    """Study as the command line says."""
    arguments = parse_arguments(Arguments, DESCRIPTION)
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    out = arguments.out or Path("runs") / f"ablation-{arguments.tree.dataset}"
    with Interrupt():
        study(arguments, out)


def study(arguments: Arguments, out: Path) -> None:
    """Run what has not been run yet, and write what all trials say."""
    evaluation = _evaluation_arguments(arguments)
    num_parallel = arguments.num_parallel or torch.cuda.device_count() or 1
    num_threads = arguments.tree.num_threads or max(1, num_cores() // num_parallel)
    trials = make_trials(arguments, out, evaluation, num_threads)
    for trial in trials:
        check_same_run(trial.config, trial.run_dir)
    with _locked(out) as lock:
        left = [trial for trial in trials if not (trial.is_trained() and trial.is_evaluated())]
        if left:
            prepare_store(arguments.tree)
        jobs = [_job(trial, evaluation, num_threads) for trial in left]
        failed = _run(jobs, len(trials), _environments(num_parallel), lock)
        done = [trial for trial in trials if trial.is_trained() and trial.is_evaluated()]
        if done:
            _publish(done, arguments, out)
    if failed:
        raise UserError(f"{len(failed)} of {len(trials)} trials failed, see {', '.join(map(str, failed))}")


def make_trials(arguments: Arguments, out: Path, evaluation: Sequence[str], num_threads: int) -> list[Trial]:
    """All trials, seed by seed: what is there early compares all variants."""
    trials = []
    for seed in arguments.seeds:
        for variant in find_variants(arguments.variants):
            own = {"seed": seed, "run_dir": str(out / f"{variant.name}-seed{seed}"), "num_threads": num_threads}
            config = config_from_dict(merge(merge(config_to_dict(arguments.tree), dict(variant.overrides)), own))
            assert config.run_dir is not None
            asked = json.dumps([config.steps, *evaluation]).encode()
            name = f"ablation-{hashlib.sha256(asked).hexdigest()[:8]}"
            trials.append(Trial(variant, config, config.run_dir / "evaluation" / name))
    return trials


def _evaluation_arguments(arguments: Arguments) -> list[str]:
    """For pipeline/evaluate.py, the same for all trials."""
    options = ["--checkpoint", "latest", "--num-samples", f"{arguments.num_samples}", "--psi", f"{arguments.psi}"]
    if arguments.pseudo_gt is not None:
        if arguments.pseudo_gt != FITTED:
            load_segmentation(arguments.pseudo_gt, torch.device("cpu"))  # a mistake must not wait for the training
        options += ["--pseudo-gt", arguments.pseudo_gt]
    try:  # once, and not by several trials at a time: it may download
        load_extractor(arguments.features, arguments.inception_weights, torch.device("cpu"))
    except WeightsUnavailableError as error:
        logger.warning("no FID or other distance of pictures: %s", error)
        return [*options, "--image-metrics"]
    options += ["--image-metrics", "fid", "--features", arguments.features]
    if arguments.inception_weights is not None:
        options += ["--inception-weights", str(arguments.inception_weights)]
    return options


def _job(trial: Trial, evaluation: Sequence[str], num_threads: int) -> Job:
    """What is left to do of a trial."""
    here = Path(__file__).parent
    commands: list[tuple[str, ...]] = []
    if not trial.is_trained():
        write_config(trial.config, trial.run_dir)
        commands.append((sys.executable, str(here / "train.py"), "--resume", str(trial.run_dir)))
    options = ("--run", str(trial.run_dir), "--out", str(trial.evaluation), "--num-threads", str(num_threads))
    commands.append((sys.executable, str(here / "evaluate.py"), *options, *evaluation))
    return Job(trial.run_dir.name, tuple(commands), trial.run_dir / "trial.log")


def _environments(num_parallel: int) -> list[dict[str, str]]:
    """Of the trials at work: each has one of the GPUs."""
    patient = {"OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE")}  # trials share cores
    if (num_gpus := torch.cuda.device_count()) < 2:
        return [patient] * num_parallel
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible else [str(i) for i in range(num_gpus)]
    return [patient | {"CUDA_VISIBLE_DEVICES": gpus[i % num_gpus]} for i in range(num_parallel)]


def _run(jobs: Sequence[Job], num_trials: int, environments: Sequence[dict[str, str]], lock: int) -> list[Path]:
    """Run all; the logs of those that failed."""
    failed = []
    bar = progress_bar(total=num_trials, initial=num_trials - len(jobs), desc="trials", unit="trial")
    with contextlib.closing(bar), contextlib.closing(run_jobs(jobs, environments, keep_open=[lock])) as ended:
        for job, code in ended:
            bar.update()
            if code:
                failed.append(job.log)
                logger.warning("%s failed with code %d: %s", job.name, code, _last_line(job.log))
    return failed


def _last_line(log: Path) -> str:
    """What a command said of its end: in one line, if it was a user's mistake."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "without a word"


def _publish(done: Sequence[Trial], arguments: Arguments, out: Path) -> None:
    """Write the files, and tell."""
    variants = find_variants(arguments.variants)
    results = summarise({v: [trial.results() for trial in done if trial.variant is v] for v in variants})
    markdown = to_markdown(results)
    write_results(results, out / "ablation.json")
    write_whole(out / "tables.md", markdown)
    write_whole(out / "tables.tex", to_latex(results))
    for seed in arguments.seeds:
        runs = {
            trial.variant.title: open_run(trial.run_dir, "latest", torch.device("cpu"))
            for trial in done
            if trial.config.seed == seed
        }
        if runs:
            grid = comparison(runs, seed=seed, num_columns=arguments.tree.log.grid_columns)
            grid.save(out / f"grid-seed{seed}.png")
    print(markdown)
    print(f"tables    {out / 'tables.md'}, tables.tex, ablation.json\npictures  {out / 'grid-seed*.png'}", flush=True)


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[int]:
    """Keep a second study out of the directory; the trials inherit the lock and may outlive a study that was killed."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / "study.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{out} is in use by another study, or by trials that a killed one left at work: "
                "wait for them, or choose another --out"
            ) from None
        yield file.fileno()


if __name__ == "__main__":
    run_command(main)
