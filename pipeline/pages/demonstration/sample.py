"""A generated image and its parts, with an adjustable alpha."""

from dataclasses import dataclass, replace

from torch import Tensor

from data_shards.errors import UserError
from models.generator import GeneratorOutput
from models.masks import combine_masks, composite
from pipeline.generation.sampler import Sampler
from pipeline.generation.trained_run import TrainedRun

MAX_FADE_IN = 2.0
HARDEST = 1 - 1e-6


@dataclass(frozen=True)
class Choices:
    """What is to be seen.

    Attributes:
        seed: of foreground, masks and background; the image is sample 0 of generate.py's ``--seed``.
        psi: truncation.
        background_seed: of the background alone; None: that of `seed`.
        fade_in: gamma of Eq. 3. 0 leaves the coarse mask, 1 is what training ends at.
        threshold: see `harden`.
        hardness: see `harden`.
    """

    seed: int
    psi: float
    background_seed: int | None
    fade_in: float
    threshold: float
    hardness: float

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            UserError: one is invalid.
        """
        for name, seed in (("seed", self.seed), ("background seed", self.background_seed)):
            if seed is not None and not 0 <= seed < 2**32:
                raise UserError(f"{name} {seed} is invalid: give 0 to {2**32 - 1}")
        for name, value, high in (
            ("psi", self.psi, 1),
            ("gamma", self.fade_in, MAX_FADE_IN),
            ("threshold", self.threshold, 1),
            ("hardness", self.hardness, 1),
        ):
            if not 0 <= value <= high:
                raise UserError(f"{name} {value} is invalid: give 0 to {high}")


def make_sample(run: TrainedRun, choices: Choices) -> GeneratorOutput:
    """The sample; its composite is of the background and the alpha that were chosen."""
    output = _sample(run, choices.seed, choices.psi)
    background = output.background
    if choices.background_seed is not None:
        background = _sample(run, choices.background_seed, choices.psi).background
    mask = combine_masks(output.mask_coarse, output.mask_fine, choices.fade_in)
    mask = harden(mask, choices.threshold, choices.hardness)
    return replace(output, background=background, mask=mask, composite=composite(output.foreground, background, mask))


def harden(alpha: Tensor, threshold: float, hardness: float) -> Tensor:
    """Alpha stretched about a threshold, ``clip(t + (alpha - t) / (1 - hardness), 0, 1)``.

    Hardness 0 leaves it as it is, to the bit; 1 makes it a step at the threshold.
    """
    hardness = min(hardness, HARDEST)
    return ((alpha - hardness * threshold) / (1 - hardness)).clamp(0, 1)


def _sample(run: TrainedRun, seed: int, psi: float) -> GeneratorOutput:
    return Sampler(run, seed=seed, psi=psi, noise_mode="random", batch=1).generate([0])
