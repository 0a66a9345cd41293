"""Comparison of all ways to segment a real image with ground-truth alpha: accuracy and time."""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812
from PIL import Image
from torch import Tensor

from data_shards.building.builtin import furballs_shards
from data_shards.errors import UserError
from data_shards.files import check_new, whole_directory
from data_shards.progress import progress_bar
from data_shards.reading.loader import make_loader
from data_shards.reading.shard_set import ShardSet
from pipeline.evaluation.mask_scores import MaskScores, join, score_masks
from pipeline.evaluation.pictures import RealPictures
from pipeline.evaluation.pseudo_truth import load_segmentation
from pipeline.evaluation.results import write_results
from pipeline.evaluation.tables import Row, Table, markdown_table
from pipeline.generation.sample_grid import draw_panel, to_uint8_pictures
from pipeline.generation.trained_run import TrainedRun, open_run
from pipeline.photographs.distillation.fit import FitOptions, fit_network
from pipeline.photographs.distillation.network import load_network
from pipeline.photographs.projection.perceptual import choose_distance
from pipeline.photographs.projection.projector import ProjectionOptions, Space, project
from pipeline.runs.reproducible import this_device
from pipeline.runs.shards import open_shards
from pipeline.training.trainer import make_accelerator

NUM_SHOWN = 8
HELD_OUT_SEED = 1
"""Of the furballs that no run has seen: training draws those of seed 0."""

Masks = Callable[[Tensor, int], Tensor]
"""``images [b, 3, R, R]`` in [-1, 1], and the number of the first -> alpha ``[b, 1, R, R]``."""


@dataclass(frozen=True)
class Comparison:
    """What is compared, and on what."""

    run: Path
    """Run directory, with what distill.py made in it."""
    data: Path | None = None
    """Shards with ground-truth alpha that the run has not seen. A run on furballs has new ones drawn by default."""
    count: int = 200
    """How many images, the first ones."""
    checkpoint: str = "best"
    """best, latest, or a checkpoint file."""
    spaces: tuple[Space, ...] = ("w",)
    """Of the projector, each a row; none after a bare --spaces."""
    projector_steps: int = 1000
    """Of the projector."""
    lpips_backbone: Path | None = None
    """File of torchvision's VGG-16 weights, for LPIPS; else the discriminator's features."""
    yardsticks: tuple[str, ...] = ()
    """Supervised networks to measure besides, as evaluate.py's --pseudo-gt: u2netp=FILE, ..."""
    supervised_steps: int = 1000
    """Of a network like the distilled one, fitted on the ground-truth alpha of the run's own shards; 0 for none."""
    batch: int = 50
    """Images at a time for the projector; the others get one at a time."""
    seed: int = 0
    """Of projector and fit."""

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            UserError: one is invalid.
        """
        for name, value, low in (
            ("count", self.count, 1),
            ("batch", self.batch, 1),
            ("projector-steps", self.projector_steps, 1),
            ("supervised-steps", self.supervised_steps, 0),
        ):
            if value < low:
                raise UserError(f"--{name} {value} is invalid: give {low} or more")


@dataclass(frozen=True, eq=False)
class Measured:
    """One way's scores, what it costs, and its alpha ``[n, 1, R, R]`` of the first images."""

    name: str
    scores: MaskScores
    seconds_per_photo: float
    shown: Tensor


def compare(comparison: Comparison, out: Path) -> str:
    """Measure all ways; write ``comparison.md``, ``.json`` and ``.png`` to the new directory `out`.

    Returns:
        The table in Markdown.

    Raises:
        UserError: the run, its distilled network or the images cannot be used, or `out` exists.
    """
    check_new(out)
    device = this_device()
    run = open_run(comparison.run, comparison.checkpoint, device)
    with (
        contextlib.closing(_held_out(comparison, run)) as shard_set,
        contextlib.closing(RealPictures(shard_set, num_threads=torch.get_num_threads())) as pictures,
    ):
        count = min(comparison.count, shard_set.num_samples)
        ways = _ways(comparison, run, device)
        measured = [_measure(name, batch, masks, pictures, count, device) for name, batch, masks in ways]
        picture = _picture(measured, pictures, range(min(NUM_SHOWN, count)))
    table = _table(measured, count, run, choose_distance(run.discriminator, comparison.lpips_backbone, device).name)
    results = {
        "run": run.run_dir.resolve().name,
        "num_pictures": count,
        "comparison": {name: str(value) for name, value in asdict(comparison).items() if name != "run"},
        "ways": {way.name: {"seconds_per_photo": way.seconds_per_photo, **way.scores.figures()} for way in measured},
    }
    with whole_directory(out) as partial:
        (partial / "comparison.md").write_text(table, encoding="utf-8")
        picture.save(partial / "comparison.png")
        write_results(results, partial / "comparison.json")
    return table


def _ways(comparison: Comparison, run: TrainedRun, device: torch.device) -> list[tuple[str, int, Masks]]:
    """Name, images at a time, and the function of each way."""
    distilled = load_network(comparison.run / "distilled" / "network.pt", device)
    if distilled.resolution != run.config.resolution:
        raise UserError(f"{comparison.run / 'distilled'} is of {distilled.resolution} px: make it again by distill.py")
    distance = choose_distance(run.discriminator, comparison.lpips_backbone, device)
    ways: list[tuple[str, int, Masks]] = []
    for space in comparison.spaces:
        options = ProjectionOptions(space=space, steps=comparison.projector_steps, seed=comparison.seed)

        def projected(images: Tensor, first: int, options: ProjectionOptions = options) -> Tensor:
            return project(run, images, distance, options, first=first, progress=True).output.mask

        ways.append((f"projector, {space.upper()}, {options.steps:,} steps", comparison.batch, projected))

    def upsampled(images: Tensor, _: int) -> Tensor:
        return F.interpolate(run.discriminator.predict_mask(images), size=images.shape[-1], mode="bilinear")

    ways += [("mask predictor, upsampled", 1, upsampled), ("distilled network", 1, _one_by_one(distilled))]
    for spec in comparison.yardsticks:
        name, segmentation = load_segmentation(spec, device, option="--yardsticks")
        ways.append((f"{name} (supervised elsewhere)", 1, _one_by_one(segmentation)))
    if comparison.supervised_steps:
        supervised = _fit_supervised(comparison, run, device)
        ways.append(("the same network on ground-truth alpha", 1, _one_by_one(supervised)))
    return ways


def _one_by_one(network: Callable[[Tensor], Tensor]) -> Masks:
    return lambda images, _: network(images)


def _fit_supervised(comparison: Comparison, run: TrainedRun, device: torch.device) -> torch.nn.Module:
    """The upper bound: the distilled network's architecture and schedule, on labels."""
    options = FitOptions(steps=comparison.supervised_steps, seed=comparison.seed)
    with contextlib.closing(open_shards(run.config, make_accelerator(600.0))) as shard_set:
        loader = make_loader(
            run.config.loader,
            shard_set,
            global_batch=options.batch,
            rank=0,
            world_size=1,
            seed=comparison.seed,
            flip=run.config.flip,
            with_alpha=True,
            device=device,
            num_threads=torch.get_num_threads(),
        )

        def pairs() -> Iterator[tuple[Tensor, Tensor]]:
            for batch in loader:
                assert batch.alphas is not None
                yield batch.images, batch.alphas

        with contextlib.closing(loader):
            return fit_network(pairs(), run.config.resolution, options, device=device, progress=True)


def _held_out(comparison: Comparison, run: TrainedRun) -> ShardSet:
    """Images with ground-truth alpha that the run has not seen."""
    if comparison.data is not None:
        shard_set = ShardSet.open(comparison.data, resolution=run.config.resolution)
        if not shard_set.has_alpha:
            raise UserError(f"--data {comparison.data} has no ground-truth alpha: give a set that has")
        return shard_set
    if run.config.data is not None:
        raise UserError(
            "the run was trained on shards of yours: give --data with others of the kind, with ground-truth alpha"
        )
    path = furballs_shards(
        run.config.cache_dir,
        resolution=run.config.resolution,
        num_images=comparison.count,
        seed=HELD_OUT_SEED,
        progress=True,
    )
    return ShardSet.open(path, resolution=run.config.resolution)


def _measure(name: str, batch: int, masks: Masks, pictures: RealPictures, count: int, device: torch.device) -> Measured:
    scores, shown, seconds = [], [], 0.0
    if batch == 1:
        masks(_floats(pictures, [0], device), 0)  # what a first call costs is not the way's
    for first in progress_bar(range(0, count, batch), desc=name, unit="batch"):
        samples = range(first, min(first + batch, count))
        images = _floats(pictures, samples, device)
        _wait(device)
        start = time.perf_counter()
        found = masks(images, first).detach()
        _wait(device)
        seconds += time.perf_counter() - start
        scores.append(score_masks(found.cpu(), pictures.alphas(samples), threshold=0.5))
        shown.append(found.cpu()[: max(0, NUM_SHOWN - first)])
    return Measured(name, join(scores), seconds / count, torch.cat(shown))


def _floats(pictures: RealPictures, samples: range | list[int], device: torch.device) -> Tensor:
    return pictures.images(samples).to(device).float() / 127.5 - 1


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _picture(measured: list[Measured], pictures: RealPictures, samples: range) -> Image.Image:
    """The first images, their ground-truth alpha, and that of each way."""
    rows = [to_uint8_pictures(pictures.images(samples).float() / 127.5 - 1)]
    alphas = [pictures.alphas(samples), *(way.shown for way in measured)]
    rows += [to_uint8_pictures(alpha * 2 - 1) for alpha in alphas]
    labels = ["real image", "ground-truth alpha", *(way.name for way in measured)]
    return draw_panel(rows, labels, title="Alpha of real images that the run has not seen")


def _table(measured: list[Measured], count: int, run: TrainedRun, distance: str) -> str:
    rows = []
    for way in measured:
        f = way.scores.figures()
        cells = (
            f"{f['iou_fg']:.3f}/{f['iou_bg']:.3f}",
            f"{f['miou']:.3f}",
            f"{f['sad']:.3f}",
            f"{f['mse'] * 1000:.2f}",
        )
        rows.append(Row((way.name, *cells, f"{way.seconds_per_photo:.4f}")))
    note = (
        f"{count:,} real images of {run.config.resolution} px that are new to the run, against ground-truth alpha; "
        f"SAD in thousands, mean over the images. The projector minimises: {distance}. Networks get one image at a "
        f"time, the projector many at once. Time on {torch.get_num_threads()} CPU thread(s)"
        f"{' and a GPU' if torch.cuda.is_available() else ''}."
    )
    columns = ("", "IoU fg/bg", "mIoU", "SAD", "MSE (10⁻³)", "seconds a photo")
    return markdown_table(Table(f"Real images, {run.run_dir.resolve().name}", columns, 1, tuple(rows), note))
