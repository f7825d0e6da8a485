"""The client for asyncio. Cancelling a call closes its connection, which stops the work on the server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any, Self

import httpx

from ..protocol.errors import DeadlinePassed, SafelightError, Unavailable
from . import adapter_calls, calls, rollout_calls, weight_calls
from .async_weights import AsyncWeights
from .calls import Call
from .endpoint import DEFAULT_TIMEOUT_S, DEFAULT_URL, Endpoint, ReadyWait
from .errors import transport_errors
from .results import Event, Generation, Health, Loras
from .retry import Retries
from .rollouts import Rollout, decode_rollouts
from .sync_client import Client


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

    @calls.with_arguments_of(calls.generate)
    async def generate(self, call: Call) -> Generation:
        """:meth:`Client.generate`, awaited."""
        return self._endpoint.generation(await self._fetch(call))

    @calls.with_arguments_of(calls.generate)
    def stream(self, call: Call) -> AsyncIterator[Event]:
        """:meth:`Client.stream` for ``async for``; use ``contextlib.aclosing`` to stop the work on an early exit."""
        return self._events(call.streaming())

    @calls.with_arguments_of(rollout_calls.rollout)
    async def rollout(self, call: Call) -> list[Rollout]:
        """:meth:`Client.rollout`, awaited."""
        return decode_rollouts(await self._fetch(call), call, self.base_url)

    async def info(self) -> dict[str, Any]:
        """:meth:`Client.info`, awaited."""
        return self._endpoint.document(await self._fetch(calls.SERVER_INFO))

    async def model_info(self) -> dict[str, Any]:
        """:meth:`Client.model_info`, awaited."""
        return self._endpoint.document(await self._fetch(calls.MODEL_INFO))

    async def health(self) -> Health:
        """:meth:`Client.health`, awaited."""
        with transport_errors(self.base_url):
            return self._endpoint.health(await self._http.send(self._endpoint.request(self._http, calls.HEALTH)))

    async def wait_until_ready(self, timeout: float = 600.0, on_change: Callable[[Health], None] | None = None) -> None:
        """:meth:`Client.wait_until_ready`, awaited."""
        wait = ReadyWait(timeout, on_change)
        while not (health := await self._health_or_reason()).ready:
            await asyncio.sleep(wait.pause(health))

    @calls.with_arguments_of(weight_calls.sleep)
    async def sleep(self, call: Call) -> None:
        """:meth:`Client.sleep`, awaited."""
        await self._fetch(call)

    @calls.with_arguments_of(weight_calls.wake)
    async def wake(self, call: Call) -> None:
        """:meth:`Client.wake`, awaited."""
        await self._fetch(call)

    @calls.with_arguments_of(weight_calls.pause)
    async def pause(self, call: Call) -> None:
        """:meth:`Client.pause`, awaited."""
        await self._fetch(call)

    async def resume(self) -> None:
        """:meth:`Client.resume`, awaited."""
        await self._fetch(weight_calls.RESUME)

    async def flush_cache(self) -> None:
        """:meth:`Client.flush_cache`, awaited."""
        await self._fetch(weight_calls.FLUSH_CACHE)

    @calls.with_arguments_of(adapter_calls.set_lora)
    async def set_lora(self, call: Call) -> Loras:
        """:meth:`Client.set_lora`, awaited."""
        return self._endpoint.loras(await self._fetch(call))

    @calls.with_arguments_of(adapter_calls.merge_lora)
    async def merge_lora(self, call: Call) -> Loras:
        """:meth:`Client.merge_lora`, awaited."""
        return self._endpoint.loras(await self._fetch(call))

    @calls.with_arguments_of(adapter_calls.unmerge_lora)
    async def unmerge_lora(self, call: Call) -> Loras:
        """:meth:`Client.unmerge_lora`, awaited."""
        return self._endpoint.loras(await self._fetch(call))

    @calls.with_arguments_of(adapter_calls.unload_lora)
    async def unload_lora(self, call: Call) -> Loras:
        """:meth:`Client.unload_lora`, awaited."""
        return self._endpoint.loras(await self._fetch(call))

    async def loras(self) -> Loras:
        """:meth:`Client.loras`, awaited."""
        return self._endpoint.loras(await self._fetch(adapter_calls.LIST))

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

    async def _fetch(self, call: Call) -> bytes:
        async with aclosing(await self._open(call)) as response:
            with transport_errors(self.base_url):
                return await response.aread()

    async def _events(self, call: Call) -> AsyncIterator[Event]:
        reader = self._endpoint.events()
        async with aclosing(await self._open(call)) as response:
            with transport_errors(self.base_url):
                async for chunk in response.aiter_bytes():
                    for event in reader.feed(chunk):
                        yield event
        reader.close()

    async def _open(self, call: Call) -> httpx.Response:
        """Return a successful reply, its body unread; retry as the policy allows."""
        attempts = self._endpoint.attempts(call)
        while True:
            try:
                return await self._attempt(call)
            except SafelightError as error:
                pause = attempts.pause_after(error)
            await asyncio.sleep(pause)

    async def _attempt(self, call: Call) -> httpx.Response:
        with transport_errors(self.base_url):
            response = await self._http.send(self._endpoint.request(self._http, call), stream=True)
            if response.is_success:
                return response
            async with aclosing(response):
                await response.aread()
        raise self._endpoint.error(response)
