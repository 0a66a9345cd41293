"""A directory behind an fsspec URL: fetches files with retries and clear errors."""

import hashlib
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
from fsspec.callbacks import Callback
from fsspec.registry import known_implementations
from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception,
    sleep_using_event,
    stop_after_attempt,
    wait_exponential_jitter,
)

from data_shards.errors import UserError

logger = logging.getLogger(__name__)

ATTEMPTS = 7
FIRST_WAIT_SECONDS = 1.0  # doubled after each attempt: a minute in all
_NO_ANSWER_SECONDS = 60  # from a server that is connected
_TEMPORARY_STATUS = (408, 429)  # of HTTP's 4xx: timeout, too many requests


class RemoteDirectory:
    """Files below a URL.

    Attributes:
        url: without a slash at its end.
        closed: set by `close`.

    Args:
        url: of any file system that fsspec knows; its options come from fsspec's own configuration.

    Raises:
        UserError: no file system of that name, or its package is not installed.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self.closed = threading.Event()
        protocol = fsspec.core.split_protocol(url)[0].rpartition("::")[2]
        try:
            self._files, self._root = fsspec.url_to_fs(self.url, **_options(protocol))
        except ImportError as error:
            raise UserError(f"{url} needs a package: pip install {_package(protocol)} ({error})") from None
        except ValueError as error:
            raise UserError(f"{url} cannot be opened ({error}); give s3://, gs://, http://, or a directory") from None

    def fetch(self, name: str, path: Path, check: Callable[[Path], None] | None = None) -> None:
        """Copy a file to `path`; try again, after growing waits, what may have been an accident.

        Args:
            name: of the file.
            path: where to; what is there after an error means nothing.
            check: raises `DamagedError` for a copy that is not what it should be.

        Raises:
            UserError: there is no such file, no access to it, or every attempt failed.
            InterruptedError: closed meanwhile.
        """
        url = f"{self.url}/{name}"

        def attempt() -> None:
            self._check_open()
            self._files.get_file(f"{self._root.rstrip('/')}/{name}", str(path), callback=_Checkpoint(self._check_open))
            if check:
                check(path)

        def announce(state: RetryCallState) -> None:
            assert state.outcome is not None
            logger.warning("%s: %s; trying again", url, _one_line(state.outcome.exception()))

        retrying = Retrying(
            stop=stop_after_attempt(ATTEMPTS),
            wait=wait_exponential_jitter(multiplier=FIRST_WAIT_SECONDS, jitter=FIRST_WAIT_SECONDS),
            sleep=sleep_using_event(self.closed),
            retry=retry_if_exception(_may_pass),
            before_sleep=announce,
            reraise=True,
        )
        try:
            retrying(attempt)
        except InterruptedError:
            raise
        except FileNotFoundError:
            raise UserError(f"{url} does not exist; check the URL, or upload the whole set again") from None
        except DamagedError as error:
            raise UserError(f"{url} {error}, {ATTEMPTS} times in a row; upload the set again") from None
        except Exception as error:  # file systems raise what their own libraries do
            reason = _one_line(error)
            if _may_pass(error):
                raise UserError(
                    f"{url} cannot be fetched, {ATTEMPTS} attempts failed ({reason}); check the connection"
                ) from None
            raise UserError(f"{url} is refused ({reason}); check the URL and your credentials") from None

    def close(self) -> None:
        """End what is being fetched."""
        self.closed.set()

    def _check_open(self) -> None:
        if self.closed.is_set():
            raise InterruptedError


class DamagedError(ValueError):
    """A copy that differs from what the manifest describes; a clause such as "has another sha256"."""


def check_digest(path: Path, *, num_bytes: int, sha256: str) -> None:
    """Hold a tar against its manifest.

    Raises:
        DamagedError: it is another one.
    """
    found = path.stat().st_size
    if found != num_bytes:
        raise DamagedError(f"has {found} bytes where its manifest says {num_bytes}")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != sha256:
        raise DamagedError(f"has sha256 {digest[:12]}... where its manifest says {sha256[:12]}...")


class _Checkpoint(Callback):  # type: ignore[misc]
    """Lets a transfer be interrupted between two chunks."""

    def __init__(self, check: Callable[[], None]) -> None:
        super().__init__()
        self._check = check

    def relative_update(self, inc: int = 1) -> None:
        self._check()


def _may_pass(error: BaseException) -> bool:
    """Whether another attempt may succeed."""
    status = getattr(error, "status", None)
    if isinstance(status, int):
        return status >= 500 or status in _TEMPORARY_STATUS
    return not isinstance(error, (FileNotFoundError, PermissionError, InterruptedError))


def _options(protocol: str) -> dict[str, Any]:
    if protocol not in ("http", "https"):
        return {}
    try:
        from aiohttp import ClientTimeout
    except ImportError:
        return {}  # fsspec says what is missing
    # By default a transfer may last five minutes in all, however much it brings.
    timeout = ClientTimeout(total=None, sock_connect=_NO_ANSWER_SECONDS, sock_read=_NO_ANSWER_SECONDS)
    return {"client_kwargs": {"timeout": timeout}}


def _package(protocol: str) -> str:
    """What pip calls the package of a file system: for those that are not fsspec's own, its module's name."""
    module = known_implementations[protocol]["class"].partition(".")[0]
    return f"'fsspec[{protocol}]'" if module == "fsspec" else str(module)


def _one_line(error: BaseException | None) -> str:
    return " ".join(f"{error}".split()) or type(error).__name__
