"""A launcher that starts the ranks again loses nothing. Real processes, gloo."""

import os
import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from helpers import BATCH, children, command, environment, shard_cache, tiny, training_rows, wait_until
from torch.distributed import HashStore
from two_ranks import TWO_RANKS

from data_shards.errors import UserError
from pipeline.ranks.rendezvous import agree_on_start
from pipeline.runs.checkpoints import list_checkpoints, load_checkpoint

WORLD_SIZE, STEPS = 3, 40


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_each_start_has_a_name_of_its_own_whatever_is_left_of_the_former(order: tuple[int, ...]) -> None:
    store, names = HashStore(), []
    for _ in range(3):
        with ThreadPoolExecutor(WORLD_SIZE) as pool:
            ranks = []
            for rank in order:
                ranks.append(pool.submit(agree_on_start, store, rank, WORLD_SIZE, 30.0))
                if rank != order[-1]:
                    with pytest.raises(TimeoutError):  # time enough to be misled
                        ranks[-1].result(0.3)
            names.append({rank.result() for rank in ranks})
    assert all(len(agreed) == 1 for agreed in names)
    assert len(set.union(*names)) == 3


def test_rank_that_does_not_come_is_named() -> None:
    store = HashStore()
    with ThreadPoolExecutor(2) as pool:
        ranks = [pool.submit(agree_on_start, store, rank, WORLD_SIZE, 1.0) for rank in (0, 1)]
        with pytest.raises(UserError, match=r"^rank 2 of 3 did not come within 1 s"):
            ranks[0].result()
        with pytest.raises(UserError, match=r"^rank 1: rank 0 did not come"):
            ranks[1].result()


def test_killed_rank_is_started_again_and_the_run_goes_on_in_its_directory(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    """No --run-dir is given: a new one by the time of day would begin again."""
    arguments = tiny(
        shard_cache(tmp_path_factory),
        steps=STEPS,
        log={"checkpoint_interval_images": 4 * BATCH, "keep_checkpoints": 99},
    )
    runs = tmp_path / "runs"
    with (tmp_path / "err").open("w") as err:
        process = subprocess.Popen(
            command(*arguments, launcher=[*TWO_RANKS, "--max-restarts", "1"]),
            cwd=tmp_path,
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=err,
            text=True,
        )
    try:
        wait_until(lambda: any(map(list_checkpoints, runs.glob("*/checkpoints"))), [process])
        os.kill(children(process.pid)[1], signal.SIGKILL)
        code = process.wait(300)
    finally:
        process.kill()
    told = (tmp_path / "err").read_text()
    assert code == 0, told
    (run_dir,) = runs.iterdir()
    assert f"of {run_dir.relative_to(tmp_path)}" in told.split("resuming at iteration ")[1]
    assert [row["iteration"] for row in training_rows(run_dir)] == list(range(1, STEPS + 1))
    saved = [load_checkpoint(path)["iteration"] for path in list_checkpoints(run_dir / "checkpoints")]
    assert saved == list(range(STEPS, 0, -4))
