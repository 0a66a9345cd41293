"""What a sweep found: a table, the configuration to train in full, and pictures of objective and parameters."""

import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from data_shards.files import write_atomically
from pipeline.config import Config
from pipeline.config_io import save_config
from pipeline.evaluation.tables import ABSENT, Row, Table, markdown_table
from pipeline.saving import saving
from pipeline.sweep.parent import ParentRun
from pipeline.sweep.pictures import draw_parallel_coordinates, draw_slices
from pipeline.sweep.records import Record
from pipeline.sweep.space import MIOU, UNLABELLED, override

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
    if len(measured) > 1:
        for draw, name in ((draw_parallel_coordinates, "parallel-coordinates.png"), (draw_slices, "slices.png")):
            draw(measured, space, metric, out / name)
            files.append(out / name)
    parent.add({f"best/{metric.rpartition('/')[2]}": best.metrics[metric]}, files)
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
