"""Segmentation of photographs by projection into the latent space of a run."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro
from numpy.typing import NDArray
from PIL import Image

from data_shards.errors import UserError
from data_shards.files import write_atomically
from data_shards.progress import progress_bar
from data_shards.sources.images import BrokenPictureError, Picture, fit, read_mask
from data_shards.sources.source import existing_folder, picture_names
from pipeline.evaluation.mask_scores import join, score_masks
from pipeline.evaluation.results import write_results
from pipeline.evaluation.tables import markdown_table, real_table
from pipeline.generation.cutouts import to_uint8_alpha
from pipeline.generation.sample_grid import to_uint8_pictures
from pipeline.generation.trained_run import open_run
from pipeline.photographs.photos import (
    check_outputs_new,
    cut_out,
    find_photos,
    output_path,
    read_photo,
    save_png,
    to_tensor,
)
from pipeline.photographs.projection.perceptual import choose_distance
from pipeline.photographs.projection.projector import ProjectionOptions, project
from pipeline.runs.reproducible import make_repeatable, this_device


@dataclass(frozen=True)
class Project:
    """Reconstruction, alpha and cut-out of each photo by StyleGAN2's projector: minutes, where segmenting takes
    milliseconds. Photos are cropped to their centre and reduced to the run's resolution."""

    photos: tyro.conf.Positional[tuple[Path, ...]]
    """Photos, or folders of them."""
    run: Path
    """Run directory."""
    checkpoint: str = "best"
    """best, latest, or a checkpoint file."""
    masks: Path | None = None
    """Folder of true masks, named as the photos are: prints the figures of the paper's Table 4."""
    out: Path = Path("projected")
    """Folder for NAME-reconstruction.png, NAME-alpha.png, NAME-cutout.png, and table4.md and .json with --masks."""
    projection: Annotated[ProjectionOptions, tyro.conf.arg(name="")] = field(default_factory=ProjectionOptions)
    """How photos are projected."""
    lpips_backbone: Path | None = None
    """File of torchvision's VGG-16 weights, for LPIPS. Without it, and where torchvision has not downloaded it, the
    features of the run's discriminator take its place."""
    batch: int = 16
    """Photos at a time."""
    num_threads: int = 0
    """CPU threads; 0 is all cores."""

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise UserError(f"--batch {self.batch} is invalid: give 1 or more")

    def __call__(self) -> None:
        """Project all photos."""
        make_repeatable(self.num_threads)
        photos = find_photos(self.photos)
        check_outputs_new(photos, self.out, ("reconstruction", "alpha", "cutout"))
        masks = None if self.masks is None else _match_masks(photos, self.masks)
        device = this_device()
        run = open_run(self.run, self.checkpoint, device)
        distance = choose_distance(run.discriminator, self.lpips_backbone, device)
        print(f"perceptual distance: {distance.name}")
        samples = [
            _square(photo, None if masks is None else masks[i], run.config.resolution) for i, photo in enumerate(photos)
        ]
        scores, distances = [], []
        for first in progress_bar(range(0, len(photos), self.batch), desc="batches", unit="batch"):
            part = samples[first : first + self.batch]
            images = torch.cat([to_tensor(image, device) for image, _ in part])
            found = project(run, images, distance, self.projection, first=first, progress=True)
            distances += found.distance.tolist()
            alphas = to_uint8_alpha(found.output.mask)
            reconstructions = to_uint8_pictures(found.output.composite)
            for photo, (image, _), alpha, reconstruction in zip(
                photos[first:], part, alphas, reconstructions, strict=False
            ):
                save_png(reconstruction, output_path(self.out, photo, "reconstruction"))
                save_png(alpha, output_path(self.out, photo, "alpha"))
                save_png(cut_out(image, alpha), output_path(self.out, photo, "cutout"))
            if masks is not None:
                true = torch.stack([torch.tensor(mask)[None].float() / 255 for _, mask in part if mask is not None])
                scores.append(score_masks(found.output.mask.cpu(), true, threshold=0.5))
        print(f"{self.out}: {len(photos)} projected in {self.projection.space.upper()}, ", end="")
        print(f"mean distance {np.mean(distances):.4f}")
        if scores:
            figures = join(scores).figures()
            table = markdown_table(real_table(figures, len(photos), distance.name))
            write_atomically(self.out / "table4.md", table)
            write_results({"num_photos": len(photos), "distance": distance.name, **figures}, self.out / "table4.json")
            print(table)


def _match_masks(photos: list[Path], folder: Path) -> list[Path]:
    names = {
        Path(name).stem: folder / name for name in picture_names(existing_folder(folder, "give a folder of masks"))
    }
    missing = [photo for photo in photos if photo.stem not in names]
    if missing:
        raise UserError(
            f"--masks {folder} has none named {missing[0].stem}.*, for {missing[0]}; add it, or leave both out"
        )
    return [names[photo.stem] for photo in photos]


def _square(photo: Path, mask: Path | None, resolution: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8] | None]:
    """The centre of a photo, and its true mask."""
    image = Image.fromarray(read_photo(photo))
    try:
        alpha = None if mask is None else read_mask(mask)
        sample, _ = fit(Picture(image, alpha), resolution)
    except BrokenPictureError as error:
        raise UserError(f"mask {mask} cannot be used: {error}; mend it, or leave both out") from None
    return sample.image, sample.alpha
