"""What is seen of a run: progress, metrics, sample grids, mask metrics, checkpoints."""

import math
import resource
import time
from pathlib import Path
from typing import Any

import torch

from data_shards.progress import progress_bar
from pipeline.background import Background
from pipeline.checkpoints import BEST, checkpoint_path, copy_to_host, prune_checkpoints, save_checkpoint
from pipeline.evaluation import PseudoTruth, generated_mask_metrics, real_mask_prediction_metrics
from pipeline.randomness import Stream, draw
from pipeline.sample_grid import sample_grid
from pipeline.schedules import linear_ramp
from pipeline.tracking import Tracker
from pipeline.trainer import Trainer


def is_due_by_images(trainer: Trainer, interval_images: int) -> bool:
    """Whether the last step crossed a multiple of `interval_images`."""
    before = trainer.images_seen - trainer.config.batch
    return trainer.images_seen // interval_images > before // interval_images


class Progress:
    """A bar with ETA, and the means of all metrics at every log interval.

    Args:
        trainer: at the iteration where it goes on.
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
        seconds = time.perf_counter() - self._since
        loss = trainer.config.loss
        metrics = measured | {
            "schedule/fade_in": trainer.fade_in,
            "schedule/lambda_bin": linear_ramp(
                trainer.iteration, loss.binarization_start, loss.binarization_end, loss.binarization_iterations
            ),
            "speed/img_per_s": (trainer.images_seen - self._images_before) / seconds,
            "speed/data_wait_share": (trainer.seconds_waiting - self._waiting_before) / seconds,
            "memory/peak_bytes": float(peak_memory_bytes()),
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

    def _restart(self, trainer: Trainer) -> None:
        self._since = time.perf_counter()
        self._images_before = trainer.images_seen
        self._waiting_before = trainer.seconds_waiting


class SampleGrids:
    """Grids of the EMA's pictures from fixed latents, on the main process.

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
        if self._tracker is not None:
            grid = sample_grid(trainer.ema, self._draw.z, self._draw.noise, fade_in=trainer.fade_in)
            self._tracker.log_image(grid, "grid", images_seen=trainer.images_seen)


class Checkpoints:
    """Saves the run and measures its masks, at intervals and at the end. Training waits for a copy, not for the disk.

    The best checkpoint is the one of the greatest mask mIoU; without pseudo ground truth, the newest.

    Args:
        run_dir: checkpoints go to ``checkpoints/`` in it.
        tracker: of the main process; None on other processes, which only wait.
        pseudo_truth: None where shards carry no alpha.
        best_miou: of the best checkpoint so far.
        seconds_before: training time before this process.
    """

    def __init__(
        self,
        run_dir: Path,
        tracker: Tracker | None,
        pseudo_truth: PseudoTruth | None,
        *,
        best_miou: float,
        seconds_before: float,
        saved_iteration: int = -1,
    ) -> None:
        self._directory = run_dir / "checkpoints"
        self._tracker = tracker
        self._pseudo_truth = pseudo_truth
        self._started = time.perf_counter() - seconds_before
        self.best_miou = best_miou
        self.metrics: dict[str, float] = {}
        self._last = saved_iteration
        self._background = Background("checkpoints")

    @property
    def seconds(self) -> float:
        """Training time of the run, over all its processes."""
        return time.perf_counter() - self._started

    def on_step(self, trainer: Trainer) -> None:
        if is_due_by_images(trainer, trainer.config.log.checkpoint_interval_images):
            evaluation, final = trainer.config.evaluation, trainer.iteration == trainer.config.steps
            num_samples = evaluation.num_samples_final if final else evaluation.num_samples
            self._save(trainer, self._measure(trainer, num_samples))

    def on_end(self, trainer: Trainer) -> None:
        if self._last != trainer.iteration:
            self._save(trainer, self._measure(trainer, trainer.config.evaluation.num_samples_final))
        self._background.wait()

    def on_interrupt(self, trainer: Trainer) -> None:
        """Save without measuring: whoever interrupts may not wait for long."""
        if self._last != trainer.iteration:
            self._save(trainer, {})
        self._background.wait()

    def close(self) -> None:
        """Finish writing."""
        self._background.close()

    def _save(self, trainer: Trainer, measured: dict[str, float]) -> None:
        self._last = trainer.iteration
        trainer.refuse_drift()
        if self._tracker is not None:
            self._background.wait()  # no more than one copy of the run in memory
            if measured:
                self.metrics = measured
                self._tracker.log_metrics(measured, iteration=trainer.iteration, images_seen=trainer.images_seen)
            miou = measured.get("mask/miou", 0.0)
            if not math.isfinite(miou):
                miou = 0.0
            is_best = miou >= self.best_miou or not (self._directory / BEST).is_file()
            self.best_miou = max(miou, self.best_miou)
            state = trainer.state_dict() | {
                "tracker_run_id": self._tracker.run_id,
                "best_miou": self.best_miou,
                "seconds": self.seconds,
                "metrics": self.metrics,
            }
            self._background.submit(
                self._write, copy_to_host(state), is_best=is_best, keep=trainer.config.log.keep_checkpoints
            )
        trainer.accelerator.wait_for_everyone()

    def _write(self, state: dict[str, Any], *, is_best: bool, keep: int) -> None:
        save_checkpoint(state, checkpoint_path(self._directory, state["iteration"]))
        if is_best:
            save_checkpoint(state, self._directory / BEST)
        prune_checkpoints(self._directory, keep)

    def _measure(self, trainer: Trainer, num_samples: int) -> dict[str, float]:
        truth, config = self._pseudo_truth, trainer.config
        if truth is None or self._tracker is None:
            return {}
        generated = generated_mask_metrics(
            trainer.ema,
            truth.segmenter,
            num_samples=num_samples,
            seed=config.seed,
            fade_in=trainer.fade_in,
            threshold=config.evaluation.threshold,
        )
        measured = generated.named("mask")
        if trainer.discriminator.mask_predictor is not None:
            real = real_mask_prediction_metrics(
                trainer.discriminator, truth.images, truth.alphas, threshold=config.evaluation.threshold
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
