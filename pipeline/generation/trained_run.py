"""A trained run, opened for use: its configuration and its networks."""

from dataclasses import dataclass
from pathlib import Path

import torch

from data_shards.errors import UserError
from models.discriminator import Discriminator
from models.generator import FurryGenerator
from pipeline.config import Config
from pipeline.config.architecture import make_discriminator, make_generator
from pipeline.config.command_line import CONFIG_FILE
from pipeline.config.files import config_from_dict, load_config
from pipeline.methods.schedules import linear_ramp
from pipeline.runs.checkpoints import BEST, list_checkpoints, load_checkpoint


@dataclass(frozen=True)
class TrainedRun:
    """What a checkpoint holds of a run.

    Attributes:
        run_dir: of the run.
        config: it was trained with.
        checkpoint: file that was read.
        generator: average of G, in evaluation mode.
        discriminator: D, in evaluation mode.
        iteration: of the checkpoint.
        images_seen: by then.
    """

    run_dir: Path
    config: Config
    checkpoint: Path
    generator: FurryGenerator
    discriminator: Discriminator
    iteration: int
    images_seen: int

    @property
    def fade_in(self) -> float:
        """Gamma of Eq. 3 at the checkpoint."""
        return linear_ramp(self.iteration, 0.0, 1.0, self.config.loss.fade_in_iterations)


def open_run(run_dir: Path, checkpoint: str, device: torch.device) -> TrainedRun:
    """Read a checkpoint of a run; nothing of it is changed.

    Args:
        run_dir: of the run.
        checkpoint: "best", "latest", or the path of a checkpoint.
        device: for the networks.

    Raises:
        UserError: there is no run, no checkpoint, or the checkpoint cannot be read.
    """
    if not (run_dir / CONFIG_FILE).is_file():
        raise UserError(f"--run {run_dir}: there is no {CONFIG_FILE} in it, so it is not a run directory")
    config = config_from_dict(load_config(run_dir / CONFIG_FILE))
    path = _find_checkpoint(run_dir, checkpoint)
    state = load_checkpoint(path)
    generator, discriminator = make_generator(config), make_discriminator(config)
    try:
        generator.load_state_dict(state["ema"])
        discriminator.load_state_dict(state["discriminator"])
    except (KeyError, RuntimeError):
        raise UserError(f"checkpoint {path} is not of the run that {run_dir / CONFIG_FILE} describes") from None
    return TrainedRun(
        run_dir=run_dir,
        config=config,
        checkpoint=path,
        generator=generator.to(device).eval().requires_grad_(False),
        discriminator=discriminator.to(device).eval().requires_grad_(False),
        iteration=state["iteration"],
        images_seen=state["images_seen"],
    )


def _find_checkpoint(run_dir: Path, checkpoint: str) -> Path:
    directory = run_dir / "checkpoints"
    if checkpoint not in ("best", "latest"):
        path = Path(checkpoint)
        if not path.is_file():
            raise UserError(f"--checkpoint {path} does not exist: give best, latest, or a file of {directory}")
        return path
    found = list_checkpoints(directory)
    if checkpoint == "best" and (directory / BEST).is_file():
        return directory / BEST
    if not found:
        raise UserError(f"there is no checkpoint in {directory} yet: train to the first one, or choose another --run")
    return found[0]
