"""A score of a generator's masks that needs no labels: do they cover whole objects and nothing else?

Each part is in [0, 1] and falls for a kind of mask that trainings end with when a threshold is wrong; the score is a
product of them. `docs/objective.md` says how well it goes with true mIoU, and where it fails.
"""

import contextlib
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor

from data_shards.reading.shard_set import ShardSet
from models.discriminator import Discriminator
from models.generator import FurryGenerator
from pipeline.evaluation.features import FeatureStatistics, image_distances, load_extractor
from pipeline.evaluation.mask_metrics import MaskCounter
from pipeline.evaluation.pictures import RealPictures, to_uint8
from pipeline.evaluation.random_features import RANDOM_VGG16
from pipeline.methods.furrygan.losses import downsample_mask
from pipeline.methods.randomness import Stream, draw
from pipeline.ranks.collectives import on_first_rank

NUM_SAMPLES = 512
NUM_REAL = 1024
CHUNK = 64
THRESHOLD = 0.5
EPSILON = 1e-6
FAR = 10.0
"""Distance of the foregrounds at which `Parts.fidelity` is 1/2, in units of the real images' own spread."""


@dataclass(frozen=True)
class Parts:
    """Of the score, each in [0, 1].

    Attributes:
        fidelity: foregrounds look like the real images: ``10 t / (10 t + d)`` for their Fréchet distance d by the
            features of a random VGG16 and the trace t of the covariance of the real features. Without the dual fake
            input, or with masks of nothing, foregrounds are no images at all; finer differences are left out.
        separation: share of the foreground's variance of colours that lies between inside and outside of the mask,
            mean over the images. A mask that is full, empty or cuts through the object separates little.
        inside: share of the image's border that is left free by the mask: objects lie inside, surroundings do not.
        agreement: mIoU of the masks with what the discriminator's mask predictor sees in the foregrounds, at 16x16;
            None without a predictor.
    """

    fidelity: float
    separation: float
    inside: float
    agreement: float | None

    @property
    def score(self) -> float:
        """Product of the parts; twice that of the border, which alone tells a mask from one of the surroundings."""
        agreement = 1.0 if self.agreement is None else self.agreement
        return self.fidelity * self.separation * agreement * self.inside**2

    def named(self) -> dict[str, float]:
        """Metrics by name."""
        parts = {name: value for name, value in asdict(self).items() if value is not None}
        return {f"unlabelled/{name}": value for name, value in (parts | {"score": self.score}).items()}


class UnlabelledJudge:
    """Measures the score of a training, on its first rank; the others wait.

    Args:
        shard_set: of its images.
        seed: of latents and noise.
        device: to measure on.
    """

    def __init__(self, shard_set: ShardSet, seed: int, device: torch.device) -> None:
        self._seed = seed
        self._extractor = load_extractor(RANDOM_VGG16, None, device)
        self._real = on_first_rank(lambda: self._statistics_of_real(shard_set, device))

    def measure(self, generator: FurryGenerator, discriminator: Discriminator, *, fade_in: float) -> Parts:
        """The parts of the score; all ranks call it.

        Args:
            generator: the average of G.
            discriminator: D.
            fade_in: gamma of Eq. 3.
        """
        return on_first_rank(lambda: self._measure(generator, discriminator, fade_in))

    @torch.no_grad()
    def _measure(self, generator: FurryGenerator, discriminator: Discriminator, fade_in: float) -> Parts:
        device = next(generator.parameters()).device
        sizes = {"z_dim": generator.z_dim, "num_noise": generator.num_noise}
        statistics = FeatureStatistics(keep=False)
        agreeing = MaskCounter(THRESHOLD)
        separated = border = 0.0
        for first in range(0, NUM_SAMPLES, CHUNK):
            given = draw(self._seed, Stream.UNLABELLED, 0, range(first, first + CHUNK), **sizes, device=device)
            out = generator(given.z, noise=given.noise, fade_in=fade_in, num_composites=0)
            mask = (out.mask > THRESHOLD).float()
            statistics.add(self._extractor(to_uint8(out.foreground)))
            separated += separation(out.foreground, mask).sum().item()
            border += border_share(mask).sum().item()
            if discriminator.mask_predictor is not None:
                agreeing.add(discriminator.predict_mask(out.foreground), downsample_mask(out.mask))
        distance = image_distances(statistics, self._real, self._extractor, ["fid"], seed=0)["frechet_distance"]
        far = FAR * float(np.trace(self._real.covariance))
        return Parts(
            fidelity=far / (far + max(distance, 0.0)),
            separation=separated / NUM_SAMPLES,
            inside=1.0 - border / NUM_SAMPLES,
            agreement=None if discriminator.mask_predictor is None else float(np.nan_to_num(agreeing.metrics().miou)),
        )

    def _statistics_of_real(self, shard_set: ShardSet, device: torch.device) -> FeatureStatistics:
        num = min(NUM_REAL, shard_set.num_samples)
        statistics = FeatureStatistics(keep=False)
        chosen = [i * shard_set.num_samples // num for i in range(num)]
        with contextlib.closing(RealPictures(shard_set, num_threads=torch.get_num_threads())) as pictures:
            for first in range(0, num, CHUNK):
                statistics.add(self._extractor(pictures.images(chosen[first : first + CHUNK]).to(device)))
        return statistics


def separation(images: Tensor, mask: Tensor) -> Tensor:
    """Share of the variance of the colours of each image that lies between inside and outside of its mask.

    Args:
        images: ``[b, 3, R, R]``.
        mask: ``[b, 1, R, R]``, 0 or 1.

    Returns:
        ``[b]``, in [0, 1]; 0 for a full or an empty mask.
    """
    inside = mask.mean(dim=(2, 3)).clamp(EPSILON, 1 - EPSILON)
    mean = images.mean(dim=(2, 3))
    mean_inside = (images * mask).mean(dim=(2, 3)) / inside
    mean_outside = (images * (1 - mask)).mean(dim=(2, 3)) / (1 - inside)
    between = inside * (mean_inside - mean).square() + (1 - inside) * (mean_outside - mean).square()
    total = images.var(dim=(2, 3), unbiased=False).sum(dim=1).clamp(min=EPSILON)
    is_mask = (mask.amax(dim=(1, 2, 3)) > mask.amin(dim=(1, 2, 3))).float()
    return is_mask * (between.sum(dim=1) / total).clamp(max=1.0)


def border_share(mask: Tensor) -> Tensor:
    """Share of the image's outermost pixels that the mask covers, ``[b, 1, R, R] -> [b]``."""
    rows = torch.cat([mask[:, 0, 0], mask[:, 0, -1], mask[:, 0, 1:-1, 0], mask[:, 0, 1:-1, -1]], dim=1)
    return rows.mean(dim=1)
