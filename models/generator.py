"""The generator of FurryGAN: foreground, background and masks from one latent (paper, section 3.2)."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models import fused
from models.layers import StyledConv, ToRGB, call
from models.mapping import MappingNetwork
from models.masks import MaskNetwork, combine_masks, composite
from models.ops import min_max
from models.widths import Widths


@dataclass(frozen=True)
class GeneratorOutput:
    """What the generator made of a batch of B latents, the first b of which became composites.

    Attributes:
        foreground: ``x_fg [B, 3, R, R]`` in [-1, 1].
        background: ``x_bg [b, 3, R, R]`` in [-1, 1].
        mask_coarse: ``m_c [B, 1, R, R]`` in [0, 1].
        mask_fine: ``m_f [B, 1, R, R]`` in [0, 1]; 0 without a fine mask network.
        mask: final alpha ``m [B, 1, R, R]`` in [0, 1].
        composite: ``x_comp [b, 3, R, R]``.
        w_foreground: ``[B, Z]``, for the truncation centre; as they were given to `FurryGenerator.synthesize`.
        w_background: ``[b, Z_bg]``, likewise.
    """

    foreground: Tensor
    background: Tensor
    mask_coarse: Tensor
    mask_fine: Tensor
    mask: Tensor
    composite: Tensor
    w_foreground: Tensor
    w_background: Tensor


class SynthesisNetwork(nn.Module):
    """StyleGAN2 synthesis without RGB skips: ``w [B, D] -> image [B, 3, R, R], features [B, C, R, R]``.

    ``w`` may be ``[B, num_styles, D]``, a style of its own for each layer (W+): those of the convolutions in their
    order, then that of ToRGB, which the mask networks share.

    Args:
        resolution: R.
        widths: channels by resolution before `width_ratio`.
        width_ratio: numerator of ``n / 4``: 3 for the foreground, 1 for the background.
        w_dim: D.
        recompute: keep no activations for the backward pass but those between layers.
    """

    def __init__(
        self, resolution: int, widths: Widths, width_ratio: int, w_dim: int, *, recompute: bool = False
    ) -> None:
        super().__init__()

        def channels(at: int) -> int:
            return widths(at) * width_ratio // 4

        self.constant = nn.Parameter(torch.randn(1, channels(4), 4, 4))
        layers = [StyledConv(channels(4), channels(4), 3, w_dim)]
        self.noise_resolutions = [4]
        at = 8
        while at <= resolution:
            layers.append(StyledConv(channels(at // 2), channels(at), 3, w_dim, upsample=True))
            layers.append(StyledConv(channels(at), channels(at), 3, w_dim))
            self.noise_resolutions += [at, at]
            at *= 2
        self.layers = nn.ModuleList(layers)
        self.to_rgb = ToRGB(channels(resolution), w_dim)
        self.num_features = channels(resolution)
        self.num_styles = len(layers) + 1
        self.recompute = recompute

    def forward(self, w: Tensor, noise: Iterator[Tensor]) -> tuple[Tensor, Tensor]:
        *styles, last = w.unbind(1) if w.ndim == 3 else [w] * self.num_styles
        x = self.constant.expand(len(w), -1, -1, -1).contiguous(memory_format=torch.channels_last)
        for layer, style in zip(self.layers, styles, strict=True):
            x = call(layer, x, style, next(noise), recompute=self.recompute)
        return self.to_rgb(x, last), x


class FurryGenerator(nn.Module):
    """Foreground, background and mask generators, and their blend.

    Args:
        resolution: R, a power of two.
        widths: channels of a full StyleGAN2; the foreground takes 3/4 of them, the background 1/4.
        z_dim: length of the foreground latent.
        z_dim_background: the background latent is this many first entries of the same z.
        fine_mask: have a fine mask network; without it the final alpha is the coarse mask.
        recompute: keep no activations for the backward pass but those between layers.
    """

    def __init__(
        self,
        resolution: int,
        widths: Widths | None = None,
        *,
        z_dim: int = 384,
        z_dim_background: int = 128,
        fine_mask: bool = True,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        widths = widths or Widths()
        self.resolution = resolution
        self.z_dim = z_dim
        self.z_dim_background = z_dim_background
        self.mapping_foreground = MappingNetwork(z_dim)
        self.mapping_background = MappingNetwork(z_dim_background)
        self.synthesis_foreground = SynthesisNetwork(resolution, widths, 3, z_dim, recompute=recompute)
        self.synthesis_background = SynthesisNetwork(resolution, widths, 1, z_dim_background, recompute=recompute)
        self.mask_network_coarse = MaskNetwork(self.synthesis_foreground.num_features, z_dim)
        self.mask_network_fine = MaskNetwork(self.synthesis_foreground.num_features, z_dim) if fine_mask else None
        self._noise_resolutions = [
            *self.synthesis_foreground.noise_resolutions,
            resolution,  # coarse mask
            resolution,  # fine mask; without its network too, so that all other noise stays the same
            *self.synthesis_background.noise_resolutions,
        ]
        self.to(memory_format=torch.channels_last)

    @property
    def num_noise(self) -> int:
        """Noise values a sample needs: one a pixel of every StyledConv's output."""
        return sum(r * r for r in self._noise_resolutions)

    def forward(
        self,
        z: Tensor,
        *,
        fade_in: float | Tensor = 1.0,
        num_composites: int | None = None,
        noise: Tensor | None = None,
        psi: float = 1.0,
    ) -> GeneratorOutput:
        """Generate.

        Args:
            z: ``[B, z_dim]`` standard normal.
            fade_in: gamma of Eq. 3.
            num_composites: make backgrounds and composites of this many first samples; all of them by default.
            noise: ``[B, num_noise]`` standard normal; drawn again by default.
            psi: truncation of both latents.
        """
        b = len(z) if num_composites is None else num_composites
        if noise is None:
            noise = torch.randn(len(z), self.num_noise, device=z.device)
        w_foreground = self.mapping_foreground(z, psi)
        w_background = self.mapping_background(z[:b, : self.z_dim_background], psi)
        return self.synthesize(w_foreground, w_background, noise, fade_in=fade_in)

    def synthesize(
        self, w_foreground: Tensor, w_background: Tensor, noise: Tensor, *, fade_in: float | Tensor = 1.0
    ) -> GeneratorOutput:
        """Generate from styles, which need not be of one latent.

        Args:
            w_foreground: ``[B, Z]``, or ``[B, synthesis_foreground.num_styles, Z]``, a style for each layer.
            w_background: ``[b, Z_bg]`` or ``[b, synthesis_background.num_styles, Z_bg]``; b at most B, those of the
                first samples.
            noise: ``[B, num_noise]``.
            fade_in: gamma of Eq. 3.
        """
        b = len(w_background)
        maps = self.noise_maps(noise)
        if fused.applies(noise):
            foreground, raw_coarse, raw_fine = fused.foreground(self, w_foreground, maps)
            mask_coarse, mask_fine = min_max(raw_coarse), min_max(raw_fine)
            background = fused.background(self, w_background, (n[:b] for n in maps))
        else:
            foreground, mask_coarse, mask_fine = self._foreground(w_foreground, maps)
            background, _ = self.synthesis_background(w_background, (n[:b] for n in maps))
        mask = combine_masks(mask_coarse, mask_fine, fade_in)
        return GeneratorOutput(
            foreground=foreground,
            background=background,
            mask_coarse=mask_coarse,
            mask_fine=mask_fine,
            mask=mask,
            composite=composite(foreground[:b], background, mask[:b]),
            w_foreground=w_foreground,
            w_background=w_background,
        )

    def _foreground(self, w: Tensor, noise: Iterator[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Foreground, coarse and fine mask."""
        foreground, features = self.synthesis_foreground(w, noise)
        w_last = w[:, -1] if w.ndim == 3 else w
        mask_coarse = self.mask_network_coarse(features, w_last, next(noise))
        noise_fine = next(noise)
        if self.mask_network_fine is None:
            return foreground, mask_coarse, torch.zeros_like(mask_coarse)
        return foreground, mask_coarse, self.mask_network_fine(features, w_last, noise_fine)

    def noise_maps(self, noise: Tensor) -> Iterator[Tensor]:
        """The maps ``[B, 1, r, r]`` in ``noise [B, num_noise]``, in the order in which they are used."""
        sizes = [r * r for r in self._noise_resolutions]
        for flat, r in zip(noise.split(sizes, dim=1), self._noise_resolutions, strict=True):
            yield flat.view(-1, 1, r, r)
