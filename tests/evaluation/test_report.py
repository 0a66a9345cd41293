"""The report holds all it shows; what it shows is right; figures and files reach the training's MLflow run."""

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from evaluating import FEATURES, SMALL, evaluate_in_process, results, train_tiny_run
from helpers import shard_cache
from mlflow import MlflowClient
from PIL import Image

from pipeline.evaluation.report import AGREED, MASK_ONLY, TRUTH_ONLY, _overlay, _zoom
from pipeline.evaluation.results import as_metrics


@pytest.fixture(scope="module")
def cwd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a run that MLflow knows, and its evaluation."""
    cwd = tmp_path_factory.mktemp("report")
    cache = shard_cache(tmp_path_factory)
    train_tiny_run(cwd, cache, log={"tracking_uri": "sqlite:///runs/mlflow.db"})
    outcome = evaluate_in_process(cwd, *SMALL, *FEATURES)
    assert outcome.code == 0, outcome.err
    assert "report   run/evaluation/iteration-4-samples-24/report.html" in outcome.out
    return cwd


def evaluation(cwd: Path) -> Path:
    return cwd / "run" / "evaluation" / "iteration-4-samples-24"


class Page(HTMLParser):
    """What a browser would be told to fetch, and whether every element is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [value for name, value in attrs if name in ("src", "href") and value]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [value for name, value in attrs if name in ("src", "href", "xlink:href") and value]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_report_needs_nothing_else(cwd: Path) -> None:
    page = Page()
    text = (evaluation(cwd) / "report.html").read_text()
    page.feed(text)
    assert page.open == []
    assert page.addresses and all(address.startswith(("data:image/webp;base64,", "#")) for address in page.addresses)
    assert "<script" not in text and "@import" not in text and "url(http" not in text
    assert text.count("<svg") == 3


def test_report_shows_the_samples_it_names(cwd: Path) -> None:
    """8 random ones at each psi, 4 best, 4 worst; alpha is the alpha of the cut-out."""
    text = (evaluation(cwd) / "report.html").read_text()
    strips = re.findall(r'<figure class="strip">.*?</figure>', text, re.S)
    assert len(strips) == 8 + 8 + 4 + 4
    mious = [float(re.search(r"mIoU ([\d.]+)", strip)[1]) for strip in strips]  # type: ignore[index]
    best, worst = mious[16:20], mious[20:]
    assert best == sorted(best, reverse=True) and worst == sorted(worst)
    assert max(best) >= max(mious[:8]) and min(worst) <= min(mious[:8])
    for strip in strips:
        tiles = {}
        for uri, label in re.findall(r'src="data:image/webp;base64,([^"]+)" alt="([^"]+)"', strip):
            tiles[label] = Image.open(io.BytesIO(base64.b64decode(uri)))
        assert set(tiles) == {"foreground", "alpha", "overlay", "cut-out", "hair", "composite"}
        cutout = np.asarray(tiles["cut-out"].convert("RGBA"))
        assert np.array_equal(cutout[..., 3], np.asarray(tiles["alpha"].convert("L")))
        assert tiles["hair"].size == (12, 12)


def test_figures_of_the_report_are_those_of_the_json(cwd: Path) -> None:
    text = (evaluation(cwd) / "report.html").read_text()
    masks = results(evaluation(cwd))["generated"][0]["masks"]["fitted"]
    assert f'<dd class="value">{masks["miou"]:.3f}</dd>' in text
    assert f'<dd class="value">{masks["iou_fg"]:.3f} / {masks["iou_bg"]:.3f}</dd>' in text


def test_overlay_tints_agreement_and_both_kinds_of_error() -> None:
    image = np.full((2, 2, 3), 100, np.uint8)
    mask, true = np.array([[1, 1], [0, 0]], bool), np.array([[1, 0], [1, 0]], bool)
    ((both, mask_only), (truth_only, neither)) = _overlay(image, mask, true).astype(float)
    grey = 0.75 * 100 + 40
    assert both == pytest.approx(0.6 * grey + 0.4 * np.array(AGREED), abs=1)
    assert mask_only == pytest.approx(0.25 * grey + 0.75 * np.array(MASK_ONLY), abs=1)
    assert truth_only == pytest.approx(0.25 * grey + 0.75 * np.array(TRUTH_ONLY), abs=1)
    assert neither == pytest.approx([grey] * 3, abs=1)


def test_zoom_is_where_the_hair_is() -> None:
    cutout = np.zeros((64, 64, 4), np.uint8)
    cutout[:32, :, 3] = 255
    cutout[40:50, 48:60, 3] = 128
    zoomed = _zoom(cutout)
    assert zoomed.shape == (16, 16, 4)
    assert (zoomed[..., 3] == 128).sum() == 120


def test_figures_and_files_are_in_the_trainings_mlflow_run(cwd: Path) -> None:
    client = MlflowClient(tracking_uri=f"sqlite:///{cwd}/runs/mlflow.db")
    (experiment,) = client.search_experiments(filter_string="name = 'furrygan'")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    expected = as_metrics(json.loads((evaluation(cwd) / "evaluation.json").read_text(), parse_constant=float))
    logged = {name: value for name, value in run.data.metrics.items() if name.startswith("evaluation/")}
    assert logged == pytest.approx(expected)
    assert "evaluation/psi_0.7/mask/fitted/iou_fg" in logged
    assert "evaluation/psi_1.0/foreground/frechet_distance" in logged
    files = client.list_artifacts(run.info.run_id, "evaluation/iteration-4-samples-24")
    names = {Path(file.path).name for file in files}
    assert names == {"evaluation.json", "report.html", "tables.md", "tables.tex"}


def test_evaluation_elsewhere_makes_no_mlflow_store(cwd: Path, tmp_path: Path) -> None:
    arguments = ["--run", str(cwd / "run"), *SMALL[2:], "--psi", "1.0", "--image-metrics", "--out", "here"]
    outcome = evaluate_in_process(tmp_path, *arguments)
    assert outcome.code == 0, outcome.err
    assert "not logged to MLflow" in outcome.err
    assert [path.name for path in tmp_path.iterdir()] == ["here"]
