"""In every order of requests, failures, losses and restarts, replicas draw only with committed weights.

The machine plays server, trainer, workers and supervisor. It keeps its own account of what was committed, made of the
answers alone, and its workers have weights and adapters that are words, so that wrong ones are seen.
"""

from collections import Counter, deque
from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from msgspec.structs import replace

from safelight.protocol.adapters import (
    ALL,
    AdapterChange,
    AdapterSource,
    MergeAdapters,
    SetAdapters,
    UnloadAdapter,
    UnmergeAdapters,
    WantedMode,
)
from safelight.protocol.config import Config
from safelight.protocol.errors import Conflict
from safelight.protocol.generation import Cancel, Failed, Generate, Queued, Result
from safelight.protocol.messages import FromScheduler, FromWorker, ToWorker
from safelight.protocol.operations import (
    Abort,
    Adapt,
    Barrier,
    Begin,
    Commit,
    Continue,
    Digests,
    ListAdapters,
    Operate,
    Operation,
    Pause,
    Perform,
    Save,
    SetPaused,
    Sleep,
    TakeSnapshot,
    Update,
    Wake,
)
from safelight.protocol.replicas import Heartbeat, ReplicaLoading, ReplicaReady, ReplicaStats
from safelight.protocol.reports import Operated, Performed, Report
from safelight.protocol.tensor_sources import Files
from safelight.tests.effort import examples
from safelight.tests.scheduler.account import Account, Asked, Truth, Weights
from safelight.tests.scheduler.adapting import set_adapters
from safelight.tests.scheduler.operating import CHECKPOINT, Process, update
from safelight.tests.scheduler.stage import MODEL, Stage, generate, result, stopped

REPLICAS = 3
STALL_TIMEOUT_S, UPDATE_TIMEOUT_S = 30.0, 5.0

NUMBERS = st.integers(0, REPLICAS - 1)
BARRIERS: st.SearchStrategy[Barrier] = st.sampled_from(["wait", "abort", "in_place"])
MODULES = st.sampled_from(sorted(CHECKPOINT))
NICKNAMES = st.sampled_from(["ink", "oil"])
MODES: st.SearchStrategy[WantedMode] = st.sampled_from(["merge", "dynamic", "request"])
KEPT = Save(
    source=Files({"transformer": ["an adapter"]}),
    adapter=AdapterSource("lora_merge:transformer", None, "/shared/kept", "kept"),
)


@dataclass
class Worker:
    """A process of a replica, what it was sent and has not read, and the requests that it draws."""

    process: Process
    loaded: bool = False
    inbox: deque[Perform | tuple[Generate, list[Truth]]] = field(default_factory=deque)
    running: set[str] = field(default_factory=set)
    paused: bool = False
    journalled: tuple[str, Weights] | None = None

    @property
    def truth(self) -> Truth:
        """The weights and adapters that it draws with."""
        return (self.process.version, self.process.weights, self.process.adapters)


class OperationsMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.workers: list[Worker | None] = [None] * REPLICAS
        self.believed = [False] * REPLICAS  # whether the scheduler may think that a loaded process is there
        self.unreported = [0] * REPLICAS
        self.asked: dict[str, Asked] = {}
        self.answers: Counter[str] = Counter()
        self.taken_back: set[str] = set()
        self.requests: dict[str, bool] = {}  # whether each that was accepted is answered
        self.steps_asked: set[tuple[int, str]] = set()
        self.names = self.beats = 0

    @initialize(
        journal=st.booleans(),
        adapters=st.sampled_from([None, set_adapters("ink", words=["first"])]),
        lost=st.booleans(),
        back=st.booleans(),
        late=st.booleans(),
    )
    def all_are_there(self, journal: bool, adapters: SetAdapters | None, lost: bool, back: bool, late: bool) -> None:
        """Or all are lost, which had other weights, and adapters, but for one that loads what was before.

        What is hard comes after that.
        """
        self.account, self.with_journal = Account(adapters), journal
        path = "/journal" if journal else None
        config = Config(replicas=REPLICAS, max_running=2, stall_timeout_s=STALL_TIMEOUT_S, weights_journal=path)
        self.stage = Stage(ready=(), config=config, adapters=adapters)
        for number in range(REPLICAS):
            self.start(number, at_once=number > 0 or not late)
        if lost:
            self.ask(update(self.name("whole"), "transformer", version="before all were lost"))
            self.ask(Adapt(set_adapters("oil", words=[self.name("word")])))
            self.obey_all()
            self.kill_all(0 if late else None, back)

    # What trainers and clients do.

    @rule(timeout_s=st.sampled_from([None, None, 3.0]))
    def draw(self, timeout_s: float | None) -> None:
        self.stage.server(generate(self.name("request"), timeout_s=timeout_s))
        self.deliver()

    @rule(module=MODULES, half=st.booleans(), barrier=BARRIERS)
    def update_at_once(self, module: str, half: bool, barrier: Barrier) -> None:
        name = self.name("half" if half else "whole")
        self.ask(update(name, module, version=f"version of {name}"), barrier)

    @rule(barrier=BARRIERS)
    def begin(self, barrier: Barrier) -> None:
        name = self.name("update")
        version = f"version of {name}"
        self.ask(Begin(update_id=name, weight_version=version, timeout_s=UPDATE_TIMEOUT_S), barrier)

    @precondition(lambda self: self.account.begun)
    @rule(module=MODULES, half=st.booleans())
    def send_a_part(self, module: str, half: bool) -> None:
        self.ask(update(self.name("half" if half else "whole"), module, part_of=[*self.account.begun][-1]))

    @precondition(lambda self: self.account.begun)
    @rule(kind=st.sampled_from([Commit, Commit, Abort]))
    def end(self, kind: type[Commit | Abort]) -> None:
        self.ask(kind([*self.account.begun][-1]))

    @rule(
        operation=st.sampled_from(
            [
                Digests(),
                KEPT,
                Sleep(["transformer"]),
                Sleep(["transformer", "vae"]),
                Sleep(["caches"]),
                Wake(["transformer"]),
                Wake(["transformer", "vae", "caches"]),
            ]
        ),
        barrier=BARRIERS,
    )
    def ask_for_something_else(self, operation: Operation, barrier: Barrier) -> None:
        self.ask(operation, "wait" if isinstance(operation, Sleep) else barrier)

    @rule(nickname=NICKNAMES, loads=st.booleans(), mode=MODES, publishes=st.booleans(), named=st.booleans())
    def set_an_adapter(self, nickname: str, loads: bool, mode: WantedMode, publishes: bool, named: bool) -> None:
        words = [self.name("word")] if loads else []
        version = self.name("published") if publishes and named else None
        self.ask(Adapt(set_adapters(nickname, words=words, mode=mode), publishes, version))

    @rule(
        change=st.one_of(
            st.sampled_from([MergeAdapters(), UnmergeAdapters(ALL)]), st.builds(UnloadAdapter, nickname=NICKNAMES)
        ),
        publishes=st.booleans(),
        barrier=BARRIERS,
    )
    def change_adapters(self, change: AdapterChange, publishes: bool, barrier: Barrier) -> None:
        self.ask(Adapt(change, publishes), barrier)

    @rule()
    def list_adapters(self) -> None:
        name = self.name("list")
        self.asked[name] = ListAdapters(name)
        self.stage.server(ListAdapters(name))
        self.deliver()
        assert self.answers[name] == 1

    @rule(mode=st.sampled_from([None, "wait", "abort", "in_place"]))
    def pause_or_continue(self, mode: Barrier | None) -> None:
        name = self.name("pause")
        self.asked[name] = None
        self.stage.server(Continue(name) if mode is None else Pause(name, mode))
        self.deliver()

    @rule(data=st.data())
    def go_away(self, data: st.DataObject) -> None:
        if names := [name for name in (*self.asked, *self.requests) if not self.answers[name]]:
            name = data.draw(st.sampled_from(names))
            self.taken_back.add(name)
            self.stage.server(Cancel(name))
            self.deliver()

    # What processes do.

    @rule(number=NUMBERS, many=st.booleans())
    def obey(self, number: int, many: bool) -> None:
        worker = self.workers[number]
        while worker is not None and worker.inbox:
            self.read_next(number, worker)
            if not many:
                break

    @rule()
    def obey_all(self) -> None:
        while any(worker is not None and worker.inbox for worker in self.workers):
            for number in range(REPLICAS):
                self.obey(number, many=True)

    @rule(kind=st.sampled_from(["write", "journal", "commit", Adapt, Update, TakeSnapshot]))
    def obey_up_to(self, kind: str | type[Operation]) -> None:
        """All obey their orders, except such a step, or the first of such an operation."""

        def is_next(worker: Worker) -> bool:
            order = worker.inbox[0]
            if not isinstance(order, Perform):
                return False
            return order.step == kind if isinstance(kind, str) else isinstance(order.operation, kind)

        while busy := [n for n, worker in enumerate(self.workers) if worker and worker.inbox and not is_next(worker)]:
            for number in busy:
                self.obey(number, many=False)

    @rule(number=NUMBERS)
    def refuse(self, number: int) -> None:
        worker = self.workers[number]
        if worker is None or not worker.inbox or not isinstance(order := worker.inbox[0], Perform):
            return
        asked = (order.number, order.step) in self.steps_asked  # what only undoes cannot be refused
        if asked and order.step in ("prepare", "write", "journal"):
            worker.inbox.popleft()
            self.say(number, Performed(order.number, order.step, Report(), Conflict("I cannot.").info()))

    @rule(number=NUMBERS, well=st.booleans())
    def finish_a_request(self, number: int, well: bool) -> None:
        worker = self.workers[number]
        if worker is not None and worker.running and not worker.paused:
            name = min(worker.running)
            worker.running.remove(name)
            self.say(number, result(name) if well else stopped(name))

    @rule(number=NUMBERS, at_once=st.booleans())
    def start(self, number: int, at_once: bool) -> None:
        """A process starts; one that ran before is gone, and its end may be reported any time later."""
        if self.workers[number] is not None:
            self.unreported[number] += 1
        self.names += 1
        process = Process(number, 1000 + self.names)
        if self.account.journal is not None:
            process.version, process.weights = self.account.journal[0], dict(self.account.journal[1])
        self.workers[number] = Worker(process)
        if at_once:
            self.become_ready(number)
        else:
            self.believed[number] = False
            self.say(number, ReplicaLoading(number, process.pid, "importing"))

    @rule(number=NUMBERS)
    def become_ready(self, number: int) -> None:
        worker = self.workers[number]
        if worker is not None and not worker.loaded:
            worker.loaded, self.believed[number] = True, True
            model = replace(MODEL, weight_version=worker.process.version)
            self.say(number, ReplicaReady(number, worker.process.pid, model))

    @rule(number=NUMBERS, report=st.booleans())
    def kill(self, number: int, report: bool) -> None:
        if self.workers[number] is None:
            return
        self.workers[number] = None
        self.unreported[number] += 1
        if report:
            self.report_ends(number)

    @rule(keep=st.sampled_from([None, None, *range(REPLICAS)]), back=st.booleans())
    def kill_all(self, keep: int | None, back: bool) -> None:
        """All but ``keep`` are gone at once, and maybe back at once."""
        for number in set(range(REPLICAS)) - {keep}:
            self.kill(number, report=True)
            if back:
                self.start(number, at_once=True)

    @rule(number=NUMBERS)
    def report_ends(self, number: int) -> None:
        while self.unreported[number]:
            self.unreported[number] -= 1
            if self.workers[number] is None and not self.unreported[number]:
                self.believed[number] = False
            self.stage.exited(number)
            self.deliver()

    @rule(number=NUMBERS)
    def beat(self, number: int) -> None:
        if worker := self.workers[number]:
            self.beats += 1
            self.say(number, Heartbeat(number, worker.process.pid, ReplicaStats(), self.beats))

    @rule(seconds=st.sampled_from([0.0, 1.0, UPDATE_TIMEOUT_S, STALL_TIMEOUT_S]))
    def wait(self, seconds: float) -> None:
        self.stage.wait(seconds)
        self.deliver()

    # What must hold.

    @invariant()
    def those_who_serve_are_alike_when_all_is_done(self) -> None:
        if any(self.unreported) or any(worker is not None and worker.inbox for worker in self.workers):
            return
        serving = [worker for number in self.serving() if (worker := self.workers[number]) is not None]
        if any(worker.process.open for worker in serving):
            return  # an update is open
        for worker in serving:
            assert worker.truth in self.account.truths
            assert worker.truth == serving[0].truth
            assert worker.process.asleep <= self.account.asleep

    @invariant()
    def a_current_replica_serves_when_nothing_is_in_progress(self) -> None:
        if self.stage.dispatcher.status(self.stage.now).hold is not None or len(self.account.truths) > 1:
            return
        if any(self.unreported) or any(worker is not None and worker.inbox for worker in self.workers):
            return
        for number, worker in enumerate(self.workers):
            if worker is not None and worker.loaded and worker.truth == self.account.truths[0]:
                assert self.stage.replica(number).state != "starting", "it has all that was committed"

    def teardown(self) -> None:
        """In the end everything is answered and all replicas serve the same, if need be after what was lost is sent."""
        self.pause_or_continue(None)
        self.settle()
        self.ask(Wake(["transformer", "vae", "caches"]))
        self.settle()
        if self.with_journal and all(self.account.journal_has(truth) for truth in self.account.truths):
            self.kill_all(None, back=True)
            self.settle()
            assert self.serving() == list(range(REPLICAS)), "nothing must be sent again"
        if self.with_journal:  # no replica may read a half-written one
            words = {module: [self.name("whole")] for module in CHECKPOINT}
            self.ask(Update(source=Files(words), weight_version=self.name("version")))
            self.settle()
        for module in CHECKPOINT:
            self.update_at_once(module, half=False, barrier="wait")
            self.settle()
        self.draw(None)
        self.settle()
        self.list_adapters()
        for name in self.asked:
            assert self.answers[name] == 1 or name in self.taken_back, f"{name}: {self.asked[name]}"
        assert all(self.requests.values())
        assert self.serving() == list(range(REPLICAS))
        for worker in self.workers:
            assert worker is not None
            assert [worker.truth] == self.account.truths
            assert not worker.process.open
            assert not worker.process.asleep
        status = self.stage.dispatcher.status(self.stage.now)
        assert (status.queued, status.running, status.halted) == (0, 0, None)

    def settle(self) -> None:
        """Nothing fails any more, and replicas that cannot catch up are restarted."""
        for _ in range(4 + len(self.asked)):  # updates that nobody ends are given up one after the other
            for number, worker in enumerate(self.workers):
                self.report_ends(number)
                if worker is not None and self.stage.replica(number).state == "failed":
                    self.kill(number, report=True)
                if self.workers[number] is None:
                    self.start(number, at_once=True)
                self.become_ready(number)
            self.stage.wait(UPDATE_TIMEOUT_S)
            for number in range(REPLICAS):
                self.beat(number)
            self.obey_all()
            for number, worker in enumerate(self.workers):
                while worker is not None and worker.running:
                    self.finish_a_request(number, well=True)
                    self.obey_all()

    # How it is played.

    def name(self, kind: str) -> str:
        self.names += 1
        return f"{kind} {self.names}"

    def ask(self, operation: Operation, barrier: Barrier = "in_place") -> None:
        name = self.name("operation")
        self.asked[name] = operation
        self.stage.server(Operate(name, operation, barrier))
        self.deliver()

    def serving(self) -> list[int]:
        return [
            replica.replica
            for replica in self.stage.dispatcher.status(self.stage.now).replicas
            if replica.state == "ready"
        ]

    def say(self, number: int, *messages: FromWorker) -> None:
        self.stage.worker(number, *messages)
        self.deliver()

    def read_next(self, number: int, worker: Worker) -> bool:
        if not worker.inbox:
            return False
        message = worker.inbox.popleft()
        if isinstance(message, Perform):
            self.perform(number, worker, message)
        else:
            self.begin_to_draw(worker, *message)
        return True

    def begin_to_draw(self, worker: Worker, request: Generate, truths: list[Truth]) -> None:
        """It has obeyed all earlier orders by now."""
        process, found = worker.process, worker.truth
        assert found in truths, f"it draws with {found}, and {truths} are committed"
        if len(self.account.truths) > 1 and found in self.account.truths:
            self.account.truths = [_copy(found)]
        assert not process.open
        assert not process.asleep
        worker.running.add(request.request_id)

    def perform(self, number: int, worker: Worker, order: Perform) -> None:
        process = worker.process
        written = dict(process.weights)
        if isinstance(order.operation, TakeSnapshot):
            assert not process.open
        done = process.perform(order)
        if order.step == "journal":
            assert order.weight_version is not None
            worker.journalled = (order.weight_version, written)
        elif order.step == "commit" and worker.journalled is not None:
            self.account.journal, worker.journalled = worker.journalled, None
        elif order.step == "rollback":
            worker.journalled = None
        self.say(number, done)

    def deliver(self) -> None:
        for message in self.stage.to_server:
            self.hear(message)
        self.stage.to_server.clear()
        orders, self.stage.to_replicas = self.stage.to_replicas, []
        self.check_leaders([(number, order) for number, order in orders if isinstance(order, Perform)])
        for number, order in orders:
            assert self.believed[number], f"replica {number} is gone, and was sent {order}"
            if isinstance(order, Perform) and order.step not in ("release", "rollback"):
                assert self.stage.replica(number).state != "failed", f"it is about to be ended, and was sent {order}"
            worker = self.workers[number]
            if worker is not None and worker.loaded:
                self.send(worker, order)
        self.account.serves = self.account.serves or bool(self.serving())
        if any(isinstance(order, Generate) for _, order in orders):
            self.check_nothing_is_being_done()

    def send(self, worker: Worker, order: ToWorker) -> None:
        match order:
            case Perform():
                worker.inbox.append(order)
            case Generate():
                worker.inbox.append((order, [_copy(truth) for truth in self.account.truths]))
            case SetPaused(paused=paused):
                worker.paused = paused

    def check_leaders(self, orders: list[tuple[int, Perform]]) -> None:
        """Exactly one replica of a step is primary; steps that only undo what takes no memory have none."""
        primaries = Counter((order.number, order.step) for _, order in orders if order.is_primary)
        for key in {(order.number, order.step) for _, order in orders}:
            assert primaries[key] == 1 or (key[1] in ("rollback", "release") and not primaries[key])
            if key[1] == "journal":
                assert len([order for _, order in orders if (order.number, order.step) == key]) == 1
            if primaries[key]:
                self.steps_asked.add(key)

    def check_nothing_is_being_done(self) -> None:
        for number, worker in enumerate(self.workers):
            for message in worker.inbox if worker is not None and self.believed[number] else ():
                if isinstance(message, Perform):
                    assert (message.number, message.step) not in self.steps_asked, "a request began during an operation"

    def hear(self, message: FromScheduler) -> None:
        match message:
            case Queued(request_id=name):
                assert name not in self.requests
                self.requests[name] = False
            case Operated(request_id=name):
                self.answers[name] += 1
                assert self.answers[name] == 1
                self.account.is_done(self.asked[name], message)
            case Result(request_id=name) | Failed(request_id=name) if name in self.requests:
                assert not self.requests[name], "a second answer"
                self.requests[name] = True
            case Failed(request_id=name, error=error) if name in self.asked:
                self.answers[name] += 1
                assert self.answers[name] == 1
                self.account.has_failed(self.asked[name], error.message)


def _copy(truth: Truth) -> Truth:
    return (truth[0], dict(truth[1]), truth[2])


TestOperations = OperationsMachine.TestCase
TestOperations.settings = settings(
    max_examples=examples(80, 5000), stateful_step_count=50, deadline=None, database=None
)
