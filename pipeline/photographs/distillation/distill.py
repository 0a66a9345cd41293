"""Distillation of a run: real images, the fit, a check, and the files that are written."""

import contextlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated

import torch
import tyro
from torch import Tensor

from data_shards.errors import UserError
from data_shards.files import check_new, whole_directory
from data_shards.reading.loader import make_loader
from pipeline.evaluation.mask_scores import join, score_masks
from pipeline.evaluation.pictures import generate
from pipeline.generation.trained_run import TrainedRun, open_run
from pipeline.photographs.distillation.export import export_onnx, model_card
from pipeline.photographs.distillation.fit import FitOptions, distill
from pipeline.photographs.distillation.network import MattingNetwork, save_network
from pipeline.runs.reproducible import make_repeatable, this_device
from pipeline.runs.shards import open_shards
from pipeline.training.trainer import make_accelerator

DISTILLED = "distilled"
"""Directory in the run's."""
NUM_CHECKED, CHECK_BATCH = 256, 32


@dataclass(frozen=True)
class DistillOptions:
    """What to distill, and how. Each field is an option of the command line."""

    run: Path
    """Run directory of the teacher."""
    checkpoint: str = "best"
    """best, latest, or a checkpoint file."""
    data: str | None = None
    """Shards of real images, whose alpha is never read; the run's own by default, 'none' for none."""
    out: Path | None = None
    """Directory to make; RUN/distilled by default."""
    fit: Annotated[FitOptions, tyro.conf.arg(name="")] = field(default_factory=FitOptions)
    """How the network is taught."""
    num_threads: int = 0
    """CPU threads; 0 is all cores."""


def distill_run(options: DistillOptions) -> str:
    """Distil a run into a new directory; returns a line that states what it reached.

    Raises:
        UserError: the directory exists, or the run or its shards cannot be opened.
    """
    out = options.out or options.run / DISTILLED
    check_new(out)
    make_repeatable(options.num_threads)
    run = open_run(options.run, options.checkpoint, this_device())
    with real_pictures(run, options.data, options.fit) as real:
        network = distill(run, real, options.fit, progress=True)
    figures = check(run, network, seed=options.fit.seed)
    facts = {
        "run": run.run_dir.resolve().name,
        "dataset": run.config.dataset,
        "resolution": run.config.resolution,
        "iteration": run.iteration,
        "real_pictures": "none" if real is None else "unlabelled",
        **asdict(options.fit),
    }
    with whole_directory(out) as partial:
        save_network(network, partial / "network.pt", facts)
        error = export_onnx(network, partial / "network.onnx")
        (partial / "README.md").write_text(model_card(network, facts, figures, error), encoding="utf-8")
    return (
        f"{out}: IoU {figures['iou_fg']:.3f} with the generator's own alpha on new samples; "
        f"network.onnx differs from torch by {error:.1e}"
    )


@contextlib.contextmanager
def real_pictures(run: TrainedRun, data: str | None, options: FitOptions) -> Iterator[Iterator[Tensor] | None]:
    """Endless batches of real images ``[b, 3, R, R]``, without their alpha; None where `data` is "none".

    Raises:
        UserError: the shards cannot be opened.
    """
    if data == "none":
        yield None
        return
    config = run.config if data is None else replace(run.config, data=data)
    with contextlib.ExitStack() as stack:
        try:
            shard_set = stack.enter_context(contextlib.closing(open_shards(config, make_accelerator(600.0))))
        except UserError as error:
            if data is not None:
                raise
            raise UserError(f"the run's own images: {error}; or give --data SHARDS, or --data none") from None
        loader = make_loader(
            config.loader,
            shard_set,
            global_batch=options.batch,
            rank=0,
            world_size=1,
            seed=options.seed,
            flip=config.flip,
            with_alpha=False,
            device=this_device(),
            num_threads=torch.get_num_threads(),
        )
        stack.enter_context(contextlib.closing(loader))
        yield (batch.images for batch in loader)


def check(run: TrainedRun, network: MattingNetwork, *, seed: int) -> dict[str, float]:
    """Figures on generated pairs of another random stream than it learnt from."""
    parts = []
    for first in range(0, NUM_CHECKED, CHECK_BATCH):
        out = generate(run, range(first, first + CHECK_BATCH), psi=1.0, seed=seed)
        parts.append(score_masks(network(out.composite), out.mask, threshold=0.5))
    return {"num": float(NUM_CHECKED), **join(parts).figures()}
