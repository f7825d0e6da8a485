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
    """A connection to the server at ``base_url``; safe to share between threads.

    ``timeout`` is how many seconds a reply's next bytes may take. Every method raises the errors of
    :mod:`safelight.protocol.errors`, and :class:`Unreachable` when nothing answers.
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
        """Updates, digests and the version of the weights that serve."""

    @property
    def base_url(self) -> str:
        return self._endpoint.base_url

    @calls.with_arguments_of(calls.generate)
    def generate(self, call: Call) -> Generation:
        """Make pictures or clips from ``prompt`` and wait for them.

        ``steps`` is short for ``num_inference_steps``; what is left out is the server's to choose, and arguments that
        are not named here go to the pipeline's own ``__call__``.
        """
        return self._endpoint.generation(self._fetch(call))

    @calls.with_arguments_of(calls.generate)
    def stream(self, call: Call) -> Iterator[Event]:
        """The arguments of :meth:`generate`; its events as they come, the last one a :class:`Result`.

        Dropping the iterator closes the connection, and that stops the work.
        """
        return self._events(call.streaming())

    @calls.with_arguments_of(rollout_calls.rollout)
    def rollout(self, call: Call) -> list[Rollout]:
        """Generate with log-probabilities: a :class:`Rollout` for each sample, prompt by prompt.

        ``sampler`` is ``sde``, ``dance``, ``cps`` or ``ode``; ``trajectory``, ``environment`` and ``debug`` say what is
        told. The arguments of :meth:`generate` are taken too.
        """
        return decode_rollouts(self._fetch(call), call, self.base_url)

    def info(self) -> dict[str, Any]:
        """``/server_info``: version, configuration, replicas, and how requests share forwards."""
        return self._endpoint.document(self._fetch(calls.SERVER_INFO))

    def model_info(self) -> dict[str, Any]:
        """``/model_info``: the model, its sizes, and the arguments that its pipeline takes."""
        return self._endpoint.document(self._fetch(calls.MODEL_INFO))

    def health(self) -> Health:
        """Whether the server can serve now. Raises when nothing answers."""
        with transport_errors(self.base_url):
            return self._endpoint.health(self._http.send(self._endpoint.request(self._http, calls.HEALTH)))

    def wait_until_ready(self, timeout: float = 600.0, on_change: Callable[[Health], None] | None = None) -> None:
        """Return once the server can serve. ``on_change`` hears what is waited for.

        Raises ``Unavailable`` after ``timeout`` seconds.
        """
        wait = ReadyWait(timeout, on_change)
        while not (health := self._look()).ready:
            time.sleep(wait.pause(health))

    @calls.with_arguments_of(weight_calls.sleep)
    def sleep(self, call: Call) -> None:
        """Have the server give back the memory of ``tags``, all of them when not given; it generates nothing then."""
        self._fetch(call)

    @calls.with_arguments_of(weight_calls.wake)
    def wake(self, call: Call) -> None:
        """Undo :meth:`sleep`; every byte is there again."""
        self._fetch(call)

    @calls.with_arguments_of(weight_calls.pause)
    def pause(self, call: Call) -> None:
        """Stop generation until :meth:`resume`; new requests wait.

        What runs ends first (``wait``), is ended (``abort``), or stops where it is (``in_place``).
        """
        self._fetch(call)

    def resume(self) -> None:
        """Undo :meth:`pause`."""
        self._fetch(weight_calls.RESUME)

    def flush_cache(self) -> None:
        """Have the server forget what it could make again, such as prompt embeddings."""
        self._fetch(weight_calls.FLUSH_CACHE)

    @calls.with_arguments_of(adapter_calls.set_lora)
    def set_lora(self, call: Call) -> Loras:
        """Load adapters, of files or directories where the server may read, and have them active for all requests.

        ``mode`` is how: ``merge`` into the weights, ``dynamic`` beside them, ``auto`` whichever loses nothing, or
        ``request``, for requests alone that name them (``generate(lora=[{"name": nickname, "scale": 0.8}])``).
        """
        return self._endpoint.loras(self._fetch(call))

    @calls.with_arguments_of(adapter_calls.merge_lora)
    def merge_lora(self, call: Call) -> Loras:
        """Merge what is active into the weights, with other strengths if they are given."""
        return self._endpoint.loras(self._fetch(call))

    @calls.with_arguments_of(adapter_calls.unmerge_lora)
    def unmerge_lora(self, call: Call) -> Loras:
        """Take what is merged out of the weights; every byte is as before."""
        return self._endpoint.loras(self._fetch(call))

    @calls.with_arguments_of(adapter_calls.unload_lora)
    def unload_lora(self, call: Call) -> Loras:
        """Have the server let go of an adapter."""
        return self._endpoint.loras(self._fetch(call))

    def loras(self) -> Loras:
        """What is loaded, and what is active."""
        return self._endpoint.loras(self._fetch(adapter_calls.LIST))

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _look(self) -> Health:
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
        """A reply that is a success, its body not read yet; after as many attempts as the retries allow."""
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
