"""Tables of an ablation study in Markdown and LaTeX, in the layout of the paper's Table 1."""

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.evaluation import published
from pipeline.evaluation.tables import ABSENT, MASK_COLUMNS, Row, Table, latex_table, markdown_table
from pipeline.studies.ablation.claims import CONFIDENCE, SAME
from pipeline.studies.ablation.variants import VARIANTS

DETAILS = {
    "mse_unknown": ("MSE (10⁻³)", 1000.0),
    "sad_unknown": ("SAD", 1.0),
    "gradient_unknown": ("gradient", 1.0),
    "connectivity_unknown": ("connectivity", 1.0),
    "area_mean": ("foreground (%)", 100.0),
    "soft_share": ("neither 0 nor 1 (%)", 100.0),
}
NAMES = {"miou": "mIoU", "precision": "precision", "mse_unknown": "MSE, unknown band"}


def to_markdown(results: Mapping[str, Any]) -> str:
    """The study as a Markdown document."""
    run, settings = results["run"], results["settings"]
    head = (
        f"# Ablations on {run['dataset']}\n\n"
        f"{run['resolution']} px, iteration {run['iteration']:,}, {settings['num_samples']:,} samples a trial, psi "
        f"{settings['psi'][0]}, threshold {settings['threshold']}, pseudo ground truth {results['pseudo_truth']}; "
        f"mean ± standard deviation over seeds.\n"
    )
    return "\n".join([head, *map(markdown_table, make_tables(results))])


def to_latex(results: Mapping[str, Any]) -> str:
    """The tables in LaTeX, for the package booktabs."""
    head = f"% Ablations on {results['run']['dataset']}; needs \\usepackage{{booktabs}}.\n"
    return "\n".join([head, *map(latex_table, make_tables(results))])


def make_tables(results: Mapping[str, Any]) -> list[Table]:
    """Table 1, what its metrics do not show, and what becomes of the paper's claims."""
    tables = [_masks(results), _details(results), _claims(results)]
    return [table for table in tables if table.rows]


def _masks(results: Mapping[str, Any]) -> Table:
    distance = _distance_name(results)
    rows = []
    for variant in results["variants"].values():
        figures = variant["figures"]
        iou = "/".join(_cell(figures, name) for name in ("iou_fg", "iou_bg"))
        names = ("miou", "recall", "precision", "f1", "accuracy_as_in_paper", "accuracy", "distance")
        label = f"{variant['title']} ({len(variant['seeds'])})"
        rows.append(Row((label, iou, *(_cell(figures, name) for name in names))))
    for name, row in published.ABLATIONS.items():
        if name in results["variants"]:
            title = results["variants"][name]["title"]
            middle = (f"{row[column]:.2f}" for column in ("miou", "recall", "precision", "f1", "iou_fg"))
            iou = f"{row['iou_fg']:.2f}/{row['iou_bg']:.2f}"
            cells = (f"{title} (published, FFHQ)", iou, *middle, ABSENT, f"FID {row['fid']:.2f}")
            rows.append(Row(cells, published=True))
    return Table(
        "Ablations, as in the paper's Table 1",
        ("setting (seeds)", *MASK_COLUMNS, distance),
        1,
        tuple(rows),
        "Over all pixels of all samples. Published rows are the paper's own figures, of other images and another "
        f"pseudo ground truth: compare the differences between rows. {_about_distance(results)}",
    )


def _details(results: Mapping[str, Any]) -> Table:
    rows = [
        Row((variant["title"], *(_cell(variant["figures"], name, scale) for name, (_, scale) in DETAILS.items())))
        for variant in results["variants"].values()
    ]
    return Table(
        "What these metrics do not show",
        ("setting", *(title for title, _ in DETAILS.values())),
        1,
        tuple(rows),
        "Matting errors are means over the samples in the unknown band, where the trimap of the pseudo ground truth "
        "leaves open what is hair and what is not.",
    )


def _claims(results: Mapping[str, Any]) -> Table:
    titles = {variant.name: variant.title for variant in VARIANTS}
    rows = []
    for claim in results["claims"]:
        name = claim["figure"]
        shown = NAMES.get(name, _distance_name(results))
        scale = 1.0 if name == "distance" else 1000.0
        numbers = (_signed(claim["difference"], scale), _bounds(claim["low"], claim["high"], scale))
        rows.append(
            Row((titles[claim["variant"]], claim["words"], f"{shown} {claim['change']}", *numbers, claim["verdict"]))
        )
    counted = {verdict: [c["verdict"] for c in results["claims"]].count(verdict) for verdict in _verdicts(results)}
    return Table(
        "What the paper says, and what is found here",
        ("setting", "the paper", "so", "difference", f"{CONFIDENCE:.0%} interval", "verdict"),
        3,
        tuple(rows),
        f"{', '.join(f'{number} {verdict}' for verdict, number in counted.items())}. Difference of the means, ablated "
        f"less full, in thousandths but for distances, and Welch's interval over seeds. A verdict needs the whole "
        f"interval on one side; 'stays' needs it within ± {SAME * 1000:.0f}.",
    )


def _verdicts(results: Mapping[str, Any]) -> Sequence[str]:
    return list(dict.fromkeys(claim["verdict"] for claim in results["claims"]))


def _distance_name(results: Mapping[str, Any]) -> str:
    features = results["features"]
    return "Fréchet distance" if features is not None and not features["is_inception"] else "FID"


def _about_distance(results: Mapping[str, Any]) -> str:
    features = results["features"]
    if features is None:
        return "No distance of images was measured."
    note = f"Distance of foregrounds from all {results['data']['num_images']:,} training images"
    if features["is_inception"]:
        return f"{note}; fewer samples than the paper's {published.NUM_SAMPLES:,} raise it."
    return f"{note} by features of {features['extractor']}, layer {features['layer']}: no FID."


def _cell(figures: Mapping[str, Any], name: str, scale: float = 1.0) -> str:
    found = figures.get(name)
    if found is None or found["mean"] is None:
        return ABSENT
    digits = 3 if scale == 1.0 and name != "distance" else 2
    mean = f"{found['mean'] * scale:.{digits}f}"
    return mean if found["std"] is None else f"{mean} ± {found['std'] * scale:.{digits}f}"


def _signed(value: float | None, scale: float) -> str:
    return ABSENT if value is None else f"{value * scale:+.2f}"


def _bounds(low: float | None, high: float | None, scale: float) -> str:
    return ABSENT if low is None or high is None else f"{low * scale:+.2f} to {high * scale:+.2f}"
