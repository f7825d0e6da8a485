"""A rank's process: it loads the model, tests it, and then runs the engine's steps between messages.

Rank 0 is the leader: it alone talks to the scheduler, and it broadcasts what each step begins with to the other ranks.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import time
from pathlib import Path

import msgspec
import torch
import zmq

from ...protocol.child_config import ChildConfig
from ...protocol.errors import StartFailed
from ...protocol.messages import FROM_WORKER, TO_WORKER, FromWorker, ToWorker
from ...protocol.replicas import ReplicaFailed, ReplicaLoading, ReplicaReady
from ...protocol.self_test import RESULT_FILE, SelfTestResult
from ..accuracy.admission import admit
from ..forward.activity import Activity
from ..forward.row_division import RowDivision
from ..graphs.setting import why_without_graphs
from ..model.attention import choose_attention, use_attention
from ..model.model import Model, load_model
from ..model.modules import modules
from ..offloading.offloading import Offloading, check_offload
from ..parallel.device import find_device
from ..parallel.lockstep import Follower, Leader, RankDesync, Step
from ..parallel.mesh import join, leave
from ..parallel.ranks import RankLost
from ..parallel.starting import ReplicaStartFailed, all_or_none
from ..requests.jobs import Jobs
from ..self_test.self_test import SelfTest
from ..self_test.self_test_cache import SelfTestCache
from ..weights.snapshot.journal import Journal
from .compilation import check_compile
from .engine import Engine
from .event_socket import EventSocket, Outgoing
from .heartbeat import HEARTBEAT_S, Heartbeats
from .spinning import adapt_spinning

log = logging.getLogger(__name__)


class RankProcess:
    """One rank's process; ``child`` has its rank and replica numbers."""

    def __init__(self, child: ChildConfig) -> None:
        assert child.replica is not None
        self._child = child
        self._config = child.config
        self._number = child.replica
        self._is_primary = child.rank == 0
        journal = self._config.weights_journal
        self._journal = Journal(Path(journal)) if journal is not None else None
        self._stopping = False
        self._stats_due = 0.0
        self._context = zmq.Context()
        self._activity = Activity()
        self._heartbeats = Heartbeats(self._context, child.backend, self._number, self._activity)
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.identity = f"replica-{self._number}".encode()
        self._socket.sndhwm = 0
        self._socket.rcvhwm = 0
        self._socket.linger = 500
        self._events: EventSocket | None = None
        if self._is_primary:
            self._socket.connect(child.backend)
            self._events = EventSocket(self._context, child.backend, self._number)
        self._awake, self._alarm = os.pipe()
        os.set_blocking(self._alarm, False)

    def run(self) -> int:
        """Load and serve until SIGTERM. Returns the process's exit status."""
        signal.signal(signal.SIGTERM, self._stop if self._is_primary else signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            return self._serve(*self._load())
        except StartFailed as failed:
            if not self._is_primary and not isinstance(failed, ReplicaStartFailed):
                log.error("%s", failed.message)  # the server logs what the leader sends
            self._send(ReplicaFailed(self._number, failed.message))
            return self._leave(1)
        except (RankLost, RankDesync) as lost:
            log.error("this rank cannot go on without the others: %s", lost)
            return self._leave(1)
        except torch.AcceleratorError as broken:  # sticky: every later use of the device fails in this process
            log.error("the device no longer works in this process: %s", str(broken).partition("\n")[0])
            return self._leave(1)

    def _load(self) -> tuple[Model, SelfTestResult]:
        self._report("loading the model")
        device = find_device(self._config, self._number, self._child.rank)
        check_offload(self._config, device)
        check_compile(self._config)
        why_without_graphs(self._config, device)  # refuses what cannot be before the model is loaded
        threads = self._config.threads or max(1, (os.cpu_count() or 1) // self._config.world_size)
        torch.set_num_threads(threads)
        adapt_spinning(threads)
        # gradient mode is thread state: disabled here, so that leaving a pipeline's no_grad cannot enable it
        torch.set_grad_enabled(False)
        self._mesh = join(
            self._child.rank,
            {"cfg": 2 if self._config.cfg_parallel else 1, "sp": self._config.ulysses, "tp": self._config.tp},
            f"{self._child.rendezvous_path}-store",
            device,
            max(self._config.start_timeout_s, self._config.stall_timeout_s),  # one rank may load from a slower disk
        )
        model = all_or_none(
            self._mesh.world, lambda: load_model(self._config, device, self._mesh.tp, self._mesh.axis("sp"))
        )
        if (kind := self._config.offload) != "off":
            model.offload = all_or_none(
                self._mesh.world, lambda: Offloading(modules(model.pipeline), device, by_block=kind == "block")
            )
        earlier, cache = self._earlier(model)
        self._admit(model, earlier)
        if self._journal is not None and (version := self._journal.replay(model.layouts, self._mesh.world)) is not None:
            model.weight_version = version
        model.attention = choose_attention(
            self._config.attention_backend, device, model.dtype, shares_tokens=self._config.ulysses > 1
        )
        use_attention(model.attention)
        self._division = RowDivision.of(self._mesh, model.timing)
        self_test = self._test(model, earlier, cache)
        return model, self_test

    def _earlier(self, model: Model) -> tuple[SelfTestResult | None, SelfTestCache | None]:
        """The result of another replica's self-test, or of an earlier start's in the cache."""
        if self._child.self_test is not None or not self._config.self_test_cache:
            return self._child.self_test, None
        cache = SelfTestCache(model, self._config, self._mesh.world)
        return cache.read(), cache

    def _admit(self, model: Model, earlier: SelfTestResult | None) -> None:
        """Refuse quantized components that are not accurate enough."""
        if not model.quantized:
            return
        if earlier is None:
            self._report("comparing quantized components with the checkpoint's")
        accuracy = admit(model, self._mesh.world, self._config.variant) if earlier is None else earlier.accuracy
        model.quantized = {
            name: msgspec.structs.replace(one, accuracy=accuracy[name]) for name, one in model.quantized.items()
        }

    def _test(self, model: Model, earlier: SelfTestResult | None, cache: SelfTestCache | None) -> SelfTestResult:
        """Run the self-test, or apply the ``earlier`` result."""
        test = SelfTest(model, self._config, self._report, self._mesh.agree, self._division)
        result = earlier
        if result is None:
            result = test.run()
        else:
            try:
                test.apply(result)
            except StartFailed:
                if cache is not None:
                    cache.remove()
                raise
        if self._is_primary and self._child.self_test is None:
            self._keep(result, cache)
        return result

    def _keep(self, result: SelfTestResult, cache: SelfTestCache | None) -> None:
        try:
            result.write(Path(self._child.directory) / RESULT_FILE)
        except OSError as error:
            log.warning("the self-test runs again at each start, because its result cannot be saved: %s", error)
        if cache is not None:
            cache.write(result)

    def _serve(self, model: Model, self_test: SelfTestResult) -> int:
        lockstep = self._lockstep()
        self._activity.on_device = model.timing.running_s
        engine = Engine(
            self._child,
            model,
            self_test,
            self._mesh,
            self._activity,
            self._journal,
            self._division,
            before_forward=lockstep.before_forward,
            outgoing=Outgoing(self._send, self._send_event, self._wake),
        )
        try:
            engine.warm_up(self._report)
            self._mesh.set_timeout(self._config.stall_timeout_s)  # ranks may have compiled for unequal times
            if isinstance(lockstep, Leader):
                self._send(ReplicaReady(self._number, os.getpid(), model.info()))
                self._heartbeats.start()
                self._lead(lockstep, engine)
            else:
                lockstep.run(engine.run_step)
        finally:
            engine.close()  # also after a fault: outputs that wait for an encoding thread must not delay the exit
        leave(self._mesh)
        return self._leave(0)

    def _lockstep(self) -> Leader | Follower:
        path = self._child.rendezvous_path
        if self._is_primary:
            return Leader(self._context, path, self._config.replica_ranks)
        return Follower(self._context, path, self._child.rank)

    def _lead(self, leader: Leader, engine: Engine) -> None:
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._awake, zmq.POLLIN)
        while not self._stopping:
            self._activity.advance()
            self._update_stats(engine.jobs, at_once=not engine.busy)
            timeout_s = min(HEARTBEAT_S, engine.group_orders.next_look_s)  # an idle loop makes progress too
            ready = dict(poller.poll(0 if engine.busy else round(timeout_s * 1000)))
            if self._awake in ready:
                os.read(self._awake, 4096)
            received = engine.gather(self._received() if self._socket in ready else [], self._received)
            messages = [*received, *engine.group_orders.due()]
            dropped = engine.jobs.collect()
            if messages or dropped or engine.busy:
                step = Step(messages, dropped, engine.changed_limits())
                leader.broadcast(step)
                engine.run_step(step)
        leader.stop()

    def _update_stats(self, jobs: Jobs, *, at_once: bool) -> None:
        """Refresh the statistics that heartbeats send; unless ``at_once``, once per heartbeat at most."""
        now = time.monotonic()
        if at_once or now >= self._stats_due:
            self._activity.stats = jobs.stats()
            self._stats_due = now + HEARTBEAT_S

    def _received(self, wait_s: float = 0.0) -> list[ToWorker]:
        """The messages that are there, or the first ones that come within ``wait_s``."""
        messages: list[ToWorker] = []
        while self._socket.poll(0 if messages else math.ceil(max(0.0, wait_s) * 1000)):
            messages.append(TO_WORKER.decode(self._socket.recv_multipart()))
        return messages

    def _send(self, message: FromWorker) -> None:
        if self._is_primary:
            self._socket.send_multipart(FROM_WORKER.encode(message), copy=False)

    def _send_event(self, message: FromWorker) -> None:
        """Send what happens to a request, from any thread."""
        if self._events is not None:
            self._events.send(message)

    def _report(self, stage: str) -> None:
        if self._is_primary:
            log.info("%s", stage)
            self._send(ReplicaLoading(self._number, os.getpid(), stage))

    def _wake(self) -> None:
        """Wake the loop, from any thread; with a full pipe it is about to wake anyway."""
        try:
            os.write(self._alarm, b"\0")
        except BlockingIOError:
            return

    def _stop(self, *_: object) -> None:
        self._stopping = True
        self._wake()

    def _leave(self, status: int) -> int:
        self._heartbeats.stop()
        self._context.destroy(linger=500)
        return status
