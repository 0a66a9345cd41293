"""The score without labels: its parts in closed form, and that they fall for masks that are wrong."""

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import furballs, rows, shard_cache, tiny, train_in_process
from torch import Tensor

from data_shards.reading.shard_set import ShardSet
from models.discriminator import Discriminator
from models.generator import FurryGenerator
from pipeline.evaluation.features import FeatureStatistics, image_distances
from pipeline.evaluation.pictures import to_uint8
from pipeline.evaluation.unlabelled import (
    NUM_SAMPLES,
    Parts,
    UnlabelledJudge,
    border_share,
    separation,
)
from pipeline.methods.randomness import Stream, draw

SIZE = 16


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shard_cache(tmp_path_factory)


def square(low: int = 4, high: int = 12) -> Tensor:
    mask = torch.zeros(1, 1, SIZE, SIZE)
    mask[..., low:high, low:high] = 1
    return mask


def test_separation_is_one_where_the_mask_tells_both_colours_apart_and_zero_where_it_tells_nothing() -> None:
    mask = square()
    image = torch.tensor([0.7, -0.2, 0.1])[None, :, None, None] * (2 * mask - 1)
    assert separation(image, mask).item() == pytest.approx(1.0, abs=1e-4)
    assert separation(image, 1 - mask).item() == pytest.approx(1.0, abs=1e-4)
    for useless in (torch.zeros_like(mask), torch.ones_like(mask)):
        assert separation(image, useless).item() == 0.0


def test_separation_equals_the_share_of_variance_that_a_regression_on_the_mask_explains() -> None:
    image, mask = torch.rand(3, 3, SIZE, SIZE), (torch.rand(3, 1, SIZE, SIZE) > 0.6).float()
    for x, m, found in zip(image.double().numpy(), mask.double().numpy(), separation(image, mask), strict=True):
        explained = total = 0.0
        for channel in x:
            slope, offset = np.polyfit(m.ravel(), channel.ravel(), 1)
            explained += (slope * m + offset).var()
            total += channel.var()
        assert found.item() == pytest.approx(explained / total, rel=1e-4)


def test_border_share_counts_each_outermost_pixel_once() -> None:
    mask = torch.rand(2, 1, SIZE, SIZE)
    pixels = {(y, x) for y in range(SIZE) for x in range(SIZE) if y in (0, SIZE - 1) or x in (0, SIZE - 1)}
    for m, found in zip(mask, border_share(mask), strict=True):
        assert found.item() == pytest.approx(np.mean([m[0, y, x].item() for y, x in pixels]))
    assert border_share(square()).item() == 0.0


def test_score_is_the_product_of_the_parts_there_are() -> None:
    parts = Parts(fidelity=0.9, separation=0.8, inside=0.5, agreement=0.4)
    assert parts.score == pytest.approx(0.9 * 0.8 * 0.5**2 * 0.4)
    assert Parts(0.9, 0.8, 0.5, None).score == pytest.approx(0.9 * 0.8 * 0.5**2)
    assert set(parts.named()) == {
        f"unlabelled/{name}" for name in ("fidelity", "separation", "inside", "agreement", "score")
    }


def test_parts_are_those_of_the_generated_samples(
    cache: Path, generator: FurryGenerator, discriminator: Discriminator
) -> None:
    """Against all samples at once, and the real images read as they lie in the shards."""
    with_shards = ShardSet.open(furballs(cache), resolution=generator.resolution)
    judge = UnlabelledJudge(with_shards, 3, torch.device("cpu"))
    parts = judge.measure(generator, discriminator, fade_in=0.5)
    given = draw(
        3,
        Stream.UNLABELLED,
        0,
        range(NUM_SAMPLES),
        z_dim=generator.z_dim,
        num_noise=generator.num_noise,
        device=torch.device("cpu"),
    )
    with torch.no_grad():
        out = generator(given.z, noise=given.noise, fade_in=0.5)
        mask = (out.mask > 0.5).float()
        generated = FeatureStatistics(keep=False)
        generated.add(judge._extractor(to_uint8(out.foreground)))
    distance = image_distances(generated, judge._real, judge._extractor, ["fid"], seed=0)["frechet_distance"]
    spread = 10 * np.trace(judge._real.covariance)
    assert parts.fidelity == pytest.approx(spread / (spread + distance), rel=1e-3)
    assert parts.separation == pytest.approx(separation(out.foreground, mask).mean().item(), rel=1e-4)
    assert parts.inside == pytest.approx(1 - border_share(mask).mean().item(), abs=1e-5)
    assert judge._real.num == with_shards.num_samples
    with_shards.close()


def test_run_measures_the_score_at_each_checkpoint_and_trains_as_without(cache: Path, tmp_path: Path) -> None:
    every = {"log": {"checkpoint_interval_images": 16}}
    judged = train_in_process(tmp_path, *tiny(cache, **every), "--run-dir", "judged", "--evaluation.unlabelled")
    plain = train_in_process(tmp_path, *tiny(cache, **every), "--run-dir", "plain")
    assert (judged.code, plain.code) == (0, 0), judged.err + plain.err
    measured = [row for row in rows(tmp_path / "judged") if "unlabelled/score" in row]
    assert [row["iteration"] for row in measured] == [2, 4]
    assert all(0 <= row["unlabelled/score"] <= 1 for row in measured)
    masks = [[row["mask/miou"] for row in rows(tmp_path / run) if "mask/miou" in row] for run in ("judged", "plain")]
    assert masks[0] == masks[1]
