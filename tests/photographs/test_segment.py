"""The commands on photographs: distill, segment, project, compare; their files, and their mistakes in one line."""

import json
import re
from pathlib import Path
from unittest import mock

import numpy as np
import onnxruntime
import pytest
import torch
from evaluating import train_tiny_run
from helpers import Outcome, furballs, run_in_process, shard_cache, write_noise
from photos import picture, write_hostile, write_photo
from PIL import Image

from data_shards.reading.shard_set import ShardSet
from data_shards.sources.furballs import draw
from pipeline import distill, segment
from pipeline.evaluation.mask_scores import score_masks
from pipeline.photographs.distillation.network import load_network
from pipeline.photographs.projection import projector

SIZES = {"square": (32, 32), "wide": (150, 70), "tall": (33, 90)}
FEW = ("--steps", "2", "--num-threads", "1")


@pytest.fixture(scope="module")
def cwd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a trained run, its distilled network, photos, furballs with masks, and hostile files."""
    cwd = tmp_path_factory.mktemp("segment")
    cache = shard_cache(tmp_path_factory)
    train_tiny_run(cwd, cache)
    # Its shards carry alpha, which must not be looked at.
    with mock.patch.object(ShardSet, "alpha_bytes", side_effect=AssertionError("a label was read")):
        outcome = distilling(cwd, "--run", "run", "--batch", "8")
    assert outcome.code == 0, outcome.err
    (cwd / "distill.err").write_text(outcome.err)
    (cwd / "photos").mkdir()
    for i, (name, size) in enumerate(SIZES.items()):
        write_photo(cwd / "photos" / f"{name}.png", *size, seed=i)
    write_hostile(cwd / "hostile")
    for folder in ("furballs", "masks"):
        (cwd / folder).mkdir()
    for i in range(3):
        sample = draw(i, seed=1, resolution=48)
        assert sample.alpha is not None
        Image.fromarray(sample.image).save(cwd / "furballs" / f"{i}.png")
        Image.fromarray(sample.alpha).save(cwd / "masks" / f"{i}.png")
    return cwd


@pytest.fixture(autouse=True)
def _few_styles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(projector, "NUM_W_SAMPLES", 1000)


def distilling(cwd: Path, *arguments: str) -> Outcome:
    return run_in_process(distill.main, Path(distill.__file__), cwd, *FEW, *arguments)


def segmenting(cwd: Path, *arguments: str) -> Outcome:
    return run_in_process(segment.main, Path(segment.__file__), cwd, *arguments, "--num-threads", "1")


def test_distill_writes_a_network_an_onnx_file_and_a_card(cwd: Path) -> None:
    files = {path.name for path in (cwd / "run" / "distilled").iterdir()}
    assert files == {"network.pt", "network.onnx", "README.md"}
    card = (cwd / "run" / "distilled" / "README.md").read_text()
    network = load_network(cwd / "run" / "distilled" / "network.pt", torch.device("cpu"))
    assert f"{sum(parameter.numel() for parameter in network.parameters()):,} parameters" in card
    assert "no label was\nused" in card and "| steps | 2 |" in card and re.search(r"IoU\n0\.\d{3} \(foreground\)", card)


def test_distill_says_nothing_on_the_way_but_how_far_it_is(cwd: Path) -> None:
    said = (cwd / "distill.err").read_text()
    assert "2/2" in said and all(line.startswith("distilling:") for line in said.splitlines() if line), said


def test_onnx_equals_torch_at_every_size_and_batch(cwd: Path) -> None:
    network = load_network(cwd / "run" / "distilled" / "network.pt", torch.device("cpu"))
    session = onnxruntime.InferenceSession(cwd / "run" / "distilled" / "network.onnx")
    for shape in ((1, 3, 32, 32), (5, 3, 48, 40), (2, 3, 32, 104)):
        images = torch.rand(shape) * 2 - 1
        (found,) = session.run(["alpha"], {"images": images.numpy()})
        assert np.abs(found - network(images).numpy()).max() < 1e-4
        assert found.std() > 1e-4


def test_every_photo_gets_alpha_and_cutout_of_its_own_size(cwd: Path) -> None:
    outcome = segmenting(cwd, "photos", "--run", "run", "--out", "out")
    assert outcome.code == 0, outcome.err
    assert outcome.out == "out: alpha and cut-out of 3 photos\n"
    assert len(list((cwd / "out").iterdir())) == 6
    for name, (width, height) in SIZES.items():
        alpha, cutout = picture(cwd / "out" / f"{name}-alpha.png"), picture(cwd / "out" / f"{name}-cutout.png")
        assert alpha.shape == (height, width) and cutout.shape == (height, width, 4)
        assert torch.equal(cutout[..., 3], alpha)
    network = load_network(cwd / "run" / "distilled" / "network.pt", torch.device("cpu"))
    square = picture(cwd / "photos" / "square.png").permute(2, 0, 1)[None] / 127.5 - 1
    expected = network(square)[0, 0] * 255
    assert (picture(cwd / "out" / "square-alpha.png") - expected).abs().max() <= 0.51


def test_what_is_there_is_not_overwritten(cwd: Path) -> None:
    segmenting(cwd, "photos/wide.png", "--run", "run", "--out", "once")
    before = (cwd / "once" / "wide-alpha.png").read_bytes()
    outcome = segmenting(cwd, "photos", "--run", "run", "--out", "once")
    assert outcome.code == 2 and "once/wide-alpha.png exists already" in outcome.errors[0]
    assert (cwd / "once" / "wide-alpha.png").read_bytes() == before and len(list((cwd / "once").iterdir())) == 2
    outcome = distilling(cwd, "--run", "run")
    assert outcome.code == 2 and "run/distilled exists already" in outcome.errors[0]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("text", "no image"),
        ("truncated", "truncated"),
        ("empty", "no image"),
        ("enormous", "more than 89.5 million pixels"),
    ],
)
@pytest.mark.parametrize("command", ["segment", "project"])
def test_what_is_no_photo_is_one_line(command: str, name: str, reason: str, cwd: Path) -> None:
    words = () if command == "segment" else ("project",)
    outcome = segmenting(cwd, *words, f"hostile/{name}.png", "--run", "run", "--out", "none")
    assert (outcome.code, len(outcome.errors)) == (2, 1), outcome.err
    assert f"hostile/{name}.png cannot be used" in outcome.errors[0] and reason in outcome.errors[0]
    assert not (cwd / "none").exists() or not list((cwd / "none").iterdir())


def test_projection_writes_its_files_and_the_figures_of_table_4(cwd: Path) -> None:
    arguments = ("furballs", "--run", "run", "--masks", "masks", "--out", "found", "--steps", "2", "--batch", "2")
    outcome = segmenting(cwd, "project", *arguments)
    assert outcome.code == 0, outcome.err
    assert "perceptual distance: features of the run's discriminator" in outcome.out
    predicted, true = [], []
    for i in range(3):
        assert picture(cwd / "found" / f"{i}-reconstruction.png").shape == (32, 32, 3)
        alpha = picture(cwd / "found" / f"{i}-alpha.png")
        assert torch.equal(picture(cwd / "found" / f"{i}-cutout.png")[..., 3], alpha)
        predicted.append(alpha / 255)
        with Image.open(cwd / "masks" / f"{i}.png") as mask:
            reduced = mask.resize((32, 32), Image.Resampling.BILINEAR)
        true.append(torch.tensor(np.asarray(reduced)) / 255)
    figures = json.loads((cwd / "found" / "table4.json").read_text())
    expected = score_masks(torch.stack(predicted)[:, None], torch.stack(true)[:, None], threshold=0.5).figures()
    assert figures["num_photos"] == 3
    for name in ("iou_fg", "iou_bg", "miou", "recall", "precision", "f1", "accuracy"):
        assert figures[name] == pytest.approx(expected[name], abs=0.01)
    table = (cwd / "found" / "table4.md").read_text()
    assert f"{figures['iou_fg']:.3f}/{figures['iou_bg']:.3f}" in table and "0.92/0.81" in table and table in outcome.out


def test_comparison_has_a_row_for_every_way(cwd: Path) -> None:
    outcome = segmenting(
        cwd,
        *("compare", "--run", "run", "--count", "4", "--batch", "3", "--projector-steps", "1"),
        *("--spaces", "w", "w+", "--supervised-steps", "2", "--yardsticks", "networks:brightness"),
    )
    assert outcome.code == 0, outcome.err
    ways = json.loads((cwd / "run" / "comparison" / "comparison.json").read_text())["ways"]
    assert list(ways) == [
        "projector, W, 1 steps",
        "projector, W+, 1 steps",
        "mask predictor, upsampled",
        "distilled network",
        "brightness (supervised elsewhere)",
        "the same network on ground-truth alpha",
    ]
    for figures in ways.values():
        assert 0 <= figures["iou_fg"] <= 1 and figures["sad"] > 0 and figures["seconds_per_photo"] > 0
    assert ways["distilled network"]["sad"] != ways["the same network on ground-truth alpha"]["sad"]
    assert picture(cwd / "run" / "comparison" / "comparison.png").shape[0] > 8 * 100  # two rows and one for each way
    assert "4 real images of 32 px that are new to the run" in outcome.out


def test_compared_pictures_are_not_those_of_the_training(cwd: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    trained = ShardSet.open(furballs(tmp_path_factory.getbasetemp() / "shards"))
    new = sorted((tmp_path_factory.getbasetemp() / "shards").glob("*-seed1"))
    assert new and ShardSet.open(new[0]).image_bytes(0) != trained.image_bytes(0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("nowhere.png --run run", ("nowhere.png does not exist",)),
        ("hostile/whole.jpg photos photos --run run", ("under the same name",)),
        ("photos --run nowhere", ("nowhere/distilled/network.pt", "distill.py")),
        ("photos --run run --network run/config.yaml", ("config.yaml is no distilled network",)),
        ("photos", ("--run",)),
        ("project photos --run nowhere", ("nowhere", "not a run directory")),
        ("project photos --run run --masks masks", ("masks has none named",)),
        ("project photos --run run --masks nowhere", ("nowhere does not exist",)),
        ("project photos --run run --steps 0", ("--steps 0",)),
        ("project photos --run run --batch 0", ("--batch 0",)),
        ("project photos --run run --space z", ("z",)),
        ("project photos --run run --lpips-backbone none.pth", ("none.pth does not exist",)),
        ("compare --run nowhere", ("nowhere", "not a run directory")),
        ("compare --run run --count 0", ("--count 0",)),
        ("compare --run run --out other --data plain", ("plain has no ground-truth alpha",)),
        ("compare --run run --out other --yardsticks u2netp", ("--yardsticks u2netp", "FILE")),
    ],
)
def test_mistake_is_one_line_and_code_2(arguments: str, words: tuple[str, ...], cwd: Path) -> None:
    if not (cwd / "plain").exists():
        write_noise(cwd / "plain", 32)
    steps = ("--supervised-steps", "0", "--spaces") if arguments.startswith("compare") else ()
    outcome = segmenting(cwd, *arguments.split(), *steps)
    assert (outcome.code, len(outcome.errors)) == (2, 1), outcome.err
    for word in words:
        assert word in outcome.errors[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--run nowhere", ("nowhere", "not a run directory")),
        ("--run run --out new --data nowhere", ("nowhere does not exist",)),
        ("--run run --out new --batch 6", ("--batch 6", "multiple of 4")),
        ("--run run --out new --swapped 2", ("--swapped 2",)),
        ("--run run --out new --learning-rate 0", ("--learning-rate 0",)),
        ("--run run --out new --guidance nan", ("--guidance nan",)),
    ],
)
def test_mistake_in_distill_is_one_line_and_code_2(arguments: str, words: tuple[str, ...], cwd: Path) -> None:
    outcome = distilling(cwd, *arguments.split())
    assert (outcome.code, len(outcome.errors)) == (2, 1), outcome.err
    for word in words:
        assert word in outcome.errors[0]
    assert not (cwd / "new").exists()
