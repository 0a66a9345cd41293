"""Features of a random VGG-16, which need no download: `--features random-vgg16`."""

from typing import Any

import torch
from torch import Tensor, nn
from torch_fidelity.feature_extractor_base import FeatureExtractorBase  # type: ignore[import-untyped]

RANDOM_VGG16 = "random-vgg16"
SEED = 0
LAYER, NUM_LAYERS = "relu3_3", 16
SCALE = 100.0
"""On the features: brings distances of small sets to the order of 1."""


class RandomVgg16(FeatureExtractorBase):  # type: ignore[misc]
    """Spatial means of VGG16's third block with random weights, ``[b, 3, H, W] uint8 -> [b, 256]``.

    Naeem et al. (2020) use a random VGG16 for images unlike ImageNet's. It sees them as they are, not resized, and
    stops at a quarter of their size, where images of 32 px still have structure.
    """

    def __init__(self, name: str, features_list: list[str], **_: Any) -> None:
        from torchvision.models.vgg import cfgs, make_layers  # type: ignore[import-untyped]

        super().__init__(name, features_list)
        self.convolutions = make_layers(cfgs["D"], batch_norm=False)[:NUM_LAYERS]
        generator = torch.Generator().manual_seed(SEED)
        for layer in self.convolutions:
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu", generator=generator)
                assert layer.bias is not None
                nn.init.zeros_(layer.bias)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        """One layer."""
        return (LAYER,)

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        """The same for all."""
        del metric
        return LAYER

    @staticmethod
    def can_be_compiled() -> bool:
        """As torch-fidelity asks."""
        return True

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Features of the one layer."""
        x: Tensor = self.convolutions(images.float() / 127.5 - 1.0)
        return (x.mean(dim=(2, 3)) * SCALE,)
