"""The listening socket, and its URL."""

from __future__ import annotations

import socket

from ..process.addresses import is_loopback
from ..protocol.errors import StartFailed

_BACKLOG = 2048


def listen(host: str, port: int, *, beyond_loopback: bool = False) -> socket.socket:
    """A listening socket. Raises ``StartFailed`` that says why there is none.

    Unless ``beyond_loopback``, an address that other machines may reach is refused.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not a host name"
        raise StartFailed(f"The address {host[:100]!r} cannot be resolved ({reason}); give another --host.") from None
    if not beyond_loopback and not is_loopback(str(address[0])):
        raise StartFailed(
            f"Other machines may reach {host}, and everybody there could use and change this server: set an API key "
            "(SAFELIGHT_API_KEY or --api-key-file), or add --insecure if the network keeps strangers out."
        )
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise StartFailed(
            f"Port {port} on {host} cannot be used ({error.strerror}); stop what uses it or give another --port "
            "(0 takes a free one)."
        ) from None
    listener.setblocking(False)
    return listener


def url_of(listener: socket.socket) -> str:
    """Where a client on this machine reaches ``listener``."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
