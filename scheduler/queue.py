"""Requests in a fixed order: the next to run first, or the next to expire first."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator

from .request import Request

Order = Callable[[Request], tuple[float, int]]


def by_turn(request: Request) -> tuple[float, int]:
    """Higher priority first, then first come, first served."""
    return -request.generate.priority, request.number


def by_deadline(request: Request) -> tuple[float, int]:
    return request.deadline, request.number


class Queue:
    """Requests, sorted. A request's key never changes while it is in here.

    A sorted list finds and removes any request in O(log n) comparisons, and its position in the queue is its index.
    """

    def __init__(self, order: Order) -> None:
        self._order = order
        self._requests: list[Request] = []
        self.nbytes = 0
        """The bytes of everything that the requests carry."""

    def __iter__(self) -> Iterator[Request]:
        return iter(list(self._requests))

    def __len__(self) -> int:
        return len(self._requests)

    @property
    def first(self) -> Request | None:
        return self._requests[0] if self._requests else None

    def add(self, request: Request) -> int:
        """Put ``request`` in its place. Returns how many are ahead of it."""
        insort(self._requests, request, key=self._order)
        self.nbytes += request.nbytes
        return self._index(request)

    def remove(self, request: Request) -> None:
        index = self._index(request)
        assert self._requests[index] is request, f"request {request.id} is not in this queue"
        del self._requests[index]
        self.nbytes -= request.nbytes

    def _index(self, request: Request) -> int:
        return bisect_left(self._requests, self._order(request), key=self._order)
