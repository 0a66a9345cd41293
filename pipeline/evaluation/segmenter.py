"""Pseudo ground truth for generated foregrounds: a small U-Net fitted on the shards' own (image, alpha) pairs.

It plays the part of the paper's salient-object network (section 4.2) where shards carry alpha. It never touches the
training of the GAN.
"""

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR

from data_shards.progress import progress_bar
from pipeline.evaluation.mask_metrics import MaskCounter, MaskMetrics

SEGMENTER_VERSION = 1
"""Raised when the network or its fit changes, so that no stale one is taken from a cache."""

MAX_RESOLUTION = 128
"""Larger images are segmented at this resolution; the threshold's contour needs no more."""

HELD_OUT_EVERY = 8
BATCH = 32
LEARNING_RATE = 4e-3


def double_conv(in_channels: int, out_channels: int) -> nn.Sequential:
    """Two 3x3 convolutions, each with batch norm and ReLU: a scale of a U-Net."""
    layers: list[nn.Module] = []
    for channels in (in_channels, out_channels):
        layers += [
            nn.Conv2d(channels, out_channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
        ]
    return nn.Sequential(*layers)


class Segmenter(nn.Module):
    """U-Net of three scales: ``images [B, 3, R, R]`` in [-1, 1] -> probability of foreground ``[B, 1, R, R]``."""

    def __init__(self, widths: tuple[int, int, int] = (16, 32, 64)) -> None:
        super().__init__()
        fine, middle, coarse = widths
        self.down_fine = double_conv(3, fine)
        self.down_middle = double_conv(fine, middle)
        self.bottom = double_conv(middle, coarse)
        self.up_middle = double_conv(coarse + middle, middle)
        self.up_fine = double_conv(middle + fine, fine)
        self.to_logits = nn.Conv2d(fine, 1, 1)
        self.to(memory_format=torch.channels_last)

    def logits(self, images: Tensor) -> Tensor:
        """``[B, 1, R, R]`` before the sigmoid, at the input's resolution."""
        fine = self.down_fine(images.contiguous(memory_format=torch.channels_last))
        middle = self.down_middle(F.max_pool2d(fine, 2))
        x = self.bottom(F.max_pool2d(middle, 2))
        x = self.up_middle(torch.cat([F.interpolate(x, scale_factor=2), middle], dim=1))
        x = self.up_fine(torch.cat([F.interpolate(x, scale_factor=2), fine], dim=1))
        logits: Tensor = self.to_logits(x)
        return logits

    def forward(self, images: Tensor) -> Tensor:
        size = images.shape[-1]
        probability = torch.sigmoid(self.logits(shrink(images)))
        return probability if size <= MAX_RESOLUTION else F.interpolate(probability, size=size, mode="bilinear")


def shrink(x: Tensor) -> Tensor:
    """``[B, C, R, R]`` reduced to the segmenter's greatest resolution, antialiased; unchanged if no larger."""
    if x.shape[-1] <= MAX_RESOLUTION:
        return x
    return F.interpolate(x, size=MAX_RESOLUTION, mode="bilinear", antialias=True)


def fit_segmenter(
    images: Tensor, alphas: Tensor, *, num_steps: int, seed: int, device: torch.device, progress: bool = False
) -> tuple[Segmenter, MaskMetrics]:
    """Fit on ground-truth alpha, holding out every eighth image.

    Args:
        images: ``[N, 3, R, R]`` uint8.
        alphas: ``[N, 1, R, R]`` uint8.
        num_steps: optimizer steps of batch 32.
        seed: of the initial weights and of the batches.
        device: to fit on.
        progress: show a bar.

    Returns:
        The segmenter in evaluation mode and its figures on the held-out images.
    """
    held_out = torch.arange(len(images)) % HELD_OUT_EVERY == 0
    train = (~held_out).nonzero().squeeze(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        segmenter = Segmenter().to(device)
        optimizer = torch.optim.AdamW(segmenter.parameters())
        schedule = OneCycleLR(optimizer, max_lr=LEARNING_RATE, total_steps=num_steps)
        for _ in progress_bar(range(num_steps), desc="fitting segmenter", disable=not progress, leave=False):
            chosen = train[torch.randint(len(train), (BATCH,))]
            x, y = _to_floats(images[chosen], alphas[chosen], device)
            if torch.rand(()) < 0.5:
                x, y = x.flip(-1), y.flip(-1)
            optimizer.zero_grad()
            F.binary_cross_entropy_with_logits(segmenter.logits(shrink(x)), shrink(y)).backward()
            optimizer.step()
            schedule.step()
    segmenter.eval().requires_grad_(False)

    counter = MaskCounter()
    for chosen in held_out.nonzero().squeeze(1).split(4 * BATCH):
        x, y = _to_floats(images[chosen], alphas[chosen], device)
        counter.add(segmenter(x), y)
    return segmenter, counter.metrics()


def _to_floats(images: Tensor, alphas: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    return images.to(device).float() / 127.5 - 1.0, alphas.to(device).float() / 255.0
