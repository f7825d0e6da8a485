"""The shared core of the sync and async clients: it builds requests and decodes replies; the clients send them."""

from __future__ import annotations

import functools
import ssl
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

import httpx

from ..process.addresses import is_loopback
from ..protocol.errors import SafelightError, Unavailable
from .calls import Call
from .errors import ConnectionLost, decode, error_from_event, error_from_reply, message_of
from .event_stream import EventDecoder, ServerSentEvent
from .results import Event, Generation, Health, Preview, Progress, Queued, Result
from .retry import Attempts, Retries

DEFAULT_URL = "http://127.0.0.1:30000"

DEFAULT_TIMEOUT_S = 660.0
"""Longer than the server's default request timeout, so that the server reports a timeout first."""

CONNECT_S = 10.0

LOOK_EVERY_S = 0.25


@dataclass(frozen=True, slots=True)
class Endpoint:
    """``url`` without a scheme means http. ``timeout`` is the longest wait for a reply's next bytes, in seconds."""

    url: str = DEFAULT_URL
    api_key: str | None = field(default=None, repr=False)
    timeout: float | None = DEFAULT_TIMEOUT_S
    retries: Retries = field(default_factory=Retries)

    def settings(self) -> dict[str, Any]:
        """Arguments for the constructor of httpx's clients."""
        trust_env = not self.on_this_machine  # a proxy of the environment cannot reach this machine's loopback
        certificates = trust_env or self.base_url.startswith("https:")
        return {
            "base_url": self.base_url,
            "headers": {"authorization": f"Bearer {self.api_key}"} if self.api_key else {},
            "limits": httpx.Limits(max_connections=None, max_keepalive_connections=32),  # the server queues
            "trust_env": trust_env,
            "verify": _tls_context(trust_env) if certificates else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT),
        }

    @property
    def base_url(self) -> str:
        url = self.url if "://" in self.url else f"http://{self.url}"
        return url.rstrip("/")

    @property
    def on_this_machine(self) -> bool:
        host = httpx.URL(self.base_url).host
        return host == "localhost" or is_loopback(host)

    def request(self, http: httpx.Client | httpx.AsyncClient, call: Call[Any]) -> httpx.Request:
        timeout = httpx.Timeout(call.read_timeout(self.timeout), connect=CONNECT_S)
        return http.build_request(call.method, call.path, content=call.content, headers=call.headers, timeout=timeout)

    def attempts(self, call: Call[Any]) -> Attempts:
        return (self.retries if call.again else Retries(0)).begin()

    def error(self, response: httpx.Response) -> SafelightError:
        """The exception for ``response``, an error whose body was read."""
        return error_from_reply(response.status_code, response.headers, response.content)

    def health(self, response: httpx.Response) -> Health:
        """Decode a reply to :data:`calls.HEALTH`; a 503 is a valid reply too."""
        if response.status_code == httpx.codes.OK:
            decode(dict[str, Any], response.content, self.base_url)
            return Health(True, "ready")
        if response.status_code == httpx.codes.SERVICE_UNAVAILABLE:
            return Health(False, message_of(response.content) or "The server answered 503 without saying why.")
        raise self.error(response)

    def generation(self, content: bytes | str) -> Generation:
        return decode(Generation, content, self.base_url)

    def events(self) -> EventReader:
        return EventReader(self)


@functools.cache
def _tls_context(trust_env: bool) -> ssl.SSLContext:
    """Shared by the clients of a process: httpx would read the certificates for each of them, which takes 30 ms.

    ``SSL_CERT_FILE`` and ``SSL_CERT_DIR`` have an effect up to the first client only.
    """
    return httpx.create_ssl_context(trust_env=trust_env)


_EVENTS: dict[str, type[Queued | Progress | Preview]] = {"queued": Queued, "progress": Progress, "preview": Preview}


class EventReader:
    """Turns the chunks of a streamed reply into typed events."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._decoder = EventDecoder()
        self._finished = False

    def feed(self, chunk: bytes) -> Iterator[Event]:
        """Yield the events that ``chunk`` completes. Raises the exception of an ``error`` event."""
        for event in self._decoder.feed(chunk):
            yield from self._read(event)

    def close(self) -> None:
        """Raises ``ConnectionLost`` if the stream ended before its result."""
        if not self._finished:
            raise ConnectionLost(f"The stream from {self._endpoint.base_url} ended before its result.")

    def _read(self, event: ServerSentEvent) -> Iterator[Event]:
        """Unknown events are ignored: a newer server may send them."""
        if event.name == "error":
            raise error_from_event(event.data)
        if event.name == "result":
            self._finished = True
            yield Result(self._endpoint.generation(event.data))
        elif kind := _EVENTS.get(event.name):
            yield decode(kind, event.data, self._endpoint.base_url)


class ReadyWait:
    """The wait for a server: reports each change of its health, and gives up after ``timeout`` seconds."""

    def __init__(self, timeout: float, on_change: Callable[[Health], None] | None) -> None:
        self._timeout = timeout
        self._deadline = monotonic() + timeout
        self._on_change = on_change
        self._last: Health | None = None

    def pause(self, health: Health) -> float:
        """Seconds until the next health check. Raises ``Unavailable`` once the timeout has passed."""
        if monotonic() + LOOK_EVERY_S > self._deadline:
            raise Unavailable(f"The server was not ready after {self._timeout:g} s: {health.reason}")
        if health != self._last and self._on_change:
            self._on_change(health)
        self._last = health
        return LOOK_EVERY_S
