"""Construction of the networks from a configuration."""

from models.discriminator import Discriminator
from models.generator import FurryGenerator
from models.widths import Widths
from pipeline.config import Config


def make_generator(config: Config) -> FurryGenerator:
    """G at its random start."""
    model = config.model
    return FurryGenerator(
        config.resolution,
        _widths(config),
        z_dim=model.z_dim,
        z_dim_background=model.z_dim_background,
        fine_mask=model.fine_mask,
        recompute=config.recompute,
    )


def make_discriminator(config: Config) -> Discriminator:
    """D at its random start."""
    return Discriminator(
        config.resolution, _widths(config), mask_predictor=config.model.mask_predictor, recompute=config.recompute
    )


def _widths(config: Config) -> Widths:
    return Widths(config.model.channel_base, config.model.channel_max)
