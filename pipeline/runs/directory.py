"""The directory of a run, and whether a configuration may resume it.

``runs/NAME/`` holds `config.yaml`, `metrics.jsonl`, `samples/`, `checkpoints/` and, at the end, `summary.json`.
"""

import json
import logging
import math
import os
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil

from data_shards.errors import UserError
from pipeline.config import Config
from pipeline.config.command_line import CONFIG_FILE
from pipeline.config.files import config_from_dict, config_to_dict, flatten, load_config, save_config
from pipeline.runs.checkpoints import list_checkpoints, load_checkpoint
from pipeline.runs.saving import refuse_file_in_the_way, saving

logger = logging.getLogger(__name__)

FREE_TO_CHANGE = (
    *("steps", "run_dir", "loader", "verify_data", "cache_dir", "fetched_gb"),
    *("num_threads", "cuda_graphs", "deterministic", "recompute", "accumulate", "backend", "zero_stage"),
    *("collective_timeout_s", "heartbeat_timeout_s", "drift_interval"),
    *("log.", "evaluation."),
)
"""Fields that leave the numbers of the iterations already done as they are. Where `fetched_gb` would change the order
of the images, the loader refuses its state."""


def name_run(config: Config) -> Config:
    """The configuration with a run directory: the given one, or a new one named by data set and time.

    A launcher that starts its processes again, as ``--max-restarts`` allows, gives the time: its own start.
    """
    if config.run_dir is not None:
        return config
    time = datetime.now()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        time = datetime.fromtimestamp(psutil.Process(os.getppid()).create_time())
    return replace(config, run_dir=Path("runs") / f"{config.dataset}-{time:%Y%m%d-%H%M%S}")


def check_same_run(config: Config, run_dir: Path) -> None:
    """Whether `config` may resume what `run_dir` holds; anything goes if that is nothing.

    Raises:
        UserError: `run_dir` or one above it is a file, or it holds a run of another configuration.
    """
    refuse_file_in_the_way(run_dir, "--run-dir")
    saved = run_dir / CONFIG_FILE
    if not saved.is_file():
        return
    before = flatten(config_to_dict(config_from_dict(load_config(saved))))
    now = flatten(config_to_dict(config))
    changed = [
        f"{key} {before[key]}, not {now[key]}"
        for key in now
        if before[key] != now[key] and not key.startswith(FREE_TO_CHANGE)
    ]
    if changed:
        raise UserError(
            f"{run_dir} holds a run of another configuration ({'; '.join(changed)}): "
            "choose another --run-dir, or resume that run by --resume and without these overrides"
        )


def is_finished(config: Config, run_dir: Path) -> bool:
    """Whether the training has come to its end.

    Raises:
        UserError: it went beyond.
    """
    path = run_dir / "summary.json"
    iterations = json.loads(path.read_text())["iterations"] if path.is_file() else 0
    if iterations > config.steps:
        raise UserError(
            f"{run_dir} is trained to iteration {iterations}, beyond --steps {config.steps}: "
            "choose another --out, or as many --steps"
        )
    return bool(iterations == config.steps)


def write_config(config: Config, run_dir: Path) -> None:
    """Save the resolved configuration.

    Raises:
        SaveError: it cannot be.
    """
    with saving(run_dir / CONFIG_FILE) as temporary:
        save_config(config, temporary)


def load_newest_whole(run_dir: Path) -> dict[str, Any] | None:
    """State of the newest checkpoint that can be read; says so where a newer one cannot. None if there is none.

    Raises:
        UserError: there are checkpoints and none can be read.
    """
    paths = list_checkpoints(run_dir / "checkpoints")
    for path in paths:
        try:
            return load_checkpoint(path)
        except UserError as error:
            logger.warning("%s; trying the one before", error)
    if paths:
        raise UserError(f"no checkpoint in {run_dir / 'checkpoints'} can be read: start again in another --run-dir")
    return None


def write_summary(summary: dict[str, float], run_dir: Path) -> None:
    """Save the final figures.

    Raises:
        SaveError: they cannot be.
    """
    figures = {name: value if math.isfinite(value) else None for name, value in summary.items()}  # JSON has no nan
    with saving(run_dir / "summary.json") as temporary:
        temporary.write_text(json.dumps(figures, indent=2) + "\n")
