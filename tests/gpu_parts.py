"""The parts of `gpu_check.sh` that are no command of the project.

python tests/gpu_parts.py versions                       # of this machine
python tests/gpu_parts.py missing MODULE...              # prints the package without which one cannot be imported
python tests/gpu_parts.py tests                          # test files that need a GPU and can be imported here
python tests/gpu_parts.py graphs --device cuda           # steps with CUDA graphs beside steps without
python tests/gpu_parts.py furballs --device cuda --seconds 60 --out grid.png
"""

import argparse
import importlib
import importlib.util
import platform
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from pipeline.config import Config, preset
from pipeline.evaluation.mask_metrics import MaskCounter
from pipeline.methods.furrygan.losses import downsample_mask
from pipeline.methods.furrygan.phases import schedules
from pipeline.methods.randomness import Stream, draw
from pipeline.methods.schedules import is_due
from pipeline.training.learner import Learner

TESTS = Path(__file__).resolve().parent
OURS = {"data_shards", "models", "pipeline", *(path.stem for path in TESTS.rglob("*.py"))}
PACKAGES = ("triton", "numpy", "PIL", "tqdm", "accelerate", "tyro", "pydantic", "webdataset", "nvidia.dali", "mlflow")

TOLERANCE = 0.01
"""Of a loss, in units of itself or of 1, whichever is more; in bfloat16."""

NUM_SAMPLES, COLUMNS, REPORT_S = 512, 6, 5.0


def versions() -> None:
    """What this machine has."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    print(f"Python {platform.python_version()}, torch {torch.__version__}, CUDA {torch.version.cuda}, {gpu}")
    print(f"not installed: {', '.join(name for name in PACKAGES if not installed(name)) or 'nothing'}")


def installed(name: str) -> bool:
    """Whether a package can be found."""
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # its parent
        return False


def missing(module: str) -> str | None:
    """The package that a module cannot be imported without, if there is one."""
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] in OURS:
            raise
        return error.name
    return None


def gpu_tests() -> None:
    """Print files with tests that need a GPU; on stderr those that cannot be imported, and why."""
    for path in sorted(TESTS.rglob("test_*.py")):
        if "pytest.mark.gpu" in path.read_text():
            sys.path.insert(0, str(path.parent))  # as pytest does
            if (package := missing(path.stem)) is None:
                print(path)
            else:
                sys.stderr.write(f"{path.name} is left out: {package} is not installed\n")


def graphs(config: Config, device: torch.device, steps: int) -> None:
    """Train with and without graphs from the same start on the same images, and compare the losses."""
    runs = []
    for cuda_graphs in (True, False):
        learner = Learner(replace(config, cuda_graphs=cuda_graphs), device)
        recorded = learner._graphs is not None
        print(f"{'with' if recorded else 'without'} graphs", flush=True)
        assert recorded == (cuda_graphs and device.type == "cuda"), "graphs are not as they were asked for"
        runs.append(list(_losses(learner, config, device, steps)))
    for iteration, (one, other) in enumerate(zip(*runs, strict=True)):
        difference = float(((one - other).abs() / other.abs().clamp(min=1.0)).max())
        print(f"iteration {iteration}: greatest difference of a loss {difference:.1e}", flush=True)
        if not difference <= TOLERANCE:
            sys.exit(f"losses with graphs differ from those without by {difference:.1e}, more than {TOLERANCE}")


def _losses(learner: Learner, config: Config, device: torch.device, steps: int) -> Iterator[Tensor]:
    """Everything that each iteration measures. All phases are run at each of them."""
    generator = torch.Generator().manual_seed(1)
    for iteration in range(steps):
        images = torch.rand(config.batch, 3, config.resolution, config.resolution, generator=generator) * 2.0 - 1.0
        measured = [
            learner.run(phase, iteration, images.to(device), range(config.batch)).values.cpu()
            for phase in learner.phases
        ]
        learner.update_ema(iteration * config.batch)
        yield torch.cat(measured)
    learner.guard.wait()


def furballs(config: Config, device: torch.device, seconds: float, num_images: int, out: Path) -> None:
    """Train on furballs in the device's memory for some seconds, measure masks, and draw a grid of samples."""
    images, alphas = _drawn(config, num_images)
    print(f"{num_images} furballs of {config.resolution} px", flush=True)
    learner = Learner(config, device)
    iteration = _train(learner, config, images.to(device), seconds)
    fade_in = schedules(config.loss, iteration)[0]
    real = MaskCounter()
    with torch.no_grad():
        for some, alpha in _chunks(images, alphas, device):
            real.add(learner.discriminator.predict_mask(some), downsample_mask(alpha))
    _report("mask predictor on real images", real)
    _draw_grid(learner, config, device, fade_in, out)
    _report("masks of generated foregrounds", _generated(learner, config, device, images, alphas, fade_in))


def _drawn(config: Config, num_images: int) -> tuple[Tensor, Tensor]:
    """``[N, 3, R, R]`` and ``[N, 1, R, R]``, uint8."""
    from data_shards.parallel import num_cores, ordered_map
    from data_shards.sources.furballs import draw as draw_furball

    function = partial(draw_furball, seed=config.seed, resolution=config.resolution)
    with ordered_map(function, range(num_images), num_workers=min(num_cores(), num_images // 64)) as samples:
        pairs = [(torch.tensor(sample.image), torch.tensor(sample.alpha)) for sample in samples]
    images, alphas = (torch.stack(each) for each in zip(*pairs, strict=True))
    return images.permute(0, 3, 1, 2).contiguous(), alphas[:, None]


def _train(learner: Learner, config: Config, images: Tensor, seconds: float) -> int:
    """Iterations made."""
    generator = torch.Generator(images.device).manual_seed(config.seed)
    iteration, start = 0, time.perf_counter()
    shown, shown_at = start, 0
    ends: deque[torch.cuda.Event] = deque()
    while (now := time.perf_counter()) < start + seconds:
        chosen = torch.randint(len(images), (config.batch,), generator=generator, device=images.device)
        mirrored = torch.rand(config.batch, 1, 1, 1, generator=generator, device=images.device) < 0.5
        batch = images[chosen] / 127.5 - 1.0
        batch = torch.where(mirrored, batch.flip(3), batch)
        for phase in learner.phases:
            if is_due(iteration, phase.interval):
                measured = learner.run(phase, iteration, batch, range(config.batch))
        learner.update_ema(iteration * config.batch)
        iteration += 1
        if images.is_cuda:  # the host is a step ahead, not minutes
            ends.append(torch.cuda.current_stream().record_event())
            if len(ends) > 2:
                ends.popleft().synchronize()
        if iteration == 1:
            measured.values.tolist()
            print(f"first iteration after {time.perf_counter() - start:.1f} s", flush=True)
        elif now > shown + REPORT_S:
            area = float(measured.observed["mask/area"])  # waits for the device
            now = time.perf_counter()
            rate = (iteration - shown_at) * config.batch / (now - shown)
            print(f"{now - start:.0f} s: iteration {iteration}, {rate:.0f} img/s, mask area {area:.2f}", flush=True)
            shown, shown_at = now, iteration
    learner.guard.wait()
    return iteration


def _chunks(images: Tensor, alphas: Tensor, device: torch.device) -> Iterable[tuple[Tensor, Tensor]]:
    """Some images in [-1, 1] and their alphas in [0, 1]."""
    for some, alpha in zip(images[:NUM_SAMPLES].split(32), alphas[:NUM_SAMPLES].split(32), strict=True):
        yield some.to(device) / 127.5 - 1.0, alpha.to(device) / 255.0


def _generated(
    learner: Learner, config: Config, device: torch.device, images: Tensor, alphas: Tensor, fade_in: float
) -> MaskCounter:
    """Masks of the average of G against a segmenter that is fitted on the ground-truth alphas."""
    from pipeline.evaluation.segmenter import fit_segmenter

    num_steps = config.evaluation.segmenter_steps
    segmenter, held_out = fit_segmenter(images, alphas, num_steps=num_steps, seed=config.seed, device=device)
    print(f"the segmenter itself on other furballs: IoU {held_out.iou_fg:.3f} and {held_out.iou_bg:.3f}")
    counter, ema = MaskCounter(), learner.ema
    sizes = {"z_dim": ema.z_dim, "num_noise": ema.num_noise}
    with torch.no_grad():
        for first in range(0, min(NUM_SAMPLES, len(images)), 32):
            given = draw(config.seed, Stream.EVALUATION, 0, range(first, first + 32), **sizes, device=device)
            made = ema(given.z, noise=given.noise, fade_in=fade_in, num_composites=0)
            counter.add(made.mask, segmenter(made.foreground))
    return counter


def _draw_grid(learner: Learner, config: Config, device: torch.device, fade_in: float, out: Path) -> None:
    from pipeline.generation.sample_grid import draw_grid, sample_column

    ema = learner.ema
    given = draw(config.seed, Stream.GRID, 0, range(COLUMNS), z_dim=ema.z_dim, num_noise=ema.num_noise, device=device)
    columns = [
        sample_column(ema, given.z[i : i + 1], given.noise[i : i + 1], fade_in=fade_in, psis=(1.0,))
        for i in range(COLUMNS)
    ]
    draw_grid(columns, psis=(1.0,)).save(out)
    print(f"samples in {out}", flush=True)


def _report(what: str, counter: MaskCounter) -> None:
    metrics = counter.metrics()
    print(f"{what}: IoU {metrics.iou_fg:.3f} foreground, {metrics.iou_bg:.3f} background", flush=True)


def furballs_config(device: torch.device) -> Config:
    """On a GPU at 128 px, with schedules for a minute; on a CPU the smallest there is."""
    if device.type == "cpu":
        sizes = {"channel_base": 512, "channel_max": 24}
        return preset("furballs", batch=8, model=sizes, evaluation={"segmenter_steps": 20})
    config = preset("furballs", resolution=128, batch=32, model={"channel_base": 16384})
    r1 = config.loss.r1 * (config.resolution / 32) ** 2
    loss = replace(config.loss, r1=r1, fade_in_iterations=600, binarization_iterations=1000)
    return replace(config, loss=loss, evaluation=replace(config.evaluation, segmenter_steps=300))


def main() -> None:
    """Do the part that the command line names."""
    parser = argparse.ArgumentParser(description="Parts of tests/gpu_check.sh.")
    parts = parser.add_subparsers(dest="part", required=True)
    parts.add_parser("versions")
    parts.add_parser("missing").add_argument("modules", nargs="+")
    parts.add_parser("tests")
    for name in ("graphs", "furballs"):
        parts.add_parser(name).add_argument("--device", choices=("cpu", "cuda"), required=True)
    of_graphs, of_furballs = parts.choices["graphs"], parts.choices["furballs"]
    of_graphs.add_argument("--steps", type=int, default=8)
    of_furballs.add_argument("--seconds", type=float, default=60.0)
    of_furballs.add_argument("--num-images", type=int, default=2048)
    of_furballs.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    if arguments.part == "versions":
        versions()
    elif arguments.part == "missing":
        print(next(filter(None, map(missing, arguments.modules)), ""))
    elif arguments.part == "tests":
        gpu_tests()
    elif arguments.part == "graphs":
        small = {"resolution": 32, "batch": 4} if arguments.device == "cpu" else {}
        dataset = "furballs" if arguments.device == "cpu" else "ffhq"
        config = preset(dataset, data="none", precision="bf16", deterministic=True, **small)
        graphs(config, torch.device(arguments.device), arguments.steps)
    else:
        device = torch.device(arguments.device)
        furballs(furballs_config(device), device, arguments.seconds, arguments.num_images, arguments.out)


if __name__ == "__main__":
    main()
