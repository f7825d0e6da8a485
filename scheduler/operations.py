"""Operations: one after the other, in their order of arrival among the requests, on every replica or on none.

Whatever arrives behind an operation is held in a line until it is done. A begun update is one operation of many parts.
Like the dispatcher, this decides from messages and an explicit ``now``, and leaves what is to be sent in the outbox.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from msgspec.structs import replace

from ..protocol.adapters import AdapterChange, AdapterState, RestoreAdapters, SetAdapters
from ..protocol.errors import Conflict, NotFound, SafelightError, Unavailable, from_info
from ..protocol.messages import Failed, FromScheduler, ToWorker
from ..protocol.operations import (
    Abort,
    Adapt,
    Begin,
    Broadcast,
    Commit,
    Export,
    Files,
    Join,
    Leave,
    Operate,
    Operated,
    Operation,
    Perform,
    Performed,
    Report,
    Settled,
    Sleep,
    Step,
    Update,
    Wake,
)
from .replicas import Replica, Replicas
from .request import Request
from .transaction import Running, Transaction

logger = logging.getLogger(__name__)

RETRY_S = 5.0


class Operations:
    """Owns the line and what every replica has been told to be.

    ``named`` tells the adapters that requests name. ``resume`` takes a request that is held no longer, ``end_all`` ends
    all requests that were accepted before, and ``drained`` says whether none of them is left.
    """

    def __init__(
        self,
        replicas: Replicas,
        to_server: Callable[[FromScheduler], None],
        to_replica: Callable[[int, ToWorker], None],
        *,
        journal: bool,
        first_adapters: SetAdapters | None = None,
        named: Callable[[], Iterable[str]] = lambda: (),
        resume: Callable[[Request], None],
        end_all: Callable[[SafelightError], None],
        drained: Callable[[], bool],
    ) -> None:
        self.version: str | None = None
        """The committed version; ``None`` before a replica has loaded."""
        self._base_version: str | None = None  # of the last that weights had, without adapters that came as tensors
        self.adapters = AdapterState()
        """Those that were committed."""
        self._first_adapters = first_adapters
        self._named = named
        self.asleep: set[str] = set()
        """The tags that replicas were told to let go of."""
        self._journal = journal
        self._replicas = replicas
        self._to_server = to_server
        self._to_replica = to_replica
        self._resume = resume
        self._end_all = end_all
        self._drained = drained
        self._changed: set[str] = set()  # modules that are not as the checkpoint has them
        self._behind: set[int] = set()  # replicas that wait to be brought to the committed version
        self._bare: set[int] = set()  # those of them that lack nothing but adapters
        self._recent: dict[str, None] = {}  # adapters, the one that was not used for longest first
        self._lost: set[str] = set()  # changed modules that no replica has any more
        self._in_doubt: dict[str, set[str]] = {}  # what all replicas were lost with while they committed it: modules
        self._commits = 0
        self._published = 0  # versions that were made of adapters
        self._gone: dict[int, int] = {}  # how many commits there were when a replica's last process was lost
        self._numbers = itertools.count(1)
        self._line: deque[Request | Transaction] = deque()
        self._current: Transaction | None = None

    @property
    def blocks(self) -> bool:
        """Whether a request that comes now is to be held."""
        return self._current is not None or bool(self._line)

    @property
    def lets_run(self) -> bool:
        """Whether requests that came before may still be started."""
        return self._current is None or not self._current.reached

    @property
    def next_turn(self) -> float:
        """When a begun update is given up, unless a part of it comes before; never while replicas work on one."""
        return math.inf if self._current is None or self._current.running is not None else self._current.deadline

    def held(self) -> Iterator[Request]:
        return (item for item in self._line if isinstance(item, Request))

    def hold(self, request: Request) -> int:
        """Put ``request`` in the line; returns how many requests are held before it."""
        before = sum(1 for _ in self.held())
        self._line.append(request)
        return before

    def forget(self, request: Request) -> bool:
        """Take ``request`` out of the line, if it is there."""
        if request not in self._line:
            return False
        self._line.remove(request)
        return True

    def add(self, part: Operate, now: float) -> None:
        """An operation has arrived."""
        operation = part.operation
        update_id = operation.update_id if isinstance(operation, Update | Commit | Abort) else None
        if update_id is None:
            begun = operation if isinstance(operation, Begin) else None
            self._line.append(Transaction(part.barrier, deque([part]), begun))
        elif self._current is not None and self._current.begun and self._current.begun.update_id == update_id:
            if isinstance(operation, Update) and (refusal := self._current.refusal_of(operation.source)):
                self._refuse(part, refusal)
            else:
                self._current.parts.append(part)
        else:
            self._refuse(part, NotFound(f"There is no begun update {update_id!r}; it ended, or never was."))
        self.advance(now)

    def cancel(self, request_id: str) -> None:
        """The client of an operation is gone. One that has not begun will not; one that has ends as it would have."""
        if not request_id:  # by which a server says hello; it is also what our own operations have
            return
        for item in list(self._line):
            if isinstance(item, Transaction) and item.parts[0].request_id == request_id:
                self._line.remove(item)
                self._part_from_trainer(item.parts[0])
        if self._current is not None:
            gone = [part for part in self._current.parts if part.request_id == request_id]
            self._current.parts = deque(part for part in self._current.parts if part.request_id != request_id)
            for part in gone:
                self._part_from_trainer(part)
            if not self._current.reached and not self._current.parts:
                self._current = None

    def answered(self, replica: int, message: Performed, now: float) -> None:
        """A replica has done a step."""
        running = self._current.running if self._current is not None else None
        if running is None or (message.number, message.step) != (running.number, running.step):
            return
        if replica not in running.expected:  # the last words of a process that is gone
            return
        running.expected.remove(replica)
        running.reports[replica] = message.report
        if message.error is not None and (running.error is None or replica == min(running.reports)):
            running.error, running.failed = from_info(message.error), message.report
        self.advance(now)

    def lost(self, replica: Replica, now: float) -> None:
        """A replica's process is gone, and its part in what is being done with it."""
        self._behind.discard(replica.number)
        self._bare.discard(replica.number)
        self._gone[replica.number] = self._commits
        of_it = [item for item in self._line if isinstance(item, Transaction) and item.only == replica.number]
        for transaction in of_it:
            self._line.remove(transaction)
        if self._changed and not any(self._has_committed(other) for other in self._replicas if other is not replica):
            self._lost = set(self._changed)
        if self._current is None:
            return
        if self._current.replicas is not None:
            self._current.replicas.discard(replica.number)
        running = self._current.running
        if running is not None and replica.number in running.replicas:
            self._go_on_without(replica.number, running)
        self.advance(now)

    def _go_on_without(self, number: int, running: Running) -> None:
        """What is to be undone or committed is so by the others; whoever keeps the journal, or votes, is missed."""
        missed = number in running.expected if running.step == "journal" else running.step not in ("commit", "rollback")
        if missed and running.error is None:
            running.error = Unavailable(
                f"Replica {number} was lost; on the others everything is as it was.", retry_after_s=RETRY_S
            )
        running.replicas.discard(number)
        running.expected.discard(number)
        running.reports.pop(number, None)

    def came(self, replica: Replica, now: float) -> None:
        """A replica has loaded its model. Unless it is as the others are and will be, it is not ready yet."""
        assert replica.model is not None, "it has just said what it serves"
        version = replica.model.weight_version
        self._settle_doubt(replica, version)
        in_progress = self._current is not None and self._current.reached
        if self._has_all(replica) and self._adapters_to_be is None and not in_progress:
            self._is_current(replica)
        else:
            if self._lost:
                self._lost = set(self._changed)  # also what was sent again since: this one has nothing of it
            self._behind.add(replica.number)
            replica.wait_for(f"is to be brought to the weights of version {self.version}")
            self._bring_up(replica.number)
        self.advance(now)

    def _settle_doubt(self, replica: Replica, version: str) -> None:
        """A replica comes with ``version``: take it up if it is the first, or all were lost in its commit.

        Unless another has weights without that commit by now: then it is to be undone in this one.
        """
        if self._journal and version in self._in_doubt:
            self._changed |= self._in_doubt.pop(version)
            if not any(self._has_weights(other) for other in self._replicas if other is not replica):
                self.version = self._base_version = version
        if self.version is None:
            self.version = self._base_version = version

    def advance(self, now: float) -> None:
        """Do whatever can be done now."""
        while self._step(now):
            pass

    def _step(self, now: float) -> bool:
        """One thing; says whether there may be another."""
        transaction = self._current
        if transaction is None:
            return self._take_next(now)
        if transaction.running is not None:
            return not transaction.running.expected and self._finish_step(transaction, transaction.running, now)
        if not transaction.reached:
            transaction.reached = transaction.barrier == "in_place" or self._drained()
            return transaction.reached
        if transaction.parts:
            return self._begin_part(transaction, transaction.parts.popleft(), now)
        if transaction.begun is None:
            self._current = None
            return True
        gone = transaction.replicas is not None and not transaction.replicas
        if gone or now >= transaction.deadline:
            self._give_up(transaction)
            return True
        return False

    def _take_next(self, now: float) -> bool:
        if not self._line:
            return False
        item = self._line.popleft()
        if isinstance(item, Request):
            self._resume(item)
            return True
        self._current = item
        if item.barrier == "abort":
            self._end_all(Conflict("The request was ended to make way for a change of the weights. Send it again."))
        return True

    def _begin_part(self, transaction: Transaction, part: Operate, now: float) -> bool:
        operation = part.operation
        if transaction.only is not None:
            return self._begin_for_one(transaction, operation, transaction.only)
        if isinstance(operation, Settled):
            self._operated(part, {}, self.version)
            return True
        replicas = self._participants(transaction, operation)
        if not replicas:
            self._fail(part, Unavailable(f"No replica is ready: {self._replicas.reasons()}.", retry_after_s=RETRY_S))
            if transaction.begun is not None:
                self._end(transaction)
            return True
        if isinstance(operation, Adapt):
            if replicas <= self._behind:
                self._fail(
                    part, Unavailable("No replica has the weights that adapters are for.", retry_after_s=RETRY_S)
                )
                return True
            operation = self._with_recent(operation)
        transaction.gives_time(now)
        if isinstance(operation, Begin):
            self._operated(part, {}, self.version)
            return True
        if isinstance(operation, Commit) and (refusal := self._refusal_to_commit(transaction, operation)) is not None:
            self._fail(part, refusal)
            return True
        steps: dict[type[Any], Step] = {Commit: "commit", Abort: "rollback"}
        step = steps.get(type(operation), "prepare")
        transaction.running = Running(part, next(self._numbers), step, set(replicas))
        if isinstance(operation, Commit):
            self._end_well(transaction, transaction.running)
        else:
            self._order(transaction.running, step, operation)
        return True

    def _begin_for_one(self, transaction: Transaction, operation: Operation, number: int) -> bool:
        """Make replica ``number`` as the others are by now; there is nothing to do where it is, or is gone."""
        replica, does_it = self._replicas.get(number), number
        assert replica is not None, "it came"
        if isinstance(operation, Sleep):
            operation = Sleep(sorted(self.asleep))
            if not self.asleep or not self._has_committed(replica):
                return True
        elif number not in self._behind:
            return True
        elif isinstance(operation, Export):
            giver = self._giver()
            if number in self._bare or self._has_all(replica):
                if (change := self._adapters_to_be) is None:
                    self._is_current(replica)
                    return True
                self._bare.add(number)
                operation, giver = Adapt(change), number
            elif giver is None:
                self._wait_for_lost(replica)
                return True
            else:
                operation = Export(sorted(self._changed), f"replica-{number}-{next(self._numbers)}")
            does_it = giver
        transaction.running = Running(Operate("", operation), next(self._numbers), "prepare", {does_it})
        self._order(transaction.running, "prepare", operation)
        return True

    def _giver(self) -> int | None:
        """A replica that has the committed weights, rather one that gives signs of life."""
        having = [replica for replica in self._replicas if self._has_weights(replica)]
        first = min(having, key=lambda replica: (replica.state != "ready", replica.number), default=None)
        return None if first is None else first.number

    def _participants(self, transaction: Transaction, operation: Operation) -> set[int]:
        """Those that have what was committed; where none does, those that came without, so that it can be sent again.

        One that is silent for now may serve again, so that it is not left out. Where some lack nothing but adapters,
        an update is for these, and the others get it from them.
        """
        if transaction.replicas is None:
            having = {replica.number for replica in self._replicas if self._has_committed(replica)}
            updates = isinstance(operation, Update | Begin)
            bare = {number for number in self._behind if updates and self._have_weights([number])}
            chosen = having or bare or set(self._behind)
            if updates and not having and not bare and not self._lost:  # who had all could not be given its adapters
                self._lost = set(self._changed)
            if transaction.begun is not None:
                transaction.replicas = chosen
            return chosen
        return transaction.replicas

    def _refusal_to_commit(self, transaction: Transaction, commit: Commit) -> SafelightError | None:
        return transaction.refusal_to_end(commit) or self._cannot_replace(transaction, transaction.replicas or set())

    def _cannot_replace(self, transaction: Transaction, replicas: set[int]) -> SafelightError | None:
        """Why what came cannot stand in for weights that were lost, where the replicas are those that lost them."""
        partly = sorted((self._lost & set(transaction.written)) - transaction.complete)
        if partly and transaction.only is None and not self._have_weights(replicas):
            return Conflict(
                f"The weights of version {self.version} were lost; send every tensor of {', '.join(partly)} at once."
            )
        return None

    def _order(self, running: Running, step: Step, operation: Operation | None = None) -> None:
        """Have all that take part do ``step``; the journal is kept by one of them."""
        first = min(running.replicas)
        running.step, running.expected = step, {first} if step == "journal" else set(running.replicas)
        running.reports.clear()
        version = running.version or None
        for number in sorted(running.expected):
            leads = number == first
            order = Perform(number=running.number, step=step, leads=leads, operation=operation, weight_version=version)
            self._to_replica(number, order)

    def _end_well(self, transaction: Transaction, running: Running) -> None:
        """Commit what the replicas have written, once it stands in the journal."""
        own = running.part.operation.weight_version if isinstance(running.part.operation, Update) else None
        begun = transaction.begun.weight_version if transaction.begun is not None else None
        running.version = own or begun or self._next_version()
        transaction.running = running
        # The journal of a replica that is brought up too: it came with one that had missed a commit.
        self._order(running, "journal" if self._journal else "commit")

    def _next_version(self) -> str:
        current = self.version or ""
        return str(int(current) + 1) if current.isdecimal() else str(self._commits + self._published + 1)

    def _finish_step(self, transaction: Transaction, running: Running, now: float) -> bool:
        transaction.running = None
        transaction.gives_time(now)
        operation, step = running.part.operation, running.step
        if running.error is not None and step != "commit":
            self._undo(transaction, running)
            self._fail(running.part, running.error, running.failed)
            if transaction.only in self._behind:
                self._try_again(transaction.only, running)
        elif step == "journal":
            transaction.running = running
            self._order(running, "commit")
        elif step == "commit" and isinstance(operation, Adapt):
            self._adapted(transaction, running)
        elif step == "commit":
            self._committed(transaction, running)
        elif isinstance(operation, Update | Adapt) and step == "prepare":
            transaction.running = running
            self._order(running, "write")
        elif isinstance(operation, Adapt):
            running.version = self.version or ""
            if operation.publishes:
                running.version = operation.weight_version or self._next_version()
            transaction.running = running
            self._order(running, "commit")
        elif isinstance(operation, Update):
            self._written(transaction, running)
        else:
            self._done(transaction, running)
        return True

    def _written(self, transaction: Transaction, running: Running) -> None:
        for report in running.reports.values():
            transaction.took(report)
        if transaction.begun is not None or not transaction.written:  # an empty part is legal, and changes nothing
            self._operated(running.part, running.reports, self.version)
            return
        if (refusal := self._cannot_replace(transaction, running.replicas)) is not None:
            self._undo(transaction, running)
            self._fail(running.part, refusal)
            return
        self._end_well(transaction, running)

    def _undo(self, transaction: Transaction, running: Running) -> None:
        """Have the replicas let go of what they prepared or joined, undo what they wrote, and wake up."""
        operation = running.part.operation
        if isinstance(operation, Sleep) and transaction.only is None:
            self._order_unasked(running.replicas, "prepare", Wake(sorted(set(operation.tags) - self.asleep)))
        if not isinstance(operation, Update | Commit | Join | Adapt):
            return
        step: Step = "release" if running.step == "prepare" else "rollback"
        self._order_unasked(running.replicas, step)
        if step == "rollback":
            self._end(transaction)

    def _order_unasked(self, numbers: set[int], step: Step, operation: Operation | None = None) -> None:
        """Have replicas put back what was; nobody waits for that, as they do what they are told in its order."""
        number = next(self._numbers)
        for replica in sorted(numbers):
            self._to_replica(replica, Perform(number=number, step=step, leads=False, operation=operation))

    def _committed(self, transaction: Transaction, running: Running) -> None:
        if not running.reports:
            if transaction.only is None:
                self._in_doubt = {running.version: set(transaction.written)}
            self._fail(running.part, running.error or Unavailable("Every replica was lost.", retry_after_s=RETRY_S))
            self._end(transaction)
            return
        had_weights = self._have_weights(running.reports)
        for number, report in running.reports.items():
            if (replica := self._replicas.get(number)) is not None and report.weight_version is not None:
                replica.has_version(report.weight_version)
                if transaction.only is None:
                    self.version = self._base_version = report.weight_version
        if transaction.only is None:
            self._commits += 1
            self._bare.clear()
            self._in_doubt.clear()
            self._changed.update(transaction.written)
        was_lost = bool(self._lost)
        self._lost = self._lost - transaction.complete if transaction.only is None and not had_weights else set()
        for number in sorted(set(running.reports) & self._behind) if not self._lost else ():
            if (replica := self._replicas.get(number)) is None:
                continue
            if self._adapters_to_be is not None:
                self._bare.add(number)
                self._bring_up(number)
            else:
                self._is_current(replica)
        if was_lost and not self._lost:
            self._bring_up(*sorted(self._behind))
        self._operated(running.part, running.reports, self.version)
        self._end(transaction)

    def _adapted(self, transaction: Transaction, running: Running) -> None:
        """The adapters are others now; what was done for one replica alone makes it like the others."""
        report = running.reports.get(min(running.reports, default=-1))
        if report is None:
            self._fail(running.part, running.error or Unavailable("Every replica was lost.", retry_after_s=RETRY_S))
            self._end(transaction)
            return
        assert report.adapters is not None, "a commit of adapters brings them"
        self.adapters, self._first_adapters = report.adapters, None
        self._published += self.version != running.version
        self.version = running.version
        for number in running.reports:
            if (changed := self._replicas.get(number)) is not None:
                changed.has_version(running.version)
        replica = None if transaction.only is None else self._replicas.get(transaction.only)
        if replica is not None and replica.number in self._behind:
            self._is_current(replica)
        change = running.part.operation.change if isinstance(running.part.operation, Adapt) else None
        self.used(change.nicknames if isinstance(change, SetAdapters) else ())
        self._operated(running.part, running.reports, self.version)
        self._end(transaction)

    @property
    def _adapters_to_be(self) -> AdapterChange | None:
        """By which a replica that has loaded gets the adapters that the others have, or that all begin with.

        None may be left in a version that was published with some.
        """
        if self.adapters.loaded or self.version != self._base_version:
            return RestoreAdapters(self.adapters)
        return self._first_adapters

    def used(self, adapters: Iterable[str]) -> None:
        """A request names these."""
        for name in adapters:
            if name in self.adapters.loaded:
                self._recent.pop(name, None)
                self._recent[name] = None

    def _with_recent(self, operation: Adapt) -> Adapt:
        if not isinstance(operation.change, SetAdapters):
            return operation
        self._recent = {name: None for name in self._recent if name in self.adapters.loaded}
        change = replace(operation.change, recent=list(self._recent), busy=sorted(set(self._named())))
        return replace(operation, change=change)

    def _done(self, transaction: Transaction, running: Running) -> None:
        operation, reports = running.part.operation, running.reports
        if isinstance(operation, Sleep) and transaction.only is None:
            self.asleep.update(operation.tags)
        elif isinstance(operation, Wake):
            self.asleep.difference_update(operation.tags)
        elif isinstance(operation, Export):
            (report,) = reports.values() or (Report(),)
            source = Files(report.files, delete=True)
            transaction.parts.append(Operate("", Update(source=source, weight_version=self._base_version)))
        self._operated(running.part, reports, self.version)
        if isinstance(operation, Abort):
            self._end(transaction)

    def _give_up(self, transaction: Transaction) -> None:
        """End a begun update of which nothing has been heard for too long, or whose replicas are all lost."""
        assert transaction.begun is not None
        logger.warning("the update %s is aborted: nothing more came", transaction.begun.update_id)
        self._order_unasked(transaction.replicas or set(), "rollback")
        self._end(transaction)

    def _end(self, transaction: Transaction) -> None:
        """Nothing more is done in ``transaction``; parts that came meanwhile are for an update that is over."""
        self._current = None
        for part in transaction.parts:
            self._refuse(part, NotFound("The update that this was a part of has ended."))
        transaction.parts.clear()

    def _bring_up(self, *numbers: int) -> None:
        """Have a replica that holds what was committed write it out, and these read it, one after the other."""
        for number in numbers:
            self._line.append(Transaction("in_place", deque([Operate("", Export([], ""))]), only=number))

    def _try_again(self, number: int, running: Running) -> None:
        """The replica that was to give ``number`` the weights is lost; or it cannot be brought up, and starts again."""
        replica = self._replicas.get(number)
        if running.failed is None:
            self._bring_up(number)
        elif replica is not None and running.error is not None:
            replica.failed(f"could not be brought to version {self.version}: {running.error.message}")

    def _wait_for_lost(self, replica: Replica) -> None:
        self._lost = set(self._changed)
        replica.wait_for(
            f"the weights of version {self.version} were lost with the last process that had them: "
            f"update {', '.join(sorted(self._lost))} again, or restart the server"
        )

    def _is_current(self, replica: Replica) -> None:
        """It has all that was committed, and can give it to those that wait for it."""
        self._behind.discard(replica.number)
        self._bare.discard(replica.number)
        replica.waits_no_longer()
        if self.asleep:
            self._line.append(Transaction("in_place", deque([Operate("", Sleep([]))]), only=replica.number))
        if self._lost:
            self._lost = set()
            self._bring_up(*sorted(self._behind))

    def _has_all(self, replica: Replica) -> bool:
        """Whether what a replica came with is what was committed: without updates the checkpoint, else the journal.

        What was committed while it started may have the name of what the journal had before.
        """
        if not self._changed:
            return not self._journal or self._is_named(replica)
        return self._journal and self._is_named(replica) and self._gone.get(replica.number, 0) == self._commits

    def _is_named(self, replica: Replica) -> bool:
        return replica.model is not None and replica.model.weight_version == self._base_version

    def _have_weights(self, numbers: Iterable[int]) -> bool:
        return any(self._has_weights(replica) for replica in self._replicas if replica.number in numbers)

    def _has_weights(self, replica: Replica) -> bool:
        """Whether it has the committed weights; it may wait for adapters, or for its turn to be found complete."""
        waits = replica.number in self._behind and replica.state == "starting"
        return self._has_committed(replica) or (waits and (replica.number in self._bare or self._has_all(replica)))

    def _has_committed(self, replica: Replica) -> bool:
        return replica.state in ("ready", "stalled") and replica.number not in self._behind

    def _operated(self, part: Operate, reports: dict[int, Report], version: str | None) -> None:
        if part.request_id:
            told = dict(sorted(reports.items()))
            self._to_server(Operated(part.request_id, told, version, sorted(self.asleep), self.adapters))

    def _refuse(self, part: Operate, error: SafelightError) -> None:
        """Of a part that no replica has heard of."""
        self._fail(part, error)
        self._part_from_trainer(part)

    def _part_from_trainer(self, part: Operate) -> None:
        """Leave the group over which a trainer sends what nobody receives: it would wait, or be taken for the next."""
        match part.operation:
            case Update(source=Broadcast(group=group)):
                leave = Operate("", Leave(group))
                if self._current is not None and self._current.begun is not None:
                    self._current.parts.append(leave)
                else:
                    self._line.append(Transaction("in_place", deque([leave])))

    def _fail(self, part: Operate, error: SafelightError, report: Report | None = None) -> None:
        if part.request_id:
            self._to_server(Failed(part.request_id, error.info(), report))
        else:
            logger.error("%s failed: %s", type(part.operation).__name__, error.message)
