"""The benchmark of the loaders compares like with like, and tells what it leaves out."""

import contextlib
import re
import sys
from pathlib import Path

import pytest
import torch
from helpers import write_noise

from data_shards import bench
from data_shards.bench import PLAIN, Arguments, Timing, max_prepared, measure, report
from data_shards.errors import UserError
from data_shards.reading.loader import make_loader
from data_shards.reading.shard_set import ShardSet

pytest.importorskip("nvidia.dali")


def test_all_loaders_are_timed_on_the_same_batches(tmp_path: Path) -> None:
    data = write_noise(tmp_path / "data", 32)
    with contextlib.closing(ShardSet.open(data)) as shard_set:
        loaders, skipped = bench._loaders(shard_set, Arguments(batch=8), threads=1)
        assert loaders.keys() | skipped.keys() == {
            *("DALI, CPU", "DALI, GPU", "webdataset, CPU", "webdataset, GPU"),
            PLAIN,
        }
        assert ({"DALI, GPU", "webdataset, GPU"} <= skipped.keys()) is not torch.cuda.is_available()
        for _ in range(3):
            expected = next(loaders[PLAIN])
            for name in loaders.keys() - {PLAIN}:
                torch.testing.assert_close(next(loaders[name]).cpu(), expected, rtol=0, atol=1e-5)


def test_command_prints_a_table_of_medians(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = "--resolution 32 --num-images 16 --batch 8 --batches 2 --repetitions 2 --threads 1 --alpha"
    monkeypatch.setattr(sys, "argv", ["bench.py", *sizes.split(), "--cache-dir", str(tmp_path)])
    bench.main()
    shown = capsys.readouterr().out
    assert "16 images of 32 px, .png with alpha; batch 8, 1 threads" in shown
    for name in ("DALI, CPU", "webdataset, CPU", PLAIN):
        (row,) = re.findall(
            rf"^\| {re.escape(name)} \| (\d+) \| (\d+) \| (\d+) \| [\d.]+x \| \d+ \|$", shown, re.MULTILINE
        )
        median, least, most = map(int, row)
        assert 0 < least <= median <= most


def test_loaders_take_turns() -> None:
    turns: list[str] = []

    def stream(name: str) -> torch.Tensor:
        turns.append(name)
        return torch.zeros(1)

    streams = {name: iter(lambda name=name: stream(name), None) for name in "ab"}
    timings = measure(streams, batch=4, num_batches=3, num_drained=6, repetitions=2)
    assert "".join(turns) == ("a" * 9 + "b" * 9) * 3  # 6 untimed, 3 timed; once to warm up
    assert {name: len(taken) for name, taken in timings.items()} == {"a": 2, "b": 2}


def timings_of(*rates: float) -> list[Timing]:
    return [Timing(rate=rate, caller_us=rate / 10) for rate in rates]


def test_table_has_medians_and_ratios() -> None:
    timings = {"fast": timings_of(300, 100, 200), PLAIN: timings_of(50, 100, 150)}
    shown = report(timings, {"other": "no reason"})
    assert "| fast | 200 | 100 | 300 | 2.00x | 20 |" in shown and "| other | skipped: no reason |" in shown


@pytest.mark.parametrize("threads", [1, 2, 16])
@pytest.mark.parametrize("batch", [4, 8, 64])
def test_batches_made_while_another_loader_was_timed_are_not_timed(tmp_path: Path, threads: int, batch: int) -> None:
    """Otherwise a loader would only be asked for what it has made in the others' time."""
    with contextlib.closing(ShardSet.open(write_noise(tmp_path / "data", 16, num=64))) as shard_set:
        loader = make_loader(
            "webdataset",
            shard_set,
            **{"global_batch": batch, "rank": 0, "world_size": 1, "seed": 0, "flip": True, "with_alpha": False},
            device=torch.device("cpu"),
            num_threads=threads,
        )
        assert max_prepared(threads) >= loader._batches_ahead
        assert max_prepared(threads) >= 2 * threads  # of a `DataLoader`
        loader.close()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [("--batch 6", "multiple of 4"), ("--repetitions 0", "1 or more"), ("--data nowhere", "nowhere does not exist")],
)
def test_mistake_is_one_line(arguments: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["bench.py", *arguments.split()])
    with pytest.raises(UserError, match=message):
        bench.main()
