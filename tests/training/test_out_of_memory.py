"""Commands that run out of memory say so in one line, which names what to do; what was saved stays whole.

Each runs in a process of its own whose memory the kernel limits (`tests/training/limited.py`).
"""

import errno
import hashlib
import json
import re
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

from data_shards.command import memory_errors, run_command

import pytest
import torch
from evaluating import train_tiny_run
from helpers import TINY, TRAIN, Outcome, flags, patched, shard_cache, tiny, train_in_new_process, write_noise
from PIL import Image

from data_shards.errors import MemoryShortageError, UserError, shortage_of_memory
from pipeline.config.files import merge
from pipeline.photographs.distillation.network import MattingNetwork, save_network
from pipeline.runs.checkpoints import checkpoint_path, load_checkpoint

LIMITED = Path(__file__).with_name("limited.py")
# At 128 px a batch of 64 takes gigabytes, a micro-batch of 4 some hundred megabytes.
MEGABYTES, LARGE = 700, 128
PIPELINE = TRAIN.parent
OUT_OF_MEMORY = r"error: out of memory \((no|[\d.,]+ [MG]iB) more could( not)? be allocated\): "
TRAINING = "give --accumulate 2 or more, --recompute, or a smaller --batch"

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the kernel's limit on data is Linux's")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shard_cache(tmp_path_factory)


def limited(cwd: Path, script: Path, *arguments: str, megabytes: int = MEGABYTES) -> Outcome:
    return train_in_new_process(cwd, str(megabytes), str(script), *arguments, script=LIMITED)


def assert_one_line(outcome: Outcome, remedy: str) -> None:
    assert outcome.code == 2, outcome.err
    assert len(outcome.errors) == 1 and re.fullmatch(OUT_OF_MEMORY + re.escape(remedy), outcome.errors[0]), outcome.err
    assert "Traceback" not in outcome.err


def digests(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir()}


def large_run(cwd: Path, **overrides: object) -> list[str]:
    data = cwd / "data"
    if not data.exists():
        write_noise(data, LARGE, num=64)
    sizes = {"data": data, "run_dir": "run", "batch": 64, "steps": 1, "resolution": LARGE, "loader": "webdataset"}
    model = {"model": {"channel_base": 1024}, "log": {"tracking_uri": "sqlite:///mlflow.db"}}
    return flags(merge(merge(TINY, sizes | model), overrides))


def test_training_says_how_to_take_less_memory_and_does_then(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    def states() -> list[str]:
        client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
        return [
            run.info.status for run in client.search_runs([client.get_experiment_by_name("furrygan").experiment_id])
        ]

    assert_one_line(limited(tmp_path, TRAIN, *large_run(tmp_path)), TRAINING)
    assert states() == ["FAILED"]
    outcome = limited(tmp_path, TRAIN, *large_run(tmp_path, accumulate=16))
    assert outcome.code == 0, outcome.err
    saved = digests(tmp_path / "run" / "checkpoints")
    assert states() == ["FINISHED"]
    resumed = limited(tmp_path, TRAIN, "--resume", "run", "--steps", "2", "--accumulate", "1")
    assert_one_line(resumed, TRAINING)
    assert digests(tmp_path / "run" / "checkpoints") == saved
    assert load_checkpoint(checkpoint_path(tmp_path / "run" / "checkpoints", 1))["iteration"] == 1


def test_every_rank_names_the_one_that_is_out_of_memory(cache: Path, tmp_path: Path) -> None:
    script = patched(
        tmp_path,
        """
        if RANK == 1:
            from pipeline.methods.furrygan.phases import Step
            Step.generate = lambda *_: torch.empty(2**60)
        """,
    )
    two_ranks = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    outcome = train_in_new_process(tmp_path, *tiny(cache, run_dir="run"), script=script, launcher=two_ranks)
    assert outcome.code != 0
    reason = rf"out of memory \(.* more could not be allocated\): {re.escape(TRAINING)}"
    assert len(outcome.errors) == 2, outcome.err
    for line in (f"error: rank 1: {reason}", rf"error: rank 0: rank 1 failed \({reason}\)"):
        assert any(re.fullmatch(line, error) for error in outcome.errors), outcome.err


def test_a_trial_of_a_sweep_is_marked_with_the_reason(tmp_path: Path) -> None:
    script = tmp_path / "trial.py"
    script.write_text(
        textwrap.dedent(
            """
            import json, sys
            from pathlib import Path
            from pipeline.config.command_line import parse_config
            from pipeline.config.files import config_to_dict
            from pipeline.studies.sweep import trial

            if __name__ == "__main__":
                config, results = parse_config(""), []
                plan = trial.Plan({}, Path("trials"), "mask/miou", num_workers=1, cpus=1, gpus=0.0, hands_over=False)
                trial._train({"config": config_to_dict(config), "plan": plan, "report": results.append})
                Path("results.json").write_text(json.dumps(results))
            """
        )
    )
    outcome = limited(tmp_path, script, *large_run(tmp_path, log={"tracking_uri": "none"}))
    assert outcome.code == 0, outcome.err
    (result,) = json.loads((tmp_path / "results.json").read_text())
    assert re.fullmatch(OUT_OF_MEMORY + re.escape(TRAINING), f"error: {result['failed']}")
    assert result["mask/miou"] == 0.0


@pytest.fixture(scope="module")
def trained(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a run, its untaught matting network, and a photo of 64 megapixels."""
    cwd = tmp_path_factory.mktemp("trained")
    run_dir = train_tiny_run(cwd, cache)
    (run_dir / "distilled").mkdir()
    save_network(MattingNetwork(32), run_dir / "distilled" / "network.pt", {})
    Image.new("RGB", (8000, 8000)).save(cwd / "photo.png")
    return cwd


LARGE_BATCH = ("--batch", "40000")
COMMANDS = {
    "evaluate": (("--num-samples", "40000", "--image-metrics", *LARGE_BATCH), "give a smaller --batch"),
    "generate": (("grid", "--count", "40000", "--out", "grid.png", *LARGE_BATCH), "give a smaller --batch"),
    "distill": (("--data", "none", "--out", "matting", *LARGE_BATCH), "give a smaller --batch"),
    "segment": (("photo.png", "--out", "alpha"), "give smaller photos, or a smaller --batch to project them"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_on_a_trained_run_say_what_to_give(name: str, trained: Path) -> None:
    arguments, remedy = COMMANDS[name]
    run = ("--run", "run", "--num-threads", "1")
    outcome = limited(trained, PIPELINE / f"{name}.py", *arguments, *run, megabytes=400)
    assert_one_line(outcome, remedy)


# --- which errors they are ---


def of_graph() -> None:
    """As the recording of a CUDA graph ends that ran out of memory within."""
    try:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of")
    finally:
        raise RuntimeError("CUDA error: operation failed due to a previous error during capture")


def of_a_reader() -> None:
    """As of a file that seemed to be no checkpoint."""
    try:
        torch.empty(2**60)
    except RuntimeError:
        raise UserError("checkpoint x cannot be read") from None


def raised(error: BaseException) -> Callable[[], object]:
    def work() -> None:
        raise error

    return work


@pytest.mark.parametrize(
    ("work", "shortage"),
    [
        (lambda: torch.empty(2**60), "4,398,046,511,104.00 MiB more could not be allocated"),
        (of_graph, "20.00 MiB more could not be allocated"),
        (of_a_reader, "4,398,046,511,104.00 MiB more could not be allocated"),
        (lambda: bytearray(2**60), "no more could be allocated"),
        (raised(RuntimeError("CUDA error: out of memory")), "no more could be allocated"),
        (raised(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate")), "no more"),
        (raised(RuntimeError("could not create a primitive")), "no more could be allocated"),
        (raised(OSError(errno.ENOMEM, "Cannot allocate memory")), "no more could be allocated"),
    ],
)
def test_shortages_are_recognised(work: Callable[[], object], shortage: str) -> None:
    with pytest.raises(MemoryShortageError, match=re.escape(f"out of memory ({shortage}")), memory_errors("buy some"):
        work()


@pytest.mark.parametrize(
    "error",
    [
        UserError("rank 1 (host) lost: killed, or out of memory"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        OSError(errno.ENOSPC, "No space left on device"),
        KeyError("out of memory"),
    ],
)
def test_other_errors_stay_what_they_are(error: Exception) -> None:
    assert shortage_of_memory(error) is None
    with pytest.raises(type(error)) as caught, memory_errors("buy some"):
        raise error
    assert caught.value is error


def test_a_checkpoint_that_does_not_fit_is_not_called_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else training would resume from an older one."""
    torch.save({"iteration": 1}, tmp_path / "checkpoint.pt")
    monkeypatch.setattr(torch, "load", lambda *_, **__: torch.empty(2**60))
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator"):
        load_checkpoint(tmp_path / "checkpoint.pt")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpus_memory_is_said_so_too(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        run_command(lambda: torch.empty(2**45, device="cuda") and None, memory_remedy="buy another")
    assert end.value.code == 2
    assert re.fullmatch(OUT_OF_MEMORY + "buy another\n", capsys.readouterr().err)
