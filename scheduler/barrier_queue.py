"""The barrier queue: transactions, and the requests that came behind one, in their order of arrival."""

from __future__ import annotations

from collections import deque

from ..protocol.operations import Operate
from .replicas import Replica
from .request import Request
from .transaction import Transaction


class BarrierQueue:
    def __init__(self) -> None:
        self._items: deque[Request | Transaction] = deque()

    def __bool__(self) -> bool:
        return bool(self._items)

    def requests(self) -> list[Request]:
        """The requests that are queued behind a transaction."""
        return [item for item in self._items if isinstance(item, Request)]

    def transactions(self) -> list[Transaction]:
        return [item for item in self._items if isinstance(item, Transaction)]

    def enqueue_behind(self, request: Request) -> int:
        """Returns the number of requests before it."""
        before = len(self.requests())
        self._items.append(request)
        return before

    def enqueue(self, transaction: Transaction) -> None:
        self._items.append(transaction)

    def take(self) -> Request | Transaction | None:
        return self._items.popleft() if self._items else None

    def remove(self, request: Request) -> bool:
        """Return whether ``request`` was queued."""
        if request not in self._items:
            return False
        self._items.remove(request)
        return True

    def cancel(self, request_id: str) -> list[Operate]:
        """Remove the operations of a client that has gone away."""
        cancelled = [item for item in self.transactions() if item.parts[0].request_id == request_id]
        for transaction in cancelled:
            self._items.remove(transaction)
        return [transaction.parts[0] for transaction in cancelled]

    def has_target(self, replica: Replica) -> bool:
        """Return whether a transaction for ``replica`` alone is queued."""
        return any(item.target is replica for item in self.transactions())

    def remove_target(self, replica: Replica) -> None:
        """Remove the transactions that are for ``replica`` alone."""
        for transaction in [item for item in self.transactions() if item.target is replica]:
            self._items.remove(transaction)
