"""Detection of dead ranks and silent nodes while this rank waits for them.

Every rank keeps a connection to rank 0, which passes on what it learns. A process that dies closes its connection. A
machine that vanishes no longer answers TCP's keep-alive probes: the kernel answers them, so that a rank which is only
busy, however long and with whatever locks held, is never taken for dead.
"""

import asyncio
import hmac
import json
import os
import secrets
import socket
import sys
import threading
from dataclasses import asdict, dataclass
from typing import Literal

from accelerate.utils import broadcast_object_list
from torch import distributed as dist
from tqdm import tqdm

from data_shards.errors import UserError

GRACE_S = 20.0
"""Left to a rank to end by itself after another one has failed: it may be writing a checkpoint."""
NUM_PROBES = 5

ADVICE = "every rank ends, and the last checkpoint is whole: resume from there"


@dataclass(frozen=True)
class News:
    """What became of a rank.

    Attributes:
        fate: ``failed``: it said so, with its `reason`; ``lost``: it died; ``silent``: its machine does not answer;
            ``ended``: it is done.
    """

    rank: int
    host: str
    fate: Literal["failed", "lost", "silent", "ended"]
    reason: str = ""


class FailureDetector:
    """Watches the other ranks in a thread of its own; made by all of them together.

    When one has failed and this rank is still there after `GRACE_S`, blocked in a collective that cannot end, the
    process ends with one line and exit code 2.

    Args:
        silence_s: seconds without an answer after which a machine is gone.

    Raises:
        UserError: rank 0 cannot be reached.
    """

    def __init__(self, silence_s: int) -> None:
        self.rank = dist.get_rank()
        self._host = socket.gethostname()
        self._silence_s = silence_s
        self._news: dict[int, News] = {}
        self._heard = threading.Event()
        self._ending = False
        self._peers: dict[int, asyncio.StreamWriter] = {}
        self._loop = asyncio.new_event_loop()
        if self.rank == 0:
            listener = _listen()
            self._token = secrets.token_hex()
            broadcast_object_list([(listener.getsockname()[1], self._token, self._host)])
            self._loop.run_until_complete(self._serve(listener))
        else:
            port, self._token, host = broadcast_object_list([None])[0]
            self._loop.run_until_complete(self._join(self._connect(port), host))
        self._thread = threading.Thread(target=self._loop.run_forever, name="failure-detector", daemon=True)
        self._thread.start()

    def close(self, fate: Literal["failed", "ended"], reason: str = "") -> None:
        """Tell the others how this rank ends, and watch no longer."""

        def leave() -> None:
            self._ending = True
            self._say(News(self.rank, self._host, fate, reason))
            for writer in self._peers.values():
                writer.close()  # what was said is sent first
            self._loop.call_later(0.1, self._loop.stop)

        self._loop.call_soon_threadsafe(leave)
        self._thread.join(timeout=5)

    def what_happened(self, wait_s: float) -> str | None:
        """Names the ranks that are gone; waits for news if there are none. None if none come."""
        return self._describe() if self._heard.wait(wait_s) else None

    # --- in the thread ---

    async def _serve(self, listener: socket.socket) -> None:
        self._server = await asyncio.start_server(self._greet, sock=listener)

    async def _join(self, connection: socket.socket, host: str) -> None:
        reader, writer = await asyncio.open_connection(sock=connection)
        writer.write(_line({"token": self._token, "rank": self.rank, "host": self._host}))
        self._peers[0] = writer
        self._listening = self._loop.create_task(self._listen_to(reader, 0, host))

    async def _greet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            hello = json.loads(await asyncio.wait_for(reader.readline(), self._silence_s))
            known = hmac.compare_digest(hello["token"], self._token)
        except (OSError, ValueError, LookupError, TypeError):  # TimeoutError is an OSError
            known = False
        if not known:
            writer.close()
            return
        self._keep_alive(writer.get_extra_info("socket"))
        self._peers[hello["rank"]] = writer
        for news in self._news.values():
            writer.write(_line(asdict(news)))
        await self._listen_to(reader, hello["rank"], hello["host"])

    async def _listen_to(self, reader: asyncio.StreamReader, rank: int, host: str) -> None:
        fate: Literal["lost", "silent"] = "lost"
        try:
            async for line in reader:
                self._learn(News(**json.loads(line)))
        except OSError as error:  # no answer, or no way
            fate = "lost" if isinstance(error, ConnectionError) else "silent"
        self._learn(News(rank, host, fate))

    def _learn(self, news: News) -> None:
        if news.rank in self._news or self._ending:
            return
        self._news[news.rank] = news
        if self.rank == 0:
            self._say(news)
        if news.fate != "ended":
            # A silent machine's ranks fall due one after the other, within a probe.
            self._loop.call_later(self._probe_s if news.fate == "silent" else GRACE_S, self._end)
        self._heard.set()

    def _say(self, news: News) -> None:
        for rank, writer in self._peers.items():
            if rank != news.rank:
                writer.write(_line(asdict(news)))

    def _end(self) -> None:
        if self._ending:
            return
        self._say(News(self.rank, self._host, "ended"))
        with tqdm.external_write_mode(sys.stderr):
            sys.stderr.write(f"error: rank {self.rank}: {self._describe()}\n")
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(2)

    # --- what is said, and how ---

    def _describe(self) -> str:
        told = list(self._news.values())
        if failed := [news for news in told if news.fate == "failed"]:
            return "; ".join(f"rank {news.rank} failed ({news.reason})" for news in failed)
        reasons = {
            "silent": f"lost: nothing heard for {self._silence_s} s, so the machine or its network is gone",
            "lost": "lost: killed, or out of memory",
            "ended": "ended before the others",
        }
        named = [
            f"{' and '.join(f'rank {n.rank} ({n.host})' for n in of_fate)} {reasons[fate]}"
            for fate in reasons
            if (of_fate := [news for news in told if news.fate == fate])
        ]
        return f"{named[0]}; {ADVICE}"

    @property
    def _probe_s(self) -> int:
        return max(1, self._silence_s // NUM_PROBES)

    def _connect(self, port: int) -> socket.socket:
        address = os.environ["MASTER_ADDR"]  # rank 0's machine, by torch's convention
        try:
            connection = socket.create_connection((address, port), timeout=self._silence_s)
        except OSError as error:
            raise UserError(
                f"rank {self.rank} cannot reach rank 0 at {address}:{port} ({error}): "
                "machines must reach each other on all ports"
            ) from error
        self._keep_alive(connection)
        return connection

    def _keep_alive(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        options = {
            "TCP_KEEPIDLE" if hasattr(socket, "TCP_KEEPIDLE") else "TCP_KEEPALIVE": self._probe_s,  # macOS's name
            "TCP_KEEPINTVL": self._probe_s,
            "TCP_KEEPCNT": NUM_PROBES - 1,
        }
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux: unanswered news count as silence, too
            options["TCP_USER_TIMEOUT"] = 1000 * self._silence_s
        for name, value in options.items():
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _listen() -> socket.socket:
    """On a port that the system picks, of all addresses."""
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    return socket.create_server(("", 0), family=family, backlog=dist.get_world_size(), dualstack_ipv6=both)


def _line(fields: dict[str, object]) -> bytes:
    return json.dumps(fields).encode() + b"\n"
