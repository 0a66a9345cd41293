"""Results of a sweep: a table, the best configuration, and figures."""

import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from scipy import stats

from data_shards.files import write_atomically
from pipeline.config import Config
from pipeline.config.files import save_config
from pipeline.evaluation.tables import ABSENT, Row, Table, markdown_table
from pipeline.runs.saving import saving
from pipeline.studies.sweep.parent import ParentRun
from pipeline.studies.sweep.pictures import draw_parallel_coordinates, draw_scatter, draw_slices
from pipeline.studies.sweep.records import Record
from pipeline.studies.sweep.space import MIOU, UNLABELLED, override

NUM_SHOWN = 20
BEST = "best.yaml"


def ranked(records: Sequence[Record], metric: str) -> list[Record]:
    """The best first; those that failed last."""
    return sorted(records, key=lambda record: (record.outcome == "failed", -record.metrics.get(metric, -math.inf)))


def publish(
    records: Sequence[Record], space: Mapping[str, str], metric: str, tree: Config, out: Path, parent: ParentRun
) -> None:
    """Write the files, add them to the sweep's MLflow run, and tell.

    Args:
        records: of the trials that have ended.
        space: that was searched.
        metric: that decides.
        tree: configuration of the full training, but for what was searched.
        out: directory of the sweep.
        parent: the sweep's MLflow run.
    """
    best_first = ranked(records, metric)
    measured = [record for record in best_first if record.outcome != "failed" and metric in record.metrics]
    table = markdown_table(_table(best_first, space, metric))
    print(table)
    write_atomically(out / "trials.md", table)
    files = [out / "trials.md"]
    if not measured:
        print("no trial went far enough to be measured")
        parent.add({}, files)
        return
    best = measured[0]
    with saving(out / BEST) as temporary:
        save_config(override(tree, best.parameters), temporary)
    files.append(out / BEST)
    figures = {f"best/{metric.rpartition('/')[2]}": best.metrics[metric]}
    if len(measured) > 1:
        for draw, name in ((draw_parallel_coordinates, "parallel-coordinates.png"), (draw_slices, "slices.png")):
            draw(measured, space, metric, out / name)
            files.append(out / name)
    both = [record for record in measured if {MIOU, UNLABELLED} <= record.metrics.keys()]
    if len(both) > 2:
        scores, true = ([record.metrics[name] for record in both] for name in (UNLABELLED, MIOU))
        rho = float(stats.spearmanr(scores, true).statistic)
        figures["objective/spearman"] = rho
        draw_scatter(scores, true, rho, out / "objective.png")
        files.append(out / "objective.png")
        print(f"objective  {UNLABELLED} against {MIOU}: Spearman's rho {rho:.2f} over {len(both)} trials")
    parent.add(figures, files)
    print(f"best       {best.run_dir}, {metric} {best.metrics[metric]:.3f} at iteration {best.iteration}")
    print(f"all        {out / 'trials.md'}" + (", parallel-coordinates.png, slices.png" if len(measured) > 1 else ""))
    print(f"in full    accelerate launch pipeline/train.py --config {shlex.quote(str(out / BEST))}", flush=True)


def _table(records: Sequence[Record], space: Mapping[str, str], metric: str) -> Table:
    measured = {name for record in records for name in record.metrics}
    shown = [metric, *(name for name in (MIOU, UNLABELLED) if name != metric and name in measured)]
    rows = [
        Row(
            (
                record.trial,
                *(f"{record.metrics[name]:.3f}" if name in record.metrics else ABSENT for name in shown),
                f"{record.iteration:,}",
                record.outcome + (f": {record.reason}" if record.reason else ""),
                *(_short(record.parameters[field]) for field in space),
            )
        )
        for record in records[:NUM_SHOWN]
    ]
    note = f"The best {NUM_SHOWN} of {len(records)}." if len(records) > NUM_SHOWN else ""
    header = ("trial", *shown, "iteration", "outcome", *(field.rpartition(".")[2] for field in space))
    return Table("Trials, the best first", header, 1, tuple(rows), note)


def _short(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
