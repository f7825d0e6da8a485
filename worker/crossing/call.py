"""One call that a pipeline makes to one of its components."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

from greenlet import getcurrent


class OwnState(Protocol):
    """What the fork that makes a call has changed in the components."""

    def aside(self) -> AbstractContextManager[None]:
        """Around what must find the components as they are for everybody."""


@dataclass(slots=True, eq=False)
class Call:
    """``component.method(*args, **kwargs)``, not yet made.

    ``component`` is the dotted name below the pipeline ("transformer", "text_encoder.model"), ``function`` the real
    bound method. ``changes`` are those that its fork has made; a call that needs them is made in a context of
    ``around``, and for nobody else.
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
        """Make the call with exactly the arguments that the pipeline gave."""
        with nullcontext() if self.around is None else self.around():
            return self.function(*self.args, **self.kwargs)


def cross(call: Call) -> Any:
    """Suspend the current coroutine until the batcher has made ``call``; returns what the component returned."""
    return cross_all(call)[0]


def cross_all(*calls: Call) -> Sequence[Any]:
    """Suspend the current coroutine until all ``calls`` are made, and return their answers in the same order.

    Those that can meet are made as one forward. If any failed, one of the failures is raised. Outside a coroutine there
    is nobody to switch to, and the calls are made at once.
    """
    batcher = getcurrent().parent
    if batcher is None:
        return [call.run() for call in calls]
    answers: Sequence[Any] = batcher.switch(calls)
    return answers
