"""The chain that a request's calls pass on their way to the batcher, and their answers on the way back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from .call import Call, cross_all

Proceed = Callable[..., Sequence[Any]]
"""``proceed(*calls)`` passes calls on and returns their answers."""


class Interceptor(Protocol):
    """Something that a request's calls meet. It belongs to one request, and lives as long as its fork.

    It returns the call's answer: that of ``proceed(call)``, whatever it makes of it, or one of its own. The last of a
    chain may proceed with several calls, which then are made together.
    """

    def __call__(self, call: Call, proceed: Proceed) -> Any: ...


class Chain:
    """Passes calls through ``interceptors``, the first one first, to the batcher."""

    def __init__(self, interceptors: Sequence[Interceptor] = ()) -> None:
        self._interceptors = list(interceptors)

    def add(self, interceptor: Interceptor) -> None:
        """As the last one, which is next to the batcher."""
        self._interceptors.append(interceptor)

    def __call__(self, call: Call) -> Any:
        (answer,) = self._pass(0, (call,))
        return answer

    def _pass(self, depth: int, calls: Sequence[Call]) -> Sequence[Any]:
        if depth == len(self._interceptors):
            return cross_all(*calls)
        (call,) = calls  # several could not be made together by way of another interceptor
        return [self._interceptors[depth](call, lambda *calls: self._pass(depth + 1, calls))]
