"""The batch script, run for real with Slurm's commands replaced by ones that write down how they were called."""

import os
import re
import shutil
import signal
import subprocess
import sysconfig
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from helpers import PIPES, TRAIN

from pipeline.config.command_line import parse_config

ROOT = TRAIN.parents[1]
SCRIPT = ROOT / "cluster" / "slurm" / "train.sbatch"

# srun starts its command once for each node and lives until all have ended; SIGTERM to srun itself would kill them, and
# is an error here. The launcher trains until the file `finish` is there or until it is told to stop, and then saves.
COMMANDS = {
    "srun": """
        echo "$*" > srun.arguments
        trap 'echo srun was signalled >> mistakes' TERM USR1
        while [[ $1 == --* ]]; do shift; done
        for node in 0 1; do SLURM_NODEID=$node "$@" & echo $! > node$node.pid; done
        status=0
        for node in 0 1; do
            while kill -0 "$(cat node$node.pid)" 2>/dev/null; do wait "$(cat node$node.pid)" || true; done
            wait "$(cat node$node.pid)" || status=$?
        done
        exit $status
    """,
    "accelerate": """
        printf '%s\\n' "$@" > "node$SLURM_NODEID.arguments"
        env > "node$SLURM_NODEID.env"
        trap 'sleep 1; echo saved >> "node$SLURM_NODEID.saved"; exit 1' TERM
        until [[ -e finish ]]; do sleep 0.1; done
    """,
    "scontrol": """
        case "$1 $2" in
            "show hostnames") echo gpu-03; echo gpu-07;;
            "requeue "*) echo "$2" >> requeued;;
            *) echo "scontrol $*" >> mistakes;;
        esac
    """,
    "scancel": """
        [[ "$*" == "--signal=TERM 4711.0" ]] || echo "scancel $*" >> mistakes
        kill -TERM "$(cat node0.pid)" "$(cat node1.pid)"
    """,
}


@dataclass(frozen=True)
class Job:
    """A started job and the directory it was submitted from."""

    shell: subprocess.Popen[str]
    cwd: Path

    def end(self) -> int:
        return self.shell.wait(60)

    def lines(self, name: str) -> list[str]:
        path = self.cwd / name
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., Job]:
    """Starts the script as Slurm's batch shell does, with the launchers running when it returns."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, body in COMMANDS.items():
        path = commands / name
        path.write_text("#!/usr/bin/env bash\n" + body)
        path.chmod(0o755)

    def start_job(*arguments: str, **env: str) -> Job:
        slurm = {
            **{"SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "gpu-[03,07]", "SLURM_JOB_NUM_NODES": "2"},
            **{"SLURM_GPUS_ON_NODE": "4", "SLURM_CPUS_PER_TASK": "32", "SLURM_SUBMIT_DIR": str(tmp_path)},
        }
        shell = subprocess.Popen(
            ["bash", str(SCRIPT), *arguments],
            env={**os.environ, **slurm, **env, "PATH": f"{commands}{os.pathsep}{os.environ['PATH']}"},
            stdout=(tmp_path / "out").open("w"),
            stderr=subprocess.STDOUT,
            text=True,
        )
        job = Job(shell, tmp_path)
        deadline = time.monotonic() + 60
        while not all((tmp_path / f"node{node}.env").exists() for node in (0, 1)):
            assert shell.poll() is None and time.monotonic() < deadline, job.lines("out")
            time.sleep(0.05)
        time.sleep(0.2)  # from its environment to its trap
        return job

    return start_job


def test_each_node_launches_its_rank_of_one_training(start: Callable[..., Job]) -> None:
    job = start("--dataset", "ffhq", "--data", "/shared/a folder", "--batch", "64")
    (job.cwd / "finish").touch()
    assert job.end() == 0
    # One launcher must not be killed for another's end: it may still be saving.
    assert {"--kill-on-bad-exit=0", "--wait=0"} <= set(job.lines("srun.arguments")[0].split())
    for node in (0, 1):
        launch, *call = job.lines(f"node{node}.arguments")
        assert launch == "launch"
        script = call.index("pipeline/train.py")
        parsed = launch_command_parser().parse_args([c.replace("cluster/", f"{ROOT}/cluster/") for c in call])
        args, _, _ = _validate_launch_command(parsed)
        assert (args.machine_rank, args.num_machines, args.num_processes) == (node, 2, 8)
        assert (args.main_process_ip, args.main_process_port, args.multi_gpu) == ("gpu-03", 24711, True)
        config = parse_config("", call[script + 1 :])
        assert (config.data, config.batch, str(config.run_dir)) == ("/shared/a folder", 64, "runs/slurm-4711")
        env = dict(line.split("=", 1) for line in job.lines(f"node{node}.env") if "=" in line)
        assert env["SRUN_CPUS_PER_TASK"] == "32"
        (seconds_before_the_end,) = re.findall(r"--signal=B:USR1@(\d+)", SCRIPT.read_text())
        assert int(env["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) < int(seconds_before_the_end)
    assert not job.lines("requeued") and not job.lines("mistakes")


def test_job_near_its_time_limit_saves_and_is_queued_again(start: Callable[..., Job]) -> None:
    job = start()
    job.shell.send_signal(signal.SIGUSR1)
    assert job.end() == 1
    assert [job.lines(f"node{node}.saved") for node in (0, 1)] == [["saved"], ["saved"]]
    assert job.lines("requeued") == ["4711"]
    assert not job.lines("mistakes")


def test_job_that_is_queued_again_goes_on_with_its_run(start: Callable[..., Job]) -> None:
    job = start(SLURM_RESTART_COUNT="2")
    (job.cwd / "finish").touch()
    assert job.end() == 0
    assert job.lines("out") == ["job 4711, start 3, nodes gpu-[03,07], run runs/slurm-4711"]
    assert job.lines("node0.arguments")[-2:] == ["--run-dir", "runs/slurm-4711"]


def test_cancelled_job_waits_for_its_checkpoint_and_is_not_queued_again(start: Callable[..., Job]) -> None:
    """Slurm sends SIGTERM to the batch shell and to the step; after preemption it queues the job again itself."""
    job = start()
    for name in ("node0.pid", "node1.pid"):
        os.kill(int(job.lines(name)[0]), signal.SIGTERM)
    job.shell.send_signal(signal.SIGTERM)
    assert job.end() == 1
    assert [job.lines(f"node{node}.saved") for node in (0, 1)] == [["saved"], ["saved"]]
    assert not job.lines("requeued") and not job.lines("mistakes")


def test_failed_job_is_not_queued_again(start: Callable[..., Job]) -> None:
    job = start()
    for name in ("node0.pid", "node1.pid"):
        os.kill(int(job.lines(name)[0]), signal.SIGKILL)
    assert job.end() == 128 + signal.SIGKILL
    assert not job.lines("requeued")


@pytest.mark.parametrize(("missing", "remedy"), [("SLURM_JOB_ID", "sbatch"), ("SLURM_GPUS_ON_NODE", "--gpus-per-node")])
def test_script_outside_of_its_place_says_what_to_do(missing: str, remedy: str) -> None:
    env = {**os.environ, "SLURM_JOB_ID": "4711", "SLURM_GPUS_ON_NODE": "4"}
    del env[missing]
    done = subprocess.run(["bash", str(SCRIPT)], env=env, **PIPES, timeout=60)
    assert done.returncode != 0
    (line,) = done.stderr.splitlines()
    assert missing in line and remedy in line


def test_batch_script_pleases_shellcheck() -> None:
    tool = shutil.which("shellcheck", path=Path(sysconfig.get_path("scripts"))) or shutil.which("shellcheck")
    if tool is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run([tool, str(SCRIPT)], **PIPES, timeout=60)
    assert done.returncode == 0, done.stdout
