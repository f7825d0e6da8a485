"""Replicas that do operations as workers do, on weights that are words, and a stage on which they stand."""

from collections import deque
from dataclasses import dataclass, field

from msgspec.structs import replace

from safelight.protocol.adapters import AdapterState, SetAdapters
from safelight.protocol.config import Config
from safelight.protocol.errors import InvalidRequest, SafelightError
from safelight.protocol.generation import Failed
from safelight.protocol.operations import (
    CACHES,
    Adapt,
    Barrier,
    Begin,
    Commit,
    Operate,
    Operation,
    Perform,
    Sleep,
    TakeSnapshot,
    Update,
    Wake,
)
from safelight.protocol.replicas import ModelInfo, ReplicaReady
from safelight.protocol.reports import Operated, Performed, Report
from safelight.protocol.tensor_sources import Files
from safelight.tests.scheduler.adapting import adapted, words
from safelight.tests.scheduler.stage import MODEL, Stage

CHECKPOINT = {"transformer": "checkpoint", "vae": "checkpoint"}
TWO = Config(replicas=2)

REFUSED = InvalidRequest("Nothing was written: there is 1 name that the model does not have.")


def update(
    word: str = "new", module: str = "transformer", *, part_of: str | None = None, version: str | None = None
) -> Update:
    """All tensors of ``module`` become ``word``; a word that begins with "half" is half of them."""
    return Update(source=Files({module: [word]}), update_id=part_of, weight_version=version)


@dataclass
class Process:
    """One process of a replica: its weights, what it would put back, and the orders that it has not answered.

    ``applied`` are the adapters that its weights are with, which it has not committed yet while they are written.
    """

    number: int
    pid: int
    version: str = "0"
    weights: dict[str, str] = field(default_factory=lambda: dict(CHECKPOINT))
    adapters: AdapterState = field(default_factory=AdapterState)
    applied: AdapterState = field(default_factory=AdapterState)
    asleep: set[str] = field(default_factory=set)
    orders: deque[Perform] = field(default_factory=deque)
    _operation: Operation | None = None
    _prepared: dict[str, list[str]] = field(default_factory=dict)
    _undo: dict[str, str] = field(default_factory=dict)
    _complete: set[str] = field(default_factory=set)
    _next_adapters: AdapterState | None = None

    @property
    def open(self) -> bool:
        """True if it has changes that are neither committed nor undone."""
        return bool(self._undo or self._prepared or self._next_adapters is not None or self.applied != self.adapters)

    def perform(self, order: Perform) -> Performed:
        self._operation = order.operation or self._operation
        try:
            report = self._do(order)
        except SafelightError as error:
            return _refusal(order, error)
        if order.step in ("commit", "rollback", "release"):
            self._operation = None
        return Performed(order.number, order.step, report)

    def _do(self, order: Perform) -> Report:
        match order.step:
            case "prepare":
                return self._first_step()
            case "write":
                return self._write()
            case "rollback":
                self.weights |= self._undo
                self.applied, self._next_adapters = self.adapters, None
                self._end()
            case "release":
                self._prepared, self._next_adapters = {}, None
            case "commit":
                return self._commit(order)
        return Report()

    def _commit(self, order: Perform) -> Report:
        assert order.weight_version is not None
        self.version = order.weight_version
        if isinstance(self._operation, Adapt):
            assert self._next_adapters is not None
            assert self._next_adapters == self.applied, "written before"
            self.adapters, self._next_adapters = self._next_adapters, None
        adapters = self.adapters if isinstance(self._operation, Adapt) else None
        report = self._written()
        self._end()
        return replace(report, weight_version=self.version, adapters=adapters)

    def _first_step(self) -> Report:
        match self._operation:
            case Update(source=Files(modules=modules)):
                self._prepared = modules
                return Report(updated=dict.fromkeys(modules, 2))
            case TakeSnapshot(modules=names):
                assert not self._undo, "what is given to others is committed"
                return Report(files={name: [self.weights[name]] for name in names})
            case Sleep(tags=tags):
                assert {*CHECKPOINT, CACHES} >= set(tags)
                self.asleep.update(tags)
            case Wake(tags=tags):
                assert {*CHECKPOINT, CACHES} >= set(tags)
                self.asleep.difference_update(tags)
            case Adapt(change=change):
                self._next_adapters = adapted(self.adapters, change)
                return Report()
        return Report(weight_version=self.version)

    def _write(self) -> Report:
        if isinstance(self._operation, Adapt):
            assert self._next_adapters is not None, "prepared before"
            self.applied = self._next_adapters
            return Report()
        for module, (word,) in self._prepared.items():
            self._undo.setdefault(module, self.weights[module])
            self.weights[module] = f"{self.weights[module]} and {word}" if word.startswith("half") else word
            if not word.startswith("half"):
                self._complete.add(module)
        self._prepared = {}
        return self._written()

    def _written(self) -> Report:
        return Report(updated=dict.fromkeys(self._undo, 2), complete=sorted(self._complete))

    def _end(self) -> None:
        self._undo, self._prepared, self._complete = {}, {}, set()


class Operating(Stage):
    """A stage whose replicas are processes that obey orders when the test lets them."""

    def __init__(
        self,
        *,
        replicas: int = 2,
        ready: int | None = None,
        config: Config | None = None,
        adapters: SetAdapters | None = None,
    ) -> None:
        super().__init__(ready=(), config=config or Config(replicas=replicas), adapters=adapters)
        self.processes: dict[int, Process] = {}
        self.ordered: list[tuple[int, Perform]] = []
        """Every order to do a step, in order, with its replica."""
        self._pids = 100
        for number in range(replicas if ready is None else ready):
            self.start(number)

    def start(self, number: int, process: Process | None = None) -> None:
        """The replica is there, or there again, with the checkpoint's weights."""
        self._pids += 1
        self.processes[number] = process or Process(number, self._pids)
        self.processes[number].pid = self._pids
        model = _model(self.processes[number].version)
        self.worker(number, ReplicaReady(number, self._pids, model))

    def kill(self, number: int) -> None:
        del self.processes[number]
        self.exited(number)

    def operate(self, request_id: str, operation: Operation, barrier: Barrier = "in_place") -> None:
        self.server(Operate(request_id, operation, barrier))

    def do(self, number: int, error: SafelightError | None = None, *, report: Report | None = None) -> Perform:
        """Let a replica do the first of its orders, or refuse it; ``report`` is what it says instead of its own."""
        order = self.processes[number].orders.popleft()
        done = self.processes[number].perform(order) if error is None else _refusal(order, error)
        done = done if report is None else replace(done, report=report)
        self.worker(number, done)
        return order

    def do_all(self) -> None:
        """Let all replicas obey their orders until none is left."""
        while busy := [number for number, process in sorted(self.processes.items()) if process.orders]:
            self.do(busy[0])

    def up_to(self, step: str) -> None:
        """Let all replicas obey the orders before ``step``, which all of them then have yet to do."""
        while busy := [n for n, process in self.processes.items() if process.orders and process.orders[0].step != step]:
            self.do(busy[0])

    def steps(self, number: int) -> list[str]:
        return [order.step for to, order in self.ordered if to == number]

    def begin(self, name: str = "u", *, timeout_s: float = 10.0, modules: list[str] | None = None) -> None:
        self.operate(f"begin {name}", Begin(update_id=name, timeout_s=timeout_s, modules=modules))
        self.do_all()

    def commit(self, name: str = "u", *, require_complete: bool = False) -> None:
        self.operate(f"commit {name}", Commit(name, require_complete))
        self.do_all()

    def done(self, request_id: str) -> Operated:
        """The one answer to an operation, which must have been done."""
        assert not self.sent(Failed, request_id), self.sent(Failed, request_id)
        (operated,) = self.sent(Operated, request_id)
        return operated

    def refusal(self, request_id: str) -> str:
        """The message of the one answer to an operation, which must have failed."""
        assert not self.sent(Operated, request_id)
        (failed,) = self.sent(Failed, request_id)
        return failed.error.message

    def unanswered(self, request_id: str) -> bool:
        return not self.sent(Operated, request_id) and not self.sent(Failed, request_id)

    def weights(self, module: str = "transformer") -> dict[int, str]:
        return {number: process.weights[module] for number, process in sorted(self.processes.items())}

    def adapters(self) -> dict[int, dict[str, str]]:
        """The words of the adapters of each replica, by nickname."""
        return {number: words(process.adapters) for number, process in sorted(self.processes.items())}

    def serving(self) -> list[int]:
        return [replica.replica for replica in self.dispatcher.status(self.now).replicas if replica.state == "ready"]

    def _collect(self) -> None:
        before = len(self.to_replicas)
        super()._collect()
        for number, order in self.to_replicas[before:]:
            assert number in self.processes, f"replica {number} is lost, and was ordered: {order}"
            if isinstance(order, Perform):
                self.ordered.append((number, order))
                self.processes[number].orders.append(order)


def _model(version: str) -> ModelInfo:
    return replace(MODEL, weight_version=version)


def _refusal(order: Perform, error: SafelightError) -> Performed:
    return Performed(order.number, order.step, Report(unknown=["nobody"]), error.info())
