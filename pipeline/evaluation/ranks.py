"""Distribution of numbered samples over ranks, with results gathered in the order of the samples."""

import os
from collections.abc import Callable, Iterator
from typing import TypeVar

from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm import tqdm

T = TypeVar("T")


def in_order(
    num_samples: int, batch: int, compute: Callable[[range], T], accelerator: Accelerator, *, label: str | None
) -> Iterator[T]:
    """Results of consecutive batches of ``range(num_samples)``.

    A batch holds the same samples on any number of ranks, and the main process alone folds the results, in their order:
    so no figure depends on the number of ranks.

    Args:
        num_samples: in all.
        batch: samples at a time on a rank.
        compute: what to do with a batch; its result must not live on a GPU.
        accelerator: of the ranks; all must iterate to the end.
        label: of the progress bar; None: there is none.

    Yields:
        On the main process, all results in order. Elsewhere nothing.
    """
    starts = range(0, num_samples, batch)
    main = accelerator.is_main_process
    with tqdm(
        total=num_samples,
        desc=label,
        unit="img",
        disable=not main or label is None,
        leave=False,
        dynamic_ncols=True,
        mininterval=0.2 if os.isatty(2) else 15.0,
    ) as bar:
        for first in range(0, len(starts), accelerator.num_processes):
            mine = starts[first + accelerator.process_index :][:1]
            results = [compute(range(start, min(start + batch, num_samples))) for start in mine]
            gathered: list[T] = gather_object(results)
            bar.update(min(accelerator.num_processes * batch, num_samples - starts[first]))
            if main:
                yield from gathered
