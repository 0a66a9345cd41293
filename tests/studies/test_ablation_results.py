"""An ablation study's figures are means over seeds, and its verdicts on the paper's claims follow from their spread."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from pipeline.studies.ablation.claims import CLAIMS, Claim, judge
from pipeline.studies.ablation.results import figures_of, summarise
from pipeline.studies.ablation.tables import to_latex, to_markdown
from pipeline.studies.ablation.variants import FULL, VARIANTS, Variant, find_variants

FALLS, RISES, STAYS = (Claim("no-consistency", "miou", change, "so it is") for change in ("falls", "rises", "stays"))


def evaluation(seed: int, miou: float | None, distance: float | None = None, **more: float) -> dict[str, Any]:
    """What pipeline/evaluate.py writes, as far as it is read."""
    masks = {"iou_fg": 0.9, "iou_bg": 0.8, "miou": miou, "recall": 0.95, "precision": 0.94, "f1": 0.93, **more}
    images = {} if distance is None else {"frechet_distance": distance}
    features = None if distance is None else {"extractor": "own", "layer": "mean", "is_inception": False}
    return {
        "run": {"dataset": "furballs", "resolution": 32, "iteration": 2000, "images_seen": 32_000},
        "settings": {"num_samples": 5000, "psi": [1.0], "seed": seed, "threshold": 0.5},
        "data": {"digest": "0" * 64, "num_images": 4096, "has_alpha": True},
        "features": features,
        "features_missing": None,
        "generated": [
            {
                "psi": 1.0,
                "images": {"foreground": images, "composite": {}},
                "masks": {"fitted": masks},
                "area_mean": 0.4,
                "soft_share": 0.1,
            }
        ],
    }


def study(mious: Mapping[str, Sequence[float | None]], **more: float) -> dict[str, Any]:
    return summarise(
        {
            variant: [evaluation(seed, miou, **more) for seed, miou in enumerate(mious[variant.name])]
            for variant in VARIANTS
            if variant.name in mious
        }
    )


# Verdicts


def test_interval_is_welchs() -> None:
    """Of two samples of three with one deviation s, the interval is the difference ± t(4) s sqrt(2/3)."""
    judged = judge(FALLS, [0.80, 0.82, 0.84], [0.70, 0.72, 0.74])
    half = 2.776445 * 0.02 * math.sqrt(2 / 3)
    assert judged["difference"] == pytest.approx(-0.1)
    assert (judged["low"], judged["high"]) == pytest.approx((-0.1 - half, -0.1 + half), rel=1e-5)


@pytest.mark.parametrize(
    ("claim", "ablated", "verdict"),
    [
        (FALLS, [0.70, 0.72, 0.74], "reproduced"),
        (FALLS, [0.90, 0.92, 0.94], "contradicted"),
        (FALLS, [0.78, 0.81, 0.83], "undecided"),
        (RISES, [0.70, 0.72, 0.74], "contradicted"),
        (RISES, [0.90, 0.92, 0.94], "reproduced"),
        (RISES, [0.78, 0.81, 0.83], "undecided"),
        (
            STAYS,
            [0.78, 0.81, 0.83],
            "undecided",
        ),  # no difference to be seen, and too much spread to say that it is none
        (STAYS, [0.90, 0.92, 0.94], "contradicted"),
        (STAYS, [0.70, 0.72, 0.74], "contradicted"),
    ],
)
def test_verdict_needs_the_whole_interval_on_one_side(claim: Claim, ablated: list[float], verdict: str) -> None:
    assert judge(claim, [0.80, 0.82, 0.84], ablated)["verdict"] == verdict


def test_figure_stays_where_the_interval_is_within_a_hundredth() -> None:
    full = [0.880, 0.881, 0.882]
    assert judge(STAYS, full, [0.881, 0.882, 0.883])["verdict"] == "reproduced"
    assert judge(STAYS, full, [0.888, 0.889, 0.890])["verdict"] == "undecided"


@pytest.mark.parametrize(("full", "ablated"), [([0.8], [0.1]), ([0.8, 0.8], [0.1])])
def test_one_seed_decides_nothing(full: list[float], ablated: list[float]) -> None:
    judged = judge(FALLS, full, ablated)
    assert judged["verdict"] == "undecided"
    assert judged["difference"] == pytest.approx(-0.7)
    assert judged["low"] is judged["high"] is None


def test_what_was_not_measured_has_no_verdict() -> None:
    assert judge(FALLS, [], [0.1, 0.2])["verdict"] == "not measured"
    distances = [
        c for c in study({"full": [0.9, 0.9], "no-consistency": [0.8, 0.8]})["claims"] if c["figure"] == "distance"
    ]
    assert [claim["verdict"] for claim in distances] == ["not measured"]


def test_claims_are_of_the_ablations_and_those_of_table_1_agree_with_its_figures() -> None:
    """As printed: mIoU, precision and FID of the rows that the table has."""
    printed = {
        "full": {"miou": 0.88, "precision": 0.98, "distance": 8.72},
        "no-fine-mask": {"miou": 0.88, "precision": 0.98, "distance": 9.48},
        "no-participation": {"miou": 0.84, "precision": 0.94, "distance": 9.79},
        "no-consistency": {"miou": 0.86, "precision": 0.98, "distance": 9.53},
    }
    assert {claim.variant for claim in CLAIMS} == {*printed, "no-dual-fake-input"} - {"full"}
    held = [claim for claim in CLAIMS if claim.figure in printed.get(claim.variant, {})]
    assert len(held) == 7
    for claim in held:
        change = printed[claim.variant][claim.figure] - printed["full"][claim.figure]
        assert {"falls": change < 0, "rises": change > 0, "stays": change == 0}[claim.change], claim


# Figures


def test_figures_are_means_and_sample_deviations_over_seeds() -> None:
    figures = study({"full": [0.8, 0.9, 0.85]})["variants"]["full"]["figures"]
    assert figures["miou"]["mean"] == pytest.approx(0.85)
    assert figures["miou"]["std"] == pytest.approx(0.05)
    assert figures["miou"]["values"] == [0.8, 0.9, 0.85]
    assert figures["area_mean"]["mean"] == pytest.approx(0.4) and figures["area_mean"]["std"] == pytest.approx(0.0)


def test_a_figure_that_one_seed_lacks_has_no_mean() -> None:
    results = study({"full": [0.8, 0.9], "no-consistency": [0.8, None]})
    lacking = results["variants"]["no-consistency"]["figures"]["miou"]
    assert (lacking["mean"], lacking["std"], lacking["values"]) == (None, None, [0.8, None])
    assert next(c for c in results["claims"] if c["figure"] == "miou")["verdict"] == "not measured"


def test_variants_without_a_trial_are_left_out() -> None:
    results = study({"full": [0.8], "no-consistency": []})
    assert list(results["variants"]) == ["full"]
    assert results["claims"] == []


def test_distance_is_that_of_the_foregrounds_by_either_name() -> None:
    one = evaluation(0, 0.9, distance=3.0)
    assert figures_of(one)["distance"] == 3.0
    one["generated"][0]["images"]["foreground"] = {"fid": 4.0, "kid": 0.1}
    assert figures_of(one)["distance"] == 4.0
    assert figures_of(evaluation(0, 0.9))["distance"] is None


# Tables


def test_table_1_sets_means_beside_the_published_rows() -> None:
    results = study(
        {"full": [0.86, 0.90], "no-participation": [0.80, 0.84], "no-dual-fake-input": [0.1, 0.2]}, distance=5.0
    )
    rows = [line for line in to_markdown(results).splitlines() if line.startswith("| ")]
    table = [[cell.strip(" *") for cell in row.strip("|").split("|")] for row in rows]
    header, full, published = (next(r for r in table if r[0].startswith(s)) for s in ("setting", "Full (2)", "Full (p"))
    assert header[1:] == [
        *("IoU fg/bg", "mIoU", "recall", "precision", "F1"),
        *("accuracy as in the paper", "pixel accuracy", "Fréchet distance"),
    ]
    assert full[2] == "0.880 ± 0.028" and full[-1] == "5.00 ± 0.00"
    # Table 1 as printed.
    assert published[1:] == ["0.93/0.82", "0.88", "0.95", "0.98", "0.96", "0.93", "–", "FID 8.72"]  # noqa: RUF001
    without = next(row for row in table if row[0].startswith("w/o BG Participation (p"))
    assert without[1:] == ["0.91/0.77", "0.84", "0.97", "0.94", "0.95", "0.91", "–", "FID 9.79"]  # noqa: RUF001
    assert not any(row[0].startswith("w/o Dual Fake Input (p") for row in table)
    assert "no FID" in to_markdown(results)


def test_latex_has_the_same_rows() -> None:
    results = study({"full": [0.86, 0.90], "no-participation": [0.80, 0.84]})
    latex, markdown = to_latex(results), to_markdown(results)
    assert r"0.880 $\pm$ 0.028" in latex and "±" not in latex
    bodies = [line for line in latex.splitlines() if line.endswith(r"\\") and "multicolumn" not in line]
    assert len(bodies) == len([line for line in markdown.splitlines() if line.startswith("| ") and "---" not in line])


def test_variants_are_found_by_name_in_the_order_of_table_1() -> None:
    assert find_variants(["full", "no-fine-mask"]) == (VARIANTS[0], FULL)
    assert isinstance(FULL, Variant) and FULL.overrides == {}
