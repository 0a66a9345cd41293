"""Train FurryGAN.

accelerate launch pipeline/train.py                                  # built-in data, minutes on a CPU
accelerate launch pipeline/train.py --dataset ffhq --data shards/ffhq
accelerate launch pipeline/train.py --resume runs/NAME
"""

import logging
import os

from data_shards.command import run_command

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from pipeline.config import Config
from pipeline.config.command_line import parse_config
from pipeline.runs.directory import name_run
from pipeline.training.interrupt import Interrupt
from pipeline.training.run import MEMORY_REMEDY, train
from pipeline.training.trainer import make_accelerator


def main() -> None:
    """Train as the command line says."""
    config = parse_config("Train FurryGAN: images and their alpha mattes, from images alone.")
    accelerator = make_accelerator(config.collective_timeout_s)
    logging.basicConfig(
        level=logging.INFO if accelerator.is_main_process else logging.ERROR, format="%(message)s", force=True
    )
    _set_num_threads(config, accelerator)
    config = broadcast_object_list([name_run(config)])[0]  # one time stamp for all ranks
    with Interrupt() as interrupt:
        try:
            train(config, accelerator, interrupt)
        finally:
            accelerator.end_training()


def _set_num_threads(config: Config, accelerator: Accelerator) -> None:
    # `accelerate launch` sets OMP_NUM_THREADS to 1 where it is not told otherwise, which would idle all other cores.
    local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(config.num_threads or max(1, available // local_processes))


if __name__ == "__main__":
    run_command(main, memory_remedy=MEMORY_REMEDY)
