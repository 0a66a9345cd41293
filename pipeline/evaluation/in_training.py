"""Mask metrics: of generated foregrounds against pseudo ground truth, and of the mask predictor on real images.

Every rank measures its share, and the counts of pixels are summed: integers, so that no figure depends on the number of
ranks.
"""

import contextlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_shards.reading.loader import make_loader
from data_shards.reading.order import GROUP_SIZE, BatchOrder
from data_shards.reading.shard_set import ShardSet
from models.discriminator import Discriminator
from models.generator import FurryGenerator
from pipeline.config import Config
from pipeline.evaluation.mask_metrics import MaskCounter, MaskMetrics
from pipeline.evaluation.pictures import RealPictures
from pipeline.evaluation.segmenter import SEGMENTER_VERSION, Segmenter, fit_segmenter, shrink
from pipeline.methods.furrygan.losses import downsample_mask
from pipeline.methods.randomness import Stream, draw
from pipeline.ranks.collectives import global_sum, on_first_rank, share
from pipeline.runs.checkpoints import serialise
from pipeline.runs.saving import SaveError, saving

logger = logging.getLogger(__name__)

CHUNK = 16
"""Images at a time; small, so that many ranks get a share."""

NUM_REAL = 512


@dataclass(frozen=True)
class PseudoTruth:
    """What mask metrics are measured with.

    Attributes:
        segmenter: fitted on the shards' ground-truth alpha.
        held_out: its own figures on images it was not fitted on.
        real: real images to try the mask predictor on, this rank's share, and their ground-truth alpha: pairs of
            ``[b, 3, R, R]`` uint8 and ``[b, 1, R, R]`` in [0, 1], on the CPU.
    """

    segmenter: Segmenter
    held_out: MaskMetrics
    real: Sequence[tuple[Tensor, Tensor]]


def prepare_pseudo_truth(shard_set: ShardSet, config: Config, device: torch.device, *, progress: bool) -> PseudoTruth:
    """Fit the segmenter on one rank for all, or take the one that an earlier run on the same shards left in the cache.

    Args:
        shard_set: with alpha.
        config: sizes of the fit, and where its result is kept.
        device: to fit on, and for the segmenter.
        progress: show a bar.
    """
    fitted = on_first_rank(lambda: _fitted(shard_set, config, device, progress=progress))
    segmenter = Segmenter().to(device)
    segmenter.load_state_dict(fitted["segmenter"])
    segmenter.eval().requires_grad_(False)
    return PseudoTruth(segmenter, MaskMetrics(**fitted["held_out"]), _real_share(shard_set))


def _fitted(shard_set: ShardSet, config: Config, device: torch.device, *, progress: bool) -> dict[str, Any]:
    """Weights of the segmenter and its figures on held-out images, from the cache where they are there."""
    num_images = min(config.evaluation.segmenter_images, shard_set.num_samples)
    path = (
        config.cache_dir
        / f"segmenter-v{SEGMENTER_VERSION}-{shard_set.digest[:16]}-{num_images}-{config.evaluation.segmenter_steps}.pt"
    )
    if (cached := _load_cached(path)) is not None:
        return cached
    images, alphas = _read_pairs(shard_set, num_images, config)
    segmenter, held_out = fit_segmenter(
        _to_uint8(images, low=-1.0),
        _to_uint8(alphas, low=0.0),
        num_steps=config.evaluation.segmenter_steps,
        seed=0,
        device=device,
        progress=progress,
    )
    weights = {name: value.cpu() for name, value in segmenter.state_dict().items()}
    fitted = {"segmenter": weights, "held_out": vars(held_out)}
    try:
        with saving(path) as temporary, temporary.open("wb") as file:
            serialise(fitted, file)
    except SaveError as error:
        logger.warning("%s: the next run has to fit the segmenter again", error)
    return fitted


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
    """Final masks against the segmenter's of the generated foregrounds (paper, section 4.2); on all ranks together."""
    device = next(generator.parameters()).device
    counter = MaskCounter(threshold)
    for first in share(range(0, num_samples, CHUNK)):
        slots = range(first, min(first + CHUNK, num_samples))
        given = draw(
            seed, Stream.EVALUATION, 0, slots, z_dim=generator.z_dim, num_noise=generator.num_noise, device=device
        )
        out = generator(given.z, noise=given.noise, fade_in=fade_in, psi=psi, num_composites=0)
        counter.add(out.mask, segmenter(out.foreground))
    return MaskMetrics.from_counts(global_sum(counter.counts.to(device)))


@torch.no_grad()
def real_mask_prediction_metrics(
    discriminator: Discriminator, real: Sequence[tuple[Tensor, Tensor]], *, threshold: float
) -> MaskMetrics:
    """The discriminator's 16x16 masks of real images against their ground-truth alpha at 16x16; on all ranks together.

    Args:
        discriminator: D.
        real: as in `PseudoTruth`.
        threshold: a value above it is foreground.
    """
    device = next(discriminator.parameters()).device
    counter = MaskCounter(threshold)
    for images, alpha in real:
        counter.add(discriminator.predict_mask(images.to(device) / 127.5 - 1.0), downsample_mask(alpha.to(device)))
    return MaskMetrics.from_counts(global_sum(counter.counts.to(device)))


def _load_cached(path: Path) -> dict[str, Any] | None:
    """What an earlier run left; None if there is nothing, or nothing that can be read."""
    if not path.is_file():
        return None
    try:
        cached: dict[str, Any] = torch.load(path, weights_only=True)
    except Exception as error:  # torch raises half a dozen kinds for a damaged file
        logger.warning("%s cannot be read (%s): fitting the segmenter again", path, type(error).__name__)
        return None
    return cached


def _real_share(shard_set: ShardSet) -> list[tuple[Tensor, Tensor]]:
    """This rank's share of some real images and their alphas, in chunks that are the same on any number of ranks."""
    num = min(NUM_REAL, shard_set.num_samples // GROUP_SIZE * GROUP_SIZE)
    order = BatchOrder(shard_set.num_samples, global_batch=num, seed=0, flip=False, windows=shard_set.windows)
    if order.windows:
        shard_set.expect(order.shards_at(0))
    chosen, _ = order.batch_at(0)
    mine = share([chosen[first : first + CHUNK].tolist() for first in range(0, num, CHUNK)])
    with contextlib.closing(RealPictures(shard_set, num_threads=2)) as pictures:
        return [(pictures.images(samples), pictures.alphas(samples)) for samples in mine]


def _read_pairs(shard_set: ShardSet, num_images: int, config: Config) -> tuple[Tensor, Tensor]:
    """Images and their alphas as the segmenter takes them."""
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
        images.append(shrink(pairs.images))
        alphas.append(shrink(pairs.alphas))
    loader.close()
    return torch.cat(images), torch.cat(alphas)


def _to_uint8(x: Tensor, *, low: float) -> Tensor:
    return ((x - low) / (1.0 - low) * 255.0).round().byte()
