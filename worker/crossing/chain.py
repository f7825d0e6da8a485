"""The chain of interceptors between a request's boundaries and the batcher."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

from .call import Call, cross_all

Proceed = Callable[..., Sequence[Any]]
"""``proceed(*calls)`` passes calls on and returns their answers."""


class Interceptor(Protocol):
    """A wrapper around a request's calls. It belongs to one request, and lives as long as the request's fork.

    It returns the call's answer: that of ``proceed(call)``, possibly changed, or one of its own. The last interceptor
    may proceed with several calls, which can then run as one forward.
    """

    def __call__(self, call: Call, proceed: Proceed) -> Any: ...


class Chain:
    """Passes calls through ``interceptors``, in order, to the batcher."""

    def __init__(self, interceptors: Sequence[Interceptor] = ()) -> None:
        self._interceptors = list(interceptors)
        self._pass = self._linked()

    def add(self, interceptor: Interceptor) -> None:
        """Append ``interceptor``, next to the batcher."""
        self._interceptors.append(interceptor)
        self._pass = self._linked()

    def __call__(self, call: Call) -> Any:
        (answer,) = self._pass(call)
        return answer

    def _linked(self) -> Proceed:
        proceed: Proceed = cross_all
        for interceptor in reversed(self._interceptors):
            proceed = partial(_intercepted, interceptor, proceed)
        return proceed


def _intercepted(interceptor: Interceptor, proceed: Proceed, *calls: Call) -> Sequence[Any]:
    (call,) = calls  # another interceptor would pass several calls on one by one
    return [interceptor(call, proceed)]
