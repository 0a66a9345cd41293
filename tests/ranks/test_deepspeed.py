"""DeepSpeed trains what DDP trains, to checkpoints that either resumes. Two real ranks, gloo."""

import importlib.util
import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    assert_same_bits,
    ended,
    tiny,
    train_in_new_process,
    train_in_process,
    training,
    training_rows,
    write_noise,
)
from two_ranks import TWO_RANKS, assert_weights_alike
from zero_worker import BACKENDS, HALF, HANDED, LOSS, MODEL, STEPS, config_of

from models.discriminator import Discriminator
from models.generator import FurryGenerator
from models.widths import Widths
from pipeline.benchmarks.memory import Arguments, held, largest_share, table
from pipeline.ranks.zero import settings
from pipeline.runs.checkpoints import checkpoint_path, list_checkpoints, load_checkpoint

ROOT = Path(__file__).parents[2]
ZERO = [name for name in BACKENDS if name != "ddp"]
needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `zero_worker.py` wrote. The run in ``run/``, begun by DDP on one rank, resumed in it."""
    out = tmp_path_factory.mktemp("zero")
    common = tiny(out, batch=16, steps=4, data=write_noise(out / "data", 32, num=64))
    assert train_in_process(out, *common, "--run-dir", "whole").code == 0
    assert train_in_process(out, *common, "--run-dir", "run", "--steps", "1").code == 0
    worker = Path(__file__).parent / "zero_worker.py"
    outcome = train_in_new_process(out, str(out), "run", launcher=TWO_RANKS, script=worker)
    assert outcome.code == 0, outcome.err
    assert "deepspeed" not in outcome.out.lower()  # nothing is compiled, nothing is chatty
    return out


def load(out: Path, name: str) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(out / f"{name}.pt", weights_only=True)
    return state


def said(out: Path, name: str) -> list[Any]:
    """By rank."""
    return [json.loads((out / f"{name}-{rank}.json").read_text()) for rank in (0, 1)]


# --- the same numbers ---


@needs_deepspeed
@pytest.mark.parametrize("backend", ZERO)
def test_twenty_steps_with_r1_are_those_of_ddp(backend: str, trained: Path) -> None:
    """Where rounding is alike: 20 steps of a GAN make much of the last bit."""
    assert LOSS["r1_interval"] < STEPS == 20
    assert_weights_alike(load(trained, f"{backend}-{STEPS}"), load(trained, f"ddp-{STEPS}"))


@needs_deepspeed
@pytest.mark.parametrize("backend", ZERO)
def test_micro_batches_are_those_of_ddp(backend: str, trained: Path) -> None:
    assert_weights_alike(load(trained, f"accumulated-{backend}"), load(trained, "accumulated-ddp"))


@needs_deepspeed
def test_run_handed_from_backend_to_backend_ends_as_one_of_ddp(trained: Path) -> None:
    assert HANDED[0] == HANDED[-1] == "ddp" and set(HANDED) == set(BACKENDS)
    assert_weights_alike(load(trained, f"handed-{len(HANDED) - 1}"), load(trained, f"ddp-{HALF}"))


@needs_deepspeed
@pytest.mark.parametrize("backend", ZERO)
def test_state_of_adam_is_saved_as_ddp_saves_it(backend: str, trained: Path) -> None:
    """Whole, under the same numbers, and in memory in the same order, by which Adam goes."""
    ours, theirs = (load(trained, f"{name}-{HALF}")["optimizers"] for name in (backend, "ddp"))
    for network in ("generator", "discriminator"):
        assert_same_bits(ours[network]["param_groups"], theirs[network]["param_groups"])
        actual, expected = ours[network]["state"], theirs[network]["state"]
        assert actual.keys() == expected.keys()
        for i, of_parameter in expected.items():
            assert actual[i].keys() == of_parameter.keys() == {"step", "exp_avg", "exp_avg_sq"}
            assert torch.equal(actual[i]["step"], of_parameter["step"])
            for name in ("exp_avg", "exp_avg_sq"):
                one, other = actual[i][name], of_parameter[name]
                assert one.shape == other.shape
                # As the bytes lie, not as indices go.
                memory = [torch.as_strided(x, (x.numel(),), (1,)) for x in (one, other)]
                torch.testing.assert_close(*memory, rtol=1e-4, atol=1e-7)


@needs_deepspeed
def test_two_ranks_of_zero_go_on_with_a_run_of_one_of_ddp_and_it_with_theirs(trained: Path) -> None:
    """With the optimizer as it is: 1 step of DDP on one rank, 2 of ZeRO-2 on two, 1 of DDP on one."""
    assert [row["iteration"] for row in training_rows(trained / "run")] == [1, 2, 3]
    outcome = train_in_process(trained, "--resume", "run", "--steps", "4", "--backend", "ddp", "--zero-stage", "0")
    assert outcome.code == 0, outcome.err
    assert "resuming at iteration 3" in outcome.err
    parts, whole = (load_checkpoint(checkpoint_path(trained / name / "checkpoints", 4)) for name in ("run", "whole"))
    assert_weights_alike(parts, whole)


@needs_deepspeed
def test_one_rank_needs_no_launcher_and_saves_when_it_is_told_to_stop(tmp_path: Path) -> None:
    data = write_noise(tmp_path / "data", 32)
    arguments = tiny(tmp_path, data=data, run_dir="run", steps=100_000, backend="deepspeed", zero_stage=1)
    with training(tmp_path, *arguments) as process:
        process.send_signal(signal.SIGTERM)
        outcome = ended(process, tmp_path)
    assert outcome.code == 128 + signal.SIGTERM, outcome.err
    (path,) = list_checkpoints(tmp_path / "run" / "checkpoints")
    iteration = load_checkpoint(path)["iteration"]
    on = ["--resume", "run", "--steps", str(iteration + 1), "--backend", "ddp", "--zero-stage", "0"]
    outcome = train_in_process(tmp_path, *on)
    assert outcome.code == 0, outcome.err
    assert f"resuming at iteration {iteration}" in outcome.err


# --- what breaks ---


@needs_deepspeed
@pytest.mark.parametrize("backend", BACKENDS)
def test_loss_that_breaks_on_one_rank_stops_both_before_the_step(backend: str, trained: Path) -> None:
    other, broken = said(trained, f"broken-{backend}")
    assert broken["told"].startswith("loss g_main_binarization is not finite at iteration 0")
    assert other["told"].startswith("averaged gradient of g_main is not finite at iteration 0")
    assert not broken["moved"] and not other["moved"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--backend", "deepspeed", "--zero-stage", "3"), ("zero_stage 3", "R1", "0, 1 or 2")),
        (("--zero-stage", "1"), ("zero_stage 1", "--backend deepspeed")),
        (("--backend", "deepspeed", "--zero-stage", "4"), ("'zero_stage'", "0 to 2")),
        (("--backend", "zero"), ("backend", "deepspeed")),
    ],
)
def test_what_is_not_possible_is_one_line(arguments: tuple[str, ...], words: tuple[str, ...], tmp_path: Path) -> None:
    outcome = train_in_process(tmp_path, *arguments)
    assert outcome.code == 2
    assert outcome.err.splitlines() == outcome.errors and len(outcome.errors) == 1
    assert [word for word in words if word not in outcome.errors[0]] == []
    assert list(tmp_path.iterdir()) == []


def test_missing_package_is_one_line_with_the_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "deepspeed" else find(name))
    outcome = train_in_process(tmp_path, "--backend", "deepspeed")
    assert outcome.code == 2
    (error,) = outcome.err.splitlines()
    assert "pip install 'furrygan-pipeline[deepspeed]'" in error and "uv sync --extra deepspeed" in error
    assert list(tmp_path.iterdir()) == []


# --- settings ---


@needs_deepspeed
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_settings_change_no_number(stage: int) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    tree = settings(stage)
    config = DeepSpeedConfig(tree | {"train_micro_batch_size_per_gpu": 4})
    assert config.zero_optimization_stage == stage
    assert not config.float16_config.enabled and not config.bfloat16_config.enabled
    assert config.gradient_clipping == 0.0  # DeepSpeed's default is 1
    assert config.optimizer_name is None and config.scheduler_name is None  # the learner makes its own
    # Our parts are of parameters in their own order.
    assert not config.zero_config.round_robin_gradients and not config.zero_config.parameter_alignment


# --- memory ---


@needs_deepspeed
@pytest.mark.parametrize("backend", BACKENDS)
def test_bytes_counted_are_those_that_ranks_hold(backend: str, trained: Path) -> None:
    widths = Widths(MODEL["channel_base"], MODEL["channel_max"])
    config = config_of(backend)
    with torch.device("meta"):
        generator = FurryGenerator(
            config.resolution, widths, z_dim=MODEL["z_dim"], z_dim_background=MODEL["z_dim_background"]
        )
        discriminator = Discriminator(config.resolution, widths)
    stage = config.zero_stage if config.backend == "deepspeed" else None
    first, second = said(trained, f"held-{backend}")
    assert {name: max(first[name], second[name]) for name in first} == vars(
        held(generator, discriminator, stage, ranks=2)
    )


def test_largest_share_counts_parameters_whole() -> None:
    assert largest_share([3, 4, 5], part=6) == max(3 + 4, 4 + 5)
    assert largest_share([9, 4, 5], part=6) == max(9, 9 + 4, 4 + 5)
    assert largest_share([3, 4, 5], part=12) == 12


def test_table_of_the_docs_is_that_of_the_command() -> None:
    arguments = Arguments()
    assert table(arguments.resolutions, arguments.ranks) in (ROOT / "docs" / "deepspeed.md").read_text()
