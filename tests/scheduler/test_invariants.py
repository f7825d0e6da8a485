"""In every order of events: one terminal message per accepted request, and no capacity lost or invented.

The machine plays server, workers and supervisor. Its workers keep their own account of what they were given, which the
dispatcher's must equal.
"""

from collections import deque
from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from safelight.protocol.config import Config
from safelight.protocol.generation import Cancel, Failed, Generate, GenerateCopies, Progress, Queued, Result, Started
from safelight.protocol.messages import FromWorker
from safelight.protocol.replicas import Heartbeat, ReplicaFailed, ReplicaLoading, ReplicaStats
from safelight.tests.effort import examples
from safelight.tests.scheduler.stage import Stage, generate, result, stopped

REPLICAS, MAX_RUNNING, MAX_QUEUE = 2, 4, 3
STALL_TIMEOUT_S = 30.0

REPLICA_NUMBERS = st.integers(0, REPLICAS - 1)
REQUEST_IDS = st.integers(0, 9).map(str)  # few, so that they are used again


@dataclass
class Worker:
    """A process: what it was given and has not answered, and which of it was cancelled."""

    pid: int
    progress: int = 0
    held: dict[str, int] = field(default_factory=dict)
    cancelled: set[str] = field(default_factory=set)


@dataclass
class Life:
    """An accepted request, as the server sees it."""

    started: bool = False
    ended: bool = False
    pinned_to: int | None = None


class SchedulerMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        config = Config(
            replicas=REPLICAS, max_running=MAX_RUNNING, max_queue=MAX_QUEUE, stall_timeout_s=STALL_TIMEOUT_S
        )
        self.stage = Stage(ready=(), config=config)
        self.workers: list[Worker | None] = [None] * REPLICAS
        self.unreported: list[deque[int]] = [deque() for _ in range(REPLICAS)]
        self.lives: dict[str, Life] = {}
        self.next_pid = 100

    @initialize()
    def one_worker_is_there(self) -> None:
        self.start_worker(0, silently=False)

    @rule(number=REPLICA_NUMBERS, silently=st.booleans())
    def start_worker(self, number: int, silently: bool) -> None:
        """A process starts; one that ran before is gone, and its end may be reported any time later."""
        if self.workers[number] is not None:
            self.unreported[number].append(number)
        self.next_pid += 1
        self.workers[number] = Worker(self.next_pid)
        if silently:
            self.say(number, ReplicaLoading(number, self.next_pid, "importing"))
        else:
            self.stage.ready(number, self.next_pid)
        self.deliver()

    @rule(number=REPLICA_NUMBERS)
    def finish_loading(self, number: int) -> None:
        if worker := self.workers[number]:
            self.stage.ready(number, worker.pid)
            self.deliver()

    @rule(number=REPLICA_NUMBERS)
    def kill_worker(self, number: int) -> None:
        """The supervisor reports in order: every earlier end, then this one."""
        if self.workers[number] is None:
            return
        while self.unreported[number]:
            self.report_exit(number)
        self.workers[number] = None
        self.stage.exited(number)
        self.deliver()

    @rule(number=REPLICA_NUMBERS)
    def report_exit(self, number: int) -> None:
        if self.unreported[number]:
            self.unreported[number].popleft()
            self.stage.exited(number)
            self.deliver()

    @rule(number=REPLICA_NUMBERS)
    def give_up(self, number: int) -> None:
        if worker := self.workers[number]:
            worker.held.clear()
            self.say(number, ReplicaFailed(number, "There is no memory left."))

    @rule(
        request_id=REQUEST_IDS,
        outputs=st.integers(1, MAX_RUNNING + 2),
        priority=st.integers(-1, 1),
        timeout_s=st.sampled_from([None, 1.0, 10.0]),
        pinned_to=st.sampled_from([None, *range(REPLICAS)]),
    )
    def ask(self, request_id: str, outputs: int, priority: int, timeout_s: float | None, pinned_to: int | None) -> None:
        before = len(self.stage.to_server)
        asked = generate(request_id, outputs, priority=priority, timeout_s=timeout_s)
        self.stage.server(asked if pinned_to is None else GenerateCopies(asked, [pinned_to]))
        answers = [message for message in self.stage.to_server[before:] if isinstance(message, Queued | Failed)]
        mine = [message for message in answers if message.request_id == request_id]
        if isinstance(mine[0], Queued):
            assert request_id not in self.lives or self.lives[request_id].ended
            self.lives[request_id] = Life(pinned_to=pinned_to)
        else:
            self.stage.to_server.remove(mine[0])  # a refusal is for a request that was not accepted
        self.deliver()

    @rule(request_id=REQUEST_IDS)
    def cancel(self, request_id: str) -> None:
        self.stage.server(Cancel(request_id))
        self.deliver()

    @rule(number=REPLICA_NUMBERS, data=st.data(), succeed=st.booleans())
    def answer(self, number: int, data: st.DataObject, succeed: bool) -> None:
        worker = self.workers[number]
        if worker and worker.held:
            request_id = data.draw(st.sampled_from(sorted(worker.held)))
            del worker.held[request_id]
            self.say(number, result(request_id) if succeed else stopped(request_id))

    @rule(number=REPLICA_NUMBERS)
    def acknowledge_cancels(self, number: int) -> None:
        if worker := self.workers[number]:
            for request_id in sorted(worker.cancelled & worker.held.keys()):
                del worker.held[request_id]
                self.say(number, stopped(request_id))
            worker.cancelled.clear()

    @rule(number=REPLICA_NUMBERS, request_id=REQUEST_IDS)
    def answer_what_was_never_asked(self, number: int, request_id: str) -> None:
        """Also the late answer of a process that is gone."""
        worker = self.workers[number]
        if worker is None or request_id not in worker.held:
            self.say(number, Progress(request_id, 0, 1, 4), result(request_id))

    @rule(number=REPLICA_NUMBERS, goes_on=st.booleans(), forward_s=st.sampled_from([None, 0.0, 100.0]))
    def beat(self, number: int, goes_on: bool, forward_s: float | None) -> None:
        if worker := self.workers[number]:
            worker.progress += goes_on
            self.say(number, Heartbeat(number, worker.pid, ReplicaStats(), worker.progress, forward_s))

    @rule(number=REPLICA_NUMBERS)
    def hear_an_earlier_process(self, number: int) -> None:
        """Heartbeats have a socket of their own: one may be read after what the next process says."""
        before = self.stage.replica(number)
        self.say(number, Heartbeat(number, 99, ReplicaStats(forwards=1), 1000))
        assert self.stage.replica(number) == before

    @rule(seconds=st.sampled_from([0.0, 0.5, 2.0, 11.0, STALL_TIMEOUT_S]))
    def wait(self, seconds: float) -> None:
        self.stage.wait(seconds)
        self.deliver()

    @invariant()
    def outstanding_is_what_the_workers_hold(self) -> None:
        for number, worker in enumerate(self.workers):
            held = worker.held if worker else {}
            outstanding = self.stage.replica(number).outstanding
            assert outstanding == sum(held.values())
            assert outstanding <= MAX_RUNNING or len(held) == 1

    @invariant()
    def status_agrees_with_the_servers_messages(self) -> None:
        open_lives = [life for life in self.lives.values() if not life.ended]
        status = self.stage.dispatcher.status(self.stage.now)
        assert status.running == sum(life.started for life in open_lives)
        assert status.queued == sum(not life.started for life in open_lives)
        assert status.queued <= MAX_QUEUE

    @invariant()
    def nobody_waits_without_a_ready_replica_or_beside_an_idle_one(self) -> None:
        ready = {
            replica.replica: replica.outstanding
            for replica in self.stage.dispatcher.status(self.stage.now).replicas
            if replica.state == "ready"
        }
        for life in self.lives.values():
            if not life.started and not life.ended:
                its_own = ready if life.pinned_to is None else {life.pinned_to} & ready.keys()
                assert its_own
                assert all(ready[number] for number in its_own)

    @invariant()
    @precondition(lambda self: any(not life.ended for life in self.lives.values()))
    def the_loop_would_wake_up_for_the_next_deadline(self) -> None:
        assert self.stage.dispatcher.next_turn() < float("inf")

    def teardown(self) -> None:
        """In the end everything is answered, late or not, and nothing is left."""
        self.wait(0.0)
        while any(worker and worker.held for worker in self.workers):
            for number, worker in enumerate(self.workers):
                for request_id in sorted(worker.held) if worker else []:
                    assert worker is not None
                    del worker.held[request_id]
                    self.say(number, result(request_id))
        self.wait(1e6)
        assert all(life.ended for life in self.lives.values())
        status = self.stage.dispatcher.status(self.stage.now)
        assert (status.queued, status.running) == (0, 0)
        assert [replica.outstanding for replica in status.replicas] == [0] * REPLICAS

    def say(self, number: int, *messages: FromWorker) -> None:
        self.stage.worker(number, *messages)
        self.deliver()

    def deliver(self) -> None:
        """Bring what was sent to the workers that live, and to the server, which checks the order of what it gets."""
        for number, order in self.stage.to_replicas:
            worker = self.workers[number]
            assert worker is not None, "a dead replica was given work"
            if isinstance(order, Generate):
                assert order.request_id not in worker.held
                worker.held[order.request_id] = len(order.samples)
            elif isinstance(order, Cancel):
                worker.cancelled.add(order.request_id)
        self.stage.to_replicas.clear()
        for message in self.stage.to_server:
            match message:
                case Started(request_id=request_id):
                    life = self.lives[request_id]
                    assert not life.started
                    assert not life.ended
                    life.started = True
                case Progress(request_id=request_id):
                    assert self.lives[request_id].started
                    assert not self.lives[request_id].ended
                case Result(request_id=request_id) | Failed(request_id=request_id):
                    assert not self.lives[request_id].ended, "a second terminal message"
                    self.lives[request_id].ended = True
        self.stage.to_server.clear()


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=examples(60, 5000), stateful_step_count=40, deadline=None, database=None)
