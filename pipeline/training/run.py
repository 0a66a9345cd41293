"""A training run from start to end: one function for each stage, in the order in which `train` calls them."""

import contextlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_shards.command import memory_errors

import torch
from accelerate import Accelerator

from data_shards.errors import UserError
from data_shards.reading.batches import Loader
from data_shards.reading.loader import make_loader
from data_shards.reading.order import GROUP_SIZE
from data_shards.reading.shard_set import ShardSet
from pipeline.config import Config
from pipeline.evaluation.in_training import PseudoTruth, prepare_pseudo_truth
from pipeline.methods.furrygan.scribbles import load_scribbles
from pipeline.ranks.lost_ranks import ranks_named
from pipeline.ranks.zero import check_installed
from pipeline.runs.checkpoints import BEST
from pipeline.runs.determinism import refusals_named
from pipeline.runs.directory import check_same_run, load_newest_whole, write_config, write_summary
from pipeline.runs.mlflow_mirror import hide_password, is_server, refuse_unknown_store
from pipeline.runs.saving import refuse_file_in_the_way
from pipeline.runs.shards import open_shards
from pipeline.runs.tracking import RunTracker, make_tracker
from pipeline.training.callbacks import Checkpoints, OnMeasured, Progress, SampleGrids, summarise
from pipeline.training.interrupt import Interrupt, Interrupted
from pipeline.training.trainer import Trainer

if TYPE_CHECKING:
    from pipeline.evaluation.unlabelled import UnlabelledJudge

logger = logging.getLogger(__name__)

MEMORY_REMEDY = "give --accumulate 2 or more, --recompute, or a smaller --batch"


def train(
    config: Config, accelerator: Accelerator, interrupt: Interrupt, on_measured: OnMeasured | None = None
) -> None:
    """Train from the configuration's start, or from the newest checkpoint in its run directory, to the end.

    Args:
        config: with a run directory.
        accelerator: from `make_accelerator`.
        interrupt: stops the training.
        on_measured: called with each measurement.

    Raises:
        Interrupted: before the end, after the last iteration was saved.
    """
    _check(config, accelerator.num_processes)
    scribbled = None
    if config.scribbles is not None:
        scribbled = load_scribbles(config.scribbles, config.resolution, accelerator.device)
    with _open_data(config, accelerator) as (shard_set, loader), _errors_named(config):
        trainer = Trainer(config, accelerator, loader, scribbled)
        state = _restore(trainer)
        if accelerator.is_main_process:
            write_config(config, _run_dir(config))
        pseudo_truth, judge = _prepare_judges(shard_set, config, accelerator)
        with _tracking(trainer) as tracker:
            checkpoints = _checkpoints(state, config, tracker, pseudo_truth, judge, on_measured)
            _fit(trainer, tracker, checkpoints, interrupt)
            if tracker is not None:
                _report(trainer, tracker, checkpoints, pseudo_truth)


def _run_dir(config: Config) -> Path:
    assert config.run_dir is not None
    return config.run_dir


def _check(config: Config, num_ranks: int) -> None:
    """Refuse what cannot train, before anything is opened."""
    if config.backend == "deepspeed":
        check_installed()
    check_same_run(config, _run_dir(config))
    refuse_file_in_the_way(config.cache_dir, "--cache-dir")
    refuse_unknown_store(config.log.tracking_uri)
    unit = GROUP_SIZE * num_ranks * config.accumulate
    if config.batch % unit:
        parts = f" of {config.accumulate} micro-batches" if config.accumulate > 1 else ""
        raise UserError(
            f"batch {config.batch} does not divide among {num_ranks} processes{parts} in groups of {GROUP_SIZE}: "
            f"give a multiple of {unit}"
        )


@contextlib.contextmanager
def _open_data(config: Config, accelerator: Accelerator) -> Iterator[tuple[ShardSet, Loader]]:
    """The shards, and a loader of this rank's images."""
    with contextlib.closing(open_shards(config, accelerator)) as shard_set:
        loader = make_loader(
            config.loader,
            shard_set,
            global_batch=config.batch,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            seed=config.seed,
            flip=config.flip,
            with_alpha=False,
            device=accelerator.device,
            num_threads=torch.get_num_threads(),
        )
        try:
            yield shard_set, loader
        finally:
            shard_set.close()  # first: it ends what the loader's threads may be waiting for
            loader.close()


@contextlib.contextmanager
def _errors_named(config: Config) -> Iterator[None]:
    """One line for a lost rank, a lack of memory, and an operation that is not deterministic."""
    with ranks_named(config.heartbeat_timeout_s), memory_errors(MEMORY_REMEDY), refusals_named():
        yield


def _restore(trainer: Trainer) -> Mapping[str, Any]:
    """Load the newest whole checkpoint of the run's directory, if there is one; returns its state."""
    run_dir = _run_dir(trainer.config)
    state = load_newest_whole(run_dir)
    if state is not None:
        trainer.load_state_dict(state)
        logger.info("resuming at iteration %d of %s", trainer.iteration, run_dir)
    return state or {}


def _prepare_judges(
    shard_set: ShardSet, config: Config, accelerator: Accelerator
) -> "tuple[PseudoTruth | None, UnlabelledJudge | None]":
    """What measures masks: the fitted segmenter, where shards carry alpha; a judge without labels, where asked for."""
    pseudo_truth, judge = None, None
    if shard_set.has_alpha:
        progress = accelerator.is_main_process
        pseudo_truth = prepare_pseudo_truth(shard_set, config, accelerator.device, progress=progress)
        logger.info("pseudo ground truth: %s", _figures(pseudo_truth.held_out.named("segmenter")))
    if config.evaluation.unlabelled:
        from pipeline.evaluation.unlabelled import UnlabelledJudge  # imports torch-fidelity

        judge = UnlabelledJudge(shard_set, config.seed, accelerator.device)
    return pseudo_truth, judge


@contextlib.contextmanager
def _tracking(trainer: Trainer) -> Iterator[RunTracker | None]:
    """The main process's tracker; a run that breaks off is marked so."""
    if not trainer.accelerator.is_main_process:
        yield None
        return
    tracker = make_tracker(trainer.config, _run_dir(trainer.config), iteration=trainer.iteration)
    try:
        yield tracker
    except SystemExit:  # interrupted, or ended by Ray Tune
        tracker.close("KILLED")
        raise
    except BaseException:
        tracker.close("FAILED")
        raise


def _checkpoints(
    state: Mapping[str, Any],
    config: Config,
    tracker: RunTracker | None,
    pseudo_truth: PseudoTruth | None,
    judge: "UnlabelledJudge | None",
    on_measured: OnMeasured | None,
) -> Checkpoints:
    """The callback that saves and measures, with what a former process of the run has measured."""
    checkpoints = Checkpoints(
        _run_dir(config),
        tracker,
        pseudo_truth,
        judge,
        best_miou=state.get("best_miou", 0.0),
        seconds_before=state.get("seconds", 0.0),
        saved_iteration=state.get("iteration", -1),
        measured_iteration=state.get("measured_iteration", state.get("iteration", -1)),
        on_measured=on_measured,
    )
    checkpoints.metrics = state.get("metrics", {})
    return checkpoints


def _fit(trainer: Trainer, tracker: RunTracker | None, checkpoints: Checkpoints, interrupt: Interrupt) -> None:
    """Train to the end. An interruption comes after an iteration, which is saved."""
    progress = Progress(trainer, tracker)
    with contextlib.closing(progress), contextlib.closing(checkpoints):
        interrupt.deferred = True
        try:
            trainer.fit([progress, SampleGrids(trainer, tracker), checkpoints], interrupt)
        except Interrupted as end:
            checkpoints.on_interrupt(trainer)
            progress.close()
            run_dir = _run_dir(trainer.config)
            saved = f"saved in {run_dir / 'checkpoints'}"
            if checkpoints.unsaved is not None:
                saved = f"not saved ({checkpoints.unsaved})"
            logger.info(
                "%s: stopped after iteration %d, %s; resume with --resume %s",
                *(end.name, trainer.iteration, saved, run_dir),
            )
            raise


def _report(trainer: Trainer, tracker: RunTracker, checkpoints: Checkpoints, pseudo_truth: PseudoTruth | None) -> None:
    """Write the summary, end the run in MLflow, and print what was reached and where it is."""
    checkpoints.refuse_unsaved()
    tracker.wait()
    summary = summarise(trainer, checkpoints, pseudo_truth)
    write_summary(summary, _run_dir(trainer.config))
    tracker.close("FINISHED", summary)
    print("\n".join(_summary_lines(trainer.config, summary)), flush=True)


def _figures(metrics: Mapping[str, float]) -> str:
    return ", ".join(f"{name.split('/')[1]} {value:.3f}" for name, value in metrics.items())


def _summary_lines(config: Config, summary: Mapping[str, float]) -> list[str]:
    run_dir = _run_dir(config)
    lines = [
        f"trained {summary['iterations']:.0f} iterations, {summary['images_seen']:.0f} images, "
        f"in {summary['seconds'] / 60:.1f} minutes ({summary['img_per_s']:.0f} img/s)",
    ]
    if "mask/miou" in summary:
        generated = {k: v for k, v in summary.items() if k.startswith("mask/")}
        real = {k: v for k, v in summary.items() if k.startswith("mask_pred_real/iou")}
        lines.append(f"masks of generated foregrounds: {_figures(generated)}")
        if real:
            lines.append(f"mask predictor on real images:  {_figures(real)}")
    lines += [
        f"images         {run_dir / 'samples'}",
        f"best checkpoint  {run_dir / 'checkpoints' / BEST}",
        f"metrics          {run_dir / 'metrics.jsonl'}, {run_dir / 'summary.json'}",
    ]
    if (uri := config.log.tracking_uri) != "none":
        how = "" if is_server(uri) else "mlflow ui --backend-store-uri "
        lines.append(f"compare runs     {how}{hide_password(uri)}")
    return lines
