"""When to retry a call, and how long to wait first.

A server that answers 429 or 503 with Retry-After has not done the work. Nothing else is retried: after any other
reply, or none, the server may have done the work.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass

from ..protocol.errors import SafelightError
from .errors import Unreachable


@dataclass(frozen=True, slots=True)
class Retries:
    """How often, and for how many seconds in total, one call is retried; ``Retries(0)`` never retries.

    With ``refused``, a call is also retried, after ``refused_pause_s``, if nothing listens at the address.
    """

    count: int = 5
    total_s: float = 60.0
    refused: bool = False
    refused_pause_s: float = 0.5
    jitter: float = 0.25
    """Up to this fraction is added to a pause, so that clients refused together do not retry together."""

    def begin(self) -> Attempts:
        return Attempts(self)


class Attempts:
    """The retries of one call; created when the call starts."""

    def __init__(self, policy: Retries) -> None:
        self._policy = policy
        self._left = policy.count
        self._deadline = time.monotonic() + policy.total_s

    def pause_after(self, error: SafelightError) -> float:
        """Seconds to wait before the next attempt. Raises ``error`` if no attempt is left."""
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
