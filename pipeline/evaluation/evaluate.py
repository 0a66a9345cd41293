"""The whole evaluation of a run: pseudo ground truths, features, figures, report."""

import contextlib
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

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
from pipeline.runs.shards import open_shards

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvaluationOptions:
    """What to evaluate, and how. Each field is an option of the command line."""

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
    """Of foregrounds and composites against all training images; prc is generative precision and recall. None of
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
    """Where statistics of real images, furballs and segmenters are kept; the run's own by default."""
    out: Path | None = None
    """Directory for the results; RUN/evaluation/CHECKPOINT-SAMPLES by default."""
    batch: int = 64
    """Samples at a time on a rank."""
    num_threads: int = 0
    """CPU threads of a process; 0 shares the cores among the processes of this machine."""

    def __post_init__(self) -> None:
        for name, value, low in (("num-samples", self.num_samples, 2), ("batch", self.batch, 1)):
            if value < low:
                raise UserError(f"--{name} {value} is invalid: give {low} or more")
        if self.num_threads < 0:
            raise UserError(f"--num-threads {self.num_threads} is invalid: give 0 or more")
        if not 0 <= self.threshold < 1:
            raise UserError(f"--threshold {self.threshold} is invalid: give 0 or more, and less than 1")
        if not self.psi or not all(math.isfinite(psi) for psi in self.psi) or len(set(self.psi)) < len(self.psi):
            raise UserError(f"--psi {' '.join(map(str, self.psi))}: give one or more numbers, each once")
        if self.seed is not None and not 0 <= self.seed < 2**32:
            raise UserError(f"--seed {self.seed} is invalid: give 0 to {2**32 - 1}")


def evaluate(options: EvaluationOptions, accelerator: Accelerator) -> None:
    """Measure, and write what was found."""
    run = _open(options, accelerator.device)
    with (
        contextlib.closing(open_shards(run.config, accelerator)) as shard_set,
        contextlib.closing(RealPictures(shard_set, num_threads=torch.get_num_threads())) as pictures,
    ):
        truths, fitted = _truths(options, run, shard_set, accelerator)
        extractor, missing = _extractor(options, accelerator)
        plan = Plan(
            run=run,
            num_samples=options.num_samples,
            batch=options.batch,
            seed=run.config.seed if options.seed is None else options.seed,
            threshold=options.threshold,
        )
        keep = needs_features(options.image_metrics)
        statistics = None
        if extractor is not None:
            statistics = real_statistics(
                shard_set, pictures, extractor, plan, run.config.cache_dir, accelerator, keep_features=keep
            )
        measured, figures = [], []
        for psi in options.psi:
            generated = measure_generated(plan, psi, truths, extractor, accelerator, keep_features=keep)
            if generated is not None:
                figures.append(
                    generated_figures(generated, statistics, extractor, options.image_metrics, seed=plan.seed)
                )
                measured.append(replace(generated, statistics={}))  # features of many samples are large
        others = {name: truth for name, truth in truths.items() if name != FITTED}
        real = measure_real(plan, shard_set, pictures, others, accelerator)
        if accelerator.is_main_process:
            results = describe(plan, shard_set, options.psi, extractor, missing) | {
                "generated": figures,
                "real": real_figures(real, fitted),
            }
            report = render_report(results, measured, plan, truths)
            _publish(results, report, options, run)


def _open(options: EvaluationOptions, device: torch.device) -> TrainedRun:
    run = open_run(options.run, options.checkpoint, device)
    config = run.config
    if options.data is not None:
        config = replace(config, data=options.data)
    if options.cache_dir is not None:
        config = replace(config, cache_dir=options.cache_dir)
    return replace(run, config=config)


def _truths(
    options: EvaluationOptions, run: TrainedRun, shard_set: ShardSet, accelerator: Accelerator
) -> tuple[dict[str, Segmentation], MaskMetrics | None]:
    """Pseudo ground truths by name, and the fitted segmenter's own figures."""
    specs = options.pseudo_gt
    if specs is None:
        specs = (FITTED,) if shard_set.has_alpha else ()
        if not specs:
            logger.warning("no masks are measured: the shards carry no alpha, and no --pseudo-gt is given")
    truths: dict[str, Segmentation] = {}
    fitted = None
    for spec in specs:
        if spec in (FITTED, ALPHA) and not shard_set.has_alpha:
            raise UserError(
                f"--pseudo-gt {spec} needs ground-truth alpha, and {shard_set.root} has none: give a network's file"
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


def _extractor(options: EvaluationOptions, accelerator: Accelerator) -> tuple[Extractor | None, str | None]:
    """The feature extractor, or why there is none."""
    if not options.image_metrics:
        return None, None
    extractor, missing = None, None
    with accelerator.local_main_process_first():  # one of them downloads
        try:
            extractor = load_extractor(options.features, options.inception_weights, accelerator.device)
        except WeightsUnavailableError as error:
            missing = str(error)
    reasons: Sequence[str | None] = gather_object([missing])
    missing = next((reason for reason in reasons if reason), None)
    if missing:
        logger.warning("no FID, KID or other distance of images: %s", missing)
        return None, missing
    return extractor, None


def _publish(results: dict[str, Any], report: str, options: EvaluationOptions, run: TrainedRun) -> None:
    """Write the files, log them to MLflow, and tell."""
    name = f"iteration-{run.iteration}-samples-{options.num_samples}"
    out = options.out or run.run_dir / "evaluation" / name
    markdown = to_markdown(results)
    write_results(results, out / "evaluation.json")
    write_whole(out / "tables.md", markdown)
    write_whole(out / "tables.tex", to_latex(results))
    write_whole(out / "report.html", report)
    log_to_mlflow(run, as_metrics(results), sorted(out.iterdir()), f"evaluation/{name}")
    print(markdown)
    print(f"report   {out / 'report.html'}\nfigures  {out / 'evaluation.json'}, tables.md, tables.tex", flush=True)
