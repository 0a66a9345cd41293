"""Detection of ranks whose weights are no longer bitwise equal."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from data_shards.errors import UserError
from pipeline.ranks.collectives import Agreement, num_ranks

_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class DriftError(UserError):
    """A tensor differs between ranks."""


def fingerprint(x: Tensor) -> Tensor:
    """Sum of the elements' bits read as integers, an int64 scalar: no change of one element leaves it as it is."""
    return x.detach().view(_INTEGER[x.element_size()]).sum(dtype=torch.int64)


def refuse_drift(networks: Mapping[str, nn.Module], agreement: Agreement, iteration: int) -> None:
    """Compare parameters and buffers over the ranks; 8 bytes a tensor are sent.

    Raises:
        DriftError: on all ranks, where one differs.
    """
    if num_ranks() == 1:
        return
    tensors = {f"{key}.{name}": x for key, network in networks.items() for name, x in network.state_dict().items()}
    first, *others = agreement.gather(torch.stack([fingerprint(x) for x in tensors.values()]))
    for i, name in enumerate(tensors):
        if differing := [str(rank) for rank, other in enumerate(others, start=1) if other[i] != first[i]]:
            raise DriftError(
                f"{name} of rank 0 differs from that of rank {' and '.join(differing)} at iteration {iteration}: the "
                "ranks have drifted apart; resume from the last checkpoint, on machines with the same software and GPUs"
            )
