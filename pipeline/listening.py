"""The address that a page of ours is served on."""

import socket

from data_shards.errors import UserError


def check_port(port: int) -> None:
    """Whether there can be such a port.

    Raises:
        UserError: there cannot.
    """
    if not 0 <= port <= 65535:
        raise UserError(f"--port {port} is impossible: give 0 to 65535")


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
