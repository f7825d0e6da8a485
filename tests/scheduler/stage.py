"""Messages to play with, and a dispatcher whose clock the test turns."""

from collections.abc import Sequence
from typing import TypeVar

from safelight.protocol.adapters import SetAdapters, Use
from safelight.protocol.codec import Buffer
from safelight.protocol.config import Config
from safelight.protocol.errors import ClientGone
from safelight.protocol.generation import Cancel, Failed, Generate, Output, Result, Sample, Started, Timings
from safelight.protocol.messages import FromScheduler, FromWorker, ToScheduler, ToWorker
from safelight.protocol.replicas import (
    Batching,
    Heartbeat,
    ModelInfo,
    ReplicaExited,
    ReplicaReady,
    ReplicaStats,
    ReplicaStatus,
    Status,
)
from safelight.scheduler.dispatcher import Dispatcher

M = TypeVar("M")

MODEL = ModelInfo(
    model="shapes",
    path="shapes",
    pipeline="FluxPipeline",
    kind="image",
    device="cpu",
    dtype="float32",
    parameters={"transformer": 1},
    arguments={},
    size_multiple=8,
    default_width=64,
    default_height=64,
    batching=Batching("merged", "the self-test saw no difference"),
    weight_version="0",
)


def generate(
    request_id: str,
    outputs: int = 1,
    *,
    priority: int = 0,
    timeout_s: float | None = None,
    lora: Sequence[str] | None = None,
    progress: bool = True,
) -> Generate:
    samples = [Sample("a red circle", seed) for seed in range(outputs)]
    uses = None if lora is None else [Use(name) for name in lora]
    return Generate(
        request_id=request_id,
        samples=samples,
        priority=priority,
        timeout_s=timeout_s,
        lora=uses,
        progress=progress,
    )


def result(request_id: str, data: bytes = b"png", total_s: float = 1.0) -> Result:
    """A worker's result, without the time in the queue."""
    output = Output(data=Buffer(data), format="png", seed=0, width=64, height=64)
    timings = Timings(queue_s=0.0, encode_s=0.25, denoise_s=0.5, decode_s=0.25, total_s=total_s)
    return Result(request_id, [output], timings, steps=4, weight_version="0")


def stopped(request_id: str) -> Failed:
    """A worker's answer to ``Cancel``."""
    return Failed(request_id, ClientGone("The client went away.").info())


class Stage:
    """A dispatcher, what it sent so far, and the time."""

    def __init__(
        self, *, ready: Sequence[int] = (0,), config: Config | None = None, adapters: SetAdapters | None = None
    ) -> None:
        self.dispatcher = Dispatcher(config or Config(), adapters)
        self.now = 1000.0
        self.progress = 0
        self.to_server: list[FromScheduler] = []
        self.to_replicas: list[tuple[int, ToWorker]] = []
        for number in ready:
            self.ready(number)

    def server(self, *messages: ToScheduler) -> None:
        for message in messages:
            self.dispatcher.from_server(message, self.now)
            self._collect()

    def worker(self, number: int, *messages: FromWorker) -> None:
        for message in messages:
            self.dispatcher.from_worker(number, message, self.now)
            self._collect()

    def ready(self, number: int = 0, pid: int | None = None) -> None:
        self.worker(number, ReplicaReady(number, 10 + number if pid is None else pid, MODEL))

    def heartbeat(
        self,
        number: int = 0,
        stats: ReplicaStats | None = None,
        *,
        goes_on: bool = True,
        forward_s: float | None = None,
    ) -> None:
        """A heartbeat of the replica's current process, whose loop ``goes_on`` or has stalled."""
        pid = self.replica(number).pid
        assert pid is not None
        self.progress += goes_on
        self.worker(number, Heartbeat(number, pid, stats or ReplicaStats(), self.progress, forward_s))

    def exited(self, number: int = 0, message: str = "it was killed by signal 9") -> None:
        self.server(ReplicaExited(number, message))

    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.dispatcher.turn(self.now)
        self._collect()

    def replica(self, number: int = 0) -> ReplicaStatus:
        return self.dispatcher.status(self.now).replicas[number]

    def sent(self, kind: type[M], request_id: str | None = None) -> list[M]:
        """The server's messages of one kind, and of one request if given."""
        found = [message for message in self.to_server if isinstance(message, kind)]
        return [message for message in found if request_id in (None, getattr(message, "request_id", None))]

    def error(self, request_id: str) -> str:
        """The code of the one terminal message of a request, which must be a failure."""
        assert not self.sent(Result, request_id)
        (failed,) = self.sent(Failed, request_id)
        return failed.error.code

    def started(self) -> list[tuple[str, int]]:
        """Requests in the order in which they were started, each with its replica."""
        return [(message.request_id, message.replica) for message in self.sent(Started)]

    def given(self, number: int) -> list[str]:
        """The requests that a worker was given, in order."""
        return [order.request_id for to, order in self.to_replicas if to == number and isinstance(order, Generate)]

    def cancelled(self, number: int) -> list[str]:
        return [order.request_id for to, order in self.to_replicas if to == number and isinstance(order, Cancel)]

    def statuses(self) -> list[Status]:
        return self.sent(Status)

    def _collect(self) -> None:
        outbox = self.dispatcher.take_outbox()
        self.to_server += outbox.to_server
        self.to_replicas += outbox.to_replicas
