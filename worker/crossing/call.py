"""One call that a pipeline makes to one of its components."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

from greenlet import getcurrent


class OwnState(Protocol):
    """The changes that a fork has made to the components."""

    def aside(self) -> AbstractContextManager[None]:
        """Hide the changes within the context."""


@dataclass(slots=True, eq=False)
class Call:
    """``component.method(*args, **kwargs)``, not yet run.

    ``component`` is the dotted name below the pipeline ("transformer", "text_encoder.model"), ``function`` the real
    bound method. ``changes`` are its fork's. A call that needs them runs alone, within the context ``around()``.
    """

    component: str
    method: str
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    changes: OwnState | None = None
    around: Callable[[], AbstractContextManager[None]] | None = None

    @property
    def name(self) -> str:
        return self.component if self.method == "__call__" else f"{self.component}.{self.method}"

    def run(self) -> Any:
        """Run the call with exactly the arguments that the pipeline gave."""
        with nullcontext() if self.around is None else self.around():
            return self.function(*self.args, **self.kwargs)


@dataclass(frozen=True, slots=True)
class Yielded:
    """A coroutine lets others run, without a call. ``changes`` are its fork's."""

    changes: OwnState | None


Suspension = Sequence[Call] | Yielded
"""The reason for which a coroutine waits."""


def yield_turn(changes: OwnState | None) -> None:
    """Suspend the current coroutine until the batcher's next step. Outside a coroutine, do nothing."""
    batcher = getcurrent().parent
    if batcher is not None:
        batcher.switch(Yielded(changes))


def cross(call: Call) -> Any:
    """Suspend the current coroutine until the batcher has run ``call``, and return the component's answer."""
    return cross_all(call)[0]


def cross_all(*calls: Call) -> Sequence[Any]:
    """Suspend the current coroutine until all ``calls`` have run, and return their answers in the same order.

    Calls with equal signatures run as one forward. If any fails, one of the failures is raised. Outside a coroutine the
    calls run at once.
    """
    batcher = getcurrent().parent
    if batcher is None:
        return [call.run() for call in calls]
    answers: Sequence[Any] = batcher.switch(calls)
    return answers
