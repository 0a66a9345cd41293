"""Number of feature channels at each resolution."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Widths:
    """Feature channels by resolution: ``min(channel_max, channel_base / resolution)``.

    StyleGAN2's config f is ``Widths(32768, 512)``: 512 up to 64 px, 256 at 128 px, 128 at 256 px.
    """

    channel_base: int = 32768
    channel_max: int = 512

    def __call__(self, resolution: int) -> int:
        return min(self.channel_max, self.channel_base // resolution)
