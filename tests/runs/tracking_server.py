"""A real MLflow server for the tests of tracking, and the cable to it, which may be pulled."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HOST = "127.0.0.1"


@dataclass(frozen=True)
class Server:
    """`mlflow server` on SQLite."""

    url: str
    process: subprocess.Popen[bytes]

    @contextlib.contextmanager
    def hanging(self) -> Iterator[None]:
        """It takes connections, and answers none."""
        os.killpg(self.process.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.killpg(self.process.pid, signal.SIGCONT)


@contextlib.contextmanager
def mlflow_server(directory: Path) -> Iterator[Server]:
    """Start one, and end it."""
    with socket.create_server((HOST, 0)) as free:
        port = free.getsockname()[1]
    call = [
        *(sys.executable, "-m", "mlflow", "server", "--host", HOST, "--port", str(port), "--workers", "1"),
        *("--backend-store-uri", f"sqlite:///{directory / 'mlflow.db'}"),
        *("--artifacts-destination", str(directory / "artifacts")),
    ]
    with (directory / "log").open("wb") as log:
        environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}  # seven more processes
        process = subprocess.Popen(call, cwd=directory, env=environment, stdout=log, stderr=log, start_new_session=True)
    url = f"http://{HOST}:{port}"
    try:
        while True:
            assert process.poll() is None, (directory / "log").read_text()
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=5):
                break
            time.sleep(0.1)
        yield Server(url, process)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


class Cable:
    """A port that leads to a server, while it is plugged in.

    Attributes:
        url: of this end.
        num_answers: that the server has given.
        lost_answer: the number of the one that is lost, from 1: its connection breaks instead.
    """

    def __init__(self, server: Server) -> None:
        self._far = int(server.url.rpartition(":")[2])
        with socket.create_server((HOST, 0)) as free:
            self._port = free.getsockname()[1]
        self.url = f"http://{HOST}:{self._port}"
        self.num_answers, self.lost_answer = 0, 0
        self._counting = threading.Lock()
        self._listener: socket.socket | None = None
        self._open: list[socket.socket] = []

    def plug(self) -> None:
        """From now on the server is there."""
        if self._listener is None:
            self._listener = socket.create_server((HOST, self._port))
            threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def pull(self) -> None:
        """From now on it is not: connections break, and new ones are refused."""
        if self._listener is not None:
            self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
            self._listener = None
        while self._open:
            with contextlib.suppress(OSError):
                self._open.pop().shutdown(socket.SHUT_RDWR)

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = listener.accept()
                far = socket.create_connection((HOST, self._far))
                self._open += [near, far]
                asked = threading.Event()  # since the last answer on this connection
                for one, other, answers in ((near, far, False), (far, near, True)):
                    threading.Thread(target=self._copy, args=(one, other, answers, asked), daemon=True).start()

    def _copy(self, one: socket.socket, other: socket.socket, answers: bool, asked: threading.Event) -> None:
        with contextlib.suppress(OSError):
            while data := one.recv(65536):
                if not answers:
                    asked.set()
                elif asked.is_set():  # the first bytes of an answer
                    asked.clear()
                    if self._is_lost():
                        break
                other.sendall(data)
        for end in (one, other):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _is_lost(self) -> bool:
        """Count an answer."""
        with self._counting:
            self.num_answers += 1
            return self.num_answers == self.lost_answer
