"""Requests that come together start together: a leader without work waits a little for clients that ask again."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

from ...protocol.generation import Generate
from ...protocol.messages import ToWorker

PATIENCE = 1 / 16
"""The longest wait for one more request, as a part of the time that the last one took."""

MOST_SKIPPED = 64
"""Starts without a wait, at most, after waits in which nobody came."""

Receive = Callable[[float], Sequence[ToWorker]]
"""The messages that are there, or come within so many seconds."""


class Gathering:
    """Waits, before the first forward of new requests, for the clients whose outputs were just drawn.

    Clients that ask again as soon as they are answered come one by one, as their answers leave one by one. The first
    would be a step ahead of the others from its prompt to its picture, and each group would run its own forwards. The
    wait ends with the last client, and takes ``longest_s`` at most. After waits in which nobody came, the next 1, 3,
    7… starts are at once.
    """

    def __init__(self, longest_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._longest_s = longest_s
        self._clock = clock
        self._drawn = self._due = self._vain = self._skipped = 0
        self._grew = -math.inf

    def arrived(self, messages: Sequence[ToWorker], drawn: int) -> None:
        """Note what came while others run. ``drawn`` counts the requests since the start whose outputs were drawn."""
        if drawn != self._drawn:
            self._grew = self._clock()
        self._due, self._drawn = self._due + drawn - self._drawn, drawn
        self._due = max(0, self._due - sum(isinstance(message, Generate) for message in messages))

    def gather(
        self, messages: list[ToWorker], receive: Receive, *, drawn: int, took_s: float, together: int
    ) -> list[ToWorker]:
        """``messages``, which are requests, and those that are worth a wait: ``together`` at most.

        ``took_s`` are the seconds that drawing the last request took. Clients that have not come within as long again
        are not expected any more.
        """
        self.arrived((), drawn)
        expected, self._due = min(self._due, together), 0
        if self._clock() - self._grew > max(took_s, self._longest_s):
            expected = 0
        if len(messages) >= expected or not self._longest_s or self._skips():
            return messages
        gathered = self._wait(messages, receive, expected, took_s * PATIENCE)
        self._vain = 0 if len(gathered) > len(messages) else self._vain + 1
        return gathered

    def _wait(self, messages: list[ToWorker], receive: Receive, expected: int, patience_s: float) -> list[ToWorker]:
        until = self._clock() + self._longest_s
        while are_requests(messages) and len(messages) < expected:
            more = receive(min(patience_s, until - self._clock()))
            if not more:
                break
            messages = [*messages, *more]
        return messages

    def _skips(self) -> bool:
        self._skipped = (self._skipped + 1) % min(1 << self._vain, MOST_SKIPPED)
        return self._skipped != 0


def are_requests(messages: Sequence[ToWorker]) -> bool:
    return bool(messages) and all(isinstance(message, Generate) for message in messages)
