"""StyleGAN2's residual discriminator with FurryGAN's mask predictor on its 16x16 features."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models import fused, ops
from models.layers import EqualizedConv2d, EqualizedLinear, call
from models.ops import minibatch_stddev
from models.widths import Widths

MASK_RESOLUTION = 16


@dataclass(frozen=True)
class DiscriminatorOutput:
    """What the discriminator says of n images, the first k of which were judged.

    Attributes:
        logits: ``[k, 1]``, positive for real.
        mask_pred: ``D_m [n, 1, 16, 16]`` in [0, 1]; None without a mask predictor.
    """

    logits: Tensor
    mask_pred: Tensor | None


class ResidualBlock(nn.Module):
    """``[B, I, H, W] -> [B, O, H/2, W/2]``.

    A 3x3 and a strided 3x3 convolution, plus a skip of one strided 1x1 convolution; their sum over sqrt(2).
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        gain = math.sqrt(0.5)
        self.conv1 = EqualizedConv2d(in_channels, in_channels, 3)
        self.conv2 = EqualizedConv2d(in_channels, out_channels, 3, downsample=True, gain=gain)
        self.skip = EqualizedConv2d(in_channels, out_channels, 1, downsample=True, activate=False, gain=gain)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.skip(x).add_(self.conv2(self.conv1(x)))
        return out


class MaskPredictor(nn.Module):
    """``D_m``: ``[B, C, 16, 16] -> [B, 1, 16, 16]`` in [0, 1].

    Residual block of two 1x1 convolutions C -> C -> 32 with a linear 1x1 skip, then as the mask networks: ReLU, mean
    over the channels, min-max per image. Never in half precision.
    """

    def __init__(self, in_channels: int, num_channels: int = 32) -> None:
        super().__init__()
        gain = math.sqrt(0.5)
        self.conv1 = EqualizedConv2d(in_channels, in_channels, 1)
        self.conv2 = EqualizedConv2d(in_channels, num_channels, 1, gain=gain)
        self.skip = EqualizedConv2d(in_channels, num_channels, 1, activate=False, gain=gain)

    def forward(self, features: Tensor) -> Tensor:
        with torch.autocast(features.device.type, enabled=False):
            features = features.to(self.skip.weight.dtype)
            x = self.skip(features).add_(self.conv2(self.conv1(features)))
            return ops.min_max(torch.relu(x).mean(dim=1, keepdim=True))


class Discriminator(nn.Module):
    """``images [n, 3, R, R]`` in [-1, 1] -> logits and 16x16 mask prediction.

    Args:
        resolution: R, a power of two, 32 or more.
        widths: channels by resolution.
        mask_predictor: have one.
        recompute: keep no activations for the backward pass but those between blocks.
    """

    def __init__(
        self, resolution: int, widths: Widths | None = None, *, mask_predictor: bool = True, recompute: bool = False
    ) -> None:
        super().__init__()
        widths = widths or Widths()
        self.recompute = recompute
        self.from_rgb = EqualizedConv2d(3, widths(resolution), 1)
        # Split at 16x16: the mask predictor branches off there and runs without the rest.
        to_mask: list[nn.Module] = []
        to_logits: list[nn.Module] = []
        at = resolution
        while at > 4:
            (to_mask if at > MASK_RESOLUTION else to_logits).append(ResidualBlock(widths(at), widths(at // 2)))
            at //= 2
        self.blocks_to_mask = nn.Sequential(*to_mask)
        self.blocks_to_logits = nn.Sequential(*to_logits)
        self.mask_predictor = MaskPredictor(widths(MASK_RESOLUTION)) if mask_predictor else None
        self.final_conv = EqualizedConv2d(widths(4) + 1, widths(4), 3)
        self.final_linear = nn.Sequential(
            EqualizedLinear(widths(4) * 4 * 4, widths(4), activate=True),
            EqualizedLinear(widths(4), 1),
        )
        self.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor, *, judged: Sequence[int] | None = None) -> DiscriminatorOutput:
        """Judge and predict masks in one pass.

        Args:
            images: ``[n, 3, R, R]``, several minibatches one after the other.
            judged: lengths of the minibatches that get logits, at the front of `images`; what is left over gets a mask
                prediction alone. Minibatch stddev never mixes two minibatches. All of `images` as one by default.
        """
        judged = [len(images)] if judged is None else judged
        if fused.applies(images):
            padded, halved = fused.features16(self, images)
            features = fused.inner(padded)
            x = fused.final_features(self, padded[: sum(judged)], halved[: sum(judged)], judged)
        else:
            features = self._features16(images)
            x = self._run(self.blocks_to_logits, features[: sum(judged)])
            x = self.final_conv(torch.cat([minibatch_stddev(part) for part in x.split(list(judged))]))
        logits = self.final_linear(x.flatten(1))
        mask_pred = None if self.mask_predictor is None else self.mask_predictor(features)
        return DiscriminatorOutput(logits=logits, mask_pred=mask_pred)

    def predict_mask(self, images: Tensor) -> Tensor:
        """``D_m [n, 1, 16, 16]`` of ``images [n, 3, R, R]``, without the layers below 16x16."""
        assert self.mask_predictor is not None
        fast = fused.applies(images)
        features = fused.inner(fused.features16(self, images)[0]) if fast else self._features16(images)
        mask_pred: Tensor = self.mask_predictor(features)
        return mask_pred

    def _features16(self, images: Tensor) -> Tensor:
        return self._run(self.blocks_to_mask, self.from_rgb(images.contiguous(memory_format=torch.channels_last)))

    def _run(self, blocks: nn.Sequential, x: Tensor) -> Tensor:
        for block in blocks:
            x = call(block, x, recompute=self.recompute)
        return x
