"""The client for ordinary programs and notebooks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any, Self

import httpx

from ..protocol.errors import DeadlinePassed, SafelightError, Unavailable
from . import adapter_calls, calls, rollout_calls, weight_calls
from .calls import Call
from .endpoint import DEFAULT_TIMEOUT_S, DEFAULT_URL, Endpoint, ReadyWait
from .errors import transport_errors
from .results import Event, Generation, Health, Loras
from .retry import Retries
from .rollouts import Rollout, decode_rollouts
from .weights import Weights


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
        self.weights = Weights(self._endpoint, self._fetch)
        """Updates, digests and the version of the server's weights."""

    @property
    def base_url(self) -> str:
        return self._endpoint.base_url

    @calls.with_arguments_of(calls.generate)
    def generate(self, call: Call) -> Generation:
        """Generate pictures or clips from ``prompt`` and wait for them.

        ``steps`` is short for ``num_inference_steps``. The server chooses values for omitted arguments; arguments that
        are not named here go to the pipeline's ``__call__``.
        """
        return self._endpoint.generation(self._fetch(call))

    @calls.with_arguments_of(calls.generate)
    def stream(self, call: Call) -> Iterator[Event]:
        """Yield events as they come, the last one a :class:`Result`; the arguments are those of :meth:`generate`.

        Dropping the iterator closes the connection, which stops the work on the server.
        """
        return self._events(call.streaming())

    @calls.with_arguments_of(rollout_calls.rollout)
    def rollout(self, call: Call) -> list[Rollout]:
        """Generate with log-probabilities: a :class:`Rollout` for each sample, prompt by prompt.

        ``sampler`` is ``sde``, ``dance``, ``cps`` or ``ode``; ``trajectory``, ``environment`` and ``debug`` select the
        records in the reply. The arguments of :meth:`generate` are accepted too.
        """
        return decode_rollouts(self._fetch(call), call, self.base_url)

    def info(self) -> dict[str, Any]:
        """``/server_info``: version, configuration, replicas, and how requests share forwards."""
        return self._endpoint.document(self._fetch(calls.SERVER_INFO))

    def model_info(self) -> dict[str, Any]:
        """``/model_info``: the model, its sizes, and the arguments of its pipeline."""
        return self._endpoint.document(self._fetch(calls.MODEL_INFO))

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

    @calls.with_arguments_of(weight_calls.sleep)
    def sleep(self, call: Call) -> None:
        """Release the server's memory of ``tags``, by default all; the server does not generate while it sleeps."""
        self._fetch(call)

    @calls.with_arguments_of(weight_calls.wake)
    def wake(self, call: Call) -> None:
        """Undo :meth:`sleep` and restore every byte."""
        self._fetch(call)

    @calls.with_arguments_of(weight_calls.pause)
    def pause(self, call: Call) -> None:
        """Pause generation until :meth:`resume`; new requests wait.

        Running requests finish first (``wait``), are aborted (``abort``), or stop where they are (``in_place``).
        """
        self._fetch(call)

    def resume(self) -> None:
        """Undo :meth:`pause`."""
        self._fetch(weight_calls.RESUME)

    def flush_cache(self) -> None:
        """Drop cached results that the server can recompute, such as prompt embeddings."""
        self._fetch(weight_calls.FLUSH_CACHE)

    @calls.with_arguments_of(adapter_calls.set_lora)
    def set_lora(self, call: Call) -> Loras:
        """Load adapters from files or directories that the server may read, and activate them for all requests.

        ``mode``: ``merge`` adds them to the weights, ``dynamic`` applies them in the forward, ``auto`` merges unless
        rounding would lose part of the change, and ``request`` applies them only to requests that name them
        (``generate(lora=[{"name": nickname, "scale": 0.8}])``).
        """
        return self._endpoint.loras(self._fetch(call))

    @calls.with_arguments_of(adapter_calls.merge_lora)
    def merge_lora(self, call: Call) -> Loras:
        """Merge the active adapters into the weights, with new strengths if given."""
        return self._endpoint.loras(self._fetch(call))

    @calls.with_arguments_of(adapter_calls.unmerge_lora)
    def unmerge_lora(self, call: Call) -> Loras:
        """Unmerge the adapters; every byte of the weights is restored."""
        return self._endpoint.loras(self._fetch(call))

    @calls.with_arguments_of(adapter_calls.unload_lora)
    def unload_lora(self, call: Call) -> Loras:
        """Unload an adapter."""
        return self._endpoint.loras(self._fetch(call))

    def loras(self) -> Loras:
        """List the loaded and the active adapters."""
        return self._endpoint.loras(self._fetch(adapter_calls.LIST))

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

    def _fetch(self, call: Call) -> bytes:
        with closing(self._open(call)) as response, transport_errors(self.base_url):
            return response.read()

    def _events(self, call: Call) -> Iterator[Event]:
        reader = self._endpoint.events()
        with closing(self._open(call)) as response, transport_errors(self.base_url):
            for chunk in response.iter_bytes():
                yield from reader.feed(chunk)
        reader.close()

    def _open(self, call: Call) -> httpx.Response:
        """Return a successful reply, its body unread; retry as the policy allows."""
        attempts = self._endpoint.attempts(call)
        while True:
            try:
                return self._attempt(call)
            except SafelightError as error:
                pause = attempts.pause_after(error)
            time.sleep(pause)

    def _attempt(self, call: Call) -> httpx.Response:
        with transport_errors(self.base_url):
            response = self._http.send(self._endpoint.request(self._http, call), stream=True)
            if response.is_success:
                return response
            with closing(response):
                response.read()
        raise self._endpoint.error(response)
