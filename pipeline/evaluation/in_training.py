"""Mask metrics: of generated foregrounds against pseudo ground truth, and of the mask predictor on real images."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_shards.loader import make_loader
from data_shards.shard_set import ShardSet
from models.discriminator import Discriminator
from models.generator import FurryGenerator
from pipeline.checkpoints import serialise
from pipeline.config import Config
from pipeline.losses import downsample_mask
from pipeline.mask_metrics import MaskCounter, MaskMetrics
from pipeline.randomness import Stream, draw
from pipeline.saving import SaveError, saving
from pipeline.segmenter import SEGMENTER_VERSION, Segmenter, fit_segmenter, shrink

logger = logging.getLogger(__name__)

CHUNK = 128
NUM_REAL = 512


@dataclass(frozen=True)
class PseudoTruth:
    """What mask metrics are measured with.

    Attributes:
        segmenter: fitted on the shards' true alpha.
        held_out: its own figures on images it was not fitted on.
        images: real images to try the mask predictor on, ``[N, 3, R, R]`` in [-1, 1].
        alphas: their true alpha ``[N, 1, R, R]`` in [0, 1].
    """

    segmenter: Segmenter
    held_out: MaskMetrics
    images: Tensor
    alphas: Tensor


def prepare_pseudo_truth(shard_set: ShardSet, config: Config, device: torch.device, *, progress: bool) -> PseudoTruth:
    """Fit the segmenter, or take the one that an earlier run on the same shards left in the cache.

    Args:
        shard_set: with alpha.
        config: sizes of the fit, and where its result is kept.
        device: to fit on.
        progress: show a bar.
    """
    num_images = min(config.evaluation.segmenter_images, shard_set.num_samples)
    path = (
        config.cache_dir
        / f"segmenter-v{SEGMENTER_VERSION}-{shard_set.digest[:16]}-{num_images}-{config.evaluation.segmenter_steps}.pt"
    )
    cached = _load_cached(path)
    images, alphas = _read_pairs(shard_set, min(NUM_REAL, num_images), config, shrunk=False)
    if cached is None:
        fit_images, fit_alphas = _read_pairs(shard_set, num_images, config, shrunk=True)
        segmenter, held_out = fit_segmenter(
            _to_uint8(fit_images, low=-1.0),
            _to_uint8(fit_alphas, low=0.0),
            num_steps=config.evaluation.segmenter_steps,
            seed=0,
            device=device,
            progress=progress,
        )
        try:
            with saving(path) as temporary, temporary.open("wb") as file:
                serialise({"segmenter": segmenter.state_dict(), "held_out": vars(held_out)}, file)
        except SaveError as error:
            logger.warning("%s: the next run has to fit the segmenter again", error)
    else:
        segmenter = Segmenter().to(device)
        segmenter.load_state_dict(cached["segmenter"])
        segmenter.eval().requires_grad_(False)
        held_out = MaskMetrics(**cached["held_out"])
    return PseudoTruth(segmenter, held_out, images.to(device), alphas.to(device))


@torch.no_grad()
def generated_mask_metrics(
    generator: FurryGenerator,
    segmenter: Segmenter,
    *,
    num_samples: int,
    seed: int,
    fade_in: float,
    threshold: float,
    psi: float = 1.0,
) -> MaskMetrics:
    """Final masks against the segmenter's of the generated foregrounds (paper, section 4.2)."""
    device = next(generator.parameters()).device
    counter = MaskCounter(threshold)
    for first in range(0, num_samples, CHUNK):
        slots = range(first, min(first + CHUNK, num_samples))
        given = draw(
            seed, Stream.EVALUATION, 0, slots, z_dim=generator.z_dim, num_noise=generator.num_noise, device=device
        )
        out = generator(given.z, noise=given.noise, fade_in=fade_in, psi=psi, num_composites=0)
        counter.add(out.mask, segmenter(out.foreground))
    return counter.metrics()


@torch.no_grad()
def real_mask_prediction_metrics(
    discriminator: Discriminator, images: Tensor, alphas: Tensor, *, threshold: float
) -> MaskMetrics:
    """The discriminator's 16x16 masks of real images against their true alpha at 16x16."""
    counter = MaskCounter(threshold)
    for x, alpha in zip(images.split(CHUNK), alphas.split(CHUNK), strict=True):
        counter.add(discriminator.predict_mask(x), downsample_mask(alpha))
    return counter.metrics()


def _load_cached(path: Path) -> dict[str, Any] | None:
    """What an earlier run left; None if there is nothing, or nothing that can be read."""
    if not path.is_file():
        return None
    try:
        cached: dict[str, Any] = torch.load(path, weights_only=True)
    except Exception as error:  # torch raises half a dozen kinds for a damaged file
        logger.warning("%s cannot be read (%s): fitting the segmenter anew", path, type(error).__name__)
        return None
    return cached


def _read_pairs(shard_set: ShardSet, num_images: int, config: Config, *, shrunk: bool) -> tuple[Tensor, Tensor]:
    batch = min(64, num_images // 4 * 4)
    loader = make_loader(
        config.loader,
        shard_set,
        global_batch=batch,
        rank=0,
        world_size=1,
        seed=0,
        flip=False,
        with_alpha=True,
        device=torch.device("cpu"),
        num_threads=2,
    )
    images, alphas = [], []
    for _ in range(num_images // batch):
        pairs = next(loader)
        assert pairs.alphas is not None
        images.append(shrink(pairs.images) if shrunk else pairs.images)
        alphas.append(shrink(pairs.alphas) if shrunk else pairs.alphas)
    loader.close()
    return torch.cat(images), torch.cat(alphas)


def _to_uint8(x: Tensor, *, low: float) -> Tensor:
    return ((x - low) / (1.0 - low) * 255.0).round().byte()
