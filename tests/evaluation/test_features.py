"""Distances between sets of images: equal to torch-fidelity's, near 0 for one set, growing as images get worse."""

from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from torch import Tensor
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

from data_shards.errors import UserError
from data_shards.sources.furballs import draw
from pipeline.evaluation.features import (
    INCEPTION,
    Extractor,
    FeatureStatistics,
    WeightsUnavailableError,
    image_distances,
    load_extractor,
    statistics_path,
)

CPU = torch.device("cpu")


@pytest.fixture
def extractor() -> Extractor:
    return load_extractor("extractors:TinyFeatures", None, CPU)


def pictures(num: int, seed: int = 0) -> Tensor:
    """Smooth colour fields with detail, uint8."""
    rng = torch.Generator().manual_seed(seed)
    smooth = F.interpolate(torch.randn(num, 3, 4, 4, generator=rng), size=32, mode="bicubic")
    detail = F.interpolate(torch.randn(num, 3, 16, 16, generator=rng), size=32)
    return (128 + 40 * smooth + 25 * detail).clamp(0, 255).round().byte()


def statistics(extractor: Extractor, images: Tensor) -> FeatureStatistics:
    found = FeatureStatistics(keep=True)
    for part in images.split(50):
        found.add(extractor(part))
    return found


def distance(extractor: Extractor, one: Tensor, other: Tensor) -> float:
    sets = (statistics(extractor, images) for images in (one, other))
    return image_distances(*sets, extractor, ["fid"], seed=0)["frechet_distance"]


def blur(images: Tensor, sigma: float) -> Tensor:
    return torch.from_numpy(gaussian_filter(images.numpy(), (0, 0, sigma, sigma)))


def test_halves_of_one_set_are_near_and_worse_pictures_ever_farther(extractor: Extractor) -> None:
    images = pictures(1200)
    one, other = images[::2], images[1::2]
    halves = distance(extractor, one, other)
    blurred = [distance(extractor, one, blur(other, sigma)) for sigma in (1.0, 1.5, 2.5)]
    rng = torch.Generator().manual_seed(1)
    noise = torch.randn(other.shape, generator=rng)
    noisy = [distance(extractor, one, (other + s * noise).clamp(0, 255).byte()) for s in (20, 40, 80)]
    for worse in (blurred, noisy):
        assert halves < worse[0] / 10, (halves, worse)
        assert worse[0] < worse[1] < worse[2], worse


def test_set_has_no_distance_from_itself(extractor: Extractor) -> None:
    images = pictures(100)
    assert distance(extractor, images, images) == pytest.approx(0, abs=1e-6)


def test_streamed_statistics_equal_those_of_all_features(extractor: Extractor) -> None:
    images = pictures(130)
    streamed = statistics(extractor, images)
    whole = fid_features_to_statistics(torch.from_numpy(extractor(images)).double())
    assert streamed.num == 130
    assert streamed.mean == pytest.approx(whole["mu"])
    assert streamed.covariance == pytest.approx(whole["sigma"])
    other = statistics(extractor, pictures(90, seed=3))
    expected = fid_statistics_to_metric(whole, {"mu": other.mean, "sigma": other.covariance}, verbose=False)[
        "frechet_inception_distance"
    ]
    ours = image_distances(streamed, other, extractor, ["fid"], seed=0)
    assert ours == {"frechet_distance": pytest.approx(expected)}


def test_gaussians_of_known_moments_have_the_closed_form(extractor: Extractor) -> None:
    """Two axis-parallel Gaussians: squared distance of the means plus the squared differences of the deviations."""
    rng = np.random.default_rng(0)

    def sampled(mean: float, deviation: float) -> FeatureStatistics:
        x: NDArray[np.float32] = rng.standard_normal((4000, 3)).astype(np.float32)
        white = (x - x.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(x, rowvar=False))).T
        found = FeatureStatistics(keep=False)
        found.add((mean + deviation * white).astype(np.float32))
        return found

    ours = image_distances(sampled(0.0, 1.0), sampled(2.0, 3.0), extractor, ["fid"], seed=0)
    assert ours["frechet_distance"] == pytest.approx(3 * 2.0**2 + 3 * (3.0 - 1.0) ** 2, rel=1e-4)


def test_what_is_not_inception_is_not_called_fid_or_kid(extractor: Extractor) -> None:
    sets = [statistics(extractor, pictures(40, seed)) for seed in (0, 1)]
    names = image_distances(*sets, extractor, ["fid", "kid", "prc"], seed=0).keys()
    assert names == {
        "frechet_distance",
        "kernel_distance",
        "kernel_distance_std",
        "generative_precision",
        "generative_recall",
    }


def test_statistics_come_back_from_the_cache_as_they_were(extractor: Extractor, tmp_path: Path) -> None:
    path = statistics_path(tmp_path, "0" * 64, extractor)
    assert FeatureStatistics.load(path, keep=False) is None
    before = statistics(extractor, pictures(60))
    before.save(path)
    for keep in (False, True):
        after = FeatureStatistics.load(path, keep=keep)
        assert after is not None and after.num == 60
        assert np.array_equal(after.mean, before.mean) and np.array_equal(after.covariance, before.covariance)
        if keep:
            assert np.array_equal(after.features, before.features)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_cache_without_features_does_not_serve_who_needs_them(extractor: Extractor, tmp_path: Path) -> None:
    path = tmp_path / "s.npz"
    found = FeatureStatistics(keep=False)
    found.add(extractor(pictures(20)))
    found.save(path)
    assert FeatureStatistics.load(path, keep=False) is not None
    assert FeatureStatistics.load(path, keep=True) is None


def test_damaged_cache_is_measured_anew(extractor: Extractor, tmp_path: Path) -> None:
    path = tmp_path / "s.npz"
    statistics(extractor, pictures(20)).save(path)
    path.write_bytes(path.read_bytes()[:300])
    assert FeatureStatistics.load(path, keep=False) is None


def test_fingerprint_tells_weights_apart(extractor: Extractor) -> None:
    again = load_extractor("extractors:TinyFeatures", None, CPU)
    assert again.fingerprint == extractor.fingerprint
    assert load_extractor("extractors:OtherFeatures", None, CPU).fingerprint != extractor.fingerprint


@pytest.fixture(scope="module")
def inception() -> FeatureExtractorInceptionV3:
    """Of random weights: torch-fidelity's network, as if its download had worked."""
    with (
        mock.patch("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url"),
        mock.patch.object(FeatureExtractorInceptionV3, "load_state_dict"),
    ):
        torch.manual_seed(0)
        return FeatureExtractorInceptionV3(INCEPTION, ["2048"])


def test_inception_by_file_is_torch_fidelitys_and_its_distances_are_called_by_its_name(
    inception: FeatureExtractorInceptionV3, tmp_path: Path
) -> None:
    weights = tmp_path / "inception.pth"
    torch.save(inception.state_dict(), weights)
    extractor = load_extractor(INCEPTION, weights, CPU)
    images = pictures(4)
    assert np.array_equal(extractor(images), inception(images)[0].numpy())
    assert "bilinear without antialiasing" in extractor.resize
    found = statistics(extractor, images)
    assert image_distances(found, found, extractor, ["kid"], seed=0).keys() == {"kid", "kid_std"}


def test_inception_without_file_or_network_is_told_apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nobody listens there
    with pytest.raises(WeightsUnavailableError, match="--inception-weights FILE"):
        load_extractor(INCEPTION, None, CPU)


def test_bad_extractors_and_weights_are_named(tmp_path: Path) -> None:
    other = tmp_path / "other.pth"
    torch.save({"x": torch.zeros(1)}, other)
    (tmp_path / "text.pth").write_text("no weights")
    for name, weights, words in (
        ("inception-v4", None, "inception-v4 is unknown"),
        ("nowhere:Features", None, "nowhere"),
        ("extractors:Nothing", None, "has no 'Nothing'"),
        ("extractors:NUM_FEATURES", None, "FeatureExtractorBase"),
        (INCEPTION, tmp_path / "missing.pth", "missing.pth does not exist"),
        (INCEPTION, other, "other.pth are not torch-fidelity's"),
        (INCEPTION, tmp_path / "text.pth", "text.pth are not torch-fidelity's"),
        ("extractors:TinyFeatures", other, "leave one of them out"),
    ):
        with pytest.raises(UserError, match=words):
            load_extractor(name, weights, CPU)


def test_random_vgg16_is_the_same_each_time_and_its_distance_grows_as_pictures_get_worse() -> None:
    """No FID, and nothing is downloaded."""
    extractor, again = (load_extractor("random-vgg16", None, CPU) for _ in range(2))
    assert extractor.fingerprint == again.fingerprint and not extractor.is_inception

    pictures = np.stack([draw(i, seed=0, resolution=32).image for i in range(96)]).transpose(0, 3, 1, 2)

    def statistics(images: NDArray[np.uint8]) -> FeatureStatistics:
        found = FeatureStatistics(keep=False)
        found.add(extractor(torch.from_numpy(np.ascontiguousarray(images))))
        return found

    real, half = statistics(pictures[:48]), pictures[48:]
    blurred = [half, *(gaussian_filter(half, (0, 0, s, s)) for s in (0.7, 1.5))]
    distances = [image_distances(statistics(x), real, extractor, ["fid"], seed=0)["frechet_distance"] for x in blurred]
    assert distances[0] < distances[1] < distances[2]
