"""A replica's rank: it loads, tests itself, and then turns the batcher between messages.

Rank 0 leads: it alone speaks with the scheduler, and tells the other ranks what each turn begins with.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import torch
import zmq

from ..protocol.child_config import ChildConfig
from ..protocol.config import Config
from ..protocol.errors import StartFailed
from ..protocol.generation import Cancel, Generate
from ..protocol.messages import FROM_WORKER, TO_WORKER, FromWorker, ToWorker
from ..protocol.operations import Perform, SetPaused
from ..protocol.replicas import ReplicaFailed, ReplicaLoading, ReplicaReady
from ..protocol.reports import Performed
from ..protocol.self_test import SelfTestResult
from .batcher import Batcher
from .forward.at_rest import AtRest
from .forward.prompt_cache import PromptCache
from .heartbeat import HEARTBEAT_S, Activity, Heartbeats
from .jobs import Jobs
from .lora.adapters import RankAdapters
from .model import Model, find_device, load_model, modules, use_device
from .operations.group_orders import GroupOrders
from .operations.resources import Resources
from .operations.table import new_coordinator
from .parallel.ranks import RankLost, join, leave
from .parallel.starting import FailedTogether, all_or_none
from .parallel.team import Diverged, Follower, Leader, SettleJoin, Stop, Turn
from .self_test import Found, SelfTest
from .self_test_cache import SelfTestCache
from .weights.snapshot.journal import Journal
from .weights.transport.groups import Groups
from .weights.update.undo_log import UndoLog

log = logging.getLogger(__name__)


class Replica:
    """One process of a replica. ``replica`` and ``rank`` of ``child`` are its numbers."""

    def __init__(self, child: ChildConfig) -> None:
        assert child.replica is not None
        self._child = child
        self._config = child.config
        self._number = child.replica
        self._leads = child.rank == 0
        journal = _path(self._config.weights_journal)
        self._journal = Journal(journal) if journal is not None else None
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
        if self._leads:
            self._socket.connect(child.backend)
        self._awake, self._alarm = os.pipe()
        os.set_blocking(self._alarm, False)

    def run(self) -> int:
        """Load and serve until SIGTERM. Returns the process's exit status."""
        signal.signal(signal.SIGTERM, self._stop if self._leads else signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            return self._serve(*self._load())
        except StartFailed as failed:
            if not self._leads and not isinstance(failed, FailedTogether):
                log.error("%s", failed.message)  # what the leader sends, the server says
            self._send(ReplicaFailed(self._number, failed.message))
            return self._leave(1)
        except (RankLost, Diverged) as lost:
            log.error("this rank cannot go on without the others: %s", lost)
            return self._leave(1)
        except torch.AcceleratorError as broken:  # sticky: whatever this process asks of the device fails from now on
            log.error("the device is broken for this process: %s", str(broken).partition("\n")[0])
            return self._leave(1)

    def _load(self) -> tuple[Model, Found]:
        self._report("loading the model")
        device = find_device(self._config, self._number, self._child.rank)
        use_device(device)  # before anything opens one
        threads = self._config.threads or max(1, (os.cpu_count() or 1) // (self._config.replicas * self._config.tp))
        torch.set_num_threads(threads)
        # gradient mode is the thread's: set once here, so that no pipeline's no_grad can switch it on on leaving
        torch.set_grad_enabled(False)
        self._ranks = join(
            self._child.rank,
            self._config.tp,
            f"{self._child.meeting_place}-store",
            device,
            max(self._config.start_timeout_s, self._config.stall_timeout_s),  # a rank's disk may be the slower one
        )
        model = all_or_none(self._ranks, lambda: load_model(self._config, device, self._ranks))
        if self._journal is not None and (version := self._journal.replay(model.layouts, self._ranks)) is not None:
            model.weight_version = version
        found = self._test(model)
        self._ranks.limit(self._config.stall_timeout_s)
        return model, found

    def _test(self, model: Model) -> Found:
        """Find out what the model does, or take over what an earlier start has found out."""
        test = SelfTest(model, self._config, self._report, self._ranks.agree)
        if self._child.self_test is not None:
            return test.recall(self._child.self_test)
        cache = SelfTestCache(model, self._config, self._ranks) if self._config.self_test_cache else None
        if cache is not None and (kept := cache.read()) is not None:
            try:
                found = test.recall(kept)
            except StartFailed:
                cache.forget()
                raise
        else:
            found = test.run()
        if self._leads:
            self._keep(test.result(found), cache)
        return found

    def _keep(self, result: SelfTestResult, cache: SelfTestCache | None) -> None:
        try:
            result.write(Path(self._child.directory))
        except OSError as error:
            log.warning("the self-test is made again at each start, as its result cannot be kept: %s", error)
        if cache is not None:
            cache.keep(result)

    def _serve(self, model: Model, found: Found) -> int:
        adapters = RankAdapters(
            model.pipeline,
            model.layouts,
            self._ranks,
            model.device,
            most=self._config.max_loras,
            most_bytes=self._config.max_lora_mb * 1_000_000,
        )
        team = self._team()
        batcher = Batcher(
            max_batch=self._config.max_batch,
            max_tokens=self._config.max_batch_tokens,
            mode=found.mode,
            cache=PromptCache(self._config.prompt_cache_mb * 2**20) if self._config.prompt_cache_mb else None,
            adapters=adapters,
            costs=model.costs,
            at_rest=AtRest(modules(model.pipeline)),
            activity=self._activity,
            agree=self._ranks.agree,
            meet=team.meet,
        )
        batcher.policy.unmergeable.update(found.unmergeable)
        shared = Path(self._child.shared)
        jobs = Jobs(model, batcher, self._send, self._wake, leads=self._leads, adapters=adapters, shared=shared)
        global_rank = self._number * self._config.tp + self._child.rank
        groups = Groups(global_rank, model.device, ended=self._wake, receive_s=self._config.max_update_hold_s)
        group_orders = GroupOrders(groups, self._ranks)
        operations = new_coordinator(
            Resources(
                model=model,
                batcher=batcher,
                ranks=self._ranks,
                global_rank=global_rank,
                world_size=self._config.replicas * self._config.tp,
                shared=shared,
                journal=self._journal,
                undo_log=UndoLog(model.device, _undo_limit(self._config), _path(self._config.undo_spill)),
                adapters=adapters,
                groups=groups,
                on_progress=self._activity.advance,
            )
        )

        def take(turn: Turn) -> None:
            """What every rank does in a turn."""
            for request_id in turn.dropped:
                jobs.drop(request_id)
            for message in turn.messages:
                match message:
                    case Generate():
                        jobs.submit(message)
                    case Cancel():
                        jobs.cancel(message.request_id)
                    case SetPaused(paused=paused):
                        batcher.paused = paused
                    case SettleJoin():
                        self._answer(group_orders.settle(message))
                    case Perform() if group_orders.include(message):
                        self._answer(group_orders.perform(message))
                    case Perform():
                        with batcher.aside():
                            performed = operations.perform(message)
                        self._send(performed)
                        jobs.set_version(model.weight_version)
            if not operations.holds:
                batcher.step()

        try:
            if isinstance(team, Leader):
                self._send(ReplicaReady(self._number, os.getpid(), model.info()))
                self._heartbeats.start()
                self._lead(team, batcher, jobs, group_orders, lambda: batcher.busy and not operations.holds, take)
            else:
                team.run(take)
        finally:
            jobs.close()  # also after a fault: what waits to be encoded must not hold up the end
        leave(self._ranks)
        return self._leave(0)

    def _team(self) -> Leader | Follower:
        place = self._child.meeting_place
        if self._leads:
            return Leader(self._context, place, self._config.tp)
        return Follower(self._context, place, self._child.rank)

    def _lead(
        self,
        team: Leader,
        batcher: Batcher,
        jobs: Jobs,
        group_orders: GroupOrders,
        busy: Callable[[], bool],
        take: Callable[[Turn], None],
    ) -> None:
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._awake, zmq.POLLIN)
        while not self._stopping:
            self._activity.advance()
            self._show(jobs, at_once=not busy())
            left_s = min(HEARTBEAT_S, group_orders.next_look_s)  # a loop that has nothing to do turns too
            ready = dict(poller.poll(0 if busy() else round(left_s * 1000)))
            if self._awake in ready:
                os.read(self._awake, 4096)
            messages = [*(self._received() if self._socket in ready else []), *group_orders.due()]
            dropped = jobs.collect()
            if messages or dropped or busy():
                turn = Turn(messages, dropped)
                team.tell(turn)
                take(turn)
        team.tell(Stop())

    def _show(self, jobs: Jobs, *, at_once: bool) -> None:
        """Let the next heartbeats say how far ``jobs`` are; unless ``at_once``, no more often than they are sent."""
        now = time.monotonic()
        if at_once or now >= self._stats_due:
            self._activity.stats = jobs.stats()
            self._stats_due = now + HEARTBEAT_S

    def _received(self) -> list[ToWorker]:
        """Every message that has arrived."""
        messages: list[ToWorker] = []
        while self._socket.poll(0):
            messages.append(TO_WORKER.decode(self._socket.recv_multipart()))
        return messages

    def _answer(self, answer: Performed | None) -> None:
        if answer is not None:
            self._send(answer)

    def _send(self, message: FromWorker) -> None:
        if self._leads:
            self._socket.send_multipart(FROM_WORKER.encode(message), copy=False)

    def _report(self, stage: str) -> None:
        if self._leads:
            log.info("%s", stage)
            self._send(ReplicaLoading(self._number, os.getpid(), stage))

    def _wake(self) -> None:
        """Called by encoding threads; a full pipe means that the loop is about to wake anyway."""
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


def _path(given: str | None) -> Path | None:
    return Path(given) if given is not None else None


def _undo_limit(config: Config) -> int:
    """Bytes of host memory for what updates overwrite, on each rank."""
    if config.undo_mb:
        return config.undo_mb * 1_000_000
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return memory // 2 // (config.replicas * config.tp)
