"""Tables of an evaluation in Markdown and LaTeX, in the paper's layout and beside its rows."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.evaluation import published

OURS = "this run"
ABSENT = "–"  # noqa: RUF001

SOFT_COLUMNS = {"sad": "SAD", "mse": "MSE (10⁻³)", "gradient": "gradient", "connectivity": "connectivity"}
MASK_COLUMNS = ("IoU fg/bg", "mIoU", "recall", "precision", "F1", "accuracy as in the paper", "pixel accuracy")
IMAGE_COLUMNS = {
    "fid": "FID",
    "frechet_distance": "Fréchet distance",
    "kid": "KID (10⁻³)",
    "kernel_distance": "kernel distance (10⁻³)",
    "generative_precision": "generative precision",
    "generative_recall": "generative recall",
}
IN_THOUSANDTHS = ("mse", "kid", "kernel_distance")
ESCAPES = {"_": r"\_", "%": r"\%", "&": r"\&", "⁻³": "$^{-3}$", "±": r"$\pm$", ABSENT: "--"}
FORMATS = {"fid": ".2f", "generative_precision": ".3f", "generative_recall": ".3f"}


@dataclass(frozen=True)
class Row:
    """Cells of a row, and whether the figures are the paper's instead of this run's."""

    cells: tuple[str, ...]
    published: bool = False


@dataclass(frozen=True)
class Table:
    """A table with a title and a note below.

    Attributes:
        num_labels: columns at the left that name the row.
    """

    title: str
    columns: tuple[str, ...]
    num_labels: int
    rows: tuple[Row, ...]
    note: str = ""


def make_tables(results: Mapping[str, Any]) -> list[Table]:
    """All tables that the results have rows for."""
    tables = [_masks(results), _images(results), _soft(results), _mask_pred(results), _pseudo_truth(results)]
    return [table for table in tables if any(not row.published for row in table.rows)]


def to_markdown(results: Mapping[str, Any]) -> str:
    """The tables as a Markdown document."""
    run, settings = results["run"], results["settings"]
    parts = [
        f"# Evaluation of {run['name']}\n\n"
        f"{run['dataset']}, {run['resolution']} px, iteration {run['iteration']:,}, "
        f"{settings['num_samples']:,} samples, seed {settings['seed']}, threshold {settings['threshold']}.\n"
    ]
    return "\n".join([*parts, *map(markdown_table, make_tables(results))])


def to_latex(results: Mapping[str, Any]) -> str:
    """The tables in LaTeX, for the package booktabs."""
    parts = [f"% Evaluation of {results['run']['name']}; needs \\usepackage{{booktabs}}.\n"]
    return "\n".join([*parts, *map(latex_table, make_tables(results))])


def markdown_table(table: Table) -> str:
    """A table as a section of a Markdown document."""
    lines = [f"## {table.title}\n", "| " + " | ".join(table.columns) + " |"]
    alignments = ["---" if i < table.num_labels else "---:" for i in range(len(table.columns))]
    lines.append("| " + " | ".join(alignments) + " |")
    for row in table.rows:
        cells = [f"*{cell}*" if row.published else cell for cell in row.cells]
        if not row.published:
            cells[: table.num_labels] = [f"**{cell}**" for cell in cells[: table.num_labels]]
        lines.append("| " + " | ".join(cells) + " |")
    if table.note:
        lines.append(f"\n{table.note}")
    return "\n".join(lines) + "\n"


def latex_table(table: Table) -> str:
    """A table as a float."""
    alignment = "l" * table.num_labels + "r" * (len(table.columns) - table.num_labels)
    lines = [
        r"\begin{table}",
        r"  \centering",
        rf"  \caption{{{_escape(f'{table.title}. {table.note}'.strip())}}}",
        rf"  \begin{{tabular}}{{{alignment}}}",
        r"    \toprule",
        "    " + " & ".join(map(_escape, table.columns)) + r" \\",
        r"    \midrule",
    ]
    ours, paper = ([row for row in table.rows if row.published is kind] for kind in (False, True))
    lines += ["    " + " & ".join(map(_escape, row.cells)) + r" \\" for row in ours]
    if paper:
        lines += [r"    \midrule", rf"    \multicolumn{{{len(table.columns)}}}{{l}}{{\emph{{Published}}}} \\"]
        lines += ["    " + " & ".join(rf"\emph{{{_escape(c)}}}" for c in row.cells) + r" \\" for row in paper]
    lines += [r"    \bottomrule", r"  \end{tabular}", r"\end{table}", ""]
    return "\n".join(lines)


def _masks(results: Mapping[str, Any]) -> Table:
    dataset = results["run"]["dataset"]
    rows = [
        Row((OURS, dataset, truth, f"{at['psi']}", *mask_cells(figures)))
        for at in results["generated"]
        for truth, figures in at["masks"].items()
    ]
    # Of other data sets too, where the paper has none of this one: they tell what is good, not who is better.
    comparable = [row for row in published.MASKS if row.dataset == dataset]
    shown = comparable or [row for row in published.MASKS if row.method == "FurryGAN" and row.pseudo_truth == "TRACER"]
    for row in shown:
        figures = vars(row) | {"accuracy_as_in_paper": row.accuracy}
        labels = (f"{row.method} (published)", row.dataset, row.pseudo_truth, f"{row.psi}")
        rows.append(Row((*labels, *mask_cells(figures, digits=2)), published=True))
    note = (
        "Over all pixels of all samples. In the paper's tables the accuracy equals the foreground's IoU in every row; "
        "both that and the true share of right pixels are given. Published rows are the paper's own figures"
    )
    note += "." if comparable else ", of other images and another pseudo ground truth: not comparable."
    return Table(
        "Masks of generated foregrounds",
        ("method", "pictures", "pseudo ground truth", "psi", *MASK_COLUMNS),
        4,
        tuple(rows),
        note,
    )


def _images(results: Mapping[str, Any]) -> Table:
    dataset, features = results["run"]["dataset"], results["features"]
    found = [at for at in results["generated"] if at["images"]]
    names = [name for name in IMAGE_COLUMNS if any(name in f for at in found for f in at["images"].values())]
    rows = [
        Row((OURS, dataset, kind, f"{at['psi']}", *(_number(name, figures.get(name)) for name in names)))
        for at in found
        for kind, figures in at["images"].items()
    ]
    note = ""
    if features:
        note = (
            f"{results['settings']['num_samples']:,} generated against all {results['data']['num_images']:,} training "
            f"images, not mirrored; features of {features['extractor']}, layer {features['layer']}; resize "
            f"{features['resize']}."
        )
        if results["settings"]["num_samples"] < published.NUM_SAMPLES:
            note += " Fewer samples raise a Fréchet distance: compare with as many only"
            note += f" (the paper has {published.NUM_SAMPLES:,})."
        if features["is_inception"] and "fid" in names:
            for method, fid in published.FID.get(dataset, {}).items():
                blank = (ABSENT,) * (len(names) - 1)
                rows.append(Row((f"{method} (published)", dataset, "foreground", "1.0", f"{fid:.2f}", *blank), True))
        elif not features["is_inception"]:
            note += " Not Inception's: comparable with no published FID."
    columns = ("method", "pictures", "kind", "psi", *(IMAGE_COLUMNS[name] for name in names))
    return Table("Generated against real images", columns, 4, tuple(rows), note)


def _soft(results: Mapping[str, Any]) -> Table:
    rows = []
    for at in results["generated"]:
        for truth, figures in at["masks"].items():
            for suffix, region in (("", "all pixels"), ("_unknown", "unknown band")):
                cells = (_number(name, figures.get(name + suffix)) for name in SOFT_COLUMNS)
                rows.append(Row((truth, f"{at['psi']}", region, *cells)))
    return Table(
        "Matting errors",
        ("pseudo ground truth", "psi", "region", *SOFT_COLUMNS.values()),
        3,
        tuple(rows),
        "Means over the samples, as Rhemann et al. (2009) define them; SAD, gradient and connectivity in thousands. "
        "The unknown band is where the trimap of the pseudo ground truth leaves open what is hair and what is not.",
    )


def _mask_pred(results: Mapping[str, Any]) -> Table:
    real = results["real"]
    rows = [Row((_truth_name(truth), *mask_cells(figures))) for truth, figures in real["mask_pred"].items()]
    return Table(
        "The mask predictor on real images",
        ("compared with", *MASK_COLUMNS),
        1,
        tuple(rows),
        f"The discriminator's own 16x16 masks of {real['num_images']:,} real images.",
    )


def _pseudo_truth(results: Mapping[str, Any]) -> Table:
    rows = [Row((truth, *mask_cells(figures))) for truth, figures in results["real"]["pseudo_truth"].items()]
    return Table(
        "How good the pseudo ground truth is",
        ("pseudo ground truth", *MASK_COLUMNS),
        1,
        tuple(rows),
        "Against ground-truth alpha, on real images; the fitted segmenter on those that it was not fitted on.",
    )


def real_table(figures: Mapping[str, float], num_photos: int, distance: str) -> Table:
    """Table 4: masks of real photos by projection.

    Args:
        figures: of the masks.
        num_photos: that were projected.
        distance: that the projector minimised.
    """
    rows = [Row((OURS, f"{num_photos:,} photos", *mask_cells(figures)))]
    for method, theirs in published.REAL.items():
        labels = (f"{method} (published)", "1,000 of CelebAMask-HQ")
        rows.append(Row((*labels, *mask_cells(theirs, digits=2)), published=True))
    note = f"Over all pixels of all photos. The projector minimised: {distance}."
    return Table("Real photos by projection (Table 4)", ("method", "photos", *MASK_COLUMNS), 2, tuple(rows), note)


def _truth_name(truth: str) -> str:
    return "ground-truth alpha" if truth == "alpha" else truth


def mask_cells(figures: Mapping[str, float], digits: int = 3) -> Sequence[str]:
    """The cells of `MASK_COLUMNS`."""

    def cell(name: str) -> str:
        value = figures.get(name)
        return ABSENT if value is None or not math.isfinite(value) else f"{value:.{digits}f}"

    rest = (cell(name) for name in ("miou", "recall", "precision", "f1"))
    # The foreground's IoU by another name, see above.
    as_in_paper = cell("accuracy_as_in_paper" if "accuracy_as_in_paper" in figures else "iou_fg")
    return (f"{cell('iou_fg')}/{cell('iou_bg')}", *rest, as_in_paper, cell("accuracy"))


def _number(name: str, value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return ABSENT
    return f"{value * 1000:.2f}" if name in IN_THOUSANDTHS else format(value, FORMATS.get(name, ".4f"))


def _escape(text: str) -> str:
    for plain, escaped in ESCAPES.items():
        text = text.replace(plain, escaped)
    return text
