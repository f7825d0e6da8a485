"""Messages to send, in order, and the numbers of the orders among them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field

from ..protocol.messages import FromScheduler, ToWorker
from ..protocol.operations import OperationStep, Perform


@dataclass
class Messages:
    to_server: list[FromScheduler] = field(default_factory=list)
    to_replicas: list[tuple[int, ToWorker]] = field(default_factory=list)


class Outbox:
    def __init__(self) -> None:
        self._messages = Messages()
        self._numbers = itertools.count(1)

    def take(self) -> Messages:
        messages, self._messages = self._messages, Messages()
        return messages

    def next_number(self) -> int:
        return next(self._numbers)

    def tell_server(self, message: FromScheduler) -> None:
        self._messages.to_server.append(message)

    def tell_server_first(self, message: FromScheduler) -> None:
        """Put ``message`` before all others since :meth:`take`."""
        self._messages.to_server.insert(0, message)

    def order(self, replica: int, order: ToWorker) -> None:
        self._messages.to_replicas.append((replica, order))

    def order_each(self, replicas: Iterable[int], order: ToWorker) -> None:
        self._messages.to_replicas += [(replica, order) for replica in sorted(replicas)]

    def undo(self, replicas: Iterable[int], step: OperationStep) -> None:
        """Order an undo without waiting for it; replicas execute orders in sequence."""
        self.order_each(replicas, Perform(number=self.next_number(), step=step, is_primary=False))
