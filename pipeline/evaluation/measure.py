"""The measurements of an evaluation: of generated samples at one truncation, and of real images."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from numpy.typing import NDArray

from data_shards.reading.shard_set import ShardSet
from models.generator import GeneratorOutput
from pipeline.evaluation.features import Extractor, FeatureStatistics, statistics_path
from pipeline.evaluation.mask_scores import MaskScores, join, score_masks
from pipeline.evaluation.pictures import RealPictures, generate, to_uint8
from pipeline.evaluation.pseudo_truth import ALPHA, Segmentation
from pipeline.evaluation.ranks import in_order
from pipeline.generation.trained_run import TrainedRun
from pipeline.methods.furrygan.losses import downsample_mask

NUM_ALPHA_BINS = 20

KINDS = ("foreground", "composite")
"""Generated images whose distance from the real ones is measured."""


@dataclass(frozen=True)
class Plan:
    """What every measurement shares.

    Attributes:
        run: that is evaluated.
        num_samples: generated, and real ones at most.
        batch: samples at a time on a rank.
        seed: of latents and noise.
        threshold: alpha above it is foreground.
    """

    run: TrainedRun
    num_samples: int
    batch: int
    seed: int
    threshold: float


@dataclass(frozen=True, eq=False)
class Generated:
    """What was measured on n generated samples.

    Attributes:
        psi: their truncation.
        statistics: of features, by kind of image; empty without an extractor.
        scores: of masks, by pseudo ground truth.
        areas: ``[n]`` share of each image that is foreground.
        alpha_histogram: ``[20]`` pixels by alpha, from 0 to 1.
    """

    psi: float
    statistics: Mapping[str, FeatureStatistics]
    scores: Mapping[str, MaskScores]
    areas: NDArray[np.float64]
    alpha_histogram: NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class _Batch:
    features: dict[str, NDArray[np.float32]]
    scores: dict[str, MaskScores]
    areas: NDArray[np.float64]
    alpha_histogram: NDArray[np.int64]


def measure_generated(
    plan: Plan,
    psi: float,
    truths: Mapping[str, Segmentation],
    extractor: Extractor | None,
    accelerator: Accelerator,
    *,
    keep_features: bool,
) -> Generated | None:
    """Measure generated samples on all ranks.

    Args:
        plan: run, number and seed of the samples.
        psi: truncation.
        truths: pseudo ground truths by name; each segments the foregrounds.
        extractor: of features; None: none.
        accelerator: of the ranks.
        keep_features: keep features beyond their mean and covariance.

    Returns:
        The measurements on the main process; elsewhere None.
    """

    def compute(samples: range) -> _Batch:
        out = generate(plan.run, samples, psi=psi, seed=plan.seed)
        features = {}
        if extractor is not None:
            features = {kind: extractor(to_uint8(getattr(out, kind))) for kind in KINDS}
        scores = {
            name: score_masks(out.mask, truth(out.foreground), threshold=plan.threshold)
            for name, truth in truths.items()
        }
        return _Batch(features, scores, *_alpha_figures(out, plan.threshold))

    statistics = {kind: FeatureStatistics(keep=keep_features) for kind in KINDS} if extractor else {}
    batches = []
    for batch in in_order(plan.num_samples, plan.batch, compute, accelerator, label=f"psi {psi}"):
        for kind, features in batch.features.items():
            statistics[kind].add(features)
        batch.features.clear()
        batches.append(batch)
    if not batches:
        return None
    return Generated(
        psi=psi,
        statistics=statistics,
        scores={name: join([batch.scores[name] for batch in batches]) for name in truths},
        areas=np.concatenate([batch.areas for batch in batches]),
        alpha_histogram=np.sum([batch.alpha_histogram for batch in batches], axis=0),
    )


def real_statistics(
    shard_set: ShardSet,
    pictures: RealPictures,
    extractor: Extractor,
    plan: Plan,
    cache_dir: Path,
    accelerator: Accelerator,
    *,
    keep_features: bool,
) -> FeatureStatistics | None:
    """Features of all images of a shard set, not mirrored; from the cache where they are there.

    Returns:
        The statistics on the main process; elsewhere None.
    """
    path = statistics_path(cache_dir, shard_set.digest, extractor)
    cached = FeatureStatistics.load(path, keep=keep_features) if accelerator.is_main_process else None
    if broadcast_object_list([cached is not None])[0]:
        return cached
    device = accelerator.device
    statistics = FeatureStatistics(keep=keep_features)
    for features in in_order(
        shard_set.num_samples,
        plan.batch,
        lambda samples: extractor(pictures.images(samples).to(device)),
        accelerator,
        label="real images",
    ):
        statistics.add(features)
    if not accelerator.is_main_process:
        return None
    statistics.save(path)
    return statistics


@dataclass(frozen=True, eq=False)
class Real:
    """What was measured on real images.

    Attributes:
        num: images.
        mask_pred: the discriminator's 16x16 masks, by what they were compared with; empty where it has no predictor.
        truths: pseudo ground truths against ground-truth alpha, by name; empty where shards carry none.
    """

    num: int
    mask_pred: Mapping[str, MaskScores]
    truths: Mapping[str, MaskScores]


def measure_real(
    plan: Plan,
    shard_set: ShardSet,
    pictures: RealPictures,
    truths: Mapping[str, Segmentation],
    accelerator: Accelerator,
) -> Real | None:
    """Hold the mask predictor against ground-truth alpha where there is one, and against pseudo ground truths.

    Args:
        plan: run and number of images; of a larger set, as many are taken at even distances.
        shard_set: of the images.
        images: of the shard set.
        truths: pseudo ground truths by name.
        accelerator: of the ranks.

    Returns:
        The measurements on the main process; elsewhere None, as where there is nothing to hold it against.
    """
    if not truths and not shard_set.has_alpha:
        return None
    num = min(plan.num_samples, shard_set.num_samples)
    discriminator = plan.run.discriminator

    def compute(samples: range) -> tuple[dict[str, MaskScores], dict[str, MaskScores]]:
        chosen = [i * shard_set.num_samples // num for i in samples]
        images = pictures.images(chosen).to(accelerator.device).float() / 127.5 - 1
        with torch.no_grad():
            predicted = discriminator.predict_mask(images) if discriminator.mask_predictor is not None else None
            masks = {name: truth(images) for name, truth in truths.items()}
        quality = {}
        if shard_set.has_alpha:
            alpha = pictures.alphas(chosen).to(accelerator.device)
            quality = {name: score_masks(mask, alpha, threshold=plan.threshold) for name, mask in masks.items()}
            masks = {ALPHA: alpha, **masks}
        small = {}
        if predicted is not None:
            small = {
                name: score_masks(predicted, downsample_mask(mask), threshold=plan.threshold, soft=False)
                for name, mask in masks.items()
            }
        return small, quality

    parts = list(in_order(num, plan.batch, compute, accelerator, label="mask predictor"))
    if not parts:
        return None
    return Real(num, _join_named([p[0] for p in parts]), _join_named([p[1] for p in parts]))


def _join_named(parts: Sequence[Mapping[str, MaskScores]]) -> dict[str, MaskScores]:
    return {name: join([part[name] for part in parts]) for name in parts[0]}


def _alpha_figures(out: GeneratorOutput, threshold: float) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Area of each mask, and pixels by alpha."""
    areas = (out.mask > threshold).double().mean(dim=(1, 2, 3)).cpu().numpy()
    histogram, _ = np.histogram(out.mask.cpu().numpy(), bins=NUM_ALPHA_BINS, range=(0.0, 1.0))
    return areas, histogram
