"""What one fork of a pipeline has written to the components that all share.

The fork sees its own changes, and its calls are made with them; nobody else sees them. They are shown while the fork's
code runs and while a call of it is made, and away at all other times: whoever comes between, another request or an
update of the weights, finds the components as they are. What is left of them when the fork ends, however it ends, is
forgotten.

Nothing is looked at unless the boundary says that something may be written: a fork that only reads pays for the
configurations that it holds, some microseconds a call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn

from .call import Call
from .module_state import Piece, pieces, pieces_of_value


@contextmanager
def untraced(components: Iterable[nn.Module]) -> Iterator[None]:
    """Around what may leave traces in ``components``, which are removed."""
    traces = Changes(components)
    traces.show()
    try:
        yield
    finally:
        traces.hide()


class Changes:
    """Those of one fork. ``whole`` are components that are watched all the time, whatever the boundary says.

    With ``whole``, the changes stay shown while a call waits: for pipelines that keep state where nobody sees it, of
    which only one runs at a time.
    """

    def __init__(self, whole: Iterable[nn.Module] = ()) -> None:
        self._whole = tuple(whole)
        self._pieces: dict[int, Piece] = {}  # by the id of their targets
        self._roots: dict[int, int] = {}  # the component of each piece
        self._changed: set[int] = set()  # pieces that have kept something
        self._suspects: set[int] = set()  # components that may have been written to
        self._lasting: set[int] = set()  # pieces that the fork's code may hold in its hands
        self._shown = False
        self._in_forward = False

    @property
    def shown(self) -> bool:
        return self._shown

    def show(self) -> None:
        """The fork's code runs from here on, or a call of it is made."""
        assert not self._shown, "shown once"
        opened: list[Piece] = []
        try:
            for piece in self._pieces.values():
                opened.append(piece)
                piece.open()
        except BaseException:  # no memory for a cast: nothing of it may stay
            for piece in reversed(opened):
                piece.close()
            raise
        self._shown = True
        for component in self._whole:
            self._watch_below(component, component)

    def hide(self) -> None:
        """Put the components back as they are for everybody, and keep what was written."""
        assert self._shown, "hidden once"
        self._shown = False
        # the last first: a table may be part of what was written to another
        self._changed = {key for key in reversed(self._pieces) if self._pieces[key].close()}
        kept = self._changed | self._lasting
        self._pieces = {key: piece for key, piece in self._pieces.items() if key in kept}

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Around what is not the fork's, and must find the components as they are."""
        shown = self._shown
        if shown:
            self.hide()
        try:
            yield
        finally:
            if shown:
                self.show()

    def watch(self, module: nn.Module, component: nn.Module, *, below: bool) -> None:
        """The module, or all below it as well, may be written to until the next call of the fork."""
        if self._in_forward or not self._shown:
            return
        self._suspects.add(id(component))
        if below:
            self._watch_below(module, component)
        else:
            self._open(pieces(module), component)

    def watch_value(self, value: Any, component: nn.Module) -> None:
        """The fork's code has this in its hands from now on, and may write to it at any time."""
        if self._in_forward or not self._shown or id(value) in self._lasting:
            return
        self._lasting |= self._open(pieces_of_value(value), component)

    def _watch_below(self, module: nn.Module, component: nn.Module) -> None:
        for part in module.modules():
            self._open(pieces(part), component)

    def _open(self, found: Iterable[Piece], component: nn.Module) -> set[int]:
        keys = set()
        for piece in list(found):
            key = id(piece.target)
            keys.add(key)
            if key not in self._pieces:
                piece.open()
                self._pieces[key] = piece
                self._roots[key] = id(component)
        return keys

    def cross(self, call: Call, crossing: Callable[[Call], Any], component: nn.Module, writes: nn.Module | None) -> Any:
        """Make ``call`` by ``crossing``, with the fork's changes hidden meanwhile.

        ``writes`` is the module that the call itself may write to, where it is no mere forward.
        """
        if self._in_forward or not self._shown:  # by a hook of the fork's, within one of its calls
            return call.run()
        call.changes = self
        if self._whole:
            if writes is not None or id(component) in self._suspects:
                call.around = self._forward
            return crossing(call)
        self.hide()
        if writes is not None or any(self._roots[key] == id(component) for key in self._changed):
            call.around = partial(self._own_forward, component, writes)
        try:
            return crossing(call)
        finally:
            self.show()

    @contextmanager
    def _forward(self) -> Iterator[None]:
        self._in_forward = True
        try:
            yield
        finally:
            self._in_forward = False

    @contextmanager
    def _own_forward(self, component: nn.Module, writes: nn.Module | None) -> Iterator[None]:
        self.show()
        try:
            if writes is not None:
                self.watch(writes, component, below=True)
            with self._forward():
                yield
        finally:
            self.hide()
