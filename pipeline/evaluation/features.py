"""Distances between sets of images by the features of a network: FID, KID, generative precision and recall.

Extractors, distances and Inception weights are torch-fidelity's (Obukhov et al. 2020). Images pass in batches and are
dropped; of their features, mean and covariance are summed up in double precision, and the features themselves are kept
only where KID or precision and recall need them. What is not Inception is never called FID or KID.
"""

import hashlib
import importlib
import inspect
import logging
import os
import socket
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.error import URLError

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch_fidelity.feature_extractor_base import FeatureExtractorBase  # type: ignore[import-untyped]
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric  # type: ignore[import-untyped]
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric  # type: ignore[import-untyped]
from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric  # type: ignore[import-untyped]
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY  # type: ignore[import-untyped]

from data_shards.errors import UserError
from pipeline.evaluation.random_features import RANDOM_VGG16, RandomVgg16

logger = logging.getLogger(__name__)

ImageMetric = Literal["fid", "kid", "prc"]

INCEPTION = "inception-v3-compat"
INCEPTION_RESIZE = "to 299 px, bilinear without antialiasing, as TensorFlow 1 resized (inside the extractor)"
DOWNLOAD_TIMEOUT_SECONDS = 30
KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000
CACHE_VERSION = 1


FEATURE_EXTRACTORS_REGISTRY[RANDOM_VGG16] = RandomVgg16


class WeightsUnavailableError(UserError):
    """The extractor's weights are neither here nor available."""


@dataclass(frozen=True, eq=False)
class Extractor:
    """A network that turns images into features.

    Attributes:
        name: in torch-fidelity's registry.
        layer: whose output the features are.
        resize: how images get to the network's size.
        fingerprint: hexadecimal; another one if weights or code are others.
        module: the network.
    """

    name: str
    layer: str
    resize: str
    fingerprint: str
    module: FeatureExtractorBase

    @property
    def is_inception(self) -> bool:
        """Whether its distances may be called FID and KID."""
        return self.name == INCEPTION

    @torch.no_grad()
    def __call__(self, images: Tensor) -> NDArray[np.float32]:
        """Features ``[b, D]`` of ``images [b, 3, H, W]`` uint8."""
        (features,) = self.module(images)
        array: NDArray[np.float32] = features.float().flatten(1).cpu().numpy()
        return array


def load_extractor(name: str, weights: Path | None, device: torch.device) -> Extractor:
    """Load a feature extractor.

    Args:
        name: of torch-fidelity's registry, or ``module:name`` of an own `FeatureExtractorBase`.
        weights: file of Inception's; None: torch-fidelity downloads what the extractor needs.
        device: to compute on.

    Raises:
        WeightsUnavailableError: the download failed.
        UserError: there is no such extractor, or the file cannot be read as its weights.
    """
    if ":" in name:
        own = import_object(name, "--features")
        if not (inspect.isclass(own) and issubclass(own, FeatureExtractorBase)):
            raise UserError(f"--features {name} is no torch_fidelity FeatureExtractorBase: give a class that is one")
        if FEATURE_EXTRACTORS_REGISTRY.setdefault(name, own) is not own:
            FEATURE_EXTRACTORS_REGISTRY[name] = own
    elif name not in FEATURE_EXTRACTORS_REGISTRY:
        known = ", ".join(FEATURE_EXTRACTORS_REGISTRY)
        raise UserError(f"--features {name} is unknown: give module:name of your own, or one of {known}")
    if weights is not None and name != INCEPTION:
        raise UserError(f"--inception-weights {weights} are not for --features {name}: leave one of them out")
    if weights is not None and not weights.is_file():
        raise UserError(f"--inception-weights {weights} does not exist: give a file, or leave it out to download")
    kind = FEATURE_EXTRACTORS_REGISTRY[name]
    layer = kind.get_default_feature_layer_for_metric("fid")
    try:
        with _download_timeout():
            path = {} if weights is None else {"feature_extractor_weights_path": str(weights)}
            module = kind(name, [layer], **path)
    except (URLError, TimeoutError, ConnectionError) as error:
        raise WeightsUnavailableError(
            f"the weights of {name} cannot be downloaded ({error}): give --inception-weights FILE, or own --features"
        ) from None
    except Exception as error:  # torch raises half a dozen kinds for a file that is something else
        if weights is None:
            raise
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"--inception-weights {weights} are not torch-fidelity's ({reason}): give those") from None
    module.to(device).eval().requires_grad_(False)
    resize = INCEPTION_RESIZE if name == INCEPTION else "the extractor's own"
    return Extractor(name, layer, resize, _fingerprint(module, layer), module)


def import_object(spec: str, option: str) -> Any:
    """What ``module:name`` stands for; modules of the current directory are found too.

    Raises:
        UserError: there is no such module or name.
    """
    module, _, name = spec.partition(":")
    sys.path.insert(0, str(Path.cwd()))
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise UserError(f"{option} {spec}: {error}; give module:name of a module that can be imported") from None
    except AttributeError:
        raise UserError(f"{option} {spec}: module {module} has no {name!r}") from None
    finally:
        sys.path.pop(0)


class FeatureStatistics:
    """Number, mean and covariance of features that pass by, and on request the features.

    Args:
        keep: the features too.
    """

    def __init__(self, *, keep: bool) -> None:
        self.num = 0
        self._sum: NDArray[np.float64] = np.zeros(0)
        self._products: NDArray[np.float64] = np.zeros((0, 0))
        self._kept: list[NDArray[np.float32]] | None = [] if keep else None

    def add(self, features: NDArray[np.float32]) -> None:
        """Count a batch ``[b, D]``."""
        if not self.num:
            size = features.shape[1]
            self._sum, self._products = np.zeros(size), np.zeros((size, size))
        x = features.astype(np.float64)
        self.num += len(x)
        self._sum += x.sum(axis=0)
        self._products += x.T @ x
        if self._kept is not None:
            self._kept.append(features)

    @property
    def mean(self) -> NDArray[np.float64]:
        """``[D]``."""
        return self._sum / self.num

    @property
    def covariance(self) -> NDArray[np.float64]:
        """``[D, D]``, without bias."""
        return (self._products - self.num * np.outer(self.mean, self.mean)) / (self.num - 1)

    @property
    def features(self) -> NDArray[np.float32]:
        """All of them, ``[num, D]``, in their order."""
        assert self._kept is not None
        return np.concatenate(self._kept)

    def save(self, path: Path) -> None:
        """Write all to a file, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = {} if self._kept is None else {"features": self.features}
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        with temporary.open("wb") as file:
            np.savez(file, allow_pickle=False, num=self.num, sum=self._sum, products=self._products, **kept)
        temporary.replace(path)

    @classmethod
    def load(cls, path: Path, *, keep: bool) -> "FeatureStatistics | None":
        """What `save` wrote; None if there is nothing, nothing readable, or features are missing."""
        if not path.is_file():
            return None
        try:
            with np.load(path) as arrays:
                if keep and "features" not in arrays:
                    return None
                statistics = cls(keep=keep)
                statistics.num = int(arrays["num"])
                statistics._sum, statistics._products = arrays["sum"], arrays["products"]
                if keep:
                    statistics._kept = [arrays["features"]]
        except Exception as error:  # numpy and zipfile raise half a dozen kinds for a damaged file
            logger.warning("%s cannot be read (%s): measuring the real images again", path, type(error).__name__)
            return None
        return statistics


def statistics_path(cache_dir: Path, shards_digest: str, extractor: Extractor) -> Path:
    """Where the statistics of a shard set's images are kept."""
    return cache_dir / f"features-v{CACHE_VERSION}-{shards_digest[:16]}-{extractor.fingerprint[:16]}.npz"


def image_distances(
    generated: FeatureStatistics,
    real: FeatureStatistics,
    extractor: Extractor,
    metrics: Sequence[ImageMetric],
    *,
    seed: int,
) -> dict[str, float]:
    """Distances of generated from real images, by name.

    ``fid``, ``kid`` and ``kid_std`` where the features are Inception's, else ``frechet_distance``,
    ``kernel_distance`` and ``kernel_distance_std``; ``generative_precision`` and ``generative_recall``
    (Kynkäänniemi et al. 2019), which are not the masks'.

    Args:
        generated: of the generated images.
        real: of the real ones.
        extractor: that made the features.
        metrics: which to compute.
        seed: of KID's subsets.
    """
    distances = {}
    if "fid" in metrics:
        one, other = ({"mu": s.mean, "sigma": s.covariance} for s in (generated, real))
        name = "fid" if extractor.is_inception else "frechet_distance"
        distances[name] = float(fid_statistics_to_metric(one, other, verbose=False)[KEY_METRIC_FID])
    kept = [torch.from_numpy(s.features) for s in (generated, real)] if {"kid", "prc"} & set(metrics) else []
    if "kid" in metrics:
        size = min(KID_SUBSET_SIZE, generated.num, real.num)
        kid = kid_features_to_metric(*kept, kid_subsets=KID_SUBSETS, kid_subset_size=size, rng_seed=seed, verbose=False)
        name = "kid" if extractor.is_inception else "kernel_distance"
        distances |= {name: kid[KEY_METRIC_KID_MEAN], f"{name}_std": kid[KEY_METRIC_KID_STD]}
    if "prc" in metrics:
        prc = prc_features_to_metric(*kept, save_cpu_ram=True, verbose=False)
        distances["generative_precision"] = prc[KEY_METRIC_PRECISION]
        distances["generative_recall"] = prc[KEY_METRIC_RECALL]
    return distances


def needs_features(metrics: Iterable[ImageMetric]) -> bool:
    """Whether mean and covariance are not enough."""
    return bool({"kid", "prc"} & set(metrics))


def _fingerprint(module: FeatureExtractorBase, layer: str) -> str:
    digest = hashlib.sha256(f"{module.get_name()} {layer}".encode())
    digest.update(inspect.getsource(type(module)).encode())
    for key, value in module.state_dict().items():
        digest.update(key.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def _download_timeout() -> Iterator[None]:
    """A firewall that swallows packets must not hold an evaluation up for minutes."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT_SECONDS)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
