"""The hub: which calls of which coroutines form the next forward.

Calls wait in the order in which they became ready. The first in line chooses the forward's kind, and every later one
with the same key joins it, up to the caps. A coroutine's next call goes to the end of the line, so that kinds take
turns and none starves.
"""

from __future__ import annotations

import logging
import zlib
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from ..protocol.messages import BatchingMode
from .anatomy import Anatomist, Anatomy
from .at_rest import AtRest
from .call import Call
from .coroutine import Cancelled, Coroutine
from .costs import Costs
from .lora.adapters import RankAdapters
from .lora.beside import CannotMix, Uses
from .merging import NotSplittable, RowLists, merge
from .prompt_cache import PromptCache, prompt_key
from .random_state import has_drawn, kept_random_state, random_state
from .thread_state import ThreadState, within

log = logging.getLogger(__name__)

STARTS_PER_TURN = 2
"""A start runs a coroutine up to its first call while everybody else waits, so few are done between two forwards.

Where nobody waits, as many start as one forward takes: a group's samples then make all their steps together.
"""

MOST_KINDS_APART = 1000
"""Kinds of calls that are remembered as failing when merged; then they are forgotten, and tried again."""


@dataclass(slots=True)
class Counters:
    """Since the hub was made: component calls answered, and forwards that it took."""

    calls: int = 0
    forwards: int = 0


@dataclass(slots=True, eq=False)
class Waiting:
    """A coroutine at its call. Without an ``anatomy`` the call can only be made alone.

    A call with a ``prompt`` is a text encoder's; two with the same one have the same answer. ``state`` are the settings
    of torch with which the call is made, where they are not the hub's.
    """

    coroutine: Coroutine
    call: Call
    anatomy: Anatomy | None
    prompt: Hashable | None
    state: ThreadState | None


@dataclass(slots=True)
class Outcome:
    """What a call returned or raised."""

    value: Any = None
    error: Exception | None = None


class Hub:
    """Runs coroutines. Everything happens in the caller's greenlet, in :meth:`turn`."""

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
    ) -> None:
        self.max_batch = max_batch
        self.max_tokens = max_tokens
        self.mode: BatchingMode = mode
        self.counters = Counters()
        self.unmergeable: dict[str, str] = {}
        """Calls that run alone, by name, and why."""
        self.trace = 0
        """A digest of which coroutines have been served together, in which order; equal on all ranks of a replica."""
        self.merged_names: set[str] = set()
        """Calls that have met in a forward, by name."""
        self._apart: set[Hashable] = set()
        self._token_caps: dict[str, int] = {}
        self.paused = False
        """While it is, no coroutine goes on."""
        self._cache = cache
        self._adapters = adapters
        self._costs = costs
        self._at_rest = at_rest
        self._unmixed: set[str] = set()  # calls in which requests with other adapters cannot meet, by name
        self._anatomist = Anatomist()
        self._row_lists = RowLists()
        self._starting: deque[Coroutine] = deque()
        self._waiting: deque[Waiting] = deque()
        self._started = 0
        self._active: set[Coroutine] = set()
        self._cancelled: set[Coroutine] = set()

    @property
    def busy(self) -> bool:
        return not self.paused and bool(self._starting or self._waiting)

    def start(self, coroutine: Coroutine) -> None:
        """Run ``coroutine`` from one of the next turns on."""
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
        for waiting in [w for w in self._waiting if w.coroutine is coroutine]:
            self._waiting.remove(waiting)
            self._continue(coroutine, coroutine.throw(Cancelled()))

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Around an operation: it finds the components without what requests in progress have changed in them."""
        with ExitStack() as stack:
            for changes in {waiting.call.changes for waiting in self._waiting if waiting.call.changes is not None}:
                stack.enter_context(changes.aside())
            yield

    def forget_answers(self) -> None:
        """Every answer that is kept was made by weights that may have changed."""
        if self._cache is not None:
            self._cache.clear()

    def adapters_changed(self) -> None:
        """Requests with different ones may meet again where those that there were could not."""
        self._unmixed.clear()

    def turn(self) -> None:
        """Start a few coroutines, then make one forward and let those that it served run to their next call."""
        if self.paused:
            return
        for _ in range(STARTS_PER_TURN if self._waiting else self.max_batch):
            # looked at anew each time: a coroutine that fails at once may cancel others that wait to start
            if not self._starting or not self._may_start(self._starting[0]):
                break
            coroutine = self._starting.popleft()
            self._active.add(coroutine)
            self._continue(coroutine, coroutine.start())
        if self._waiting:
            group = self._next_group()
            numbers = ",".join(str(waiting.coroutine.number) for waiting in group)
            self.trace = zlib.crc32(numbers.encode(), self.trace)
            for waiting, outcome in zip(group, self._forward(group), strict=True):
                self._continue(waiting.coroutine, self._answer(waiting.coroutine, outcome))

    def _may_start(self, coroutine: Coroutine) -> bool:
        """Those behind one that has to wait wait too, so that its time comes."""
        if self.mode == "serial" or coroutine.exclusive:
            return not self._active
        return not any(active.exclusive for active in self._active)

    def _answer(self, coroutine: Coroutine, outcome: Outcome) -> Call | None:
        if coroutine in self._cancelled:
            return coroutine.throw(Cancelled())
        return coroutine.throw(outcome.error) if outcome.error else coroutine.resume(outcome.value)

    def _continue(self, coroutine: Coroutine, call: Call | None) -> None:
        """Put the coroutine's next call into the line, if it made one."""
        if call is None:
            self._active.discard(coroutine)
            self._cancelled.discard(coroutine)
            return
        self._waiting.append(self._examined(coroutine, call))

    def _examined(self, coroutine: Coroutine, call: Call) -> Waiting:
        """The call with what decides its company. One that cannot be examined runs alone, and says so once."""
        if call.around is not None:  # by what its own fork has changed, so that it is nobody else's call
            return Waiting(coroutine, call, None, None, coroutine.state)
        mergeable = self.mode == "merged" and not coroutine.alone and call.name not in self.unmergeable
        try:
            anatomy = self._anatomist.dissect(call) if mergeable else None
            if anatomy is not None and anatomy.key in self._apart:
                anatomy = None
            return Waiting(coroutine, call, anatomy, prompt_key(call) if self._cache else None, coroutine.state)
        except Exception:  # arguments of any kind come by here, and the loop serves everybody
            log.warning("the arguments of %s cannot be compared", call.name, exc_info=True)
            self._never_merge_again(call.name, "its arguments cannot be compared")
            return Waiting(coroutine, call, None, None, coroutine.state)

    def _next_group(self) -> list[Waiting]:
        """The first in line and all that may join it, taken out of the line."""
        group = [self._waiting.popleft()]
        first = group[0].anatomy
        if first is None or self._is_cached(group[0]):
            return group
        name = group[0].call.name
        most = min(self.max_tokens, self._token_caps.get(name, self.max_tokens))
        positions, prompts, left = first.positions, {self._prompt(group[0])}, deque[Waiting]()
        uses = self._uses(group[0]) if name in self._unmixed else None
        state = group[0].state
        for other in self._waiting:
            part = other.anatomy
            fits = part is not None and part.key == first.key and positions + part.positions <= most
            fits = fits and other.state == state and (uses is None or self._uses(other) == uses)
            asked_already = other.prompt is not None and self._prompt(other) in prompts
            if part is None or not fits or asked_already or len(group) == self.max_batch:
                left.append(other)
                continue
            group.append(other)
            positions += part.positions
            prompts.add(self._prompt(other))
        self._waiting = left
        return group

    def _forward(self, group: list[Waiting]) -> list[Outcome]:
        self.counters.calls += len(group)
        if len(group) == 1:
            return [self._alone(group[0])]
        outcomes = self._merged(group)
        return self._one_by_one(group) if outcomes is None else outcomes

    def _alone(self, waiting: Waiting) -> Outcome:
        cached = self._cached(waiting)
        if cached is not None:
            return Outcome(cached)
        self.counters.forwards += 1
        try:
            with waiting.coroutine.own_random_numbers():
                before = random_state()
                value = self._computed([waiting], waiting.call.run)
                if waiting.prompt is not None and not has_drawn(before):
                    self._keep(waiting, value, exact=True)
        except Exception as error:  # noqa: BLE001  # goes to the coroutine that made the call
            return Outcome(error=error)
        return Outcome(value)

    def _merged(self, group: list[Waiting]) -> list[Outcome] | None:
        """One forward for the group; ``None`` when it cannot be had, and the calls must be made one by one."""
        parts = [waiting.anatomy for waiting in group if waiting.anatomy is not None]
        name = group[0].call.name
        try:
            with kept_random_state() as before:
                output = self._run(group, parts)
                if has_drawn(before):
                    self._never_merge_again(name, "it draws random numbers, which are each request's own")
                    return None
            values = self._row_lists.split(output, parts, lambda: self._run(group[:1], parts[:1]))
        except CannotMix as reason:
            log.info("requests with different adapters take turns in %s: %s", name, reason)
            self._unmixed.add(name)
            return self._by_adapters(group)
        except NotSplittable as reason:
            self._never_merge_again(name, f"its output cannot be divided: {reason}")
            return None
        except torch.OutOfMemoryError:
            if self._adapters is not None:
                self._adapters.forget_stacks()
            self._token_caps[name] = max(1, sum(part.positions for part in parts) // 2)
            log.warning("%d calls to %s are too many for the memory; fewer meet from now on", len(group), name)
            return None
        except Exception:  # one of the calls, or the merge: alone, each shows which
            log.warning("a forward of %d calls to %s failed; they run one by one", len(group), name, exc_info=True)
            return None
        self.merged_names.add(name)
        for waiting, value in zip(group, values, strict=True):
            self._keep(waiting, value, exact=False)
        return [Outcome(value) for value in values]

    def _run(self, group: list[Waiting], parts: list[Anatomy]) -> Any:
        """The output of one forward with the rows of ``group``."""
        args, kwargs = merge(parts)
        output = self._computed(group, lambda: group[0].call.function(*args, **kwargs))
        self.counters.forwards += 1
        return output

    def _computed(self, group: list[Waiting], forward: Callable[[], Any]) -> Any:
        """The output of ``forward``, of which nothing stays in the component when it fails halfway."""
        try:
            with _settings(group[0]), self._adapted(group), self._timed(group):
                return forward()
        except BaseException:
            if self._at_rest is not None:
                self._at_rest.restore(group[0].call.component.partition(".")[0])
            raise

    def _by_adapters(self, group: list[Waiting]) -> list[Outcome]:
        """A forward for each choice of adapters."""
        alike: dict[Uses, list[Waiting]] = {}
        for waiting in group:
            alike.setdefault(self._uses(waiting), []).append(waiting)
        self.counters.calls -= len(group)  # which are counted again
        outcomes = {
            id(waiting): outcome
            for part in alike.values()
            for waiting, outcome in zip(part, self._forward(part), strict=True)
        }
        return [outcomes[id(waiting)] for waiting in group]

    def _one_by_one(self, group: list[Waiting]) -> list[Outcome]:
        """After a merged forward failed. If each call alone does well, calls of just this kind stay apart."""
        outcomes = [self._alone(waiting) for waiting in group]
        anatomy, name = group[0].anatomy, group[0].call.name
        if anatomy is not None and name not in self._token_caps and not any(outcome.error for outcome in outcomes):
            if len(self._apart) == MOST_KINDS_APART:
                self._apart.clear()
            self._apart.add(anatomy.key)
        return outcomes

    def _is_cached(self, waiting: Waiting) -> bool:
        return self._cache is not None and self._cache.holds(self._prompt(waiting), exact=waiting.coroutine.alone)

    def _cached(self, waiting: Waiting) -> Any | None:
        if self._cache is None or waiting.prompt is None:
            return None
        return self._cache.get(self._prompt(waiting), exact=waiting.coroutine.alone)

    def _keep(self, waiting: Waiting, value: Any, *, exact: bool) -> None:
        if self._cache is not None and waiting.prompt is not None:
            self._cache.put(self._prompt(waiting), value, exact=exact)

    def _prompt(self, waiting: Waiting) -> Hashable | None:
        """By what a text encoder's answer is known: what it was asked, its adapters, and torch's settings."""
        if waiting.prompt is None:
            return None
        uses = tuple((adapter.number, strength) for adapter, strength in self._uses(waiting))
        return waiting.prompt, uses, waiting.state

    def _uses(self, waiting: Waiting) -> Uses:
        if self._adapters is None:
            return ()
        return self._adapters.uses(waiting.call.component, waiting.coroutine.wanted)

    def _adapted(self, group: list[Waiting]) -> AbstractContextManager[None]:
        """Around a forward of the group: each one's rows with the adapters that it has."""
        if self._adapters is None:
            return nullcontext()
        rows = [(1 if one.anatomy is None else one.anatomy.rows, self._uses(one)) for one in group]
        listed = group[0].anatomy is not None and group[0].anatomy.listed
        return self._adapters.during(group[0].call.component, rows, listed=listed)

    def _timed(self, group: list[Waiting]) -> AbstractContextManager[None]:
        if self._costs is None:
            return nullcontext()
        pixels = max(one.coroutine.pixels for one in group)
        return self._costs.timed(group[0].call.name, pixels, alone=len(group) == 1)

    def _never_merge_again(self, name: str, reason: str) -> None:
        log.warning("calls to %s run alone from now on: %s", name, reason)
        self.unmergeable[name] = reason
        for waiting in self._waiting:
            if waiting.call.name == name:
                waiting.anatomy = None


def _settings(waiting: Waiting) -> AbstractContextManager[None]:
    """Around a forward: the settings of torch that the request has made."""
    return nullcontext() if waiting.state is None else within(waiting.state)
