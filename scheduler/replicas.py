"""The replicas: which incarnation of each is alive, whether it takes work, and how much it holds."""

from __future__ import annotations

import logging
from collections.abc import Container, Iterator
from typing import Literal

from msgspec.structs import replace

from ..protocol.config import Config
from ..protocol.replicas import Heartbeat, ModelInfo, ReplicaStats, ReplicaStatus

logger = logging.getLogger(__name__)

State = Literal["starting", "ready", "failed", "lost", "stalled"]


_LEVELS = {
    "starting": logging.DEBUG,  # the worker itself logs each phase
    "ready": logging.INFO,
    "failed": logging.WARNING,
    "lost": logging.WARNING,
    "stalled": logging.WARNING,
}


class Replica:
    """One replica through all its incarnations (processes with different pids).

    A replica *has* a request from its dispatch until the worker answers with ``Result`` or ``Failed``, even if it
    ended for the server long before: it occupies the worker. The transitions that end an incarnation return the
    ids of the requests that were lost with it.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self.state: State = "starting"
        self.message = "waiting for its process"
        self.pid: int | None = None
        self.model: ModelInfo | None = None
        self.stats = ReplicaStats()
        self.outstanding = 0
        self._assigned: dict[str, int] = {}
        self._last_sign = 0.0  # of the process
        self._last_progress = 0.0  # of its loop
        self._progress = 0  # as the last heartbeat counted it
        self._forward_began: float | None = None  # of the current forward
        self._exited = False  # the exit of `pid` was reported
        self._exits_due = 0  # exits of earlier incarnations that were not reported yet

    @property
    def is_gone(self) -> bool:
        """The end of its last process was reported."""
        return self._exited

    @property
    def has_loaded(self) -> bool:
        """Its process is there and takes orders, though maybe no requests yet."""
        return self.model is not None and not self._exited

    def follows_another(self, pid: int) -> bool:
        """Return whether ``pid`` is a new process, in the place of one whose end was not reported yet."""
        return self.pid not in (None, pid) and not self._exited

    def loading(self, pid: int, stage: str, now: float) -> list[str]:
        """A worker reports the ``stage`` of its start."""
        if self._is_dead(pid):
            return []
        lost = self._meet(pid, now)
        self._become("starting", stage)
        return lost

    def ready(self, pid: int, model: ModelInfo, now: float) -> list[str]:
        """A worker takes requests from now on."""
        if self._is_dead(pid):
            return []
        lost = self._meet(pid, now)
        self.model = model
        self._become("ready", "ready")
        return lost

    def wait_for(self, message: str) -> None:
        """It has loaded, and takes no requests until :meth:`waits_no_longer`."""
        self._become("starting", message)

    def waits_no_longer(self) -> None:
        if self.state == "starting":
            self._become("ready", "ready")

    def has_version(self, weight_version: str) -> None:
        """It has other weights from now on."""
        if self.model is not None:
            self.model = replace(self.model, weight_version=weight_version)

    def failed(self, message: str) -> list[str]:
        """A worker says that it cannot start."""
        self._become("failed", message)
        return self._drop_assigned()

    def exited(self, message: str) -> list[str]:
        """The supervisor saw a process end: the current one, unless an earlier one's end is still to be reported."""
        if self._exits_due:
            self._exits_due -= 1
            return []
        if self.state != "failed" or self._exited:  # a worker's own reason says more than its exit status
            self._become("lost", message)
        self._exited = True
        return self._drop_assigned()

    def spoke(self, now: float) -> None:
        """The worker's loop sent something."""
        self.lives(now)
        self._went_on(now)

    def lives(self, now: float) -> None:
        """The worker's process sent something, though its loop may hang."""
        self._last_sign = now

    def heartbeat(self, beat: Heartbeat, now: float) -> None:
        """The worker's process lives, and its loop has done ``beat.progress`` so far.

        Before a new process has measured any costs, those that the last one measured still hold.
        """
        if self._exited or beat.pid != self.pid:  # an earlier process's, or one's that is yet to say that it loads
            return
        self.stats = beat.stats if beat.stats.costs else replace(beat.stats, costs=self.stats.costs)
        self._last_sign = now
        if beat.progress != self._progress:
            self._progress = beat.progress
            self._went_on(now)
        self._forward_began = None if beat.forward_s is None else now - beat.forward_s

    def check_stall(self, now: float, config: Config) -> None:
        """Give a ready replica no more work when its process is silent, or its loop stands still for too long."""
        if self.state == "ready" and (why := self._stall(now, config)) is not None:
            self._become("stalled", why)

    def _stall(self, now: float, config: Config) -> str | None:
        silent_s, still_s = now - self._last_sign, now - self._last_progress
        forward_s = None if self._forward_began is None else now - self._forward_began
        if silent_s >= config.stall_timeout_s:
            return f"no heartbeat for {silent_s:.0f} s"
        if forward_s is not None and forward_s >= config.forward_timeout_s:
            return f"one forward has run for {forward_s:.0f} s, and --forward-timeout-s is {config.forward_timeout_s:g}"
        if forward_s is None and still_s >= config.stall_timeout_s:
            return f"no progress for {still_s:.0f} s, though no forward is running"
        return None

    def _went_on(self, now: float) -> None:
        self._last_progress = now
        self._forward_began = None
        if self.state == "stalled":
            self._become("ready", "ready")

    def assign(self, request_id: str, outputs: int) -> None:
        assert request_id not in self._assigned, f"replica {self.number} already has request {request_id}"
        self._assigned[request_id] = outputs
        self.outstanding += outputs

    def has(self, request_id: str) -> bool:
        return request_id in self._assigned

    def release(self, request_id: str) -> None:
        """The worker is done with a request; one that it does not have (any more) is ignored."""
        self.outstanding -= self._assigned.pop(request_id, 0)

    def has_room(self, outputs: int, max_running: int) -> bool:
        """Return whether ``outputs`` fit under the cap. More than the cap are allowed if they are alone."""
        return self.outstanding == 0 or self.outstanding + outputs <= max_running

    def status(self) -> ReplicaStatus:
        return ReplicaStatus(
            replica=self.number,
            state=self.state,
            message=self.message,
            pid=self.pid,
            outstanding=self.outstanding,
            stats=self.stats,
            model=self.model,
        )

    def _is_dead(self, pid: int) -> bool:
        """Return whether a message is the last of a process whose exit was reported before it was read."""
        return self._exited and pid == self.pid

    def _meet(self, pid: int, now: float) -> list[str]:
        """Note a message of process ``pid``; a new pid means that the one before is gone."""
        self._last_sign = self._last_progress = now
        if pid == self.pid:
            return []
        if self.pid is not None and not self._exited:
            self._exits_due += 1
        self.pid, self.model, self._exited = pid, None, False
        self.stats = ReplicaStats(costs=self.stats.costs)
        return self._drop_assigned()

    def _drop_assigned(self) -> list[str]:
        lost = list(self._assigned)
        self._assigned.clear()
        self.outstanding = 0
        return lost

    def _become(self, state: State, message: str) -> None:
        if (state, message) != (self.state, self.message):
            why = "" if state in ("failed", message) else f": {message}"  # why a start failed, the server says, once
            logger.log(_LEVELS[state], "replica %d (pid %s) is %s%s", self.number, self.pid, state, why)
        self.state, self.message = state, message


class Replicas:
    """All replicas of the server, numbered from 0."""

    def __init__(self, count: int) -> None:
        self._replicas = [Replica(number) for number in range(count)]

    def get(self, number: int) -> Replica | None:
        return self._replicas[number] if 0 <= number < len(self._replicas) else None

    def __iter__(self) -> Iterator[Replica]:
        return iter(self._replicas)

    @property
    def ready(self) -> frozenset[int]:
        """The numbers of the ready replicas."""
        return frozenset(replica.number for replica in self._replicas if replica.state == "ready")

    @property
    def are_idle(self) -> bool:
        """No replica has any request."""
        return all(replica.outstanding == 0 for replica in self._replicas)

    def least_loaded(self, pinned_to: int | None = None, *, without: Container[int] = ()) -> Replica | None:
        """The ready replica with the fewest outstanding outputs, ``without`` some; if ``pinned_to`` is given, that one
        if it is ready."""
        among = self._replicas if pinned_to is None else self._replicas[pinned_to : pinned_to + 1]
        ready = (replica for replica in among if replica.state == "ready" and replica.number not in without)
        return min(ready, key=lambda replica: replica.outstanding, default=None)

    def have(self, request_id: str) -> bool:
        return any(replica.has(request_id) for replica in self._replicas)

    def check_stalls(self, now: float, config: Config) -> None:
        for replica in self._replicas:
            replica.check_stall(now, config)

    def reasons(self) -> str:
        """Why each replica is not ready, in one sentence for an error's message."""
        return "; ".join(
            f"replica {replica.number} is {replica.state}: {replica.message}" for replica in self._replicas
        )

    def states(self) -> list[tuple[State, str, int | None, ModelInfo | None]]:
        """The part of the status that is pushed when it changes."""
        return [(replica.state, replica.message, replica.pid, replica.model) for replica in self._replicas]

    def status(self) -> list[ReplicaStatus]:
        return [replica.status() for replica in self._replicas]
