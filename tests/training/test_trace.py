"""`--log.profile-at`: a trace of one iteration, and a training that it does not change."""

import gzip
import json
from pathlib import Path

import pytest
from helpers import STEPS, assert_same_bits, shard_cache, tiny, train_in_new_process, train_in_process

from pipeline.runs.checkpoints import checkpoint_path, load_checkpoint

PHASES = {"d_main", "d_r1", "g_main"}  # all are due at iteration 3


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shard_cache(tmp_path_factory)


def names_in(trace: Path) -> set[str]:
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    return {event["name"] for event in events if event.get("ph") == "X"}


def test_trace_names_the_phases_and_changes_no_number(cache: Path, tmp_path: Path) -> None:
    outcome = train_in_process(tmp_path, *tiny(cache, run_dir="run", log={"profile_at": 3}))
    assert outcome.code == 0, outcome.err
    assert train_in_process(tmp_path, *tiny(cache, run_dir="other")).code == 0
    names = names_in(tmp_path / "run" / "trace-3.json.gz")
    assert names >= {*PHASES, "data", "ema", "aten::convolution", "aten::convolution_backward"}
    told = "trace of iteration 3: run/trace-3.json.gz, which ui.perfetto.dev opens"
    assert outcome.err.count(told + "\n") == 1
    states = [load_checkpoint(checkpoint_path(tmp_path / at / "checkpoints", STEPS)) for at in ("run", "other")]
    for name in ("generator", "discriminator", "ema", "optimizers"):
        assert_same_bits(states[0][name], states[1][name], name)


def test_trace_is_of_one_iteration(cache: Path, tmp_path: Path) -> None:
    outcome = train_in_process(tmp_path, *tiny(cache, run_dir="run", log={"profile_at": 1}))
    assert outcome.code == 0, outcome.err
    assert names_in(tmp_path / "run" / "trace-1.json.gz") & PHASES == {"d_main", "g_main"}  # R1 is not due
    assert [path.name for path in (tmp_path / "run").glob("trace*")] == ["trace-1.json.gz"]


def test_one_rank_of_two_writes_a_trace(cache: Path, tmp_path: Path) -> None:
    two_ranks = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    outcome = train_in_new_process(tmp_path, *tiny(cache, run_dir="run", log={"profile_at": 3}), launcher=two_ranks)
    assert outcome.code == 0, outcome.err
    assert names_in(tmp_path / "run" / "trace-3.json.gz") >= PHASES
    assert outcome.err.count("trace of iteration 3") == 1


def test_iteration_beyond_the_end_is_one_line(cache: Path, tmp_path: Path) -> None:
    outcome = train_in_process(tmp_path, *tiny(cache, run_dir="run", log={"profile_at": STEPS}))
    assert outcome.code == 2 and not (tmp_path / "run").exists()
    assert outcome.errors == ["error: log.profile_at 4 is beyond the last iteration: give 0 to 3"]


def test_a_resumed_run_beyond_the_iteration_says_that_there_will_be_no_trace(cache: Path, tmp_path: Path) -> None:
    assert train_in_process(tmp_path, *tiny(cache, run_dir="run")).code == 0
    more = ("--steps", str(STEPS + 1), "--log.profile-at")
    outcome = train_in_process(tmp_path, "--resume", "run", *more, "2")
    assert outcome.code == 0 and "this one writes no trace of it" in outcome.err
    assert not list((tmp_path / "run").glob("trace*"))


def test_training_goes_on_where_the_trace_cannot_be_written(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "run" / "trace-3.json.gz").mkdir(parents=True)
    outcome = train_in_process(tmp_path, *tiny(cache, run_dir="run", log={"profile_at": 3}))
    assert outcome.code == 0, outcome.err
    assert "training continues without the trace" in outcome.err and "trained 4 iterations" in outcome.out
