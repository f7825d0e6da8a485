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

from msgspec.structs import replace

from ..protocol.adapters import AdapterChange, SetAdapters
from ..protocol.config import Config
from ..protocol.errors import Conflict, NotFound, SafelightError, Unavailable
from ..protocol.generation import Failed
from ..protocol.messages import FromScheduler, ToWorker
from ..protocol.operations import (
    Abort,
    Adapt,
    Begin,
    Commit,
    Export,
    Join,
    Leave,
    Operate,
    Operation,
    Perform,
    Save,
    Settled,
    Sleep,
    Step,
    Update,
    Wake,
)
from ..protocol.replicas import Hold
from ..protocol.reports import Operated, Performed, Report
from ..protocol.tensor_sources import Broadcast, Files
from .backlog import Backlog
from .committed import Committed, Turns, Weights
from .groups import Groups
from .on_disk import is_on_disk, origins
from .replicas import Replica, Replicas
from .request import Request
from .transaction import RETRY_S, Running, Transaction, of_our_own

logger = logging.getLogger(__name__)


class Operations:
    """Owns the line, and has replicas do what stands in it.

    What they have is ``committed``, which decides what those that come late are given. ``named`` tells the adapters
    that requests name. ``resume`` takes a request that is held no longer, ``end_all`` ends all requests that were
    accepted before, and ``drained`` says whether none of them is left.
    """

    def __init__(
        self,
        replicas: Replicas,
        committed: Committed,
        to_server: Callable[[FromScheduler], None],
        to_replica: Callable[[int, ToWorker], None],
        *,
        config: Config,
        named: Callable[[], Iterable[str]] = lambda: (),
        resume: Callable[[Request], None],
        end_all: Callable[[SafelightError], None],
        drained: Callable[[], bool],
    ) -> None:
        self.asleep: set[str] = set()
        """The tags that replicas were told to let go of."""
        self._replicas = replicas
        self._committed = committed
        self._to_server = to_server
        self._to_replica = to_replica
        self._named = named
        self._resume = resume
        self._end_all = end_all
        self._drained = drained
        self._numbers = itertools.count(1)
        self._line: deque[Request | Transaction] = deque()
        self._current: Transaction | None = None
        self._longest_s = config.max_update_hold_s
        self._given_up: dict[str, str] = {}  # the update that was last, and why
        self._backlog = Backlog(config)
        self._groups = Groups(self._numbers, to_replica, done=self._operated, fail=self._fail)

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
        idle = self._current is not None and self._current.running is None
        return min(self._groups.next_turn, self._current.deadline if self._current and idle else math.inf)

    def hold_at(self, now: float) -> Hold | None:
        """What holds back everything behind it, if anything does."""
        transaction = self._current
        if transaction is None:
            return None
        working = transaction.running is not None or bool(transaction.parts)
        begun = transaction.begun
        part = transaction.running.part if transaction.running is not None else next(iter(transaction.parts), None)
        return Hold(
            operation=type(begun or (part.operation if part is not None else None)).__name__,
            phase="draining" if not transaction.reached else "working" if working else "open",
            held_s=max(0.0, now - transaction.since),
            update_id=begun.update_id if begun is not None else None,
            ends_in_s=max(0.0, transaction.deadline - now) if math.isfinite(transaction.deadline) else None,
        )

    @property
    def holder(self) -> str | None:
        """The begun update that holds back everything behind it."""
        return self._current.begun.update_id if self._current is not None and self._current.begun else None

    def waiting(self) -> list[Operate]:
        """Clients' operations that have not begun yet, and parts of a begun update."""
        transactions = [item for item in self._line if isinstance(item, Transaction)]
        behind = [*([self._current] if self._current is not None else []), *transactions]
        return [part for transaction in behind for part in transaction.parts if part.request_id]

    def waiting_bytes(self) -> int:
        return self._backlog.nbytes_among(self.waiting())

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
        match part.operation:
            case Join() as join:
                self._groups.join(part, join, self._committed.participants(to_update=False), now)
            case Leave():
                self._leave(part, part.operation)
            case (
                Update(update_id=str(update_id))
                | Save(update_id=str(update_id))
                | Commit(update_id=update_id)
                | Abort(update_id=update_id)
            ):
                self._add_to_begun(part, update_id)
            case operation:
                if (refusal := self._backlog.admit(part, self.waiting())) is not None:
                    self._refuse(part, refusal)
                else:
                    begun = operation if isinstance(operation, Begin) else None
                    self._line.append(Transaction(part.barrier, deque([part]), begun))
        self.advance(now)

    def _add_to_begun(self, part: Operate, update_id: str | None) -> None:
        """A part of the begun update, or its end; an operator ends whichever there is, without its id."""
        transaction, operation = self._current, part.operation
        if transaction is None or transaction.begun is None or update_id not in (None, transaction.begun.update_id):
            reason = self._given_up.get(update_id or "", "it ended, or never was")
            named = "begun update" if update_id is None else f"begun update {update_id!r}"
            self._refuse(part, NotFound(f"There is no {named}; {reason}."))
        elif (refusal := self._backlog.admit(part, self.waiting())) is not None:
            self._refuse(part, refusal)
        elif isinstance(operation, Update | Save) and (reason_not := transaction.refusal_of(operation.source)):
            self._refuse(part, reason_not)
        elif isinstance(operation, Abort):
            self._abort(transaction, part)
        else:
            transaction.parts.append(part)

    def _abort(self, transaction: Transaction, part: Operate) -> None:
        """End a begun update as soon as replicas have done what they are at: parts that wait are not begun."""
        waiting = list(transaction.parts)
        transaction.parts.clear()
        for other in waiting:
            self._refuse(other, Conflict("The update was aborted before this was done."))
        if transaction.reached:
            transaction.parts.append(part)
        else:
            self._current = None
            self._operated(part, {})

    def _leave(self, part: Operate, leave: Leave) -> None:
        self._groups.leave(part, leave, {replica.number for replica in self._replicas if replica.has_loaded})

    def cancel(self, request_id: str) -> None:
        """The client of an operation is gone. One that has not begun will not; one that has ends as it would have."""
        if not request_id:  # by which a server says hello; it is also what our own operations have
            return
        self._groups.cancel(request_id)
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
        if self._groups.answered(replica, message):
            return
        running = self._current.running if self._current is not None else None
        if running is not None and running.takes(replica, message):
            self.advance(now)

    def lost(self, replica: Replica, now: float) -> None:
        """A replica's process is gone, and its part in what is being done with it."""
        self._committed.gone(replica)
        self._groups.lost(replica)
        for transaction in [item for item in self._line if isinstance(item, Transaction) and item.only is replica]:
            self._line.remove(transaction)
        if self._current is None:
            return
        if self._current.replicas is not None:
            self._current.replicas.discard(replica.number)
        running = self._current.running
        if running is not None and replica.number in running.replicas:
            running.goes_on_without(replica.number)
        self.advance(now)

    def came(self, replica: Replica, now: float) -> None:
        """A replica has loaded its model. Unless it is as the others are and will be, it is not ready yet."""
        in_progress = self._current is not None and self._current.reached
        self._take_turns(self._committed.came(replica, changing=in_progress))
        self.advance(now)

    def advance(self, now: float) -> None:
        """Do whatever can be done now."""
        self._groups.expire(now)
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
            if transaction.reached and transaction.begun is not None:
                transaction.ceiling = now + self._longest_s
            return transaction.reached
        if transaction.begun is not None and now >= transaction.ceiling:
            self._give_up(transaction, f"it held back generation for {self._longest_s:g} s (--max-update-hold-s)")
            return True
        if transaction.parts:
            return self._begin_part(transaction, transaction.parts.popleft(), now)
        if transaction.begun is None:
            self._current = None
            return True
        if transaction.replicas == set():
            self._give_up(transaction, "its replicas were lost")
            return True
        if now >= transaction.deadline:
            self._give_up(transaction, f"nothing of it came for {transaction.begun.timeout_s:g} s")
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
        item.since = now
        if item.barrier == "abort":
            self._end_all(Conflict("The request was ended to make way for a change of the weights. Send it again."))
        return True

    def _begin_part(self, transaction: Transaction, part: Operate, now: float) -> bool:
        operation = part.operation
        if transaction.only is not None:
            return self._begin_for_one(transaction, operation, transaction.only)
        if isinstance(operation, Settled):
            self._operated(part, {})
            return True
        replicas = transaction.replicas
        if replicas is None:
            if isinstance(operation, Wake):
                replicas = self._committed.sleepers
            else:
                replicas = self._committed.participants(to_update=isinstance(operation, Update | Begin))
            if transaction.begun is not None:
                transaction.replicas = replicas
        if not replicas:
            self._fail(part, Unavailable(f"No replica is ready: {self._replicas.reasons()}.", retry_after_s=RETRY_S))
            if transaction.begun is not None:
                self._end(transaction)
            return True
        if isinstance(operation, Adapt | Save) and all(self._committed.is_behind(number) for number in replicas):
            nobody = Unavailable("No replica has the weights that adapters are for.", retry_after_s=RETRY_S)
            self._refuse(part, nobody)
            return True
        if isinstance(operation, Adapt):
            operation = self._with_recent(operation)
        transaction.gives_time(now)
        if isinstance(operation, Begin):
            self._operated(part, {})
            return True
        if isinstance(operation, Commit):
            refusal = transaction.refusal_to_end(operation) or self._refusal_of(transaction, replicas)
            if refusal is not None:
                self._fail(part, refusal)
                return True
        running = Running(part, next(self._numbers), set(replicas))
        if isinstance(operation, Commit) and transaction.adapters:
            adapt = self._with_recent(Adapt(transaction.adapters_change()))
            self._order(transaction, running, "prepare", adapt)
        elif isinstance(operation, Commit):
            self._end_well(transaction, running)
        else:
            self._order(transaction, running, "rollback" if isinstance(operation, Abort) else "prepare", operation)
        return True

    def _begin_for_one(self, transaction: Transaction, operation: Operation, replica: Replica) -> bool:
        """Make ``replica`` as the others are by now; there is nothing to do where it is."""
        does_it = replica.number
        if isinstance(operation, Sleep):
            operation = Sleep(sorted(self.asleep))
            if not self.asleep or not self._committed.serves(replica):
                return True
        elif not self._committed.is_behind(replica.number):
            return True
        elif isinstance(operation, Export):
            match self._committed.lacks(replica):
                case None:
                    self._take_turns(self._committed.completed(replica))
                    return True
                case Files() as source:
                    operation = Update(source=source, weight_version=self._committed.base_version)
                case Weights(modules, giver):
                    if giver is None:
                        self._committed.wait_for_lost(replica)
                        return True
                    does_it = giver
                    operation = Export(modules, f"replica-{replica.number}-{next(self._numbers)}")
                case adapters:
                    operation = Adapt(adapters)
        self._order(transaction, Running(Operate("", operation), next(self._numbers), {does_it}), "prepare", operation)
        return True

    def _order(
        self, transaction: Transaction, running: Running, step: Step, operation: Operation | None = None
    ) -> None:
        """Have all that take part do ``step``, which ends when the last of them has answered."""
        transaction.running = running
        for number, order in running.begin(step, operation):
            self._to_replica(number, order)

    def _end_well(self, transaction: Transaction, running: Running) -> None:
        """Commit what the replicas have written, once it stands in the journal."""
        operation = running.part.operation
        own = operation.weight_version if isinstance(operation, Update | Commit) else None
        begun = transaction.begun.weight_version if transaction.begun is not None else None
        running.version = own or begun or self._committed.next_version
        # The journal of a replica that is brought up too: it came with one that had missed a commit.
        self._order(transaction, running, "journal" if self._committed.journal and transaction.written else "commit")

    def _finish_step(self, transaction: Transaction, running: Running, now: float) -> bool:
        transaction.running = None
        transaction.gives_time(now)
        operation, step = running.part.operation, running.step
        if step == "prepare":
            running.compare()
        if running.error is not None and step != "commit":
            self._undo(transaction, running)
            self._fail(running.part, running.error, running.failed)
            if transaction.only is not None and self._committed.is_behind(transaction.only.number):
                self._try_again(transaction.only, running)
        elif step == "journal":
            self._order(transaction, running, "commit")
        elif step == "commit":
            self._finish_commit(transaction, running)
        elif isinstance(operation, Update | Adapt | Commit) and step == "prepare":
            self._order(transaction, running, "write")
        elif isinstance(operation, Commit):
            self._end_well(transaction, running)
        elif isinstance(operation, Adapt):
            running.version = self._committed.version or ""
            if operation.publishes:
                running.version = operation.weight_version or self._committed.next_version
            self._order(transaction, running, "commit")
        elif isinstance(operation, Update):
            self._written(transaction, running)
        else:
            self._done(transaction, running)
        return True

    def _written(self, transaction: Transaction, running: Running) -> None:
        assert isinstance(running.part.operation, Update)
        transaction.origins.append(origins(running.part.operation.source))
        for report in running.reports.values():
            transaction.took(report)
        if transaction.begun is not None or not transaction.written:  # an empty part is legal, and changes nothing
            self._operated(running.part, running.reports)
            return
        refusal = self._refusal_of(transaction, running.replicas)
        if transaction.only is None and refusal is not None:
            self._undo(transaction, running)
            self._fail(running.part, refusal)
            return
        self._end_well(transaction, running)

    def _refusal_of(self, transaction: Transaction, replicas: set[int]) -> Conflict | None:
        return self._committed.refusal_of(transaction.partly, transaction.complete, replicas)

    def _undo(self, transaction: Transaction, running: Running) -> None:
        """Have the replicas let go of what they prepared or joined, undo what they wrote, and wake up."""
        operation = running.part.operation
        if isinstance(operation, Sleep) and transaction.only is None:
            self._order_unasked(running.replicas, "prepare", Wake(sorted(set(operation.tags) - self.asleep)))
        if not isinstance(operation, Update | Save | Commit | Adapt):
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

    def _finish_commit(self, transaction: Transaction, running: Running) -> None:
        """All have committed that were not lost meanwhile."""
        operation = running.part.operation
        if running.reports:
            if isinstance(operation, Adapt):
                self._adapted(transaction, running, operation.change)
            elif transaction.only is None:
                self._committed_update(transaction, running)
            else:
                self._take_turns(self._committed.given(running.reports))
            self._operated(running.part, running.reports)
        else:
            if transaction.only is None and transaction.written:
                self._committed.lost_in_commit(running.version, transaction.written)
            self._fail(running.part, running.error or Unavailable("Every replica was lost.", retry_after_s=RETRY_S))
        self._end(transaction)

    def _committed_update(self, transaction: Transaction, running: Running) -> None:
        if transaction.written:
            self._committed.on_disk.updated(transaction.origins, transaction.written, transaction.complete)
            self._take_turns(self._committed.updated(running.reports, transaction.written, transaction.complete))
        if transaction.adapters:
            self._adapted(transaction, running, transaction.adapters_change())

    def _adapted(self, transaction: Transaction, running: Running, change: AdapterChange) -> None:
        """The adapters are others now; what was done for one replica alone makes it like the others."""
        adapters = running.reports[min(running.reports)].adapters
        assert adapters is not None, "a commit of adapters brings them"
        self._committed.adapted(adapters, running.version, running.reports)
        if transaction.only is not None and self._committed.is_behind(transaction.only.number):
            self._take_turns(self._committed.completed(transaction.only))
        self._committed.used(change.nicknames if isinstance(change, SetAdapters) else ())

    def _with_recent(self, operation: Adapt) -> Adapt:
        if not isinstance(operation.change, SetAdapters):
            return operation
        change = replace(operation.change, recent=self._committed.recent(), busy=sorted(set(self._named())))
        return replace(operation, change=change)

    def _done(self, transaction: Transaction, running: Running) -> None:
        operation, reports = running.part.operation, running.reports
        if isinstance(operation, Sleep) and transaction.only is None:
            self.asleep.update(operation.tags)
        elif isinstance(operation, Wake):
            self.asleep.difference_update(operation.tags)
        elif isinstance(operation, Save) and transaction.begun is not None:
            transaction.kept(operation.adapter, reports.values())
        elif isinstance(operation, Export):
            (report,) = reports.values() or (Report(),)
            source = Files(report.files, delete=True)
            transaction.parts.append(Operate("", Update(source=source, weight_version=self._committed.base_version)))
        self._operated(running.part, reports)
        if isinstance(operation, Abort):
            self._end(transaction)

    def _give_up(self, transaction: Transaction, reason: str) -> None:
        """End a begun update that its client does not end."""
        assert transaction.begun is not None
        logger.warning("the update %s is aborted: %s", transaction.begun.update_id, reason)
        self._given_up = {transaction.begun.update_id: f"it was aborted, as {reason}"}
        self._order_unasked(transaction.replicas or set(), "rollback")
        self._end(transaction)

    def _end(self, transaction: Transaction) -> None:
        """Nothing more is done in ``transaction``; parts that came meanwhile are for an update that is over."""
        self._current = None
        for part in transaction.parts:
            self._refuse(part, NotFound("The update that this was a part of has ended."))
        transaction.parts.clear()

    def _take_turns(self, turns: Turns) -> None:
        """Have those that serve now sleep as the others do, and those that are late brought up one after the other.

        For that a replica that holds what was committed writes it out, and they read it.
        """
        if self.asleep:
            self._line.extend(of_our_own(Sleep([]), replica) for replica in turns.to_serve)
        self._line.extend(of_our_own(Export([], ""), replica) for replica in turns.to_bring_up)

    def _try_again(self, replica: Replica, running: Running) -> None:
        """The one that was to give ``replica`` the weights is lost; or it cannot be brought up, and starts again."""
        operation = running.part.operation
        if running.failed is None:
            self._take_turns(Turns(to_bring_up=[replica]))
        elif running.error is not None and isinstance(operation, Update) and is_on_disk(operation.source):
            logger.warning("the weights cannot be read again from disk: %s", running.error.message)
            self._committed.on_disk.forget()
            self._committed.wait_for_lost(replica)
        elif running.error is not None:
            self._committed.gone(replica)  # else it would take part in what is done until its end is known
            replica.failed(f"could not be brought to version {self._committed.version}: {running.error.message}")

    def _operated(self, part: Operate, reports: dict[int, Report]) -> None:
        if part.request_id:
            told = dict(sorted(reports.items()))
            version, adapters = self._committed.version, self._committed.adapters
            on_its_way = any(isinstance(item, Transaction) and item.only is not None for item in self._line)
            unable = None if self._replicas.any_ready or on_its_way else self._replicas.reasons()
            self._to_server(Operated(part.request_id, told, version, sorted(self.asleep), adapters, unable))

    def _refuse(self, part: Operate, error: SafelightError) -> None:
        """Of a part that no replica has heard of."""
        self._fail(part, error)
        self._part_from_trainer(part)

    def _part_from_trainer(self, part: Operate) -> None:
        """Leave the group over which a trainer sends what nobody receives: it would wait, or be taken for the next."""
        match part.operation:
            case Update(source=Broadcast(group=group)) | Save(source=Broadcast(group=group)):
                self._leave(Operate("", Leave(group)), Leave(group))

    def _fail(self, part: Operate, error: SafelightError, report: Report | None = None) -> None:
        if part.request_id:
            self._to_server(Failed(part.request_id, error.info(), report))
        else:
            logger.error("%s failed: %s", type(part.operation).__name__, error.message)
