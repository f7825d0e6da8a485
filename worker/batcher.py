"""The dynamic batcher: which calls of which coroutines meet in the next forward, and in which order.

Calls wait in the order in which they became ready. The first in line chooses the forward's kind, and every later one
with the same signature joins it, up to the caps. A coroutine's next call goes to the end of the line, so that kinds
take turns and none starves.
"""

from __future__ import annotations

import logging
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch

from ..protocol.replicas import BatchingMode
from .crossing.call import Call
from .crossing.coroutine import Cancelled, Coroutine
from .forward.at_rest import AtRest
from .forward.batch import Forward, Outcome, Pending, Wait
from .forward.costs import Costs
from .forward.policy import MergePolicy
from .forward.prompt_cache import PromptCache, prompt_key, prompt_of
from .forward.recovery import Agree, Recovery
from .forward.runner import Runner
from .forward.signature import Signatures
from .forward.stages import stages
from .heartbeat import Activity
from .lora.adapters import RankAdapters
from .lora.bank import ActiveAdapters

log = logging.getLogger(__name__)

STARTS_PER_STEP = 2
"""A start runs a coroutine up to its first call while everybody else waits, so few are done between two forwards.

Where nobody waits, as many start as one forward takes: a group's samples then make all their steps together.
"""


class Batcher:
    """Runs coroutines. Everything happens in the caller's greenlet, in :meth:`step`."""

    def __init__(
        self,
        *,
        max_batch: int,
        max_tokens: int,
        mode: BatchingMode = "merged",
        cache: PromptCache | None = None,
        adapters: RankAdapters | None = None,
        costs: Costs | None = None,
        at_rest: AtRest | None = None,
        activity: Activity | None = None,
        agree: Agree = lambda _: None,
        meet: Callable[[int], None] = lambda _: None,
    ) -> None:
        """``meet`` hears the :attr:`schedule_digest` of each forward before it is made, and may refuse it."""
        self.mode: BatchingMode = mode
        self.policy = MergePolicy(max_batch, max_tokens)
        self.runner = Runner(stages(cache, adapters, costs, at_rest, activity))
        self.recovery = Recovery(self.runner, self.policy, self._free_memory, agree)
        self.schedule_digest = 0
        """Of which calls of which coroutines have met, in which order; equal on all ranks of a replica."""
        self.paused = False
        """While it is, no coroutine goes on."""
        self._agree = agree
        self._meet = meet
        self._cache = cache
        self._adapters = adapters
        self._signatures = Signatures()
        self._starting: deque[Coroutine] = deque()
        self._waiting: deque[Pending] = deque()
        self._started = 0
        self._active: set[Coroutine] = set()
        self._cancelled: set[Coroutine] = set()

    @property
    def busy(self) -> bool:
        return not self.paused and bool(self._starting or self._waiting)

    def start(self, coroutine: Coroutine) -> None:
        """Run ``coroutine`` from one of the next steps on."""
        self._started += 1
        coroutine.number = self._started
        self._starting.append(coroutine)

    def cancel(self, coroutine: Coroutine) -> None:
        """End ``coroutine`` where it waits; it hears of it as :class:`Cancelled`. A finished one is left alone.

        One that is being served by the forward in hand ends when its turn to go on comes.
        """
        if coroutine.finished or coroutine in self._cancelled:
            return
        self._cancelled.add(coroutine)
        if coroutine in self._starting:
            self._starting.remove(coroutine)
            self._continue(coroutine, coroutine.throw(Cancelled()))
        waits = [pending.wait for pending in self._waiting if pending.coroutine is coroutine]
        if waits:
            waits[0].abandoned = True  # also where the forward in hand makes another of its calls
            self._waiting = deque(pending for pending in self._waiting if pending.coroutine is not coroutine)
            self._continue(coroutine, coroutine.throw(Cancelled()))

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Around an operation: it finds the components without what requests in progress have changed in them."""
        with ExitStack() as stack:
            for changes in {pending.call.changes for pending in self._waiting if pending.call.changes is not None}:
                stack.enter_context(changes.aside())
            yield

    def forget_answers(self) -> None:
        """Every answer that is kept was made by weights that may have changed."""
        if self._cache is not None:
            self._cache.clear()

    def step(self) -> None:
        """Start a few coroutines, then make one forward and let those that it served run to their next call."""
        if self.paused:
            return
        for _ in range(STARTS_PER_STEP if self._waiting else self.policy.max_batch):
            # looked at anew each time: one that fails at once leaves its place to the next
            if not self._starting or not self._may_start(self._starting[0]):
                break
            coroutine = self._starting.popleft()
            self._active.add(coroutine)
            self._continue(coroutine, coroutine.start())
        if self._waiting:
            forward = self._next_forward()
            numbers = ",".join(str(pending.coroutine.number) for pending in forward.calls)
            self.schedule_digest = zlib.crc32(f"{forward.name} {numbers}".encode(), self.schedule_digest)
            self._meet(self.schedule_digest)
            self.runner.counters.calls += len(forward.calls)
            self.recovery.run(forward, self._deliver)

    def _may_start(self, coroutine: Coroutine) -> bool:
        """Those behind one that has to wait wait too, so that its time comes."""
        if self.mode == "serial" or coroutine.exclusive:
            return not self._active
        return not any(active.exclusive for active in self._active)

    def _deliver(self, pending: Pending, outcome: Outcome) -> None:
        """Let the call's coroutine go on, unless it waits for another one's answer too."""
        wait, coroutine = pending.wait, pending.coroutine
        wait.answers[pending.index] = outcome.value
        wait.error = wait.error or outcome.error
        wait.missing -= 1
        if wait.abandoned or wait.missing:
            return
        if coroutine in self._cancelled:
            calls = coroutine.throw(Cancelled())
        else:
            answers, wait.answers = wait.answers, []  # the forward in hand must not hold what the pipeline lets go of
            calls = coroutine.throw(wait.error) if wait.error else coroutine.resume(answers)
        self._continue(coroutine, calls)

    def _continue(self, coroutine: Coroutine, calls: Sequence[Call] | None) -> None:
        """Put the coroutine's next calls into the line, if it made any."""
        if calls is None:
            self._active.discard(coroutine)
            self._cancelled.discard(coroutine)
            return
        wait = Wait(coroutine, [None] * len(calls), len(calls))
        self._waiting.extend(self._examined(wait, index, call) for index, call in enumerate(calls))

    def _examined(self, wait: Wait, index: int, call: Call) -> Pending:
        """The call with what decides its company. One that cannot be examined runs alone, and says so once."""
        pending = Pending(wait, index, call, wait.coroutine.state)
        if call.around is not None:  # by what its own fork has changed, so that it is nobody else's call
            return pending
        try:
            if self.mode == "merged" and not wait.coroutine.alone and call.name not in self.policy.unmergeable:
                pending.batchable = self._signatures.read(call)
            pending.prompt = prompt_key(call) if self._cache else None
        except Exception as error:  # arguments of any kind come by here, and the loop serves everybody
            self._agree(f"reading the arguments of {call.name} has raised {type(error).__name__}")
            log.warning("the arguments of %s cannot be compared", call.name, exc_info=True)
            self.policy.never_merge(call.name, "its arguments cannot be compared")
        return pending

    def _next_forward(self) -> Forward:
        """The first in line and all that may join it, taken out of the line."""
        first = self._waiting.popleft()
        kind, uses = self.policy.batchable(first), self._uses(first)
        if kind is None or self._is_cached(first, uses):
            return Forward([first], [uses])
        turns, positions = self.policy.takes_turns(first.call.name), kind.positions
        calls, adapters, prompts, left = [first], [uses], {prompt_of(first, uses)}, deque[Pending]()
        most = self.policy.max_positions(first.call.name)
        for other in self._waiting:
            part = self.policy.batchable(other)
            if part is None or part.signature != kind.signature or other.state != first.state:
                left.append(other)
                continue
            its = self._uses(other)
            prompt = prompt_of(other, its)
            full = len(calls) == self.policy.max_batch or positions + part.positions > most
            if full or (turns and its != uses) or (prompt is not None and prompt in prompts):
                left.append(other)
                continue
            calls.append(other)
            adapters.append(its)
            positions += part.positions
            prompts.add(prompt)
        self._waiting = left
        return Forward(calls, adapters)

    def _is_cached(self, pending: Pending, uses: ActiveAdapters) -> bool:
        key = prompt_of(pending, uses)
        return self._cache is not None and self._cache.holds(key, exact=pending.coroutine.alone)

    def _uses(self, pending: Pending) -> ActiveAdapters:
        if self._adapters is None:
            return ()
        return self._adapters.uses(pending.call.component, pending.coroutine.wanted)

    def _free_memory(self) -> None:
        """Give back what can be made again, after a forward did not fit."""
        if self._adapters is not None:
            self._adapters.forget_stacks()
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.empty_cache()
