"""Generation that clients have paused, and the answers that wait for what still runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from ..protocol.errors import Conflict, SafelightError
from ..protocol.operations import Barrier, Pause, SetPaused
from .outbox import Outbox
from .replicas import Replica, Replicas
from .replies import Replies


@dataclass(slots=True, eq=False)
class Pauses:
    _replicas: Replicas
    _replies: Replies
    _outbox: Outbox
    _end_all: Callable[[SafelightError], None]
    mode: Barrier | None = None
    """How requests that run when generation is paused end; ``None`` while it is not paused."""
    _unanswered: list[Pause] = field(default_factory=list)

    @property
    def stops_forwards(self) -> bool:
        """Replicas make no forward, so nothing that runs ends."""
        return self.mode == "in_place"

    def pause(self, message: Pause) -> None:
        if message.mode == "abort":
            self._end_all(Conflict("The request was aborted, as generation is paused."))
        if "in_place" in (message.mode, self.mode):
            self._tell_all(message.mode == "in_place")
        self.mode = message.mode
        self._unanswered.append(message)

    def resume(self, request_id: str) -> None:
        if self.stops_forwards:
            self._tell_all(False)
        self.mode = None
        self._replies.at_once(request_id)

    def started(self, replica: Replica) -> None:
        """A replica pauses as the others do."""
        if self.stops_forwards:
            self._outbox.order(replica.number, SetPaused(True))

    def answer(self) -> None:
        """Answer once what was to end before the pause has ended, or once generation goes on again."""
        if self._unanswered and (self.mode in (None, "in_place") or self._replicas.are_idle):
            for pause in self._unanswered:
                self._replies.at_once(pause.request_id)
            self._unanswered.clear()

    def _tell_all(self, paused: bool) -> None:
        loaded = [replica.number for replica in self._replicas if replica.has_loaded]  # also those that are stale
        self._outbox.order_each(loaded, SetPaused(paused))
