"""A request as the scheduler keeps it, from its arrival to its terminal message."""

from __future__ import annotations

from dataclasses import dataclass

from ..protocol.generation import Generate


@dataclass(slots=True, eq=False)
class Request:
    """A request of the server, or one of its copies, and its state. Times are seconds of one monotonic clock."""

    generate: Generate
    number: int
    """Counts arrivals: the order among requests of equal priority."""
    arrived: float
    deadline: float
    nbytes: int
    """The bytes of everything that it carries."""
    replica: int | None = None
    """The replica that it was given to; ``None`` while it waits."""
    started: float | None = None
    pinned_to: int | None = None
    """The only replica that may run the request; ``None`` stands for any."""

    @property
    def id(self) -> str:
        return self.generate.request_id

    def is_named(self, name: str, *, exact: bool) -> bool:
        """True if ``name`` is its id or, unless ``exact``, the client's part of it."""
        return name == self.id or (not exact and name == self.id.rpartition(".")[0])

    def may_run_on(self, ready: frozenset[int]) -> bool:
        """Return whether one of the ``ready`` replicas may run the request."""
        return bool(ready) if self.pinned_to is None else self.pinned_to in ready

    @property
    def outputs(self) -> int:
        return len(self.generate.samples)

    def start(self, replica: int, now: float) -> None:
        assert self.replica is None, f"request {self.id} was started twice"
        self.replica = replica
        self.started = now

    def queue_s(self, now: float) -> float:
        """Seconds spent waiting, up to the start or, before it, up to ``now``."""
        return (now if self.started is None else self.started) - self.arrived
