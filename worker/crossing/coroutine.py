"""A pipeline call as a coroutine: it runs until it calls a component or yields, and waits there for the batcher.

Each coroutine has its own torch settings (autocast, for example) and random state, which are swapped out while it
waits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from greenlet import getcurrent, greenlet

from .call import Suspension, Yielded
from .random_state import RandomState, random_state, set_random_state
from .thread_state import Swap, ThreadState, thread_state

T = TypeVar("T")


class Cancelled(BaseException):
    """Raised in a cancelled coroutine. Not an ``Exception``, so that no pipeline's ``except Exception`` catches it."""


class Coroutine:
    """Runs ``body`` in a greenlet.

    ``alone`` keeps its calls out of merged forwards; an ``exclusive`` coroutine has the batcher to itself from start to
    end. The calls of a ``plain`` one compute as plain diffusers does, to the bit. ``wanted`` are the adapters that its
    request names, in the form that their implementation has chosen. ``random`` is its initial random state, by default
    the batcher's.
    When it ends, ``done`` is called with it in the batcher's greenlet, and one of ``result`` and ``error`` is set.
    """

    def __init__(
        self,
        body: Callable[[], Any],
        done: Callable[[Coroutine], None],
        *,
        alone: bool = False,
        exclusive: bool = False,
        plain: bool = False,
        wanted: object = None,
        random: RandomState | None = None,
    ) -> None:
        self._greenlet = greenlet(body)
        self._done = done
        self.alone = alone
        self.exclusive = exclusive
        self.plain = plain
        self.wanted = wanted
        self.pixels = 0
        """Pixels of the output, all frames together; 0 if unknown."""
        self.number = 0
        """A serial number, in the batcher's order of starts."""
        self.waits = 0
        """How often it has waited for answers."""
        self.called: set[str] = set()
        """The names of the calls that it has made."""
        self.state: ThreadState | None = None
        """torch's settings for its calls, if they differ from the batcher's."""
        self._away: Swap | None = None
        self._random = random
        self.result: Any = None
        self.error: BaseException | None = None

    @property
    def finished(self) -> bool:
        return bool(self._greenlet.dead)

    def start(self) -> Suspension | None:
        """Run to the first call or calls; ``None`` if the body ended without one."""
        return self._advance(self._greenlet.switch)

    def resume(self, answers: Sequence[Any]) -> Suspension | None:
        """Answer the calls that the coroutine waits for, none if it has yielded, and run to its next ones."""
        return self._advance(lambda: self._greenlet.switch(answers))

    def throw(self, error: BaseException) -> Suspension | None:
        """Raise ``error`` with its traceback where the coroutine waits; it ends unless the pipeline handles it."""
        return self._advance(lambda: self._greenlet.throw(type(error), error, error.__traceback__))

    def _advance(self, switch: Callable[[], Any]) -> Suspension | None:
        # not the greenlet that made this coroutine: that may be another coroutine (a sample that wants a preview)
        self._greenlet.parent = getcurrent()
        try:
            value = self._with_own_settings(switch)
        except BaseException as error:  # any exception of the pipeline is this request's outcome
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            self.error = error
            self._end()
            return None
        if not self.finished:
            assert isinstance(value, tuple | Yielded), "a coroutine switches only with calls or to yield"
            return value
        self.result = value
        self._end()
        return None

    def with_own_random_numbers(self, run: Callable[[], T]) -> T:
        """Call ``run``, the coroutine's own code or a call that runs alone, with this coroutine's random state."""
        outside = random_state()
        if self._random is not None:
            set_random_state(self._random)
        try:
            return run()
        finally:
            self._random = random_state()
            set_random_state(outside)

    def _with_own_settings(self, switch: Callable[[], Any]) -> Any:
        outside = thread_state()
        if self._away is not None:
            self._away.back()
        try:
            return self.with_own_random_numbers(switch)
        finally:
            inside = thread_state()
            differs = inside != outside
            self.state = inside if differs else None
            self._away = Swap(inside, outside) if differs else None

    def _end(self) -> None:
        done, self._done = self._done, _ignore  # drops the reference to the request, whose outputs are large
        done(self)


def _ignore(_: Coroutine) -> None:
    return
