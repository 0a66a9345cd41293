"""The matting network: a U-Net for images of any size."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from data_shards.errors import UserError
from pipeline.evaluation.segmenter import double_conv

COARSEST = 4
BASE_WIDTH, MAX_WIDTH = 16, 128


class MattingNetwork(nn.Module):
    """``images [b, 3, h, w]`` in [-1, 1] -> alpha ``[b, 1, h, w]`` in [0, 1].

    Args:
        resolution: of the images that it learns from, a power of two; images of other sizes do too, where h and w
            are multiples of `stride`.
    """

    def __init__(self, resolution: int) -> None:
        super().__init__()
        self.resolution = resolution
        self.stride = resolution // COARSEST
        depth = self.stride.bit_length() - 1
        widths = [min(BASE_WIDTH * 2**level, MAX_WIDTH) for level in range(depth + 1)]
        before = [3, *widths]
        self.down = nn.ModuleList(double_conv(before[level], widths[level]) for level in range(depth + 1))
        self.narrow = nn.ModuleList(nn.Conv2d(widths[level + 1], widths[level], 1) for level in range(depth))
        self.up = nn.ModuleList(double_conv(widths[level], widths[level]) for level in range(depth))
        self.to_logits = nn.Conv2d(widths[0], 1, 1)
        self.to(memory_format=torch.channels_last)

    def logits(self, images: Tensor) -> Tensor:
        """``[b, 1, h, w]`` before the sigmoid."""
        x = images.contiguous(memory_format=torch.channels_last)
        skips: list[Tensor] = []
        for block in self.down:
            x = block(F.max_pool2d(x, 2) if skips else x)
            skips.append(x)
        skips.pop()
        for narrow, block in zip(reversed(self.narrow), reversed(self.up), strict=True):
            x = block(F.interpolate(narrow(x), scale_factor=2.0, mode="bilinear") + skips.pop())
        logits: Tensor = self.to_logits(x)
        return logits

    def forward(self, images: Tensor) -> Tensor:
        return torch.sigmoid(self.logits(images))


def save_network(network: MattingNetwork, path: Path, facts: dict[str, Any]) -> None:
    """Save weights, resolution and how it was made."""
    state = {name: value.cpu() for name, value in network.state_dict().items()}
    torch.save({"resolution": network.resolution, "state": state, "facts": facts}, path)


def load_network(path: Path, device: torch.device) -> MattingNetwork:
    """What `save_network` saved, in evaluation mode.

    Raises:
        UserError: the file is missing or is something else.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist: make it by python pipeline/distill.py --run RUN")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        network = MattingNetwork(saved["resolution"])
        network.load_state_dict(saved["state"])
    except Exception as error:  # torch raises half a dozen kinds for a file that is something else
        raise UserError(
            f"{path} is no distilled network ({type(error).__name__}): give the network.pt of distill.py"
        ) from None
    return network.to(device).eval().requires_grad_(False)
