"""A score of a generator's masks that needs no labels: are they of objects, whole, and of nothing else?

Each part is in [0, 1] and falls for a kind of mask that trainings end with when a threshold is wrong; the score is
their geometric mean. `docs/objective.md` says how well it goes with true mIoU, and where it fails.
"""

import contextlib
from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from data_shards.shard_set import ShardSet
from models.discriminator import Discriminator
from models.generator import FurryGenerator
from pipeline.distributed import on_first_rank
from pipeline.evaluation.features import FeatureStatistics, image_distances, load_extractor
from pipeline.evaluation.pictures import RealPictures, to_uint8
from pipeline.evaluation.random_features import RANDOM_VGG16
from pipeline.losses import downsample_mask
from pipeline.mask_metrics import MaskCounter
from pipeline.randomness import Stream, draw

NUM_SAMPLES = 512
NUM_REAL = 1024
CHUNK = 64
THRESHOLD = 0.5
EPSILON = 1e-6


@dataclass(frozen=True)
class Parts:
    """Of the score, each in [0, 1].

    Attributes:
        fidelity: foregrounds look like the real pictures: ``t / (t + d)`` for their Fréchet distance d by the features
            of a random VGG16 and the trace t of the real features' covariance. Where masks are empty, or not of
            objects, foregrounds are bad pictures.
        separation: share of the foreground's variance of colours that lies between inside and outside of the mask,
            mean over the pictures. A mask that is full, grey or cuts through the object separates little.
        outline: share of the foreground's gradients that lies on the mask's outline, in excess of what an outline
            anywhere would have: ``1 - mean gradient / mean gradient on the outline``, at least 0.
        inside: share of the picture's border that is left free by the mask: objects lie inside, surroundings do not.
        agreement: mIoU of the masks with what the discriminator's mask predictor sees in the foregrounds, at 16x16;
            None without a predictor.
    """

    fidelity: float
    separation: float
    outline: float
    inside: float
    agreement: float | None

    @property
    def score(self) -> float:
        """Geometric mean of the parts."""
        parts = [value for value in asdict(self).values() if value is not None]
        return float(np.prod(parts) ** (1 / len(parts)))

    def named(self) -> dict[str, float]:
        """Metrics by name."""
        parts = {name: value for name, value in asdict(self).items() if value is not None}
        return {f"unlabelled/{name}": value for name, value in (parts | {"score": self.score}).items()}


class UnlabelledJudge:
    """Measures the score of a training, on its first rank; the others wait.

    Args:
        shard_set: of its pictures.
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
        sums = torch.zeros(6, dtype=torch.float64)
        for first in range(0, NUM_SAMPLES, CHUNK):
            given = draw(self._seed, Stream.UNLABELLED, 0, range(first, first + CHUNK), **sizes, device=device)
            out = generator(given.z, noise=given.noise, fade_in=fade_in, num_composites=0)
            statistics.add(self._extractor(to_uint8(out.foreground)))
            mask = (out.mask > THRESHOLD).float()
            gradient, outline = gradient_magnitude(out.foreground), outline_of(mask)
            sums += (
                torch.stack(
                    [
                        separation(out.foreground, mask).sum(),
                        gradient.sum(),
                        torch.ones_like(gradient).sum(),
                        (gradient * outline).sum(),
                        outline.sum(),
                        border_share(mask).sum(),
                    ]
                )
                .double()
                .cpu()
            )
            if discriminator.mask_predictor is not None:
                agreeing.add(discriminator.predict_mask(out.foreground), downsample_mask(out.mask))
        separated, gradients, pixels, outlined, outline_pixels, border = sums.tolist()
        on_outline = outlined / max(outline_pixels, 1.0)
        distance = image_distances(statistics, self._real, self._extractor, ["fid"], seed=0)["frechet_distance"]
        spread = float(np.trace(self._real.covariance))
        return Parts(
            fidelity=spread / (spread + max(distance, 0.0)),
            separation=separated / NUM_SAMPLES,
            outline=max(0.0, 1.0 - gradients / pixels / max(on_outline, EPSILON)),
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
    """Share of the variance of the colours of each picture that lies between inside and outside of its mask.

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


def gradient_magnitude(images: Tensor) -> Tensor:
    """Of the luminance, by central differences: ``[b, 3, R, R] -> [b, 1, R, R]``."""
    padded = F.pad(images.mean(dim=1, keepdim=True), [1, 1, 1, 1], mode="replicate")
    dx = padded[:, :, 1:-1, 2:] - padded[:, :, 1:-1, :-2]
    dy = padded[:, :, 2:, 1:-1] - padded[:, :, :-2, 1:-1]
    return (dx.square() + dy.square()).sqrt()


def outline_of(mask: Tensor) -> Tensor:
    """Pixels with inside and outside of the mask among their 3x3 neighbours: ``[b, 1, R, R]`` of 0 and 1."""
    return F.max_pool2d(mask, 3, stride=1, padding=1) + F.max_pool2d(-mask, 3, stride=1, padding=1)


def border_share(mask: Tensor) -> Tensor:
    """Share of the picture's outermost pixels that the mask covers, ``[b, 1, R, R] -> [b]``."""
    rows = torch.cat([mask[:, 0, 0], mask[:, 0, -1], mask[:, 0, 1:-1, 0], mask[:, 0, 1:-1, -1]], dim=1)
    return rows.mean(dim=1)
