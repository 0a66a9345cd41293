"""The evaluation command: its figures, that they are the same each time and on each number of ranks, its mistakes."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluating import (
    ACCELERATE_TWO_RANKS,
    FEATURES,
    NUM_SAMPLES,
    SMALL,
    evaluate_in_new_process,
    evaluate_in_process,
    results,
    train_tiny_run,
)
from helpers import NUM_IMAGES, PIPES, RESOLUTION, environment, furballs, python_path, shard_cache, write_noise
from PIL import Image

from data_shards.reading.shard_set import ShardSet
from pipeline.evaluation.pictures import RealPictures, generate, to_uint8
from pipeline.evaluation.tables import OURS
from pipeline.generation.trained_run import open_run


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shard_cache(tmp_path_factory)


@pytest.fixture(scope="module")
def cwd(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """A directory with a trained run, and its evaluation in ``one``."""
    cwd = tmp_path_factory.mktemp("evaluate")
    train_tiny_run(cwd, cache)
    before = digests(cwd / "run")
    outcome = evaluate_in_process(cwd, *SMALL, *FEATURES, "--image-metrics", "fid", "kid", "prc", "--out", "one")
    assert outcome.code == 0, outcome.err
    assert digests(cwd / "run") == before, "the evaluation changed the run"
    return cwd


def digests(directory: Path) -> dict[str, str]:
    files = (path for path in sorted(directory.rglob("*")) if path.is_file())
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_evaluation_again_writes_the_same_bytes(cwd: Path) -> None:
    outcome = evaluate_in_process(cwd, *SMALL, *FEATURES, "--image-metrics", "fid", "kid", "prc", "--out", "again")
    assert outcome.code == 0, outcome.err
    assert digests(cwd / "again") == digests(cwd / "one")


def test_two_ranks_measure_the_same_as_one(cwd: Path) -> None:
    """Without the statistics of real images that one rank left in the cache."""
    for path in results_cache(cwd):
        path.unlink()
    arguments = (*SMALL, *FEATURES, "--image-metrics", "fid", "kid", "prc", "--out", "two")
    outcome = evaluate_in_new_process(cwd, *arguments, launcher=ACCELERATE_TWO_RANKS)
    assert outcome.code == 0, outcome.err
    assert outcome.out.count("# Evaluation of run") == 1
    assert digests(cwd / "two") == digests(cwd / "one")


def results_cache(cwd: Path) -> list[Path]:
    config = open_run(cwd / "run", "best", torch.device("cpu")).config
    found = list(config.cache_dir.glob("features-*.npz"))
    assert found
    return found


def test_distances_equal_those_of_torch_fidelitys_command_on_the_same_pictures(cwd: Path, cache: Path) -> None:
    """On disk as PNG, all generated ones against all real ones."""
    run = open_run(cwd / "run", "best", torch.device("cpu"))
    shard_set = ShardSet.open(furballs(cache))
    real = RealPictures(shard_set, num_threads=1).images(range(NUM_IMAGES))
    generated = to_uint8(generate(run, range(NUM_SAMPLES), psi=0.7, seed=0).foreground)
    for name, images in (("generated", generated), ("real", real)):
        (cwd / name).mkdir()
        for i, image in enumerate(images):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(cwd / name / f"{i:03d}.png")
    theirs = fidelity(cwd, "generated", "real")
    ours = results(cwd / "one")["generated"][1]["images"]["foreground"]
    assert ours["frechet_distance"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-3)
    assert ours["generative_precision"] == pytest.approx(theirs["precision"], rel=1e-3)
    assert ours["generative_recall"] == pytest.approx(theirs["recall"], rel=1e-3)
    assert ours["kernel_distance"] == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-3)


def fidelity(cwd: Path, one: str, other: str) -> dict[str, float]:
    """What torch-fidelity's own command says."""
    program = (
        "import extractors, torch_fidelity.registry as r; from torch_fidelity.fidelity import main;"
        "r.register_feature_extractor('tiny', extractors.TinyFeatures); main()"
    )
    # The default of KID, subsets of 1,000 images, is more than there are.
    arguments = f"--input1 {one} --input2 {other} --fid --kid --prc --kid-subset-size {NUM_SAMPLES} --rng-seed 0"
    how = "--cpu --json --feature-extractor tiny --no-cache --save-cpu-ram"
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments.split(), *how.split()],
        cwd=cwd,
        env=environment() | {"PYTHONPATH": python_path()},
        **PIPES,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


def test_masks_measure_as_training_does(cwd: Path) -> None:
    """The last evaluation of the training is of 8 samples of the same seed."""
    arguments = [*SMALL, "--num-samples", "8", "--checkpoint", "latest", "--psi", "1.0", "--image-metrics"]
    outcome = evaluate_in_process(cwd, *arguments, "--out", "eight")
    assert outcome.code == 0, outcome.err
    summary = json.loads((cwd / "run" / "summary.json").read_text())
    figures = results(cwd / "eight")["generated"][0]["masks"]["fitted"]
    for name in ("iou_fg", "iou_bg", "miou", "precision", "recall", "f1", "accuracy"):
        assert figures[name] == pytest.approx(summary[f"mask/{name}"], abs=1e-3)


def test_results_say_what_was_measured(cwd: Path) -> None:
    tree = results(cwd / "one")
    assert tree["settings"] == {"num_samples": NUM_SAMPLES, "psi": [1.0, 0.7], "seed": 0, "threshold": 0.5}
    assert tree["features"]["resize"] and not tree["features"]["is_inception"]
    assert tree["data"]["num_images"] == NUM_IMAGES
    best = cwd / "run" / "checkpoints" / "best.pt"
    assert tree["run"]["checkpoint_sha256"] == hashlib.sha256(best.read_bytes()).hexdigest()
    assert tree["real"]["mask_pred"].keys() == {"alpha"}
    assert "fid" not in json.dumps(tree["generated"])


def test_tables_tell_this_runs_rows_from_published_ones(cwd: Path) -> None:
    markdown, latex = ((cwd / "one" / f"tables.{kind}").read_text() for kind in ("md", "tex"))
    ours = [line for line in markdown.splitlines() if line.startswith(f"| **{OURS}**")]
    assert len(ours) == 2 + 4  # masks at two psi; foregrounds and composites at two psi
    published = [line for line in markdown.splitlines() if "(published)" in line]
    assert len(published) == 4 and all(line.startswith("| *FurryGAN (published)* | *") for line in published)
    assert "not comparable" in markdown
    assert latex.count(r"\begin{tabular}") == latex.count(r"\end{tabular}") == 5
    assert latex.count(r"\emph{Published}") == 1
    for line in latex.splitlines():
        if line.endswith(r"\\") and "multicolumn" not in line:
            assert line.count("&") > 2


def test_without_weights_and_network_all_else_is_measured_and_one_line_says_so(
    cwd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(cwd / "empty"))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nobody listens there
    outcome = evaluate_in_process(cwd, *SMALL, "--out", "offline")
    assert outcome.code == 0, outcome.err
    told = [line for line in outcome.err.splitlines() if "--inception-weights FILE" in line]
    assert len(told) == 1 and told[0].startswith("no FID, KID or other distance of images:")
    assert "Traceback" not in outcome.err
    tree, whole = results(cwd / "offline"), results(cwd / "one")
    assert tree["features"] is None and "--inception-weights" in tree["features_missing"]
    for at, with_images in zip(tree["generated"], whole["generated"], strict=True):
        assert at == with_images | {"images": {}}
    assert tree["real"] == whole["real"]


def test_shards_without_alpha_give_distances_alone(cwd: Path) -> None:
    data = write_noise(cwd / "noise", RESOLUTION)
    outcome = evaluate_in_process(cwd, *SMALL, *FEATURES, "--data", str(data), "--psi", "1.0", "--out", "plain")
    assert outcome.code == 0, outcome.err
    assert "no masks are measured" in outcome.err
    tree = results(cwd / "plain")
    assert tree["generated"][0]["masks"] == {} and tree["real"]["mask_pred"] == {}
    assert tree["generated"][0]["images"]["foreground"]["frechet_distance"] > 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--run nowhere", ("nowhere", "not a run directory")),
        ("--run run --checkpoint none.pt", ("none.pt", "does not exist")),
        ("--run run --pseudo-gt tracer", ("tracer is unknown", "tracer-te7=FILE")),
        ("--run run --pseudo-gt u2netp", ("u2netp needs its weights", "u2netp=FILE")),
        ("--run run --pseudo-gt u2netp=none.onnx", ("none.onnx", "does not exist")),
        ("--run run --pseudo-gt nowhere:network", ("nowhere",)),
        ("--run run --pseudo-gt networks:brightness networks:brightness", ("another brightness", "once")),
        ("--run run --inception-weights none.pth", ("none.pth", "does not exist")),
        ("--run run --features none", ("none is unknown",)),
        ("--run run --data none", ("none", "does not exist")),
        ("--run run --num-samples 1", ("--num-samples 1", "2 or more")),
        ("--run run --batch 0", ("--batch 0",)),
        ("--run run --psi nan", ("--psi nan",)),
        ("--run run --psi 1 1", ("--psi", "each once")),
        ("--run run --threshold 1", ("--threshold 1",)),
        ("--run run --seed -1", ("--seed -1",)),
        ("--run run --colour red", ("--colour",)),
        ("", ("--run",)),
    ],
)
def test_mistake_is_one_line_and_code_2(arguments: str, words: tuple[str, ...], cwd: Path) -> None:
    before = digests(cwd / "run")
    outcome = evaluate_in_process(cwd, *arguments.split())
    assert outcome.code == 2, outcome.err
    assert outcome.out == "" and outcome.err.splitlines() == outcome.errors and len(outcome.errors) == 1, outcome.err
    for word in words:
        assert word in outcome.errors[0]
    assert digests(cwd / "run") == before


def test_run_without_a_checkpoint_is_one_line(cwd: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    shutil.copy(cwd / "run" / "config.yaml", tmp_path / "run")
    outcome = evaluate_in_process(tmp_path, "--run", "run")
    assert (outcome.code, len(outcome.err.splitlines())) == (2, 1)
    assert "no checkpoint in run/checkpoints" in outcome.errors[0]


def test_pseudo_truth_by_alpha_without_alpha_is_one_line(cwd: Path) -> None:
    data = write_noise(cwd / "more-noise", RESOLUTION)
    for spec in ("alpha", "fitted"):
        outcome = evaluate_in_process(cwd, *SMALL, "--data", str(data), "--pseudo-gt", spec)
        assert (outcome.code, len(outcome.err.splitlines())) == (2, 1)
        assert "needs ground-truth alpha" in outcome.errors[0]


def test_pictures_are_read_in_order_and_not_mirrored(cache: Path) -> None:
    shard_set = ShardSet.open(furballs(cache))
    pictures = RealPictures(shard_set, num_threads=2)
    images, alphas = pictures.images([5, 0, 63]), pictures.alphas([5, 0, 63])
    from data_shards.sources.furballs import draw

    for i, image, alpha in zip((5, 0, 63), images, alphas, strict=True):
        sample = draw(i, seed=0, resolution=RESOLUTION)
        assert np.array_equal(image.permute(1, 2, 0).numpy(), sample.image)
        assert np.array_equal((alpha[0] * 255).round().numpy(), sample.alpha)
    pictures.close()
