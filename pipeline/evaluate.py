"""Measure a trained run as the paper measures: FID, masks against pseudo ground truth, matting errors, a report.

accelerate launch pipeline/evaluate.py --run runs/mine
accelerate launch pipeline/evaluate.py --run runs/mine --num-samples 50000 --psi 1.0 0.7 --pseudo-gt u2netp=u2netp.onnx
"""

import contextlib
import logging
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from data_shards.command import one_line_errors, run_command

import torch
import tyro
from accelerate import Accelerator
from accelerate.utils import gather_object

from data_shards.errors import UserError
from data_shards.reading.shard_set import ShardSet
from pipeline.evaluation.features import (
    INCEPTION,
    Extractor,
    ImageMetric,
    WeightsUnavailableError,
    load_extractor,
    needs_features,
)
from pipeline.evaluation.in_training import prepare_pseudo_truth
from pipeline.evaluation.mask_metrics import MaskMetrics
from pipeline.evaluation.measure import Plan, measure_generated, measure_real, real_statistics
from pipeline.evaluation.mlflow_run import log_to_mlflow
from pipeline.evaluation.pictures import RealPictures
from pipeline.evaluation.pseudo_truth import ALPHA, FITTED, Segmentation, load_segmentation
from pipeline.evaluation.report import render_report
from pipeline.evaluation.results import (
    as_metrics,
    describe,
    generated_figures,
    real_figures,
    write_results,
    write_whole,
)
from pipeline.evaluation.tables import to_latex, to_markdown
from pipeline.generation.trained_run import TrainedRun, open_run
from pipeline.runs.reproducible import make_repeatable
from pipeline.runs.shards import open_shards
from pipeline.training.trainer import make_accelerator

logger = logging.getLogger(__name__)

DESCRIPTION = "Measure a trained run as the paper measures: FID, masks against pseudo ground truth, matting errors."


@dataclass(frozen=True)
class Arguments:
    """What the command line says."""

    run: Annotated[Path, tyro.conf.arg(aliases=("--run-dir",))]
    """Run directory to evaluate; its checkpoints stay as they are. Under torchrun write --run-dir: it takes --run for
    an abbreviation of one of its own options."""
    checkpoint: str = "best"
    """best, latest, or a checkpoint file."""
    num_samples: int = 50_000
    """Samples to generate at each psi."""
    psi: tuple[float, ...] = (1.0, 0.7)
    """Truncations."""
    pseudo_gt: tuple[str, ...] | None = None
    """Pseudo ground truths: fitted, alpha, tracer-te7=FILE, bisenet=FILE, u2net=FILE, u2netp=FILE (.onnx or
    TorchScript), maskrcnn=FILE, huggingface=FOLDER, or module:name of your own. By default fitted, where the shards
    carry alpha."""
    image_metrics: Annotated[tuple[ImageMetric, ...], tyro.conf.arg(metavar="{fid,kid,prc} ...")] = ("fid", "kid")
    """Of foregrounds and composites against all training pictures; prc is generative precision and recall. None of
    them after a bare --image-metrics."""
    features: str = INCEPTION
    """Feature extractor: a name in torch-fidelity's registry, random-vgg16 (which needs no download), or module:name of
    your own."""
    inception_weights: Path | None = None
    """File of torch-fidelity's Inception weights; downloaded by default."""
    threshold: float = 0.5
    """Alpha above it is foreground."""
    seed: int | None = None
    """Of latents and noise; the run's own by default."""
    data: str | None = None
    """Shards that the run was trained on, if they lie elsewhere by now."""
    cache_dir: Path | None = None
    """Where statistics of real pictures, furballs and segmenters are kept; the run's own by default."""
    out: Path | None = None
    """Directory for the results; RUN/evaluation/CHECKPOINT-SAMPLES by default."""
    batch: int = 64
    """Samples at a time on a rank."""
    num_threads: int = 0
    """CPU threads of a process; 0 shares the cores among the processes of this machine."""

    def __post_init__(self) -> None:
        for name, value, low in (("num-samples", self.num_samples, 2), ("batch", self.batch, 1)):
            if value < low:
                raise UserError(f"--{name} {value} is impossible: give {low} or more")
        if self.num_threads < 0:
            raise UserError(f"--num-threads {self.num_threads} is impossible: give 0 or more")
        if not 0 <= self.threshold < 1:
            raise UserError(f"--threshold {self.threshold} is impossible: give 0 or more, and less than 1")
        if not self.psi or not all(math.isfinite(psi) for psi in self.psi) or len(set(self.psi)) < len(self.psi):
            raise UserError(f"--psi {' '.join(map(str, self.psi))}: give one or more numbers, each once")
        if self.seed is not None and not 0 <= self.seed < 2**32:
            raise UserError(f"--seed {self.seed} is impossible: give 0 to {2**32 - 1}")


PATIENCE_S = 1800.0
"""For the other ranks, which wait while one downloads weights or draws the report, seconds."""


def main() -> None:
    """Evaluate as the command line says."""
    with one_line_errors(passthrough=bool({"-h", "--help"} & set(sys.argv[1:]))):
        arguments = tyro.cli(Arguments, prog=Path(sys.argv[0]).name, description=DESCRIPTION)
    accelerator = make_accelerator(PATIENCE_S)
    logging.basicConfig(
        level=logging.INFO if accelerator.is_main_process else logging.ERROR, format="%(message)s", force=True
    )
    make_repeatable(arguments.num_threads)
    try:
        evaluate(arguments, accelerator)
    finally:
        accelerator.end_training()


def evaluate(arguments: Arguments, accelerator: Accelerator) -> None:
    """Measure, and write what was found."""
    run = _open(arguments, accelerator.device)
    with (
        contextlib.closing(open_shards(run.config, accelerator)) as shard_set,
        contextlib.closing(RealPictures(shard_set, num_threads=torch.get_num_threads())) as pictures,
    ):
        truths, fitted = _truths(arguments, run, shard_set, accelerator)
        extractor, missing = _extractor(arguments, accelerator)
        plan = Plan(
            run=run,
            num_samples=arguments.num_samples,
            batch=arguments.batch,
            seed=run.config.seed if arguments.seed is None else arguments.seed,
            threshold=arguments.threshold,
        )
        keep = needs_features(arguments.image_metrics)
        statistics = None
        if extractor is not None:
            statistics = real_statistics(
                shard_set, pictures, extractor, plan, run.config.cache_dir, accelerator, keep_features=keep
            )
        measured, figures = [], []
        for psi in arguments.psi:
            generated = measure_generated(plan, psi, truths, extractor, accelerator, keep_features=keep)
            if generated is not None:
                figures.append(
                    generated_figures(generated, statistics, extractor, arguments.image_metrics, seed=plan.seed)
                )
                measured.append(replace(generated, statistics={}))  # features of many samples are large
        others = {name: truth for name, truth in truths.items() if name != FITTED}
        real = measure_real(plan, shard_set, pictures, others, accelerator)
        if accelerator.is_main_process:
            results = describe(plan, shard_set, arguments.psi, extractor, missing) | {
                "generated": figures,
                "real": real_figures(real, fitted),
            }
            report = render_report(results, measured, plan, truths)
            _publish(results, report, arguments, run)


def _open(arguments: Arguments, device: torch.device) -> TrainedRun:
    run = open_run(arguments.run, arguments.checkpoint, device)
    config = run.config
    if arguments.data is not None:
        config = replace(config, data=arguments.data)
    if arguments.cache_dir is not None:
        config = replace(config, cache_dir=arguments.cache_dir)
    return replace(run, config=config)


def _truths(
    arguments: Arguments, run: TrainedRun, shard_set: ShardSet, accelerator: Accelerator
) -> tuple[dict[str, Segmentation], MaskMetrics | None]:
    """Pseudo ground truths by name, and the fitted segmenter's own figures."""
    specs = arguments.pseudo_gt
    if specs is None:
        specs = (FITTED,) if shard_set.has_alpha else ()
        if not specs:
            logger.warning("no masks are measured: the shards carry no alpha, and no --pseudo-gt is given")
    truths: dict[str, Segmentation] = {}
    fitted = None
    for spec in specs:
        if spec in (FITTED, ALPHA) and not shard_set.has_alpha:
            raise UserError(
                f"--pseudo-gt {spec} needs true alpha, and {shard_set.root} has none: give a network's file"
            )
        if spec == FITTED:
            prepared = prepare_pseudo_truth(
                shard_set, run.config, accelerator.device, progress=accelerator.is_main_process
            )
            truths[FITTED], fitted = prepared.segmenter, prepared.held_out
        elif spec != ALPHA:
            name, truth = load_segmentation(spec, accelerator.device)
            if name in truths:
                raise UserError(f"--pseudo-gt {spec}: there is another {name} already, give each kind once")
            truths[name] = truth
    return truths, fitted


def _extractor(arguments: Arguments, accelerator: Accelerator) -> tuple[Extractor | None, str | None]:
    """The feature extractor, or why there is none."""
    if not arguments.image_metrics:
        return None, None
    extractor, missing = None, None
    with accelerator.local_main_process_first():  # one of them downloads
        try:
            extractor = load_extractor(arguments.features, arguments.inception_weights, accelerator.device)
        except WeightsUnavailableError as error:
            missing = str(error)
    reasons: Sequence[str | None] = gather_object([missing])
    missing = next((reason for reason in reasons if reason), None)
    if missing:
        logger.warning("no FID, KID or other distance of pictures: %s", missing)
        return None, missing
    return extractor, None


def _publish(results: dict[str, Any], report: str, arguments: Arguments, run: TrainedRun) -> None:
    """Write the files, log them to MLflow, and tell."""
    name = f"iteration-{run.iteration}-samples-{arguments.num_samples}"
    out = arguments.out or run.run_dir / "evaluation" / name
    markdown = to_markdown(results)
    write_results(results, out / "evaluation.json")
    write_whole(out / "tables.md", markdown)
    write_whole(out / "tables.tex", to_latex(results))
    write_whole(out / "report.html", report)
    log_to_mlflow(run, as_metrics(results), sorted(out.iterdir()), f"evaluation/{name}")
    print(markdown)
    print(f"report   {out / 'report.html'}\nfigures  {out / 'evaluation.json'}, tables.md, tables.tex", flush=True)


if __name__ == "__main__":
    run_command(main, memory_remedy="give a smaller --batch")
