"""When to ask again, and how long to wait before it.

A server that answers 429 or 503 with Retry-After has not done the work and says when it could. Nothing else is
retried: after any other answer, or none, the work may have been done.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass

from ..protocol.errors import SafelightError
from .errors import Unreachable


@dataclass(frozen=True, slots=True)
class Retries:
    """How often and for how many seconds in all one call may be tried again; ``Retries(0)`` never does.

    ``refused`` asks again also when nothing listens at the address, after ``refused_pause_s``.
    """

    count: int = 5
    total_s: float = 60.0
    refused: bool = False
    refused_pause_s: float = 0.5
    jitter: float = 0.25
    """Up to this part of a pause is added to it, so that clients that were turned away together come back apart."""

    def begin(self) -> Attempts:
        return Attempts(self)


class Attempts:
    """The retries of one call. Made when it starts."""

    def __init__(self, policy: Retries) -> None:
        self._policy = policy
        self._left = policy.count
        self._deadline = time.monotonic() + policy.total_s

    def pause_after(self, error: SafelightError) -> float:
        """Seconds to wait before the next attempt. Raises ``error`` when there is to be none."""
        wanted = self._wanted(error)
        if wanted is None or self._left <= 0:
            raise error
        pause = wanted * (1 + self._policy.jitter * random.random())
        if time.monotonic() + pause > self._deadline:
            raise error
        self._left -= 1
        return pause

    def _wanted(self, error: SafelightError) -> float | None:
        if isinstance(error, Unreachable):
            return self._policy.refused_pause_s if self._policy.refused else None
        return error.retry_after_s if error.status in (429, 503) else None
