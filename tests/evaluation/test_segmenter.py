"""The segmenter finds what its alphas show, the same each time, and leaves everything else as it was."""

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import assert_same_bits
from numpy.typing import NDArray

from data_shards.building.writer import write_shards
from data_shards.format.sample import Sample
from data_shards.reading.shard_set import ShardSet
from models.discriminator import Discriminator
from models.widths import Widths
from pipeline.config import Config
from pipeline.config.files import config_from_dict
from pipeline.evaluation import in_training
from pipeline.evaluation.in_training import prepare_pseudo_truth, real_mask_prediction_metrics
from pipeline.evaluation.mask_metrics import MaskCounter
from pipeline.evaluation.segmenter import MAX_RESOLUTION, Segmenter, fit_segmenter, shrink

CPU = torch.device("cpu")


def discs(num: int, resolution: int, seed: int = 0) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Bright discs on dark, noisy grounds: images ``[num, R, R, 3]`` and alphas ``[num, R, R]``."""
    rng = np.random.default_rng(seed)
    at = (np.arange(resolution) + 0.5) / resolution
    x, y = rng.uniform(0.3, 0.7, (2, num, 1, 1))
    radius = rng.uniform(0.2, 0.4, (num, 1, 1))
    inside = (at[:, None] - y) ** 2 + (at[None, :] - x) ** 2 < radius**2
    images = rng.normal(np.where(inside, 190, 60)[..., None], 8, (num, resolution, resolution, 3))
    return images.clip(0, 255).astype(np.uint8), np.where(inside, 255, 0).astype(np.uint8)


def to_tensors(images: NDArray[np.uint8], alphas: NDArray[np.uint8]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(alphas)[:, None]


@pytest.fixture(scope="module")
def fitted() -> tuple[Segmenter, float]:
    images, alphas = to_tensors(*discs(256, 16))
    network, held_out = fit_segmenter(images, alphas, num_steps=150, seed=0, device=CPU)
    return network, held_out.iou_fg


def test_it_finds_discs_it_has_not_seen(fitted: tuple[Segmenter, float]) -> None:
    network, held_out_iou = fitted
    assert held_out_iou > 0.9
    images, alphas = to_tensors(*discs(32, 16, seed=1))
    counter = MaskCounter()
    counter.add(network(images / 127.5 - 1), alphas / 255)
    assert counter.metrics().iou_fg > 0.9 and counter.metrics().iou_bg > 0.9


def test_fitted_segmenter_is_a_fixed_function(fitted: tuple[Segmenter, float]) -> None:
    network, _ = fitted
    assert not network.training
    assert not any(parameter.requires_grad for parameter in network.parameters())
    images = to_tensors(*discs(4, 32))[0] / 127.5 - 1
    alone = torch.cat([network(image[None]) for image in images])
    torch.testing.assert_close(network(images), alone, rtol=0, atol=1e-5)


def test_fit_is_a_function_of_its_seed() -> None:
    pairs = to_tensors(*discs(64, 32))
    networks = [fit_segmenter(*pairs, num_steps=3, seed=seed, device=CPU) for seed in (0, 0, 1)]
    assert_same_bits(dict(networks[0][0].state_dict()), dict(networks[1][0].state_dict()))
    assert networks[0][1] == networks[1][1]
    assert not torch.equal(networks[0][0].to_logits.weight, networks[2][0].to_logits.weight)


def test_fit_leaves_the_random_numbers_of_others_alone() -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    fit_segmenter(*to_tensors(*discs(16, 32)), num_steps=2, seed=0, device=CPU)
    assert torch.equal(torch.get_rng_state(), before)


def test_held_out_images_are_not_trained_on() -> None:
    """Every eighth has the opposite alpha: who had seen them would not fail on them so."""
    images, alphas = discs(256, 16)
    alphas[::8] = 255 - alphas[::8]
    _, held_out = fit_segmenter(*to_tensors(images, alphas), num_steps=150, seed=0, device=CPU)
    assert held_out.iou_fg < 0.1


@pytest.mark.parametrize("resolution", [32, 64, 256])
def test_masks_have_the_resolution_of_the_pictures(resolution: int, fitted: tuple[Segmenter, float]) -> None:
    network, _ = fitted
    mask = network(to_tensors(*discs(2, resolution))[0] / 127.5 - 1)
    assert mask.shape == (2, 1, resolution, resolution)
    assert mask.min() >= 0 and mask.max() <= 1


def test_larger_pictures_are_looked_at_smaller() -> None:
    x = torch.rand(2, 3, 256, 256)
    assert shrink(x).shape[-1] == MAX_RESOLUTION
    torch.testing.assert_close(shrink(x).mean(), x.mean(), rtol=1e-3, atol=0)
    small = torch.rand(2, 3, 64, 64)
    assert shrink(small) is small


# --- the pseudo ground truth of a run ---


def write_discs(out: Path, num: int, resolution: int) -> ShardSet:
    samples = (Sample(image, alpha) for image, alpha in zip(*discs(num, resolution), strict=True))
    write_shards(samples, out, resolution=resolution, source={})
    return ShardSet.open(out)


def config_of(cache: Path, resolution: int = 32) -> Config:
    return config_from_dict(
        {
            "resolution": resolution,
            "cache_dir": cache,
            "model": {"channel_base": 4 * resolution, "channel_max": 16},
            "evaluation": {"segmenter_steps": 3 if resolution == 32 else 1},
        }
    )


def test_cached_segmenter_is_the_fitted_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard_set, config = write_discs(tmp_path / "data", 64, 32), config_of(tmp_path / "cache")
    fitted = prepare_pseudo_truth(shard_set, config, CPU, progress=False)

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("fitted again")

    monkeypatch.setattr(in_training, "fit_segmenter", fail)
    cached = prepare_pseudo_truth(shard_set, config, CPU, progress=False)
    assert cached.held_out == fitted.held_out
    assert_same_bits(dict(cached.segmenter.state_dict()), dict(fitted.segmenter.state_dict()))
    assert_same_bits(cached.real, fitted.real)
    images = cached.real[0][0] / 127.5 - 1
    assert torch.equal(cached.segmenter(images), fitted.segmenter(images))
    assert not cached.segmenter.training
    shard_set.close()


@pytest.mark.parametrize("content", [b"", b"half of a file"])
def test_damaged_cache_is_fitted_anew(content: bytes, tmp_path: Path) -> None:
    shard_set, config = write_discs(tmp_path / "data", 16, 32), config_of(tmp_path / "cache")
    fitted = prepare_pseudo_truth(shard_set, config, CPU, progress=False)
    (path,) = (tmp_path / "cache").glob("segmenter-*.pt")
    path.write_bytes(content)
    again = prepare_pseudo_truth(shard_set, config, CPU, progress=False)
    assert_same_bits(dict(again.segmenter.state_dict()), dict(fitted.segmenter.state_dict()))
    shard_set.close()


def test_other_data_or_another_fit_has_a_cache_of_its_own(tmp_path: Path) -> None:
    config = config_of(tmp_path / "cache")
    for num, steps in ((16, 3), (24, 3), (16, 2)):
        shard_set = write_discs(tmp_path / f"data-{num}-{steps}", num, 32)
        longer = config_from_dict({"cache_dir": config.cache_dir, "evaluation": {"segmenter_steps": steps}})
        prepare_pseudo_truth(shard_set, longer, CPU, progress=False)
        shard_set.close()
    assert len(list((tmp_path / "cache").glob("segmenter-*.pt"))) == 3


def test_real_images_are_those_of_the_shards_with_their_alphas(tmp_path: Path) -> None:
    shard_set = write_discs(tmp_path / "data", 24, 32)
    truth = prepare_pseudo_truth(shard_set, config_of(tmp_path / "cache"), CPU, progress=False)
    images, alphas = to_tensors(*discs(24, 32))
    real_images, real_alphas = (torch.cat(parts) for parts in zip(*truth.real, strict=True))
    assert real_images.shape == (24, 3, 32, 32) and real_alphas.shape == (24, 1, 32, 32)
    order = [int((real_images.int() - image).abs().amax(dim=(1, 2, 3)).argmin()) for image in images]
    assert sorted(order) == list(range(24))
    assert torch.equal(real_images[order], images)
    torch.testing.assert_close(real_alphas[order], alphas / 255, rtol=0, atol=1e-5)
    shard_set.close()


def test_pictures_larger_than_the_segmenters_can_be_measured(tmp_path: Path) -> None:
    """The discriminator takes images of one size alone: those of the run."""
    shard_set, config = write_discs(tmp_path / "data", 8, 256), config_of(tmp_path / "cache", 256)
    truth = prepare_pseudo_truth(shard_set, config, CPU, progress=False)
    discriminator = Discriminator(256, Widths(1024, 16))
    metrics = real_mask_prediction_metrics(discriminator, truth.real, threshold=0.5)
    assert 0 <= metrics.accuracy <= 1
    ((images, alphas),) = truth.real
    assert truth.segmenter(images / 127.5 - 1).shape == alphas.shape
    shard_set.close()
