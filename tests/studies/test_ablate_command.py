"""The ablation command: it trains and evaluates what is left to do, writes what the paper shows, and says mistakes."""

import fcntl
import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from helpers import TINY, Outcome, python_path, run_in_process, shard_cache, train_in_process
from PIL import Image

from pipeline import ablate
from pipeline.config.command_line import parse_arguments
from pipeline.config.files import merge, save_config
from pipeline.generation.sample_grid import CELL, MARGIN
from pipeline.studies.ablation.study import AblationOptions, _measured, make_trials
from pipeline.studies.ablation.variants import FULL

ABLATE = Path(ablate.__file__)
STEPS = 2
SMALL = (
    *("--config", "tiny.yaml", "--steps", str(STEPS), "--variants", "full", "no-fine-mask", "--seeds", "0"),
    *("--num-samples", "12", "--features", "extractors:TinyFeatures", "--out", "study", "--num-parallel", "2"),
)


def ablate_in_process(cwd: Path, *arguments: str) -> Outcome:
    """The command, which starts processes of its own."""
    return run_in_process(ablate.main, ABLATE, cwd, *arguments)


@pytest.fixture(scope="module")
def cwd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the study's configuration."""
    cwd = tmp_path_factory.mktemp("ablate")
    tree = merge(TINY, {"cache_dir": str(shard_cache(tmp_path_factory))})
    (cwd / "tiny.yaml").write_text(yaml.safe_dump(tree))
    return cwd


@pytest.fixture(scope="module")
def study(cwd: Path) -> tuple[Path, Outcome]:
    """A whole study, of which one training had been done before."""
    patch = pytest.MonkeyPatch()
    patch.setenv("PYTHONPATH", python_path())
    patch.chdir(cwd)
    arguments = parse_arguments(AblationOptions, "", list(SMALL))
    full = make_trials(arguments, Path("study"), _measured(arguments), num_threads=1)[1]
    assert full.variant is FULL
    save_config(full.config, cwd / "full.yaml")
    before = train_in_process(cwd, "--config", "full.yaml")
    assert before.code == 0, before.err
    outcome = ablate_in_process(cwd, *SMALL)
    patch.undo()
    assert outcome.code == 0, outcome.err
    return cwd / "study", outcome


def test_each_trial_is_trained_and_evaluated_with_the_overrides_of_its_variant(study: tuple[Path, Outcome]) -> None:
    out, _ = study
    for name, fine in (("full-seed0", True), ("no-fine-mask-seed0", False)):
        config = yaml.safe_load((out / name / "config.yaml").read_text())
        assert (config["model"]["fine_mask"], config["seed"], config["steps"]) == (fine, 0, STEPS)
        assert json.loads((out / name / "summary.json").read_text())["iterations"] == STEPS
        assert len(list((out / name / "evaluation").glob("ablation-*/evaluation.json"))) == 1


def test_what_was_trained_before_is_not_trained_again(study: tuple[Path, Outcome]) -> None:
    out, _ = study
    assert "trained 2 iterations" in (out / "no-fine-mask-seed0" / "trial.log").read_text()
    log = (out / "full-seed0" / "trial.log").read_text()
    assert "trained 2 iterations" not in log and "# Evaluation of full-seed0" in log


def test_tables_and_figures_are_those_of_the_evaluations(study: tuple[Path, Outcome]) -> None:
    out, outcome = study
    results = json.loads((out / "ablation.json").read_text())
    for name, variant in results["variants"].items():
        (path,) = (out / f"{name}-seed0" / "evaluation").glob("ablation-*/evaluation.json")
        at = json.loads(path.read_text())["generated"][0]
        expected = at["masks"]["fitted"] | {"distance": at["images"]["foreground"]["frechet_distance"]}
        for figure, value in expected.items():
            assert variant["figures"][figure] == {"mean": value, "std": None, "values": [value]}
    assert list(results["variants"]) == ["no-fine-mask", "full"]
    assert [claim["verdict"] for claim in results["claims"]] == ["undecided"] * 3
    assert (out / "tables.md").read_text() in outcome.out
    assert (out / "tables.tex").read_text().count(r"\begin{tabular}") == 3


def test_grid_has_a_panel_a_variant_and_a_column_a_latent(study: tuple[Path, Outcome]) -> None:
    """Two variants, of four rows each; without a fine mask network the final mask is the coarse one."""
    pixels = np.asarray(Image.open(study[0] / "grid-seed0.png"))
    panel, pitch = len(pixels) // 2, CELL + MARGIN
    rows = [pixels[panel - (4 - i) * pitch :][:CELL, -2 * pitch : -MARGIN] for i in range(4)]
    assert np.array_equal(rows[1], rows[2]) and not np.array_equal(rows[0], rows[3])
    assert panel > 4 * pitch and pixels.shape[1] > 2 * pitch


def test_a_study_that_is_done_runs_nothing_and_writes_the_same(
    study: tuple[Path, Outcome], cwd: Path, tests_importable: None
) -> None:
    out, _ = study
    before = digests(out)
    outcome = ablate_in_process(cwd, *SMALL)
    assert outcome.code == 0, outcome.err
    assert digests(out) == before


def digests(directory: Path) -> dict[str, str]:
    files = (path for path in sorted(directory.rglob("*")) if path.is_file())
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture
def tests_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", python_path())


def test_a_trial_that_fails_is_named_and_the_others_are_shown(
    study: tuple[Path, Outcome], cwd: Path, tests_importable: None
) -> None:
    shutil.copytree(study[0], cwd / "broken")
    shutil.copy(cwd / "tiny.yaml", cwd / "broken" / "tiny.yaml")
    for name in ("full-seed0", "no-fine-mask-seed0"):
        path = cwd / "broken" / name / "config.yaml"
        path.write_text(path.read_text().replace("study/", "broken/"))
    shutil.rmtree(cwd / "broken" / "full-seed0" / "evaluation")
    for checkpoint in (cwd / "broken" / "full-seed0" / "checkpoints").glob("*.pt"):
        checkpoint.write_bytes(b"")
    outcome = ablate_in_process(cwd, *SMALL, "--out", "broken")
    assert outcome.code == 2
    assert outcome.errors == ["error: 1 of 2 trials failed, see broken/full-seed0/trial.log"]
    assert "full-seed0 failed: error:" in outcome.err
    assert "w/o Fine Mask Network (1)" in outcome.out and "Full (1)" not in outcome.out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--variants none", ("--variants none is unknown", "no-fine-mask")),
        ("--seeds 1 1", ("--seeds 1 1", "each once")),
        ("--num-parallel 0", ("--num-parallel 0",)),
        ("--num-samples 1", ("--num-samples 1",)),
        ("--psi nan", ("--psi nan",)),
        ("--pseudo-gt u2netp=none.onnx", ("none.onnx", "does not exist")),
        ("--features none", ("none is unknown",)),
        ("--steps 1", ("trained to iteration 2", "another --out")),
        ("--batch 16", ("another configuration", "batch 8, not 16")),
        ("--colour red", ("--colour",)),
    ],
)
def test_mistake_is_one_line_and_code_2(
    arguments: str, words: tuple[str, ...], study: tuple[Path, Outcome], cwd: Path, tests_importable: None
) -> None:
    before = digests(study[0])
    outcome = ablate_in_process(cwd, *SMALL, *arguments.split())
    assert outcome.code == 2, outcome.err
    assert outcome.out == "" and outcome.err.splitlines() == outcome.errors and len(outcome.errors) == 1, outcome.err
    for word in words:
        assert word in outcome.errors[0]
    assert digests(study[0]) == before


def test_a_second_study_in_the_same_directory_is_refused(
    study: tuple[Path, Outcome], cwd: Path, tests_importable: None
) -> None:
    with (study[0] / "study.lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        outcome = ablate_in_process(cwd, *SMALL)
    assert (outcome.code, len(outcome.errors)) == (2, 1)
    assert "study is in use" in outcome.errors[0]


def test_without_inceptions_weights_one_line_says_so_and_no_trial_asks_for_them(
    cwd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(cwd / "empty"))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.chdir(cwd)
    arguments = parse_arguments(AblationOptions, "", ["--config", "tiny.yaml"])
    assert _measured(arguments).image_metrics == ()
