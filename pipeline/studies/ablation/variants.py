"""Variants of an ablation study, as overrides of the configuration tree."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from data_shards.errors import UserError


@dataclass(frozen=True, eq=False)
class Variant:
    """A row of the comparison.

    Attributes:
        name: on the command line and in paths.
        title: in tables, as in the paper's Table 1.
        overrides: of the configuration, as in a `--config` file.
    """

    name: str
    title: str
    overrides: Mapping[str, Any]


FULL = Variant("full", "Full", {})

VARIANTS = (
    Variant("no-fine-mask", "w/o Fine Mask Network", {"model": {"fine_mask": False}}),
    Variant("no-participation", "w/o BG Participation", {"loss": {"participation": 0.0}}),
    Variant("no-consistency", "w/o Mask Consistency", {"loss": {"consistency": 0.0}}),
    Variant("no-dual-fake-input", "w/o Dual Fake Input", {"loss": {"dual_fake_input": False}}),
    Variant("no-mask-predictor", "w/o Mask Predictor", {"model": {"mask_predictor": False}}),
    FULL,
)
"""In the order of Table 1. The paper shows the fourth in figure 7 and gives no numbers; the fifth is ours: L_pred and
L_cons go with the network that they need."""


def find_variants(names: Sequence[str]) -> tuple[Variant, ...]:
    """Variants by name, in the order of `VARIANTS`.

    Raises:
        UserError: there is none of that name.
    """
    known = [variant.name for variant in VARIANTS]
    for name in names:
        if name not in known:
            raise UserError(f"--variants {name} is unknown: choose from {', '.join(known)}")
    return tuple(variant for variant in VARIANTS if variant.name in names)
