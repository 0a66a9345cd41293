"""Training of the matting network on a run's own samples. No label is read.

Each step has two halves. Fresh samples of the generator bring their own alpha; half of them change backgrounds, so that
the network cannot read a foreground off the background that usually comes with it. Real images have no alpha: the
network must agree with its own average, sharpened, across augmentations (Tarvainen & Valpola 2017), and, where the
discriminator's mask predictor is sure, with that at 16x16.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR
from torch.optim.swa_utils import AveragedModel

from data_shards.errors import UserError
from data_shards.progress import progress_bar
from models.masks import composite
from pipeline.generation.trained_run import TrainedRun
from pipeline.methods.augmentation import augment_colours, augment_geometry
from pipeline.methods.furrygan.losses import downsample_mask
from pipeline.methods.randomness import Stream, draw
from pipeline.photographs.distillation.network import MattingNetwork

AVERAGE_DECAY = 0.99
RAMP_SHARE = 0.3
"""Of all steps, until the losses on real images have their full weight: the network's average is no guide before."""
WEIGHT_DECAY = 0.01


@dataclass(frozen=True)
class FitOptions:
    """How the network is taught."""

    steps: int = 1500
    """Optimizer steps."""
    batch: int = 32
    """Generated samples a step, and as many real images where there are any."""
    learning_rate: float = 4e-3
    """Greatest, of AdamW on one cycle."""
    consistency: float = 1.0
    """Weight of agreeing with its own average on real images."""
    guidance: float = 1.0
    """Weight of agreeing with the mask predictor on real images."""
    swapped: float = 0.5
    """Share of generated samples on the background of another."""
    seed: int = 0
    """Of weights, samples and augmentation."""

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            UserError: one is invalid.
        """
        for name, value, low in (("steps", self.steps, 2), ("batch", self.batch, 4)):
            if value < low or (name == "batch" and value % 4):
                multiple = ", a multiple of 4" if name == "batch" else ""
                raise UserError(f"--{name} {value} is invalid: give {low} or more{multiple}")
        if not 0 < self.learning_rate < 1:
            raise UserError(f"--learning-rate {self.learning_rate} is invalid: give something like 0.004")
        for name, weight in (("consistency", self.consistency), ("guidance", self.guidance)):
            if not 0 <= weight < float("inf"):
                raise UserError(f"--{name} {weight} is invalid: give 0 or more")
        if not 0 <= self.swapped <= 1:
            raise UserError(f"--swapped {self.swapped} is not a share: give 0 to 1")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"--seed {self.seed} is invalid: give 0 to {2**32 - 1}")


def generated_pairs(run: TrainedRun, options: FitOptions) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless pairs as the generator makes them: images ``[b, 3, R, R]`` in [-1, 1], alpha ``[b, 1, R, R]``."""
    generator = run.generator
    device = next(generator.parameters()).device
    step = 0
    while True:
        slots = range(options.batch)
        given = draw(
            options.seed,
            Stream.DISTILLATION,
            step,
            slots,
            z_dim=generator.z_dim,
            num_noise=generator.num_noise,
            device=device,
        )
        with torch.no_grad():
            out = generator(given.z, noise=given.noise, fade_in=run.fade_in)
        num_swapped = round(options.swapped * options.batch)
        backgrounds = torch.cat([out.background[:num_swapped].roll(1, dims=0), out.background[num_swapped:]])
        yield composite(out.foreground, backgrounds, out.mask), out.mask
        step += 1


def distill(
    run: TrainedRun, real: Iterator[Tensor] | None, options: FitOptions, *, progress: bool = False
) -> MattingNetwork:
    """Teach a network.

    Args:
        run: the teacher.
        real: endless batches of real images ``[b, 3, R, R]`` in [-1, 1], if there are any.
        options: how.
        progress: show a bar.

    Returns:
        The average of the network over the steps, in evaluation mode.
    """
    pairs = generated_pairs(run, options)
    guide = None if real is None else _RealPictures(run, real, options)
    return fit_network(pairs, run.config.resolution, options, device=_device(run), guide=guide, progress=progress)


def fit_network(
    pairs: Iterator[tuple[Tensor, Tensor]],
    resolution: int,
    options: FitOptions,
    *,
    device: torch.device,
    guide: "_RealPictures | None" = None,
    progress: bool = False,
) -> MattingNetwork:
    """Fit a network on endless pairs of images ``[b, 3, R, R]`` and alpha ``[b, 1, R, R]``, augmented here."""
    rng = torch.Generator().manual_seed(options.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        network = MattingNetwork(resolution).to(device)
    average = AveragedModel(network, avg_fn=_moving_average, use_buffers=True).eval()
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=WEIGHT_DECAY)
    schedule = OneCycleLR(optimizer, max_lr=options.learning_rate, total_steps=options.steps)
    with progress_bar(range(options.steps), desc="distilling", unit="step", disable=not progress) as bar:
        for step in bar:
            images, alphas = (x.to(device) for x in next(pairs))
            both = augment_geometry(torch.cat([images, alphas], dim=1), rng)
            images, alphas = augment_colours(both[:, :3], rng), both[:, 3:]
            optimizer.zero_grad()
            if guide is None:
                loss = alpha_loss(network.logits(images), alphas)
            else:
                batch = guide.next(average, rng)
                logits, logits_real = network.logits(torch.cat([images, batch.images])).split(
                    [len(images), len(batch.images)]
                )
                ramp = min(1.0, step / (RAMP_SHARE * options.steps))
                loss = alpha_loss(logits, alphas) + ramp * guide.loss(logits_real, batch)
            loss.backward()
            optimizer.step()
            schedule.step()
            average.update_parameters(network)
            if step % 50 == 0:
                bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    fitted = average.module
    assert isinstance(fitted, MattingNetwork)
    return fitted.eval().requires_grad_(False)


def _moving_average(average: Tensor, current: Tensor, num_averaged: Tensor | int) -> Tensor:
    """Exponential; over few steps shorter, so that it never drags the network's start along."""
    decay = min(AVERAGE_DECAY, (1 + int(num_averaged)) / (10 + int(num_averaged)))
    return torch.lerp(current.float(), average.float(), decay)


def alpha_loss(logits: Tensor, alphas: Tensor) -> Tensor:
    """Cross entropy with a soft target, which finds the shape, and Laplacian pyramid L1, which finds its edges.

    The pyramid is the matting literature's (Hou & Liu 2019), with means over the pixels of each level.
    """
    return F.binary_cross_entropy_with_logits(logits, alphas) + laplacian_loss(torch.sigmoid(logits), alphas)


def laplacian_loss(predicted: Tensor, true: Tensor, num_levels: int = 3) -> Tensor:
    """L1 between the levels of two Laplacian pyramids; a level weighs twice the one below it."""
    loss = predicted.new_zeros(())
    difference = predicted - true  # the pyramid is linear
    for level in range(num_levels):
        smaller = F.avg_pool2d(difference, 2)
        loss = loss + 2**level * (difference - F.interpolate(smaller, scale_factor=2.0, mode="bilinear")).abs().mean()
        difference = smaller
    return loss


def sharpen(alphas: Tensor) -> Tensor:
    """Further from 0.5 (Berthelot et al. 2019, at temperature 1/2).

    A network that learns from its own guesses as they are stays as unsure as they are: bodies that are seen through.
    """
    kept, cut = alphas.square(), (1 - alphas).square()
    return kept / (kept + cut)


@dataclass(frozen=True, eq=False)
class _RealBatch:
    """Augmented real images, and what is to be found in them.

    Attributes:
        images: ``[b, 3, R, R]``.
        alphas: of the network's average, sharpened ``[b, 1, R, R]``.
        mask_pred: of the mask predictor ``[b, 1, 16, 16]``.
    """

    images: Tensor
    alphas: Tensor
    mask_pred: Tensor


class _RealPictures:
    def __init__(self, run: TrainedRun, real: Iterator[Tensor], options: FitOptions) -> None:
        self._run = run
        self._real = real
        self._options = options

    @torch.no_grad()
    def next(self, average: nn.Module, rng: torch.Generator) -> _RealBatch:
        plain = next(self._real).to(_device(self._run))
        mask_pred = self._run.discriminator.predict_mask(plain)
        larger = F.interpolate(mask_pred, size=plain.shape[-1], mode="bilinear")
        together = augment_geometry(torch.cat([plain, average(plain), larger], dim=1), rng)
        images, alphas, larger = together.split([3, 1, 1], dim=1)
        return _RealBatch(augment_colours(images, rng), sharpen(alphas), downsample_mask(larger))

    def loss(self, logits: Tensor, batch: _RealBatch) -> Tensor:
        alphas = torch.sigmoid(logits)
        sure = (2 * batch.mask_pred - 1).square()
        guidance = (sure * (downsample_mask(alphas) - batch.mask_pred).square()).mean()
        consistency = F.binary_cross_entropy_with_logits(logits, batch.alphas)
        return self._options.guidance * guidance + self._options.consistency * consistency


def _device(run: TrainedRun) -> torch.device:
    return next(run.generator.parameters()).device
