"""Callbacks: progress, metrics, sample grids, mask metrics, checkpoints."""

import logging
import math
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from data_shards.errors import UserError
from data_shards.progress import progress_bar
from pipeline.config import LogConfig
from pipeline.evaluation.in_training import PseudoTruth, generated_mask_metrics, real_mask_prediction_metrics
from pipeline.evaluation.ranks import in_order
from pipeline.generation.sample_grid import Pictures, draw_grid, sample_column
from pipeline.methods.randomness import Stream, draw
from pipeline.methods.schedules import linear_ramp
from pipeline.ranks.collectives import num_ranks
from pipeline.runs.background import Background
from pipeline.runs.checkpoints import BEST, checkpoint_path, copy_to_host, prune_checkpoints, save_checkpoint
from pipeline.runs.saving import SaveError
from pipeline.runs.tracking import Tracker
from pipeline.training.costs import peak_flop_per_s
from pipeline.training.trainer import Trainer

if TYPE_CHECKING:
    from pipeline.evaluation.unlabelled import UnlabelledJudge

logger = logging.getLogger(__name__)

OnMeasured = Callable[[int, dict[str, float]], None]
"""Called on each rank with the iteration and what was measured, once that is on disk."""


def is_due_by_images(trainer: Trainer, interval_images: int) -> bool:
    """Whether the last step crossed a multiple of `interval_images`."""
    before = trainer.images_seen - trainer.config.batch
    return trainer.images_seen // interval_images > before // interval_images


class Progress:
    """A bar with ETA, and the means of all metrics at every log interval.

    Args:
        trainer: at the iteration where it resumes.
        tracker: takes the metrics on the main process; None elsewhere.
    """

    def __init__(self, trainer: Trainer, tracker: Tracker | None) -> None:
        self._tracker = tracker
        self._bar = progress_bar(
            total=trainer.config.steps,
            initial=trainer.iteration,
            desc="training",
            unit="step",
            disable=tracker is None,
            smoothing=0.05,
        )
        self._restart(trainer)

    def on_step(self, trainer: Trainer) -> None:
        self._bar.update()
        if is_due_by_images(trainer, trainer.config.log.metrics_interval_images):
            self._log(trainer)

    def close(self) -> None:
        self._bar.close()

    def on_end(self, trainer: Trainer) -> None:
        self._log(trainer)
        self._bar.close()

    def _log(self, trainer: Trainer) -> None:
        measured = trainer.meter.read(trainer.accelerator)
        if self._tracker is None or not measured:
            return
        loss = trainer.config.loss
        metrics = measured | {
            "schedule/fade_in": trainer.fade_in,
            "schedule/lambda_bin": linear_ramp(
                trainer.iteration, loss.binarization_start, loss.binarization_end, loss.binarization_iterations
            ),
            "memory/peak_bytes": float(peak_memory_bytes()),
            **self._speed(trainer),
        }
        self._tracker.log_metrics(metrics, iteration=trainer.iteration, images_seen=trainer.images_seen)
        self._bar.set_postfix(
            {
                "img/s": f"{metrics['speed/img_per_s']:.0f}",
                "G": f"{measured['loss/g_main_adversarial']:.2f}",
                "D": f"{measured['loss/d_main_adversarial']:.2f}",
                "mask": f"{measured['mask/area']:.2f}",
            },
            refresh=False,
        )
        self._restart(trainer)

    def _speed(self, trainer: Trainer) -> dict[str, float]:
        """Speeds since the last row: of the phases their own time, otherwise wall time, with all that lies between."""
        seconds = time.perf_counter() - self._since
        reading = trainer.learner.clock.read()
        flop_per_s = reading.flops / seconds  # of this rank; all compute as much
        peak = peak_flop_per_s(trainer.accelerator.device)
        return {
            "speed/img_per_s": (trainer.images_seen - self._images_before) / seconds,
            "speed/data_wait_share": (trainer.seconds_waiting - self._waiting_before) / seconds,
            "speed/tflop_per_s": flop_per_s * num_ranks() / 1e12,
            **({} if peak is None else {"speed/mfu": flop_per_s / peak}),
            **{f"speed/ms_{phase}": each * 1e3 for phase, each in reading.seconds.items()},
        }

    def _restart(self, trainer: Trainer) -> None:
        self._since = time.perf_counter()
        self._images_before = trainer.images_seen
        self._waiting_before = trainer.seconds_waiting


class SampleGrids:
    """Grids of the EMA's images from fixed latents; each rank makes some of the columns.

    Args:
        trainer: gives latent sizes and device.
        tracker: takes the grids; None on other processes.
    """

    def __init__(self, trainer: Trainer, tracker: Tracker | None) -> None:
        self._tracker = tracker
        self._draw = draw(
            trainer.config.seed,
            Stream.GRID,
            0,
            range(trainer.config.log.grid_columns),
            z_dim=trainer.generator.z_dim,
            num_noise=trainer.generator.num_noise,
            device=trainer.accelerator.device,
        )
        self._last = -1

    def on_step(self, trainer: Trainer) -> None:
        if is_due_by_images(trainer, trainer.config.log.grid_interval_images):
            self._make(trainer)

    def on_end(self, trainer: Trainer) -> None:
        if self._last != trainer.images_seen:
            self._make(trainer)

    def _make(self, trainer: Trainer) -> None:
        self._last = trainer.images_seen

        def make(columns: range) -> Pictures:
            at = slice(columns.start, columns.stop)
            return sample_column(trainer.ema, self._draw.z[at], self._draw.noise[at], fade_in=trainer.fade_in)

        made = list(in_order(trainer.config.log.grid_columns, 1, make, trainer.accelerator, label=None))
        if self._tracker is not None:
            self._tracker.log_image(draw_grid(made), "grid", images_seen=trainer.images_seen)


class Checkpoints:
    """Saves the run and measures its masks, at intervals and at the end. Training waits for a copy, not for the disk.

    The best checkpoint is the one of the greatest mask mIoU; without pseudo ground truth, the newest.

    Args:
        run_dir: checkpoints go to ``checkpoints/`` in it.
        tracker: of the main process; None on other processes, which measure and wait.
        pseudo_truth: of each rank, for all of them measure; None where shards carry no alpha.
        judge: of each rank, measures without labels; None: not wanted.
        best_miou: of the best checkpoint so far.
        seconds_before: training time before this process.
        saved_iteration: of the checkpoint that training continues from.
        measured_iteration: of its mask metrics.
        on_measured: told of each measurement.

    Attributes:
        unsaved: why the newest state is not on disk; None where it is.
    """

    def __init__(
        self,
        run_dir: Path,
        tracker: Tracker | None,
        pseudo_truth: PseudoTruth | None,
        judge: "UnlabelledJudge | None" = None,
        *,
        best_miou: float,
        seconds_before: float,
        saved_iteration: int = -1,
        measured_iteration: int = -1,
        on_measured: OnMeasured | None = None,
    ) -> None:
        self._run_dir = run_dir
        self._directory = run_dir / "checkpoints"
        self._tracker = tracker
        self._pseudo_truth = pseudo_truth
        self._judge = judge
        self._started = time.perf_counter() - seconds_before
        self.best_miou = best_miou
        self.metrics: dict[str, float] = {}
        self._last = saved_iteration
        self._last_measured = measured_iteration
        self._on_measured = on_measured
        self.unsaved: SaveError | None = None
        self._background = Background("checkpoints")

    @property
    def seconds(self) -> float:
        """Training time of the run, over all its processes."""
        return time.perf_counter() - self._started

    def on_step(self, trainer: Trainer) -> None:
        self._background.check()
        if trainer.iteration == trainer.config.steps:
            self._save(trainer, {})  # before the last evaluation, which is long and may be interrupted
        elif is_due_by_images(trainer, trainer.config.log.checkpoint_interval_images):
            self._measure_and_save(trainer, trainer.config.evaluation.num_samples)

    def on_end(self, trainer: Trainer) -> None:
        if self._last_measured != trainer.iteration:
            self._measure_and_save(trainer, trainer.config.evaluation.num_samples_final)
        self._background.wait()

    def on_interrupt(self, trainer: Trainer) -> None:
        """Save without measuring: whoever interrupts may not wait for long."""
        if self._last != trainer.iteration:
            self._save(trainer, {})
        self._background.wait()

    def close(self) -> None:
        """Finish writing."""
        self._background.close()

    def refuse_unsaved(self) -> None:
        """Do not let a run pass for whole whose last state is lost.

        Raises:
            UserError: it could not be saved.
        """
        if self.unsaved is not None:
            raise self._explained(self.unsaved)

    def _explained(self, error: SaveError) -> UserError:
        return UserError(f"{error}; make room, and resume from the checkpoint before by --resume {self._run_dir}")

    def _measure_and_save(self, trainer: Trainer, num_samples: int) -> None:
        measured = self._measure(trainer, num_samples)
        self._last_measured = trainer.iteration
        self._save(trainer, measured)
        if self._on_measured is not None:
            self._background.wait()
            self._on_measured(trainer.iteration, measured)

    def _save(self, trainer: Trainer, measured: dict[str, float]) -> None:
        self._last = trainer.iteration
        trainer.refuse_drift()
        self._background.wait()  # no more than one copy of the run in memory
        state = trainer.state_dict()  # on all ranks: each may hold a part of it
        if self._tracker is not None:
            if measured:
                self.metrics = measured
                self._tracker.log_metrics(measured, iteration=trainer.iteration, images_seen=trainer.images_seen)
            miou = measured.get("mask/miou", 0.0)
            if not math.isfinite(miou):
                miou = 0.0
            is_best = miou >= self.best_miou or not (self._directory / BEST).is_file()
            former_best, self.best_miou = self.best_miou, max(miou, self.best_miou)
            state |= {
                "best_miou": self.best_miou,
                "seconds": self.seconds,
                "metrics": self.metrics,
                "measured_iteration": self._last_measured,
            }
            self._background.submit(
                self._write, copy_to_host(state), trainer.config.log, is_best=is_best, former_best=former_best
            )
        trainer.accelerator.wait_for_everyone()

    def _write(self, state: dict[str, Any], config: LogConfig, *, is_best: bool, former_best: float) -> None:
        try:
            save_checkpoint(state, checkpoint_path(self._directory, state["iteration"]))
            if is_best:
                save_checkpoint(state, self._directory / BEST)
        except SaveError as error:
            if config.on_save_error == "stop":
                raise self._explained(error) from None
            self.best_miou, self.unsaved = former_best, error
            logger.warning("%s: training continues, and tries again at the next checkpoint", error)
            return
        self.unsaved = None
        prune_checkpoints(self._directory, config.keep_checkpoints)

    def _measure(self, trainer: Trainer, num_samples: int) -> dict[str, float]:
        measured: dict[str, float] = {}
        if self._judge is not None:
            measured = self._judge.measure(trainer.ema, trainer.discriminator, fade_in=trainer.fade_in).named()
        truth, config = self._pseudo_truth, trainer.config
        if truth is None:
            return measured
        generated = generated_mask_metrics(
            trainer.ema,
            truth.segmenter,
            num_samples=num_samples,
            seed=config.seed,
            fade_in=trainer.fade_in,
            threshold=config.evaluation.threshold,
        )
        measured |= generated.named("mask")
        if trainer.discriminator.mask_predictor is not None:
            real = real_mask_prediction_metrics(
                trainer.discriminator, truth.real, threshold=config.evaluation.threshold
            )
            measured |= real.named("mask_pred_real")
        return measured


def peak_memory_bytes() -> int:
    """Greatest memory of this process so far: on the GPU where there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def summarise(trainer: Trainer, checkpoints: Checkpoints, pseudo_truth: PseudoTruth | None) -> dict[str, float]:
    """The figures of ``summary.json``."""
    summary = dict(checkpoints.metrics)
    if pseudo_truth is not None:
        summary |= {"segmenter/iou_fg": pseudo_truth.held_out.iou_fg, "segmenter/iou_bg": pseudo_truth.held_out.iou_bg}
    return summary | {
        "seconds": checkpoints.seconds,
        "iterations": trainer.iteration,
        "images_seen": trainer.images_seen,
        "img_per_s": trainer.images_seen / checkpoints.seconds,
        "peak_memory_bytes": peak_memory_bytes(),
    }
