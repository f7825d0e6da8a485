"""The changes that one fork of a pipeline has made to the shared components.

A fork sees its own changes and its calls run with them; other forks never see them. The changes are in the components
while the fork's code or one of its calls runs, and out of them at all other times, so that another request or a weight
update finds the components unchanged. They are dropped when the fork ends, however it ends.

State is compared only where the boundary reports that something may be written. A fork that only reads pays a few
microseconds per call, for the configurations that it holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from diffusers import DiffusionPipeline
from torch import nn

from .call import Call
from .facts import Facts
from .module_state import Piece, Weight, pieces, pieces_of_value


@contextmanager
def untraced(components: Iterable[nn.Module]) -> Iterator[None]:
    """Undo, on leaving the context, everything that was written to ``components`` within it."""
    traces = Changes(components)
    traces.show()
    try:
        yield
    finally:
        traces.hide()


class Changes:
    """The changes of one fork. ``whole`` are components that are watched all the time.

    With ``whole``, the changes stay in the components while a call waits. This is for pipelines that keep state where
    no boundary sees it; such requests run one at a time. ``facts`` are those of the components as they are for all.
    """

    def __init__(self, whole: Iterable[nn.Module] = (), facts: Facts | None = None) -> None:
        self._whole = tuple(whole)
        self._facts = Facts() if facts is None else facts
        self._pieces: dict[int, Piece] = {}  # by the id of their targets
        self._roots: dict[int, int] = {}  # the component of each piece
        self._changed: set[int] = set()  # pieces that have kept something
        self._suspects: set[int] = set()  # components that may have been written to
        self._lasting: set[int] = set()  # pieces that the fork's code may hold references to
        self._shown = False
        self._in_forward = False

    @property
    def shown(self) -> bool:
        return self._shown

    def fact(self, module: nn.Module, component: nn.Module, name: str) -> Any:
        """The attribute ``name`` of ``module``, read again only where the fork may have changed it."""
        return self._facts.read(module, name) if self._is_unchanged(component) else getattr(module, name)

    def found(self, module: nn.Module, component: nn.Module, find: Callable[[nn.Module], Any]) -> Any | None:
        """``find(module)`` from the facts; ``None`` where the fork may have changed it."""
        return self._facts.found(module, find) if self._is_unchanged(component) else None

    def _is_unchanged(self, component: nn.Module) -> bool:
        return self._shown and not self._whole and id(component) not in self._suspects

    def pipeline_fact(self, shared: DiffusionPipeline, own: Callable[[], Any], name: str) -> Any:
        """The attribute ``name`` of the pipeline ``shared``, or ``own()`` if the fork may have changed a component."""
        known = self._shown and not self._whole and not self._suspects
        return self._facts.read(shared, name) if known else own()

    def show(self) -> None:
        """Put the changes into the components, before the fork's code or one of its calls runs."""
        assert not self._shown, "shown once"
        opened: list[Piece] = []
        try:
            for piece in self._pieces.values():
                opened.append(piece)
                piece.open()
        except BaseException:  # no memory for a cast, for example; no change may stay
            for piece in reversed(opened):
                piece.close()
            raise
        self._shown = True
        for component in self._whole:
            self._watch_below(component, component)

    def hide(self) -> None:
        """Restore the components, and keep what was written for the next :meth:`show`."""
        assert self._shown, "hidden once"
        self._shown = False
        # in reverse order: a table may be part of a value that was written to another
        self._changed = {key for key in reversed(self._pieces) if self._pieces[key].close()}
        kept = self._changed | self._lasting
        self._pieces = {key: piece for key, piece in self._pieces.items() if key in kept}

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Hide the changes within the context, for code that is not the fork's."""
        shown = self._shown
        if shown:
            self.hide()
        try:
            yield
        finally:
            if shown:
                self.show()

    def watch(self, module: nn.Module, component: nn.Module, *, below: bool) -> None:
        """Watch ``module``, and with ``below`` all modules below it, for writes until the fork's next call."""
        if self._in_forward or not self._shown:
            return
        self._suspects.add(id(component))
        if below:
            self._watch_below(module, component)
        else:
            self._open(pieces(module), component)

    def watch_value(self, value: Any, component: nn.Module) -> None:
        """Watch ``value`` from now on, because the fork's code holds a reference to it."""
        if self._in_forward or not self._shown or id(value) in self._lasting:
            return
        found = list(pieces_of_value(value))
        if any(isinstance(piece, Weight) for piece in found):
            self._suspects.add(id(component))
        self._lasting |= self._open(found, component)

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
        """Pass ``call`` to ``crossing``, with the fork's changes hidden meanwhile.

        ``writes`` is the module that the call may write to; ``None`` for a plain forward.
        """
        if self._in_forward or not self._shown:  # made by a hook of the fork, within one of its calls
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
