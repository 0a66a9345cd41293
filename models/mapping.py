"""Mapping network, z -> w, with the truncation centre."""

import torch
from torch import Tensor, nn

from models.layers import EqualizedLinear

W_AVERAGE_DECAY = 0.995


class MappingNetwork(nn.Module):
    """Pixel norm and two equalised linear layers, ``z [B, D] -> w [B, D]``.

    The truncation centre `w_average` is a buffer: saved, copied to the EMA, and moved only by whole batches through
    `update_average`, so that a rank or a sample cannot pull it aside.
    """

    w_average: Tensor

    def __init__(self, dim: int, *, num_layers: int = 2, lr_multiplier: float = 0.01) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(EqualizedLinear(dim, dim, lr_multiplier=lr_multiplier, activate=True) for _ in range(num_layers))
        )
        self.register_buffer("w_average", torch.zeros(dim))

    def forward(self, z: Tensor, psi: float = 1.0) -> Tensor:
        """Map latents; ``psi < 1`` pulls w towards the truncation centre."""
        z = z * torch.rsqrt(z.square().mean(dim=1, keepdim=True) + 1e-8)
        w: Tensor = self.layers(z)
        return w if psi == 1.0 else torch.lerp(self.w_average.to(w.dtype), w, psi)

    @torch.no_grad()
    def update_average(self, w_mean: Tensor) -> None:
        """Move the truncation centre towards ``w_mean`` ``[D]``, the mean over the whole (global) batch."""
        self.w_average.lerp_(w_mean.to(self.w_average.dtype), 1.0 - W_AVERAGE_DECAY)
