"""One rank's part of an update: checked before anything is written, and undone as long as it is not committed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from typing import Any

import torch

from ....protocol.errors import InvalidRequest, NotFound, Unavailable
from ....protocol.reports import Invalid, Report
from ..checkpoint.layout import Layout
from ..checkpoint.names import Named, by_checkpoint_names, memory_of
from ..checkpoint.overwrite import Staging
from ..progress import Sign
from ..transport.payload import Tensors
from ..transport.sources import Opened, Rejected
from .page_swap import exchange, have_own
from .undo_log import NoRoom, UndoMemory

_SHOWN = 20

Key = tuple[str, str]
"""A module and the name of one of its tensors."""


def _nothing() -> None:
    pass


class Update:
    """The tensors that came, in one part or several, and the bytes that were there before."""

    def __init__(self, layouts: Mapping[str, Layout], memory: UndoMemory) -> None:
        self._layouts = layouts
        self._memory = memory
        self._prepared: Opened | None = None
        self._room: dict[Key, torch.Tensor] = {}
        self._give_back: Callable[[], None] = _nothing
        self._undo: dict[Key, torch.Tensor] = {}
        self._part: dict[str, int] = {}
        self._to_leave_out: list[str] = []
        self._left_out: list[str] = []

    @property
    def written(self) -> dict[str, list[str]]:
        """The names that were written, by module."""
        found: dict[str, list[str]] = {}
        for module, name in self._undo:
            found.setdefault(module, []).append(name)
        return found

    @property
    def prepared(self) -> dict[str, list[str]]:
        """The names that are to be written, by module."""
        return (
            {} if self._prepared is None else {module: list(names) for module, names in self._prepared.tensors.items()}
        )

    def prepare(self, opened: Opened, sign: Sign = _nothing, *, complete: bool = False) -> Report:
        """Check every name, shape and dtype, find room to undo it, and get ready what can be.

        ``complete`` asks for every tensor of each module. Afterwards ``opened`` has the checkpoint's names.
        Raises ``Rejected``, and ``OSError`` of what is read; all is as it was then. ``sign`` is called now and then, to
        say that it goes on.
        """
        self._prepared = opened
        try:
            named = by_checkpoint_names(opened.tensors, self._layouts)
            opened.tensors = named.tensors
            report = self.check(opened.tensors)
            self._check_ties(named)
            self._check_whole(named, complete)
            self._to_leave_out = named.left_out
            self._find_room(opened.tensors)
            self._stage(opened, sign)
        except BaseException:
            self.release()
            raise
        return report

    def write(self, sign: Sign = _nothing) -> None:
        """Write what was prepared, in place. ``sign`` is called after each tensor."""
        assert self._prepared is not None, "prepared before"
        for module, tensors in self._prepared.tensors.items():
            layout = self._layouts[module]
            for name, whole in tensors.items():
                before = self._room.get((module, name))
                if before is None:
                    layout.write(name, whole)  # an earlier part has kept what was there
                elif have_own(before):
                    exchange(layout.local(name), before)
                else:
                    layout.exchange(name, whole, before, self._prepared.read)
                if before is not None:
                    self._undo[module, name] = before
                sign()
        self._part = {module: len(tensors) for module, tensors in self._prepared.tensors.items() if tensors}
        self._left_out += self._to_leave_out
        self._give_back = _nothing
        self.release()

    def release(self) -> None:
        """Let go of what was prepared."""
        if self._prepared is not None:
            self._prepared.close()
            self._prepared = None
        self._give_back()
        self._room, self._give_back, self._to_leave_out = {}, _nothing, []

    def rollback(self) -> None:
        """Put back every byte."""
        self.release()
        with torch.no_grad():
            for (module, name), before in reversed(self._undo.items()):  # two names may be of the same memory
                local = self._layouts[module].local(name)
                if have_own(before) and have_own(local):  # which a module that sleeps has not
                    exchange(local, before)
                else:
                    local.copy_(before)
        self.commit()

    def commit(self) -> None:
        """There is no way back from here."""
        self._undo.clear()
        self._left_out.clear()
        self._memory.clear()

    def report(self, *, part: bool = False) -> Report:
        """What was written until now, or in the last part."""
        written = {module: len(names) for module, names in self.written.items()}
        updated = self._part if part else written
        return Report(
            updated=updated,
            expected={module: len(self._layouts[module]) for module in updated},
            complete=[module for module, names in self.written.items() if not _absent(self._layouts[module], names)],
            left_out=self._left_out[:_SHOWN],
        )

    def _find_room(self, tensors: Tensors) -> None:
        keys = [(module, name) for module, given in tensors.items() for name in given]
        new = [key for key in keys if key not in self._undo]
        try:
            room, self._give_back = self._memory.take(self._layouts[module].local(name) for module, name in new)
        except NoRoom as error:
            raise Rejected(Unavailable(f"Nothing was written. {error}"), Report()) from error
        self._room = dict(zip(new, room, strict=True))

    def _stage(self, opened: Opened, sign: Sign) -> None:
        """Read what an exchange of pages will bring there: what can fail in that, fails before a byte is written."""
        with torch.no_grad(), Staging(opened.read, sign) as copy:
            for (module, name), room in self._room.items():
                if have_own(room):
                    copy(self._layouts[module].beside(name, opened.tensors[module][name], room))

    def _check_ties(self, named: Named) -> None:
        """Raises ``Rejected`` where names of the same memory come with different values: only one could be written."""
        seen: dict[tuple[Any, ...], tuple[str, torch.Tensor]] = {}
        for module, given in named.tensors.items():
            for name, tensor in given.items():
                local = self._layouts[module].local(name)
                if not local.numel():
                    continue
                other, before = seen.setdefault(memory_of(local), (f"{module}.{name}", tensor))
                _compare_tied(name, tensor, other, before, local.dtype)
        for tied in named.tied:
            before, dtype = named.tensors[tied.module][tied.known], self._layouts[tied.module].dtype(tied.known)
            _compare_tied(tied.name, tied.tensor, f"{tied.module}.{tied.known}", before, dtype)

    def _check_whole(self, named: Named, complete: bool) -> None:
        """Raises ``Rejected`` where nothing is left to write, or, where all is asked for, something is missing."""
        if named.left_out and not any(named.tensors.values()):
            message = f"Nothing was written: a checkpoint has none of the names ({', '.join(named.left_out[:3])})."
            raise Rejected(InvalidRequest(message), Report(unknown=named.left_out[:_SHOWN]))
        missing = [
            _in(named.tensors, module, name)
            for module, given in named.tensors.items()
            for name in (_absent(self._layouts[module], given) if complete else ())
        ]
        if missing:
            message = (
                f"Nothing was written: {len(missing)} tensors are missing ({', '.join(missing[:3])}). To write what "
                "there is, give require_complete = false."
            )
            raise Rejected(InvalidRequest(message, field="require_complete"), Report(missing=missing[:_SHOWN]))

    def check(self, tensors: Tensors) -> Report:
        """Raises ``Rejected`` for tensors that cannot be written; only their names, shapes and dtypes matter."""
        absent = [module for module in tensors if module not in self._layouts]
        if absent:
            raise Rejected(
                NotFound(
                    f"The model has no module {absent[0]!r}; it has {', '.join(self._layouts)}.", field="target_modules"
                ),
                Report(),
            )
        expected = {module: len(self._layouts[module]) for module in tensors}
        unknown = [
            _in(tensors, module, name)
            for module, given in tensors.items()
            for name in given
            if name not in self._layouts[module]
        ]
        invalid = [
            Invalid(_in(tensors, module, name), reason)
            for module, given in tensors.items()
            for name, tensor in given.items()
            if name in self._layouts[module] and (reason := _fault(self._layouts[module], name, tensor))
        ]
        if unknown or invalid:
            report = Report(expected=expected, unknown=unknown[:_SHOWN], invalid=invalid[:_SHOWN])
            raise Rejected(InvalidRequest(_sentence(unknown, invalid)), report)
        return Report(updated={module: len(given) for module, given in tensors.items()}, expected=expected)


def _in(tensors: Tensors, module: str, name: str) -> str:
    """The name as its sender knows it; with its module's where there are several."""
    return name if len(tensors) == 1 else f"{module}.{name}"


def _compare_tied(name: str, tensor: torch.Tensor, other: str, before: torch.Tensor, dtype: torch.dtype) -> None:
    if before is not tensor and not _same(before.to(dtype), tensor.to(dtype)):
        fault = Invalid(name, f"it is tied to {other}, and its values are not the same")
        raise Rejected(InvalidRequest(_sentence([], [fault])), Report(invalid=[fault]))


def _absent(layout: Layout, names: Iterable[str]) -> list[str]:
    """The tensors of a module that are neither among ``names`` nor in the memory of one that is."""
    there = {name: layout.local(name) for name in names}
    places = {memory_of(tensor) for tensor in there.values() if tensor.numel()}
    others = [entry.name for entry in layout if entry.name not in there]
    return [name for name in others if memory_of(layout.local(name)) not in places]


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Bit by bit."""
    return one.shape == other.shape and torch.equal(
        *(tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other))
    )


def _fault(layout: Layout, name: str, tensor: torch.Tensor) -> str | None:
    """Why ``tensor`` cannot be written, in a few words."""
    wanted = layout.dtype(name)
    if tuple(tensor.shape) != layout[name].shape:
        return f"its shape is {list(tensor.shape)}, not {list(layout[name].shape)}"
    if tensor.dtype != wanted and not (tensor.is_floating_point() and wanted.is_floating_point):
        return f"its dtype is {tensor.dtype}, not {wanted}"
    return None


def _sentence(unknown: list[str], invalid: list[Invalid]) -> str:
    parts = []
    if unknown:
        parts.append(f"{len(unknown)} names that the model does not have ({', '.join(islice(unknown, 3))})")
    if invalid:
        first = invalid[0]
        parts.append(f"{len(invalid)} tensors that do not fit ({first.name}: {first.reason})")
    return f"Nothing was written: there are {' and '.join(parts)}."
