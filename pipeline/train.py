"""Train FurryGAN.

accelerate launch pipeline/train.py                                  # built-in data, minutes on a CPU
accelerate launch pipeline/train.py --dataset ffhq --data shards/ffhq
accelerate launch pipeline/train.py --resume runs/NAME
"""

import contextlib
import logging
import os
from collections.abc import Iterator

from data_shards.command import memory_errors, run_command

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from data_shards.errors import UserError
from data_shards.reading.loader import Loader, make_loader
from data_shards.reading.order import GROUP_SIZE
from data_shards.reading.shard_set import ShardSet
from pipeline.config import Config
from pipeline.config.command_line import parse_config
from pipeline.evaluation.in_training import prepare_pseudo_truth
from pipeline.methods.furrygan.scribbles import load_scribbles
from pipeline.ranks.lost_ranks import ranks_named
from pipeline.ranks.zero import check_installed
from pipeline.runs.checkpoints import BEST
from pipeline.runs.determinism import refusals_named
from pipeline.runs.directory import check_same_run, load_newest_whole, name_run, write_config, write_summary
from pipeline.runs.mlflow_mirror import hide_password, is_server, refuse_unknown_store
from pipeline.runs.saving import refuse_file_in_the_way
from pipeline.runs.shards import open_shards
from pipeline.runs.tracking import RunTracker, make_tracker
from pipeline.training.callbacks import Checkpoints, OnMeasured, Progress, SampleGrids, summarise
from pipeline.training.interrupt import Interrupt, Interrupted
from pipeline.training.trainer import Trainer, make_accelerator

logger = logging.getLogger(__name__)

MEMORY_REMEDY = "give --accumulate 2 or more, --recompute, or a smaller --batch"


def main() -> None:
    """Train as the command line says."""
    config = parse_config("Train FurryGAN: images and their alpha mattes, from pictures alone.")
    accelerator = make_accelerator(config.collective_timeout_s)
    logging.basicConfig(
        level=logging.INFO if accelerator.is_main_process else logging.ERROR, format="%(message)s", force=True
    )
    _set_num_threads(config, accelerator)
    config = broadcast_object_list([name_run(config)])[0]  # one time stamp for all ranks
    with Interrupt() as interrupt:
        try:
            train(config, accelerator, interrupt)
        finally:
            accelerator.end_training()


def train(
    config: Config, accelerator: Accelerator, interrupt: Interrupt, on_measured: OnMeasured | None = None
) -> None:
    """Run from the configuration's start, or from where its run directory stands, to its end.

    Args:
        config: with a run directory.
        accelerator: from `make_accelerator`.
        interrupt: stops it.
        on_measured: told of each measurement.

    Raises:
        Interrupted: before the end, after the last iteration was saved.
    """
    run_dir = config.run_dir
    assert run_dir is not None
    if config.backend == "deepspeed":
        check_installed()
    check_same_run(config, run_dir)
    refuse_file_in_the_way(config.cache_dir, "--cache-dir")
    refuse_unknown_store(config.log.tracking_uri)
    ranks = accelerator.num_processes
    if config.batch % (GROUP_SIZE * ranks * config.accumulate):
        parts = f" of {config.accumulate} micro-batches" if config.accumulate > 1 else ""
        raise UserError(
            f"batch {config.batch} does not divide among {ranks} processes{parts} in groups of {GROUP_SIZE}: "
            f"give a multiple of {GROUP_SIZE * ranks * config.accumulate}"
        )
    scribbled = None
    if config.scribbles is not None:
        scribbled = load_scribbles(config.scribbles, config.resolution, accelerator.device)
    with contextlib.closing(open_shards(config, accelerator)) as shard_set:
        loader = _make_loader(config, shard_set, accelerator)
        try:
            with ranks_named(config.heartbeat_timeout_s), memory_errors(MEMORY_REMEDY), refusals_named():
                trainer = Trainer(config, accelerator, loader, scribbled)
                _train_on(shard_set, trainer, config, accelerator, interrupt, on_measured)
        finally:
            shard_set.close()  # first: it ends what the loader's threads may be waiting for
            loader.close()


def _make_loader(config: Config, shard_set: ShardSet, accelerator: Accelerator) -> Loader:
    return make_loader(
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


def _train_on(
    shard_set: ShardSet,
    trainer: Trainer,
    config: Config,
    accelerator: Accelerator,
    interrupt: Interrupt,
    on_measured: OnMeasured | None,
) -> None:
    run_dir = config.run_dir
    assert run_dir is not None
    state = load_newest_whole(run_dir)
    if state is not None:
        trainer.load_state_dict(state)
        logger.info("going on at iteration %d of %s", trainer.iteration, run_dir)
    state = state or {}

    main_process = accelerator.is_main_process
    pseudo_truth = None
    if main_process:
        write_config(config, run_dir)
    if shard_set.has_alpha:
        pseudo_truth = prepare_pseudo_truth(shard_set, config, accelerator.device, progress=main_process)
        logger.info("pseudo ground truth: %s", _figures(pseudo_truth.held_out.named("segmenter")))
    judge = None
    if config.evaluation.unlabelled:
        from pipeline.evaluation.unlabelled import UnlabelledJudge  # imports torch-fidelity

        judge = UnlabelledJudge(shard_set, config.seed, accelerator.device)
    with _tracking(config, trainer, active=main_process) as tracker:
        checkpoints = Checkpoints(
            run_dir,
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
        progress = Progress(trainer, tracker)
        with contextlib.closing(progress), contextlib.closing(checkpoints):
            interrupt.deferred = True
            try:
                trainer.fit([progress, SampleGrids(trainer, tracker), checkpoints], interrupt)
            except Interrupted as end:
                checkpoints.on_interrupt(trainer)
                progress.close()
                saved = f"saved in {run_dir / 'checkpoints'}"
                if checkpoints.unsaved is not None:
                    saved = f"not saved ({checkpoints.unsaved})"
                logger.info(
                    "%s: stopped after iteration %d, %s; go on with --resume %s",
                    *(end.name, trainer.iteration, saved, run_dir),
                )
                raise
        if tracker is not None:
            checkpoints.refuse_unsaved()
            tracker.wait()
            summary = summarise(trainer, checkpoints, pseudo_truth)
            write_summary(summary, run_dir)
            tracker.close("FINISHED", summary)
            _tell(config, summary)


@contextlib.contextmanager
def _tracking(config: Config, trainer: Trainer, *, active: bool) -> Iterator[RunTracker | None]:
    """The main process's tracker; a run that breaks off is marked so."""
    if not active:
        yield None
        return
    assert config.run_dir is not None
    tracker = make_tracker(config, config.run_dir, iteration=trainer.iteration)
    try:
        yield tracker
    except SystemExit:  # interrupted, or ended by Ray Tune
        tracker.close("KILLED")
        raise
    except BaseException:
        tracker.close("FAILED")
        raise


def _set_num_threads(config: Config, accelerator: Accelerator) -> None:
    # `accelerate launch` sets OMP_NUM_THREADS to 1 where it is not told otherwise, which would idle all other cores.
    local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(config.num_threads or max(1, available // local_processes))


def _figures(metrics: dict[str, float]) -> str:
    return ", ".join(f"{name.split('/')[1]} {value:.3f}" for name, value in metrics.items())


def _tell(config: Config, summary: dict[str, float]) -> None:
    run_dir = config.run_dir
    assert run_dir is not None
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
        f"pictures         {run_dir / 'samples'}",
        f"best checkpoint  {run_dir / 'checkpoints' / BEST}",
        f"metrics          {run_dir / 'metrics.jsonl'}, {run_dir / 'summary.json'}",
    ]
    if (uri := config.log.tracking_uri) != "none":
        how = "" if is_server(uri) else "mlflow ui --backend-store-uri "
        lines.append(f"compare runs     {how}{hide_password(uri)}")
    print("\n".join(lines), flush=True)


if __name__ == "__main__":
    run_command(main, memory_remedy=MEMORY_REMEDY)
