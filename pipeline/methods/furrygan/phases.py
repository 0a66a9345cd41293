"""Training phases as data: what each trains, how often it is due, and what it computes.

`d_main` teaches the discriminator and its mask predictor (Eq. 11), `d_r1` regularises it lazily, `g_main` teaches the
generator (Eq. 12). Each runs the discriminator forward once. With B samples a rank, the first b become composites and
the others are judged as foregrounds: b = B/2 is the dual fake input (paper, section 3.1), b = B its ablation.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from models.discriminator import Discriminator, DiscriminatorOutput
from models.generator import FurryGenerator, GeneratorOutput
from pipeline.config import LossConfig
from pipeline.methods.augmentation import augment_geometry, rotate_hue
from pipeline.methods.furrygan import losses
from pipeline.methods.randomness import Draw, Stream, generator_for
from pipeline.methods.schedules import is_due, linear_ramp
from pipeline.ranks.collectives import global_mean


@dataclass(frozen=True)
class Networks:
    """The two networks, bare and as the gradient synchronisation wraps them (the same objects on one rank)."""

    generator: FurryGenerator
    discriminator: Discriminator
    generator_synced: nn.Module
    discriminator_synced: nn.Module


@dataclass(frozen=True)
class Scribbled:
    """Real images with strokes on them.

    Attributes:
        images: ``[n, 3, R, R]`` in [-1, 1].
        strokes: ``[n, 2, R, R]``, 1 where a stroke says foreground (first channel) or background (second), else 0; in
            between at the rim of one that was moved.
    """

    images: Tensor
    strokes: Tensor

    def taken(self, numbers: Iterable[int], *, seed: int, mirror: bool) -> "Scribbled":
        """Images in turn, by running numbers from 0, each moved and tinted again.

        As they are, a few that come over and over would be known by heart, and say nothing of all the others.

        Args:
            numbers: which; a function of them and the seed alone.
            seed: of the run.
            mirror: half of them, as the training images are.
        """
        rows = []
        for number in map(int, numbers):
            chosen = number % len(self.images)
            both = torch.cat([self.images[chosen], self.strokes[chosen]])[None]
            rng = generator_for(seed, Stream.SCRIBBLES, number)
            moved = augment_geometry(both, rng, mirror=mirror)
            rows.append((rotate_hue(moved[:, :3], rng), moved[:, 3:]))
        return Scribbled(*(torch.cat(x) for x in zip(*rows, strict=True)))


@dataclass(frozen=True)
class Step:
    """What a phase works on.

    Attributes:
        networks: G and D.
        config: weights, thresholds and intervals.
        iteration: from 0.
        images: real ``[B, 3, R, R]`` in [-1, 1].
        draw: latents and noise of the phase; None where its `stream` is None.
        area: what the phase's `survey` found, the mean over all micro-batches of all ranks; None where this is the only
            one of its rank.
        scribbled: images with strokes, for ``B / 4`` of the samples; None where the run has none.
        scheduled: what `schedules` says, ``[2]``, on the device: a CUDA graph is recorded once for many iterations.
    """

    networks: Networks
    config: LossConfig
    iteration: int
    images: Tensor
    draw: Draw | None
    area: Tensor | None = None
    scribbled: Scribbled | None = None
    scheduled: Tensor | None = None

    @property
    def fade_in(self) -> float | Tensor:
        """Gamma of Eq. 3."""
        return schedules(self.config, self.iteration)[0] if self.scheduled is None else self.scheduled[0]

    @property
    def binarization(self) -> float | Tensor:
        """lambda_bin of Eq. 8."""
        return schedules(self.config, self.iteration)[1] if self.scheduled is None else self.scheduled[1]

    @property
    def due(self) -> tuple[bool, bool]:
        """Which of the terms that are not computed at each iteration are due: consistency, participation."""
        return due_terms(self.config, self.iteration)

    @property
    def num_composites(self) -> int:
        """b, how many of the B fakes are composites."""
        return len(self.images) // 2 if self.config.dual_fake_input else len(self.images)

    def generate(self, generator: nn.Module) -> GeneratorOutput:
        """Foregrounds of all B latents, composites of the first b."""
        assert self.draw is not None
        z, noise = self.draw.z, self.draw.noise
        out: GeneratorOutput = generator(z, noise=noise, fade_in=self.fade_in, num_composites=self.num_composites)
        return out


@dataclass(frozen=True)
class PhaseResult:
    """What a phase computed.

    Attributes:
        terms: loss terms by name, without their weights.
        weights: their weights; the phase's loss is the weighted sum.
        observed: other scalars worth logging, detached, by metric name.
        generated: G's output where G is trained, for the truncation centre.
    """

    terms: Mapping[str, Tensor]
    weights: Mapping[str, float | Tensor]
    observed: Mapping[str, Tensor]
    generated: GeneratorOutput | None = None

    @property
    def loss(self) -> Tensor:
        """Weighted sum of the terms."""
        return torch.stack([self.weights[name] * value for name, value in self.terms.items()]).sum()


@dataclass(frozen=True)
class Phase:
    """One optimizer step.

    Attributes:
        name: as in logs, profiles and MLflow.
        trains: whose parameters move.
        interval: due every so many iterations.
        stream: of the random numbers that it needs, if any.
        second_order: whether it differentiates a gradient.
        compute: forward pass and loss terms.
        survey: a mean over a micro-batch, without gradients, that has to be known of all of them before the first one's
            gradients can be.
    """

    name: str
    trains: Literal["generator", "discriminator"]
    interval: int
    stream: Stream | None
    second_order: bool
    compute: Callable[[Step], PhaseResult]
    survey: Callable[[Step], Tensor] | None = None


def training_phases(config: LossConfig) -> tuple[Phase, ...]:
    """The phases of an iteration, in order."""
    return (
        Phase("d_main", "discriminator", 1, Stream.D_MAIN, False, d_main),
        Phase("d_r1", "discriminator", config.r1_interval, None, True, d_r1),
        Phase("g_main", "generator", 1, Stream.G_MAIN, False, g_main, coarse_area if config.area_over_batch else None),
    )


def d_main(step: Step) -> PhaseResult:
    """Adversarial loss on real and fake, and mask prediction (Eqs. 4 and 11)."""
    batch, b = len(step.images), step.num_composites
    with torch.no_grad():
        fake = step.generate(step.networks.generator)
    images = [step.images, fake.composite, fake.foreground[b:]]
    if step.networks.discriminator.mask_predictor is not None:
        # These foregrounds are no fakes: they only go as far as the mask predictor. Scribbled images likewise: a few
        # that come over and over would be known by heart.
        images.append(fake.foreground[:b])
        if step.scribbled is not None:
            images.append(step.scribbled.images)
    out: DiscriminatorOutput = step.networks.discriminator_synced(torch.cat(images), judged=(batch, batch))
    logits_real, logits_fake = out.logits.split(batch)
    terms = {"adversarial": losses.d_logistic(logits_real, logits_fake)}
    weights = {"adversarial": 1.0, "prediction": step.config.prediction}
    if out.mask_pred is not None:
        predictions = out.mask_pred.split([len(part) for part in images])
        terms["prediction"] = losses.mask_prediction(fake.mask[:b], predictions[1], predictions[3])
        if step.scribbled is not None:
            terms["scribble"] = losses.scribble(predictions[4], step.scribbled.strokes)
            weights["scribble"] = step.config.scribble
    return PhaseResult(
        terms=terms,
        weights=weights,
        observed={
            "score/real": logits_real.detach().mean(),
            "score/fake": logits_fake.detach().mean(),
            "score/accuracy": (torch.cat([logits_real, -logits_fake]).detach() > 0).float().mean(),
        },
    )


def d_r1(step: Step) -> PhaseResult:
    """Lazy R1 on the real images; the weight makes up for the interval."""
    images = step.images.detach().requires_grad_()
    out: DiscriminatorOutput = step.networks.discriminator_synced(images)
    # R1 reaches neither the mask predictor nor the last bias. Zero gradients instead of none keep DDP's ranks in step.
    anchored = out.logits.sum()
    if out.mask_pred is not None:
        anchored = anchored + out.mask_pred.sum()
    return PhaseResult(
        terms={"r1": losses.r1_penalty(out.logits, images) + 0.0 * anchored},
        weights={"r1": step.config.r1 / 2 * step.config.r1_interval},
        observed={},
    )


def g_main(step: Step) -> PhaseResult:
    """Adversarial, consistency, coarse and fine mask and participation losses (Eqs. 5 to 10 and 12)."""
    config, batch, b = step.config, len(step.images), step.num_composites
    networks = step.networks
    out = step.generate(networks.generator_synced)
    consistency_due, participation_due = step.due
    with_consistency = consistency_due and networks.discriminator.mask_predictor is not None
    fakes = [out.composite, out.foreground[b:]]
    if with_consistency:
        fakes.append(out.foreground[:b].detach())
    judged = networks.discriminator(torch.cat(fakes), judged=(batch,))

    area = losses.mask_area(out.mask_coarse)
    if config.area_over_batch:
        area = global_mean(area) if step.area is None else _with_gradient_of(step.area, area.mean())
    terms = {
        "adversarial": losses.g_nonsaturating(judged.logits),
        "binarization": losses.binarization(out.mask_coarse),
        "area": losses.area_hinge(area, config.phi1),
    }
    weights = generator_weights(config, step.binarization)
    if networks.generator.mask_network_fine is not None:
        terms["fine"] = losses.fine_area(out.mask[:b], out.mask_coarse[:b], config.phi2)
    if with_consistency:
        terms["consistency"] = losses.mask_consistency(judged.mask_pred[batch:], judged.mask_pred[:b])
        if step.scribbled is not None:
            terms["follow"] = losses.mask_following(out.mask[:b], judged.mask_pred[batch:])
            weights["follow"] = config.scribble
    if participation_due:
        terms["participation"] = losses.background_participation(out.foreground[:b], out.background, out.mask[:b])
    return PhaseResult(
        terms=terms,
        weights=weights,
        observed=_mask_statistics(out),
        generated=out,
    )


@torch.no_grad()
def coarse_area(step: Step) -> Tensor:
    """Mean area of the coarse masks of `g_main`, a scalar."""
    return losses.mask_area(step.generate(step.networks.generator).mask_coarse).mean()


def _with_gradient_of(value: Tensor, part: Tensor) -> Tensor:
    """The mean of all parts, with the gradient to one of them: averaged over the parts, that of the mean."""
    return value + (part - part.detach())


def generator_weights(config: LossConfig, binarization: float | Tensor) -> dict[str, float | Tensor]:
    """Weights of the terms of `g_main` (Eqs. 8 and 12); `binarization` is lambda_bin at this iteration."""
    return {
        "adversarial": 1.0,
        "binarization": binarization,
        "area": config.area,
        "fine": config.fine,
        "consistency": config.consistency,
        "participation": config.participation,
    }


def schedules(config: LossConfig, iteration: int) -> tuple[float, float]:
    """Gamma of Eq. 3 and lambda_bin of Eq. 8 at an iteration."""
    fade_in = linear_ramp(iteration, 0.0, 1.0, config.fade_in_iterations)
    start, end = config.binarization_start, config.binarization_end
    return fade_in, linear_ramp(iteration, start, end, config.binarization_iterations)


def due_terms(config: LossConfig, iteration: int) -> tuple[bool, bool]:
    """Whether L_cons and L_bgp are due at an iteration."""
    consistency = iteration >= config.consistency_start and is_due(iteration, config.consistency_interval)
    participation = is_due(iteration, config.participation_interval)
    return config.consistency > 0 and consistency, config.participation > 0 and participation


@torch.no_grad()
def _mask_statistics(out: GeneratorOutput) -> dict[str, Tensor]:
    return {
        "mask/area": out.mask.mean(),
        "mask/area_coarse": out.mask_coarse.mean(),
        "mask/area_fine": (out.mask - out.mask_coarse).mean(),
        "mask/binarization": losses.binarization(out.mask_coarse),
        "mask/min": out.mask.amin(dim=(1, 2, 3)).mean(),
        "mask/max": out.mask.amax(dim=(1, 2, 3)).mean(),
    }
