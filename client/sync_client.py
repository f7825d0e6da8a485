"""The client for ordinary programs and notebooks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any, Self, TypeVar

import httpx

from ..protocol.errors import DeadlinePassed, SafelightError, Unavailable
from . import adapter_calls, calls, encode_calls, rollout_calls, weight_calls
from .calls import Call, method
from .endpoint import DEFAULT_TIMEOUT_S, DEFAULT_URL, Endpoint, ReadyWait
from .errors import transport_errors
from .results import Event, Generation, Health
from .retry import Retries
from .weights import Weights

R = TypeVar("R")


class Client:
    """A client of the server at ``base_url``; threads may share it.

    ``timeout`` is the longest wait for a reply's next bytes, in seconds. Every method raises the errors of
    :mod:`safelight.protocol.errors`, and :class:`Unreachable` if nothing answers.
    """

    def __init__(
        self,
        base_url: str = DEFAULT_URL,
        *,
        api_key: str | None = None,
        timeout: float | None = DEFAULT_TIMEOUT_S,
        retries: Retries = Retries(),  # noqa: B008 - frozen
    ) -> None:
        self._endpoint = Endpoint(base_url, api_key, timeout, retries)
        self._http = httpx.Client(**self._endpoint.settings())
        self.weights = Weights(self._endpoint, self._ask)
        """Updates, digests and the version of the server's weights."""

    @property
    def base_url(self) -> str:
        return self._endpoint.base_url

    def _ask(self, call: Call[R]) -> R:
        with closing(self._open(call)) as response, transport_errors(self.base_url):
            reply = response.read()
        return call.read(reply, self.base_url)

    def _stream(self, call: Call[Generation]) -> Iterator[Event]:
        """Yield events as they come, the last one a :class:`Result`; the arguments are those of :meth:`generate`.

        Dropping the iterator closes the connection, which stops the work on the server.
        """
        reader = self._endpoint.events()
        with closing(self._open(call.streaming())) as response, transport_errors(self.base_url):
            for chunk in response.iter_bytes():
                yield from reader.feed(chunk)
        reader.close()

    generate = method(calls.generate, _ask)
    stream = method(calls.generate, _stream)
    encode = method(encode_calls.encode, _ask)
    rollout = method(rollout_calls.rollout, _ask)
    info = method(calls.info, _ask)
    model_info = method(calls.model_info, _ask)
    sleep = method(weight_calls.sleep, _ask)
    wake = method(weight_calls.wake, _ask)
    pause = method(weight_calls.pause, _ask)
    resume = method(weight_calls.resume, _ask)
    flush_cache = method(weight_calls.flush_cache, _ask)
    set_lora = method(adapter_calls.set_lora, _ask)
    merge_lora = method(adapter_calls.merge_lora, _ask)
    unmerge_lora = method(adapter_calls.unmerge_lora, _ask)
    unload_lora = method(adapter_calls.unload_lora, _ask)
    loras = method(adapter_calls.loras, _ask)

    def health(self) -> Health:
        """Ask whether the server is ready. Raises ``Unreachable`` if nothing answers."""
        with transport_errors(self.base_url):
            return self._endpoint.health(self._http.send(self._endpoint.request(self._http, calls.HEALTH)))

    def wait_until_ready(self, timeout: float = 600.0, on_change: Callable[[Health], None] | None = None) -> None:
        """Return once the server is ready; ``on_change`` gets each change of its health until then.

        Raises ``Unavailable`` after ``timeout`` seconds.
        """
        wait = ReadyWait(timeout, on_change)
        while not (health := self._health_or_reason()).ready:
            time.sleep(wait.pause(health))

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _health_or_reason(self) -> Health:
        try:
            return self.health()
        except (Unavailable, DeadlinePassed) as error:
            return Health(False, error.message, answers=False)

    def _open(self, call: Call[Any]) -> httpx.Response:
        """Return a successful reply, its body unread; retry as the policy allows."""
        attempts = self._endpoint.attempts(call)
        while True:
            try:
                return self._attempt(call)
            except SafelightError as error:
                pause = attempts.pause_after(error)
            time.sleep(pause)

    def _attempt(self, call: Call[Any]) -> httpx.Response:
        with transport_errors(self.base_url):
            response = self._http.send(self._endpoint.request(self._http, call), stream=True)
            if response.is_success:
                return response
            with closing(response):
                response.read()
        raise self._endpoint.error(response)
