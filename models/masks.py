"""Coarse and fine mask networks and what is made of their output (Eqs. 1 to 3)."""

import torch
from torch import Tensor, nn

from models import ops
from models.layers import StyledConv

NUM_MASK_CHANNELS = 32


class MaskNetwork(nn.Module):
    """Mask from the penultimate foreground features, ``f [B, C, H, W] -> [B, 1, H, W]`` in [0, 1] (Eq. 2).

    One 1x1 StyledConv to 32 channels, ReLU, mean over the channels, min-max per image; never in half precision, in
    which the pixels of the minimum and the maximum move.
    """

    def __init__(self, in_channels: int, w_dim: int) -> None:
        super().__init__()
        self.conv = StyledConv(in_channels, NUM_MASK_CHANNELS, 1, w_dim)

    def forward(self, features: Tensor, w: Tensor, noise: Tensor) -> Tensor:
        with torch.autocast(features.device.type, enabled=False):
            x = torch.relu(self.conv(features.to(self.conv.bias.dtype), w, noise))
            return ops.min_max(x.mean(dim=1, keepdim=True))


def combine_masks(mask_coarse: Tensor, mask_fine: Tensor, fade_in: float | Tensor) -> Tensor:
    """Final alpha ``clip(m_c + gamma m_f, 0, 1)`` (Eq. 3), with ``gamma = fade_in``."""
    return (mask_coarse + fade_in * mask_fine).clamp(0.0, 1.0)


def composite(foreground: Tensor, background: Tensor, mask: Tensor) -> Tensor:
    """Blend ``m x_fg + (1 - m) x_bg`` (Eq. 1)."""
    return mask * foreground + (1.0 - mask) * background
