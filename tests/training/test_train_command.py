"""The training command, from its start to what it leaves behind."""

import json
import math
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from helpers import (
    BATCH,
    PIPES,
    RESOLUTION,
    STEPS,
    TINY,
    TRAIN,
    Outcome,
    assert_same_bits,
    environment,
    flags,
    rows,
    shard_cache,
    tiny,
    tiny_trainer,
    train_in_process,
    training_rows,
    write_noise,
)
from PIL import Image

from pipeline.config import PRESETS
from pipeline.config.files import config_from_dict, config_to_dict, flatten, load_config, merge
from pipeline.runs.checkpoints import BEST, checkpoint_path, list_checkpoints, load_checkpoint
from pipeline.runs.mlflow_mirror import KEY_TAG, read_key
from pipeline.training.callbacks import Progress
from pipeline.training.interrupt import Interrupt

SUMMARY = {
    *(f"mask/{name}" for name in ("iou_fg", "iou_bg", "miou", "precision", "recall", "f1", "accuracy")),
    *("mask_pred_real/iou_fg", "mask_pred_real/iou_bg", "segmenter/iou_fg"),
    *("seconds", "images_seen", "img_per_s", "peak_memory_bytes"),
}
TERMS = {
    *("d_main_adversarial", "d_main_prediction", "d_r1_r1"),
    *("g_main_adversarial", "g_main_binarization", "g_main_area", "g_main_fine", "g_main_consistency"),
    "g_main_participation",
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shard_cache(tmp_path_factory)


# --- what it leaves behind ---


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> tuple[Path, Outcome]:
    """`accelerate launch pipeline/train.py` with nothing but sizes, in a directory of its own."""
    cwd = tmp_path_factory.mktemp("launched")
    accelerate = Path(sysconfig.get_path("scripts")) / "accelerate"
    sizes = merge(TINY, {"steps": STEPS, "cache_dir": cache, "log": {"grid_interval_images": 2 * BATCH}})
    del sizes["log"]["tracking_uri"]
    call = [sys.executable, str(accelerate), "launch", str(TRAIN), *flags(sizes)]
    done = subprocess.run(call, cwd=cwd, env=environment(), **PIPES, timeout=300)
    return cwd, Outcome(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="module")
def run_dir(launched: tuple[Path, Outcome]) -> Path:
    cwd, outcome = launched
    assert outcome.code == 0, outcome.err
    (run_dir,) = (path for path in (cwd / "runs").iterdir() if path.name.startswith("furballs-"))
    return run_dir


def test_run_writes_into_runs_alone(launched: tuple[Path, Outcome], run_dir: Path) -> None:
    cwd, _ = launched
    assert [path.name for path in cwd.iterdir()] == ["runs"]
    assert {path.name for path in (cwd / "runs").iterdir()} == {run_dir.name, "mlflow.db", "mlflow-artifacts"}


def test_run_directory_is_as_the_readme_has_it(run_dir: Path) -> None:
    left = {path.name for path in run_dir.iterdir()}
    assert left == {"config.yaml", "metrics.jsonl", "samples", "checkpoints", "summary.json", "mlflow_key"}


def test_command_tells_where_everything_is(launched: tuple[Path, Outcome], run_dir: Path) -> None:
    cwd, outcome = launched
    for place in ("samples", f"checkpoints/{BEST}", "metrics.jsonl", "summary.json"):
        (told,) = re.findall(rf"\S+/{place}", outcome.out)
        assert (cwd / told).samefile(run_dir / place)
    assert "mlflow ui --backend-store-uri sqlite:///runs/mlflow.db" in outcome.out


def test_saved_configuration_is_complete_and_accepted_back(run_dir: Path, tmp_path: Path) -> None:
    saved = load_config(run_dir / "config.yaml")
    assert flatten(saved).keys() == flatten(config_to_dict(config_from_dict({}))).keys()
    again = ["--config", str(run_dir / "config.yaml"), "--run-dir", "again", "--log.tracking-uri", "none"]
    outcome = train_in_process(tmp_path, *again)
    assert outcome.code == 0, outcome.err
    states = [load_checkpoint(checkpoint_path(at / "checkpoints", STEPS)) for at in (run_dir, tmp_path / "again")]
    assert_same_bits(states[0]["generator"], states[1]["generator"])


def test_metrics_hold_every_term_and_what_tells_of_a_collapse(run_dir: Path) -> None:
    training = training_rows(run_dir)
    assert [(row["iteration"], row["images_seen"]) for row in training] == [(i, i * BATCH) for i in range(1, STEPS + 1)]
    names = {name for row in rows(run_dir) for name in row}
    assert {f"loss/{term}" for term in TERMS} == {name for name in names if name.startswith("loss/")}
    assert {f"grad_norm/{phase}" for phase in ("d_main", "d_r1", "g_main")} <= names
    assert {"mask/area", "mask/binarization", "mask/min", "mask/max", "score/accuracy"} <= names
    assert {"speed/img_per_s", "speed/tflop_per_s", "speed/ms_d_main", "speed/ms_g_main"} <= names
    assert {"memory/peak_bytes", "schedule/fade_in", "schedule/lambda_bin"} <= names
    assert {"mask/iou_fg", "mask_pred_real/iou_fg"} <= names
    assert all(math.isfinite(value) for row in training for value in row.values())


@pytest.mark.parametrize("page", ["training.md", "speed.md"])
def test_documentation_names_metrics_that_exist(run_dir: Path, page: str) -> None:
    text = (TRAIN.parents[1] / "docs" / page).read_text()
    named = set(re.findall(r"`((?:loss|mask|mask_pred_real|score|speed|memory|schedule|segmenter)/\w+)`", text))
    recorded = {name for row in rows(run_dir) for name in row} | json.loads(
        (run_dir / "summary.json").read_text()
    ).keys()
    assert named and named <= recorded


def test_share_of_time_waiting_for_data_is_that_of_the_loader(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a clock that only the loader and the average of the weights move on."""
    now = 0.0

    def pass_time(seconds: float, call: Callable[..., Any]) -> Callable[..., Any]:
        def called(*arguments: Any) -> Any:
            nonlocal now
            now += seconds
            return call(*arguments)

        return called

    with tiny_trainer(cache, steps=2) as trainer:
        loader = iter(trainer.loader)
        monkeypatch.setattr(trainer, "loader", map(pass_time(3.0, lambda batch: batch), loader))
        monkeypatch.setattr(trainer.learner, "update_ema", pass_time(1.0, trainer.learner.update_ema))
        for module in ("pipeline.training.trainer", "pipeline.training.callbacks"):
            monkeypatch.setattr(f"{module}.time", mock.Mock(perf_counter=lambda: now))
        tracker = mock.Mock()
        trainer.fit([Progress(trainer, tracker)], Interrupt())
    shares = [call.args[0]["speed/data_wait_share"] for call in tracker.log_metrics.call_args_list]
    assert shares == [0.75, 0.75]


def test_losses_of_lazy_phases_are_recorded_when_they_are_due(run_dir: Path) -> None:
    having = {term: [r["iteration"] for r in training_rows(run_dir) if f"loss/{term}" in r] for term in TERMS}
    assert having["d_r1_r1"] == [1, 4]  # iterations 0 and 3
    assert having["g_main_consistency"] == having["g_main_participation"] == [1, 3]
    assert having["g_main_fine"] == [1, 2, 3, 4]


def test_sample_grids_are_pictures_with_labels(run_dir: Path) -> None:
    paths = sorted((run_dir / "samples").iterdir())
    assert [path.name for path in paths] == ["grid-0000000016.png", "grid-0000000032.png"]
    columns, kinds, psis = TINY["log"]["grid_columns"], 7, 2
    for path in paths:
        with Image.open(path) as grid:
            assert grid.width > columns * 96 and grid.height > psis * kinds * 96
            assert len(set(grid.convert("L").tobytes())) > 10


def test_checkpoints_can_be_loaded(run_dir: Path) -> None:
    directory = run_dir / "checkpoints"
    assert list_checkpoints(directory) == [checkpoint_path(directory, STEPS)]
    state = torch.load(checkpoint_path(directory, STEPS), weights_only=True)
    assert (state["iteration"], state["images_seen"]) == (STEPS, STEPS * BATCH)
    assert load_checkpoint(directory / BEST)["iteration"] == STEPS
    assert not list(directory.glob("*.tmp"))


def test_summary_has_the_flat_names_of_the_issue(run_dir: Path) -> None:
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary.keys() >= SUMMARY
    assert all(isinstance(value, int | float) and math.isfinite(value) for value in summary.values())
    assert summary["images_seen"] == STEPS * BATCH
    assert summary["img_per_s"] == pytest.approx(summary["images_seen"] / summary["seconds"], rel=1e-3)
    assert 100e6 < summary["peak_memory_bytes"] < 3 * 2**30
    assert all(0 <= value <= 1 for name, value in summary.items() if "/" in name)


def test_mlflow_holds_parameters_metrics_and_pictures(
    launched: tuple[Path, Outcome], run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    cwd, _ = launched
    monkeypatch.chdir(cwd)
    client = MlflowClient(tracking_uri=f"sqlite:///{cwd / 'runs' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("furrygan")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == (run_dir.name, "FINISHED")
    assert run.data.params == {key: str(value) for key, value in flatten(load_config(run_dir / "config.yaml")).items()}
    assert run.data.tags[KEY_TAG] == read_key(run_dir)

    history = client.get_metric_history(run.info.run_id, "loss/g_main_adversarial")
    expected = [(row["images_seen"], row["loss/g_main_adversarial"]) for row in training_rows(run_dir)]
    assert [(metric.step, metric.value) for metric in history] == expected
    assert client.get_metric_history(run.info.run_id, "mask/miou")

    artifacts = {file.path for file in client.list_artifacts(run.info.run_id, "images")}
    pictures = [path for path in artifacts if path.endswith(".png")]
    assert len(pictures) == 2 and all("grid" in path for path in pictures)
    with Image.open(client.download_artifacts(run.info.run_id, pictures[0])) as grid:
        assert grid.width > 2 * 96
    assert "summary.json" in {file.path for file in client.list_artifacts(run.info.run_id)}


def test_resumed_run_goes_on_in_the_same_mlflow_run(launched: tuple[Path, Outcome], run_dir: Path) -> None:
    from mlflow import MlflowClient

    cwd, _ = launched
    copy = cwd / "runs" / "furballs-copy"
    shutil.copytree(run_dir, copy)
    try:
        outcome = train_in_process(cwd, "--resume", str(copy), "--steps", str(STEPS + 1))
        assert outcome.code == 0, outcome.err
    finally:
        shutil.rmtree(copy)
    client = MlflowClient(tracking_uri=f"sqlite:///{cwd / 'runs' / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("furrygan").experiment_id])
    history = client.get_metric_history(run.info.run_id, "loss/g_main_adversarial")
    assert [metric.step for metric in history] == [i * BATCH for i in range(1, STEPS + 2)]


# --- other ways to train ---


def test_pictures_without_alpha_train_without_mask_metrics(tmp_path: Path) -> None:
    data = write_noise(tmp_path / "data", RESOLUTION)
    outcome = train_in_process(tmp_path, *flags(merge(TINY, {"steps": 2, "data": data, "run_dir": "run"})))
    assert outcome.code == 0, outcome.err
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert {name for name in summary if name in SUMMARY} == {name for name in SUMMARY if "/" not in name}
    assert load_checkpoint(tmp_path / "run" / "checkpoints" / BEST)["iteration"] == 2
    assert list((tmp_path / "run" / "samples").glob("*.png"))


@pytest.mark.parametrize("dataset", [name for name in PRESETS if name != "furballs"])
def test_every_preset_trains(dataset: str, tmp_path: Path) -> None:
    """Small, and at its first iterations: the unaligned recipe has terms that come late."""
    data = write_noise(tmp_path / "data", RESOLUTION)
    overrides = {"dataset": dataset, "data": data, "run_dir": "run", "steps": 2, "resolution": RESOLUTION}
    outcome = train_in_process(tmp_path, *flags(merge(TINY, overrides)))
    assert outcome.code == 0, outcome.err
    late = load_config(tmp_path / "run" / "config.yaml")["loss"]["consistency_start"] > 2
    assert ("loss/g_main_consistency" in training_rows(tmp_path / "run")[0]) is not late


def test_larger_pictures_with_alpha_train(tmp_path: Path) -> None:
    """At 256 px, the paper's size, the segmenter looks at smaller images than the discriminator."""
    data = write_noise(tmp_path / "data", 256, with_alpha=True, num=8)
    overrides = {
        **{"dataset": "ffhq", "data": data, "cache_dir": tmp_path / "cache", "run_dir": "run", "steps": 1},
        **{"resolution": 256, "batch": 4, "model": {"channel_base": 1024, "channel_max": 16}},
        "evaluation": {"segmenter_steps": 1, "num_samples_final": 2},
    }
    outcome = train_in_process(tmp_path, *flags(merge(TINY, overrides)))
    assert outcome.code == 0, outcome.err
    assert json.loads((tmp_path / "run" / "summary.json").read_text()).keys() >= SUMMARY


def test_loaders_train_alike(cache: Path, tmp_path: Path) -> None:
    pytest.importorskip("nvidia.dali")
    states = []
    for loader in ("dali", "webdataset"):
        outcome = train_in_process(tmp_path, *tiny(cache, steps=2, loader=loader, run_dir=loader))
        assert outcome.code == 0, outcome.err
        states.append(load_checkpoint(checkpoint_path(tmp_path / loader / "checkpoints", 2)))
    torch.testing.assert_close(states[0]["discriminator"], states[1]["discriminator"], rtol=0, atol=1e-3)


def test_adam_is_scaled_lazily_as_in_the_authors_script(cache: Path) -> None:
    with tiny_trainer(cache, loss={"r1_interval": 16}) as trainer:
        for network, ratio in (("generator", 4 / 5), ("discriminator", 16 / 17)):
            (group,) = trainer.learner.optimizers[network].param_groups
            assert group["lr"] == pytest.approx(0.002 * ratio)
            assert group["betas"] == pytest.approx((0.0, 0.99**ratio))
