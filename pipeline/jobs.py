"""Jobs side by side on one machine: each a few commands one after the other, in processes of their own."""

import os
import subprocess
import threading
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue


@dataclass(frozen=True)
class Job:
    """Something to run.

    Attributes:
        name: for people.
        commands: argument lists; one that fails ends the job.
        log: file that gets what they print, after what is in it.
    """

    name: str
    commands: tuple[tuple[str, ...], ...]
    log: Path


def run_jobs(
    jobs: Sequence[Job], environments: Sequence[Mapping[str, str]], *, keep_open: Sequence[int] = ()
) -> Generator[tuple[Job, int]]:
    """Run jobs, as many at a time as there are environments.

    Whatever ends the iteration early (Ctrl-C, a signal that raises) ends the commands at work by SIGTERM, and waits for
    what they do then.

    Args:
        jobs: started in order.
        environments: variables for the commands besides those of this process; one environment serves one job at a
            time, so that jobs can have GPUs of their own.
        keep_open: file descriptors that the commands inherit.

    Yields:
        Each job as it ends, and the exit code of its last command.
    """
    free: SimpleQueue[Mapping[str, str]] = SimpleQueue()
    for environment in environments:
        free.put(environment)
    working: set[subprocess.Popen[bytes]] = set()
    lock, stopped = threading.Lock(), threading.Event()

    def start(command: Sequence[str], job: Job, environment: Mapping[str, str]) -> subprocess.Popen[bytes] | None:
        with lock, job.log.open("ab") as log:
            if stopped.is_set():
                return None
            process = subprocess.Popen(
                command,
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=keep_open,
                start_new_session=True,  # Ctrl-C is for this process, which lets them end in good order
            )
            working.add(process)
            return process

    def run(job: Job) -> int:
        environment = free.get()
        code = 0
        try:
            for command in job.commands:
                process = start(command, job, environment)
                if process is None:
                    break
                code = process.wait()
                with lock:
                    working.discard(process)
                if code:
                    break
        finally:
            free.put(environment)
        return code

    with ThreadPoolExecutor(len(environments), thread_name_prefix="job") as pool:
        futures = {pool.submit(run, job): job for job in jobs}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            with lock:
                stopped.set()
                for process in working:
                    process.terminate()
            for future in futures:
                future.cancel()
