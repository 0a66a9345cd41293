"""Two ranks train as one does: real processes, gloo, the same global batch."""

import shutil
import textwrap
from pathlib import Path

import pytest
from helpers import Outcome, shard_cache, train_in_new_process, train_in_process, training_rows
from two_ranks import STEPS, TWO_RANKS, arguments, assert_trained_alike


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shard_cache(tmp_path_factory)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """The run of one rank."""
    cwd = tmp_path_factory.mktemp("one")
    outcome = train_in_process(cwd, *arguments(cache))
    assert outcome.code == 0, outcome.err
    return cwd / "run"


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> tuple[Path, Outcome]:
    """The run of two ranks, each with half the batch."""
    cwd = tmp_path_factory.mktemp("two")
    outcome = train_in_new_process(cwd, *arguments(cache), launcher=TWO_RANKS)
    assert outcome.code == 0, outcome.err
    return cwd / "run", outcome


def test_two_ranks_match_one(two: tuple[Path, Outcome], one: Path) -> None:
    assert_trained_alike(two[0], one)


def test_speeds_count_the_work_of_all_ranks(two: tuple[Path, Outcome], one: Path) -> None:
    for rows in zip(training_rows(two[0]), training_rows(one), strict=True):
        per_image = [row["speed/tflop_per_s"] / row["speed/img_per_s"] for row in rows]
        assert per_image[0] == pytest.approx(per_image[1], rel=0.01)  # what does not depend on the batch comes twice


def test_one_rank_alone_writes_and_tells(two: tuple[Path, Outcome], one: Path) -> None:
    run_dir, outcome = two
    assert [row["iteration"] for row in training_rows(run_dir)] == [1, 2, 3, 4]
    assert outcome.out.count("trained 4 iterations, 64 images") == 1
    assert "Warning" not in outcome.err
    assert {path.name for path in run_dir.iterdir()} == {path.name for path in one.iterdir()}


def test_two_ranks_match_one_with_the_area_over_the_batch(one: Path, cache: Path, tmp_path: Path) -> None:
    """The threshold is just above the mean area of the first batch: one rank alone would be below it, one above."""
    phi1 = training_rows(one)[0]["mask/area_coarse"] + 1e-4
    unaligned = [*arguments(cache, loss={"phi1": phi1}), "--loss.area-over-batch"]
    outcomes = [
        train_in_process(tmp_path, *unaligned, "--run-dir", "one"),
        train_in_new_process(tmp_path, *unaligned, "--run-dir", "two", launcher=TWO_RANKS),
    ]
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes[1].err
    first = training_rows(tmp_path / "one")[0]
    assert 0 < first["loss/g_main_area"] < 2e-4  # the hinge is on
    assert_trained_alike(tmp_path / "two", tmp_path / "one")


def test_one_rank_goes_on_with_the_run_of_two(two: tuple[Path, Outcome], cache: Path, tmp_path: Path) -> None:
    shutil.copytree(two[0], tmp_path / "run")
    outcome = train_in_process(tmp_path, "--resume", "run", "--steps", str(STEPS + 1))
    assert outcome.code == 0, outcome.err
    assert f"resuming at iteration {STEPS}" in outcome.err
    assert [row["iteration"] for row in training_rows(tmp_path / "run")] == [1, 2, 3, 4, 5]


def test_batch_that_does_not_divide_among_ranks_is_one_line(cache: Path, tmp_path: Path) -> None:
    outcome = train_in_new_process(tmp_path, *arguments(cache, batch=12), launcher=TWO_RANKS)
    assert outcome.code != 0
    assert set(outcome.errors) == {
        "error: batch 12 does not divide among 2 processes in groups of 4: give a multiple of 8"
    }
    assert not (tmp_path / "run").exists()


def test_ranks_wait_for_the_first_ones_work_however_long_it_takes(tmp_path: Path) -> None:
    """As for the fit of the segmenter: longer than a collective may take. But where it fails, they do not wait."""
    script = tmp_path / "work.py"
    script.write_text(
        textwrap.dedent(
            """
            import time
            from datetime import timedelta
            from torch import distributed as dist
            from pipeline.ranks.collectives import on_first_rank

            def work():
                time.sleep(6)
                return {"done by": dist.get_rank()}

            def fail():
                raise RuntimeError("broken")

            dist.init_process_group("gloo")
            impatient, limit = dist.new_group(), timedelta(seconds=3)
            dist.barrier()
            for group in (dist.group.WORLD, impatient):
                dist.distributed_c10d._set_pg_timeout(limit, group)
            found = [on_first_rank(work), on_first_rank(lambda: "again")]
            try:  # rank 0 comes when rank 1 has given up
                dist.broadcast_object_list([work()] if dist.get_rank() == 0 else [None], group=impatient)
            except RuntimeError:
                found.append("timed out")
            dist.barrier(group=dist.new_group())
            try:
                on_first_rank(fail)
            except RuntimeError as error:
                found.append("broken" if "broken" in str(error) else "lost")
            print(dist.get_rank(), *found, flush=True)
            """
        )
    )
    outcome = train_in_new_process(tmp_path, launcher=TWO_RANKS, script=script)
    expected = [f"{rank} {{'done by': 0}} again timed out {end}" for rank, end in enumerate(("broken", "lost"))]
    assert sorted(outcome.out.splitlines()) == expected, outcome.err
