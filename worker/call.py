"""One call that a pipeline makes to one of its components."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from greenlet import getcurrent


@dataclass(slots=True, eq=False)
class Call:
    """``component.method(*args, **kwargs)``, not yet made.

    ``component`` is the dotted name below the pipeline ("transformer", "text_encoder.model"), ``function`` the real
    bound method.
    """

    component: str
    method: str
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def name(self) -> str:
        return self.component if self.method == "__call__" else f"{self.component}.{self.method}"

    def run(self) -> Any:
        """Make the call with exactly the arguments that the pipeline gave."""
        return self.function(*self.args, **self.kwargs)


def cross(call: Call) -> Any:
    """Suspend the current coroutine until the hub has made ``call``; returns what the component returned.

    Outside a coroutine there is nobody to switch to, and the call is made at once.
    """
    hub = getcurrent().parent
    return call.run() if hub is None else hub.switch(call)
