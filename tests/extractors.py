"""A feature extractor of our own for the tests: small, fixed, and sensitive to colour, contrast and blur."""

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch_fidelity.feature_extractor_base import FeatureExtractorBase

NUM_FEATURES = 24


class TinyFeatures(FeatureExtractorBase):
    """Two convolutions with fixed weights, averaged over the image."""

    def __init__(self, name: str, features_list: list[str], **_: Any) -> None:
        super().__init__(name, features_list)
        rng = torch.Generator().manual_seed(7)
        self.register_buffer("first", torch.randn(12, 3, 3, 3, generator=rng) / 3)
        self.register_buffer("second", torch.randn(NUM_FEATURES, 12, 3, 3, generator=rng) / 6)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return ("mean",)

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return "mean"

    @staticmethod
    def can_be_compiled() -> bool:
        return False

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        assert images.dtype == torch.uint8
        x = torch.relu(F.conv2d(images.float() / 64 - 2, self.first))
        x = torch.relu(F.conv2d(x, self.second, stride=2))
        return (x.mean(dim=(2, 3)),)


class OtherFeatures(TinyFeatures):
    """The same with other weights."""

    def __init__(self, name: str, features_list: list[str], **_: Any) -> None:
        super().__init__(name, features_list)
        self.first.mul_(2)
