"""`--deterministic`: what it sets, that a resumed run has the same bits, and what cannot be computed so."""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from helpers import PIPES, assert_same_bits, shard_cache, tiny, train_in_process, training_rows
from torch.utils._python_dispatch import TorchDispatchMode

from models import fused
from pipeline.config import Config, preset
from pipeline.runs.checkpoints import checkpoint_path, load_checkpoint
from pipeline.training.callbacks import Progress
from pipeline.training.learner import Learner
from pipeline.training.trainer import why_no_graphs

CPU = torch.device("cpu")
B = 8
NOT_OF_THE_SEED = ("speed/", "memory/", "timestamp_ms")

# By torch.use_deterministic_algorithms' documentation, on a GPU: those that raise, by the start of their names.
WITHOUT_DETERMINISTIC_FORM = (
    *("avg_pool3d_backward", "_adaptive_avg_pool", "adaptive_avg_pool", "adaptive_max_pool", "fractional_max_pool"),
    *("max_unpool", "upsample_linear1d_backward", "upsample_bilinear2d_backward", "upsample_bicubic2d_backward"),
    *("upsample_trilinear3d_backward", "reflection_pad", "nll_loss", "_ctc_loss_backward", "_embedding_bag", "put"),
    *("histc", "bincount", "median", "nanmedian", "grid_sampler", "scatter_reduce", "index_reduce", "kthvalue"),
)


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    """The flags are of the whole process."""
    with mock.patch.dict(os.environ):
        os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
        yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic = torch.backends.cudnn.benchmark = False


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shard_cache(tmp_path_factory)


@pytest.fixture
def config() -> Config:
    return preset("furballs", batch=B, model={"channel_base": 512, "channel_max": 24})


def is_set() -> dict[str, Any]:
    return {
        "algorithms": torch.are_deterministic_algorithms_enabled(),
        "cudnn": torch.backends.cudnn.deterministic,
        "autotuning": torch.backends.cudnn.benchmark,
        "cublas": os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
    }


def test_option_sets_all_that_torch_has_for_it_and_only_then(config: Config) -> None:
    Learner(config, CPU)
    assert is_set() == {"algorithms": False, "cudnn": False, "autotuning": True, "cublas": None}
    Learner(replace(config, deterministic=True), CPU)
    assert is_set() == {"algorithms": True, "cudnn": True, "autotuning": False, "cublas": ":4096:8"}


def test_cublas_workspace_of_the_user_is_kept(config: Config) -> None:
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":16:8"
    Learner(replace(config, deterministic=True), CPU)
    assert is_set()["cublas"] == ":16:8"


def test_a_resumed_run_has_the_bits_of_a_whole_one(cache: Path, tmp_path: Path) -> None:
    """Begun without the option and resumed with it, too: on a CPU it changes no bit."""

    def train(run_dir: str, steps: int, *more: str) -> None:
        outcome = train_in_process(tmp_path, *tiny(cache, run_dir=run_dir, steps=steps), *more)
        assert outcome.code == 0, outcome.err

    train("whole", 6, "--deterministic")
    train("resumed", 3, "--deterministic")
    train("resumed", 6, "--deterministic")
    assert torch.are_deterministic_algorithms_enabled()
    train("later", 3)
    assert not torch.are_deterministic_algorithms_enabled()
    train("later", 6, "--deterministic")
    whole, *others = (tmp_path / name for name in ("whole", "resumed", "later"))
    for other in others:
        states = [load_checkpoint(checkpoint_path(at / "checkpoints", 6)) for at in (other, whole)]
        for name in ("generator", "discriminator", "ema", "optimizers", "loader"):
            assert_same_bits(states[0][name], states[1][name], name)
        rows = [
            [{k: v for k, v in row.items() if not k.startswith(NOT_OF_THE_SEED)} for row in training_rows(at)]
            for at in (other, whole)
        ]
        assert rows[0] == rows[1]


@pytest.mark.parametrize(
    ("message", "line"),
    [
        (None, "put_ has no deterministic form on this device; leave the option out"),
        (
            # torch's own words, of a matrix product on a GPU
            "Deterministic behavior was enabled with either `torch.use_deterministic_algorithms(True)` or "
            "`at::Context::setDeterministicAlgorithms(true)`, but this operation is not deterministic because it uses "
            "CuBLAS and you have CUDA >= 10.2. To enable deterministic behavior in this case, you must set an "
            "environment variable before running your PyTorch application: CUBLAS_WORKSPACE_CONFIG=:4096:8 or "
            "CUBLAS_WORKSPACE_CONFIG=:16:8.",
            "CUBLAS_WORKSPACE_CONFIG=:4096:2 lets cuBLAS give other bits each time; unset it, or give :4096:8",
        ),
    ],
    ids=["an operator without", "cuBLAS as the user set it"],
)
def test_what_cannot_be_deterministic_is_named_in_one_line(
    message: str | None, line: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def on_step(*_: Any) -> None:
        if message is None:
            torch.zeros(2).put_(torch.tensor([0]), torch.ones(1))
        else:
            raise RuntimeError(message)

    monkeypatch.setattr(Progress, "on_step", on_step)
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:2"
    outcome = train_in_process(tmp_path, *tiny(cache, run_dir="run"), "--deterministic")
    assert outcome.code == 2 and "Traceback" not in outcome.err
    assert outcome.errors == [f"error: --deterministic: {line}"]


def test_without_the_option_torch_refuses_nothing(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Progress, "on_step", lambda *_: torch.zeros(2).put_(torch.tensor([0]), torch.ones(1)))
    assert train_in_process(tmp_path, *tiny(cache, run_dir="run")).code == 0


class Operators(TorchDispatchMode):
    """Names of those that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.overloadpacket.__name__.rstrip("_"))
        return func(*args, **(kwargs or {}))


def operators(config: Config) -> set[str]:
    learner, images = Learner(config, CPU), torch.zeros(B, 3, config.resolution, config.resolution)
    with Operators() as called:
        for iteration in (0, 1):
            for phase in learner.phases:
                learner.run(phase, iteration, images, range(B))
            learner.update_ema(0)
    return called.names


@pytest.mark.parametrize("unaligned", [False, True])
def test_no_step_on_a_gpu_needs_an_operator_without_deterministic_form(config: Config, unaligned: bool) -> None:
    config = replace(config, loss=replace(config.loss, area_over_batch=unaligned), accumulate=1 + unaligned)
    with fused.on_every_device():
        names = operators(config)
    assert len(names) > 50 and "convolution_backward" in names
    assert not [name for name in names if name.startswith(WITHOUT_DETERMINISTIC_FORM)]


def test_without_triton_a_gpu_would_need_the_gradient_of_reflection_padding(config: Config) -> None:
    assert [name for name in operators(config) if name.startswith(WITHOUT_DETERMINISTIC_FORM)] != []


# --- CUDA graphs ---


def test_a_run_says_why_it_has_no_cuda_graphs(config: Config) -> None:
    gpu, deepspeed = torch.device("cuda"), replace(config, backend="deepspeed")
    assert why_no_graphs(config, gpu, triton=True) is None
    assert "--backend deepspeed" in str(why_no_graphs(deepspeed, gpu, triton=True))
    assert "Triton" in str(why_no_graphs(config, gpu, triton=False))
    for nothing_wanted in (why_no_graphs(deepspeed, CPU, triton=False), why_no_graphs(config, CPU, triton=False)):
        assert nothing_wanted is None
    assert why_no_graphs(replace(deepspeed, cuda_graphs=False), gpu, triton=True) is None


# --- on a GPU ---

RESUMED = """
import torch
from pipeline.config import preset
from pipeline.training.learner import Learner

config, device = preset("furballs", batch=8, deterministic=True), torch.device("cuda")
generator = torch.Generator().manual_seed(1)
batches = [torch.rand(8, 3, 32, 32, generator=generator).to(device) * 2 - 1 for _ in range(8)]

def train(learner, iterations):
    for iteration in iterations:
        for phase in learner.phases:
            if iteration % phase.interval == 0:
                learner.run(phase, iteration, batches[iteration], range(8))
        learner.update_ema(8 * iteration)

whole = Learner(config, device)
train(whole, range(8))
first, second = Learner(config, device), Learner(config, device)
train(first, range(5))
second.load_state_dict(first.state_dict())
train(second, range(5, 8))
for network in ("generator", "discriminator", "ema"):
    ours, theirs = (getattr(learner, network).state_dict() for learner in (second, whole))
    for name in theirs:
        assert torch.equal(ours[name], theirs[name]), name
"""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_a_resumed_run_has_the_bits_of_a_whole_one() -> None:
    """In a process of its own: cuBLAS reads its variable once."""
    done = subprocess.run([sys.executable, "-c", RESUMED], **PIPES, timeout=300)
    assert done.returncode == 0, done.stderr
