"""The dynamic batcher: runs coroutines to their next calls, and forwards that answer the calls of several."""

from __future__ import annotations

import logging
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from ...protocol.replicas import BatchingMode
from ..crossing.call import Call, OwnState, Suspension, Yielded
from ..crossing.coroutine import Cancelled, Coroutine
from ..pipelines.components import DENOISERS
from .batch import Outcome, Pending, Wait
from .policy import MergePolicy
from .prompt_cache import prompt_key
from .recovery import Agree, Recovery
from .resources import ForwardResources
from .runner import Runner
from .signature import Signatures
from .stages import stages
from .waiting import WaitingCalls

log = logging.getLogger(__name__)

TURNS_PER_FORWARD = 4
"""How often coroutines that yield are resumed before a forward that waits. Their steps take far less time than it."""


class Batcher:
    """Runs coroutines, in the caller's greenlet, in :meth:`step`."""

    def __init__(
        self,
        *,
        max_batch: int,
        max_tokens: int,
        mode: BatchingMode = "merged",
        resources: ForwardResources = ForwardResources(),  # noqa: B008  # it is frozen, and empty
        agree: Agree = lambda _: None,
        before_forward: Callable[[int], None] = lambda _: None,
    ) -> None:
        """``before_forward`` receives the :attr:`schedule_digest` before each forward, and may raise to prevent it."""
        self.mode: BatchingMode = mode
        self.resources = resources
        self.policy = MergePolicy(max_batch, max_tokens)
        self.runner = Runner(stages(resources), resources.division)
        self.recovery = Recovery(self.runner, self.policy, self._free_memory, agree, resources.tiling)
        self.schedule_digest = 0
        """A running CRC of the forwards and their coroutines, equal on all ranks of a replica."""
        self.paused = False
        """While true, no coroutine runs."""
        self.together = 0
        """The most outputs that have shared a denoiser's forward since this was last set to 0."""
        self._agree, self._before_forward = agree, before_forward
        self._signatures = Signatures()
        self._waiting = WaitingCalls(self.policy, resources.cache, resources.adapters)
        self._starting, self._yielded = deque[Coroutine](), dict[Coroutine, OwnState | None]()
        self._turns = self._started = 0
        self._active, self._cancelled = set[Coroutine](), set[Coroutine]()

    @property
    def busy(self) -> bool:
        return not self.paused and bool(self._starting or self._waiting or self._yielded)

    def start(self, coroutine: Coroutine) -> None:
        """Queue ``coroutine``; one of the next steps starts it."""
        self._started += 1
        coroutine.number = self._started
        self._starting.append(coroutine)

    def cancel(self, coroutine: Coroutine) -> None:
        """Raise :class:`Cancelled` in ``coroutine`` where it waits; ignore a finished one.

        If the running forward serves the coroutine, it ends when the forward's answer is delivered.
        """
        if coroutine.finished or coroutine in self._cancelled:
            return
        self._cancelled.add(coroutine)
        if coroutine in self._starting:
            self._starting.remove(coroutine)
            self._continue(coroutine, coroutine.throw(Cancelled()))
        removed = self._waiting.remove(coroutine)
        if removed:
            removed[0].wait.abandoned = True  # the running forward may serve another call of the same wait
        if removed or coroutine in self._yielded:
            self._yielded.pop(coroutine, None)
            self._continue(coroutine, coroutine.throw(Cancelled()))

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Within this context, the components are without the changes of requests in progress (for operations)."""
        with ExitStack() as stack:
            waiting = {pending.call.changes for pending in self._waiting} | {*self._yielded.values()}
            for changes in waiting:
                if changes is not None:
                    stack.enter_context(changes.aside())
            yield
        if self.resources.graphs is not None:
            self.resources.graphs.revalidate()

    def forget_graphs(self) -> None:
        """Free the memory of recorded graphs; the next forwards record them again."""
        if self.resources.graphs is not None:
            self.resources.graphs.forget()

    def forget_answers(self) -> None:
        """Clear the prompt cache; required when weights may have changed."""
        if self.resources.cache is not None:
            self.resources.cache.clear()

    def step(self) -> None:
        """Resume coroutines that have yielded, start new ones, then run one forward and resume those that it served.

        While coroutines yield again, most steps are without a forward.
        """
        if self.paused:
            return
        self._resume_yielded()
        self._start()
        if self._waiting and not self._turns % TURNS_PER_FORWARD:
            forward = self._waiting.next_forward()
            numbers = ",".join(str(pending.coroutine.number) for pending in forward.calls)
            self.schedule_digest = zlib.crc32(f"{forward.name} {numbers}".encode(), self.schedule_digest)
            self._before_forward(self.schedule_digest)
            self.runner.counters.calls += len(forward.calls)
            if forward.name in DENOISERS:
                self.together = max(self.together, len({pending.coroutine for pending in forward.calls}))
            self.recovery.run(forward, self._deliver)

    def _start(self) -> None:
        """Start as many as one forward takes: those that start together run all their steps together."""
        for _ in range(self.policy.max_batch):
            # checked each time, because a coroutine that fails at once frees its place
            if not self._starting or not self._may_start(self._starting[0]):
                break
            coroutine = self._starting.popleft()
            self._active.add(coroutine)
            self._continue(coroutine, coroutine.start())

    def _resume_yielded(self) -> None:
        """Resume each coroutine that has yielded once, and count how often in a row some yield again."""
        for coroutine in [*self._yielded]:
            if coroutine in self._yielded:  # no other one has cancelled it
                del self._yielded[coroutine]
                self._continue(coroutine, self._resumed(coroutine, []))
        self._turns = self._turns + 1 if self._yielded else 0

    def _may_start(self, coroutine: Coroutine) -> bool:
        """False while ``coroutine`` must wait, and so must all behind it: an exclusive one would starve otherwise."""
        if self.mode == "serial" or coroutine.exclusive:
            return not self._active
        return not any(active.exclusive for active in self._active)

    def _deliver(self, pending: Pending, outcome: Outcome) -> None:
        """Resume the call's coroutine, unless it waits for further answers."""
        wait, coroutine = pending.wait, pending.coroutine
        wait.answers[pending.index] = outcome.value
        wait.error = wait.error or outcome.error
        wait.missing -= 1
        if wait.abandoned or wait.missing:
            return
        answers, wait.answers = wait.answers, []  # so that the pipeline's last reference frees an answer
        self._continue(coroutine, self._resumed(coroutine, answers, wait.error))

    def _resumed(
        self, coroutine: Coroutine, answers: Sequence[Any], error: BaseException | None = None
    ) -> Suspension | None:
        if coroutine in self._cancelled:
            error = Cancelled()
        return coroutine.resume(answers) if error is None else coroutine.throw(error)

    def _continue(self, coroutine: Coroutine, calls: Suspension | None) -> None:
        """Queue the coroutine's next ``calls``; ``None`` means that it has ended."""
        if calls is None:
            self._active.discard(coroutine)
            self._cancelled.discard(coroutine)
            return
        if isinstance(calls, Yielded):
            self._yielded[coroutine] = calls.changes
            return
        wait = Wait(coroutine, [None] * len(calls), len(calls))
        self._waiting.extend([self._examined(wait, index, call) for index, call in enumerate(calls)])
        coroutine.waits += 1
        coroutine.called.update(call.name for call in calls)

    def _examined(self, wait: Wait, index: int, call: Call) -> Pending:
        """Read the call's signature and prompt key. A call whose arguments cannot be read runs alone from now on."""
        coroutine = wait.coroutine
        first = call.name not in coroutine.called
        pending = Pending(wait, index, call, coroutine.state, first)
        if call.around is not None:  # it runs with its own fork's changes, so no other call can join it
            return pending
        try:
            if self.mode == "merged" and not wait.coroutine.alone and call.name not in self.policy.unmergeable:
                pending.batchable = self._signatures.read(call)
            pending.prompt = prompt_key(call) if self.resources.cache else None
        except Exception as error:  # arguments are of any type, and the loop must go on for all other requests
            self._agree(f"reading the arguments of {call.name} has raised {type(error).__name__}")
            log.warning("the arguments of %s cannot be compared", call.name, exc_info=True)
            self.policy.never_merge(call.name, "its arguments cannot be compared")
        return pending

    def _free_memory(self) -> None:
        """Release caches after a forward ran out of memory."""
        if self.resources.adapters is not None:
            self.resources.adapters.forget_gathered()
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.empty_cache()
