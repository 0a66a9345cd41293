"""Benchmark of a training step: speed, and the share of what the machine allows.

python pipeline/bench.py                                             # the default run, on this machine
python pipeline/bench.py --dataset ffhq --resolution 64 --batch 4    # the paper's networks, small images
python pipeline/bench.py --dataset ffhq --batch 16 64 --precision bf16 --no-reference --json bench.json      # on a GPU

Prints while it measures: first our steps, what is cheap before what is not; then, on a GPU, their kernels; last a plain
reading of the papers (`tests/reference.py`) in turn with ours, so that noise slows both alike. Ctrl-C or SIGTERM ends
it, and what was measured until then stays, on the screen and in the file. Needs torch alone, and a loader's packages
for --data.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from data_shards.command import run_command

import torch

from data_shards.errors import UserError
from pipeline.benchmarks.steps import Bench, machine
from pipeline.config import PRESETS, Config, preset
from pipeline.runs.determinism import refusals_named
from pipeline.training.interrupt import Interrupt, Interrupted
from pipeline.training.learner import uses_graphs


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time training steps, and those of a plain reading of the papers.")
    parser.add_argument("--dataset", default="furballs", choices=PRESETS, help="preset whose networks to time")
    parser.add_argument("--resolution", type=int, help="side of the images in pixels; the preset's by default")
    parser.add_argument("--batch", type=int, nargs="+", help="batch sizes; the preset's by default")
    parser.add_argument(
        "--precision", nargs="+", default=["auto"], choices=("auto", "fp32", "bf16"), help="of our convolutions"
    )
    parser.add_argument("--recompute", action="store_true", help="also time ours with activations computed twice")
    parser.add_argument("--no-graphs", action="store_true", help="also time ours without CUDA graphs")
    parser.add_argument("--deterministic", action="store_true", help="take only algorithms that always give same bits")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="cuda where there is one, by default")
    parser.add_argument("--repetitions", type=int, default=5, help="times that every step is timed")
    parser.add_argument("--threads", type=int, help="CPU threads; all cores by default")
    parser.add_argument("--no-reference", dest="reference", action="store_false", help="time ours alone")
    parser.add_argument("--data", type=Path, help="shards to train on, to see how long a step waits for them")
    parser.add_argument("--loader", default="auto", choices=("auto", "dali", "webdataset"), help="that reads --data")
    parser.add_argument("--profile", action="store_true", help="list the kernels of each phase; on a CPU the operators")
    parser.add_argument("--rows", type=int, default=15, help="kernels that --profile lists")
    parser.add_argument("--json", type=Path, help="file for the figures, written again after each of them")
    arguments = parser.parse_args()
    for name in ("batch", "repetitions", "threads", "rows"):
        given = getattr(arguments, name)
        for number in given if isinstance(given, list) else [given]:
            if number is not None and number < 1:
                raise UserError(f"--{name} {number} is invalid: give 1 or more")
    if arguments.json and not arguments.json.parent.is_dir():
        raise UserError(f"--json {arguments.json}: there is no directory {arguments.json.parent}")
    if arguments.device is None:
        arguments.device = "cuda" if torch.cuda.is_available() else "cpu"
    elif arguments.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU here, give --device cpu")
    return arguments


def _configs(arguments: argparse.Namespace) -> list[Config]:
    base = preset(arguments.dataset, data="none", deterministic=arguments.deterministic)
    if arguments.resolution:
        base = replace(base, resolution=arguments.resolution)
    if arguments.no_graphs and not uses_graphs(base, torch.device(arguments.device)):
        raise UserError("--no-graphs: steps are not recorded as CUDA graphs here, which takes a GPU and Triton")
    return [replace(base, batch=batch) for batch in arguments.batch or [base.batch]]


def main() -> None:
    """Measure as the command line says."""
    arguments = _parse()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    bench = Bench(arguments, _configs(arguments))
    print(f"{machine(torch.device(arguments.device))}; torch {torch.__version__}", flush=True)
    try:
        with Interrupt(), refusals_named():
            bench.run()
    except (KeyboardInterrupt, Interrupted) as error:
        code = error.code if isinstance(error, Interrupted) else 130
        kept = f", and in {arguments.json}" if arguments.json and arguments.json.is_file() else ""
        sys.stderr.write(f"interrupted: what was measured is above{kept}\n")
        raise SystemExit(code) from None


if __name__ == "__main__":
    run_command(main, memory_remedy="give a smaller --batch")
