"""Addresses and HTTP headers of the web pages."""

import socket
from collections.abc import Mapping

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from data_shards.errors import UserError


def check_port(port: int) -> None:
    """Whether there can be such a port.

    Raises:
        UserError: there cannot.
    """
    if not 0 <= port <= 65535:
        raise UserError(f"--port {port} is invalid: give 0 to 65535")


def listen(host: str, port: int) -> socket.socket:
    """A socket on an address of this machine; port 0 takes any that is free.

    Raises:
        UserError: the address is not this machine's, or the port is taken.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise UserError(
            f"--host {host} --port {port} cannot be listened on ({error.strerror}); choose others"
        ) from None


def url_of(listening: socket.socket) -> str:
    """What to open in a browser."""
    host, port = listening.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/"


class AddHeaders:
    """Adds headers to every response of an application."""

    def __init__(self, app: ASGIApp, headers: Mapping[str, str]) -> None:
        self._app = app
        self._headers = [(name.lower().encode(), value.encode()) for name, value in headers.items()]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *self._headers]
            await send(message)

        await self._app(scope, receive, send_with_headers)
