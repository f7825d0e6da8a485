"""The client for asyncio. Cancelling a call closes its connection, which stops the work on the server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any, Self, TypeVar

import httpx

from ..protocol.errors import DeadlinePassed, SafelightError, Unavailable
from . import adapter_calls, calls, encode_calls, rollout_calls, weight_calls
from .async_weights import AsyncWeights
from .calls import Call, method
from .endpoint import DEFAULT_TIMEOUT_S, DEFAULT_URL, Endpoint, ReadyWait
from .errors import transport_errors
from .results import Event, Generation, Health
from .retry import Retries
from .sync_client import Client

R = TypeVar("R")


class AsyncClient:
    """:class:`Client` for asyncio, with the same arguments and methods."""

    def __init__(
        self,
        base_url: str = DEFAULT_URL,
        *,
        api_key: str | None = None,
        timeout: float | None = DEFAULT_TIMEOUT_S,
        retries: Retries = Retries(),  # noqa: B008 - frozen
    ) -> None:
        self._endpoint = Endpoint(base_url, api_key, timeout, retries)
        self._http = httpx.AsyncClient(**self._endpoint.settings())
        self._blocking = Client(base_url, api_key=api_key, timeout=timeout, retries=retries)
        self.weights = AsyncWeights(self._blocking.weights)
        """:attr:`Client.weights`, awaited."""

    @property
    def base_url(self) -> str:
        return self._endpoint.base_url

    async def _ask(self, call: Call[R]) -> R:
        async with aclosing(await self._open(call)) as response:
            with transport_errors(self.base_url):
                reply = await response.aread()
        return call.read(reply, self.base_url)

    async def _stream(self, call: Call[Generation]) -> AsyncIterator[Event]:
        """:meth:`Client.stream` for ``async for``; use ``contextlib.aclosing`` to stop the work on an early exit."""
        reader = self._endpoint.events()
        async with aclosing(await self._open(call.streaming())) as response:
            with transport_errors(self.base_url):
                async for chunk in response.aiter_bytes():
                    for event in reader.feed(chunk):
                        yield event
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

    async def health(self) -> Health:
        """:meth:`Client.health`, awaited."""
        with transport_errors(self.base_url):
            return self._endpoint.health(await self._http.send(self._endpoint.request(self._http, calls.HEALTH)))

    async def wait_until_ready(self, timeout: float = 600.0, on_change: Callable[[Health], None] | None = None) -> None:
        """:meth:`Client.wait_until_ready`, awaited."""
        wait = ReadyWait(timeout, on_change)
        while not (health := await self._health_or_reason()).ready:
            await asyncio.sleep(wait.pause(health))

    async def aclose(self) -> None:
        self._blocking.close()
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def _health_or_reason(self) -> Health:
        try:
            return await self.health()
        except (Unavailable, DeadlinePassed) as error:
            return Health(False, error.message, answers=False)

    async def _open(self, call: Call[Any]) -> httpx.Response:
        """Return a successful reply, its body unread; retry as the policy allows."""
        attempts = self._endpoint.attempts(call)
        while True:
            try:
                return await self._attempt(call)
            except SafelightError as error:
                pause = attempts.pause_after(error)
            await asyncio.sleep(pause)

    async def _attempt(self, call: Call[Any]) -> httpx.Response:
        with transport_errors(self.base_url):
            response = await self._http.send(self._endpoint.request(self._http, call), stream=True)
            if response.is_success:
                return response
            async with aclosing(response):
                await response.aread()
        raise self._endpoint.error(response)
