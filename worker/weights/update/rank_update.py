"""One rank's part of an update: checked before anything is written, and undone unless it is committed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch

from ....protocol.errors import Unavailable
from ....protocol.reports import Report
from ..checkpoint.aliases import by_checkpoint_names
from ..checkpoint.copies import Copies
from ..checkpoint.layout import Layout
from ..checkpoint.names import Tensors
from ..checkpoint.pinned_copy import Buffers
from ..progress import OnProgress
from ..transport.sources import Rejected, TensorSource
from .checks import MAX_LISTED, check_complete, check_tensors, check_ties, missing_names
from .page_swap import owns_pages, swap_pages
from .undo_log import UndoBudgetExceeded, UndoLog

Key = tuple[str, str]
"""A module and the name of one of its tensors."""


def _nothing() -> None:
    pass


class RankUpdate:
    """Writes the tensors of an update, in one part or several, and keeps the bytes that they overwrite."""

    def __init__(self, layouts: Mapping[str, Layout], undo_log: UndoLog) -> None:
        self._layouts = layouts
        self._undo_log = undo_log
        self._prepared: TensorSource | None = None
        self._reserved: dict[Key, torch.Tensor] = {}
        self._give_back: Callable[[], None] = _nothing
        self._buffers: Buffers | None = None
        self._undo: dict[Key, torch.Tensor] = {}
        self._last_part: dict[str, int] = {}
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
        """The names that :meth:`write` will write, by module."""
        tensors = {} if self._prepared is None else self._prepared.tensors
        return {module: list(names) for module, names in tensors.items()}

    def prepare(self, source: TensorSource, on_progress: OnProgress = _nothing, *, complete: bool = False) -> Report:
        """Check every name, shape and dtype, take the memory that *write* needs, and stage bytes.

        ``complete`` requires every tensor of each module. Afterwards ``source`` has the checkpoint's names.
        Raises ``Rejected``, and ``OSError`` from reading; the update is then as it was before.
        """
        self._prepared = source
        try:
            named = by_checkpoint_names(source.tensors, self._layouts)
            source.tensors = named.tensors
            report = check_tensors(source.tensors, self._layouts)
            check_ties(named, self._layouts)
            check_complete(named, self._layouts, complete=complete)
            self._to_leave_out = named.left_out
            self._reserve(source.tensors)
            self._take_buffers(source.tensors)
            self._stage(source, on_progress)
        except BaseException:
            self.release()
            raise
        return report

    def write(self, on_progress: OnProgress = _nothing) -> None:
        """Write the prepared tensors in place."""
        assert self._prepared is not None, "prepared before"
        with Copies(self._prepared.read, _nothing, self._buffers) as copies:
            for module, tensors in self._prepared.tensors.items():
                for name, whole in tensors.items():
                    self._write_tensor((module, name), whole, copies)
                    on_progress()
        self._encode((module, name) for module, tensors in self._prepared.tensors.items() for name in tensors)
        self._last_part = {module: len(tensors) for module, tensors in self._prepared.tensors.items() if tensors}
        self._left_out += self._to_leave_out
        self._give_back = _nothing
        self.release()

    def _write_tensor(self, key: Key, whole: torch.Tensor, copies: Copies) -> None:
        module, name = key
        layout, before = self._layouts[module], self._reserved.get(key)
        if before is None:
            layout.write(name, whole)  # an earlier part has kept the old bytes
            return
        if owns_pages(before):
            swap_pages(layout.local(name), before)
        elif before.device.type == "cuda":
            self._undo_log.gpu.swap(layout.local(name), before)
        else:
            copies.overwrite(layout.over(name, whole, before))
        self._undo[key] = before

    def release(self) -> None:
        """Drop the prepared tensors."""
        if self._prepared is not None:
            self._prepared.close()
            self._prepared = None
        self._give_back()
        self._reserved, self._give_back, self._to_leave_out = {}, _nothing, []
        self._buffers = None

    def rollback(self) -> None:
        """Put back every byte."""
        self.release()
        with torch.no_grad():
            for (module, name), before in reversed(self._undo.items()):  # two names may share their memory
                local = self._layouts[module].local(name)
                if owns_pages(before) and owns_pages(local):  # an offloaded module owns none
                    swap_pages(local, before)
                else:
                    local.copy_(before)
        self._encode(self._undo)
        self.commit()

    def commit(self) -> None:
        """Drop the undo log."""
        self._undo.clear()
        self._left_out.clear()
        self._undo_log.clear()

    def report(self, *, part: bool = False) -> Report:
        """The tensors that were written so far, or in the last ``part``."""
        written = {module: len(names) for module, names in self.written.items()}
        updated = self._last_part if part else written
        return Report(
            updated=updated,
            expected={module: len(self._layouts[module]) for module in updated},
            complete=[name for name, names in self.written.items() if not missing_names(self._layouts[name], names)],
            left_out=self._left_out[:MAX_LISTED],
        )

    def _encode(self, keys: Iterable[Key]) -> None:
        """Have the modules compute with what was written."""
        for module, name in keys:
            self._layouts[module].encode(name)

    def _reserve(self, tensors: Tensors) -> None:
        keys = [(module, name) for module, given in tensors.items() for name in given]
        new = [key for key in keys if key not in self._undo]
        for module, name in new:
            self._layouts[module].own(name)
        try:
            copies, self._give_back = self._undo_log.reserve(self._layouts[module].local(name) for module, name in new)
        except UndoBudgetExceeded as error:
            raise Rejected(Unavailable(f"Nothing was written. {error}"), Report()) from error
        self._reserved = dict(zip(new, copies, strict=True))

    def _take_buffers(self, tensors: Tensors) -> None:
        """Take page-locked memory where bytes will pass between the host and a GPU."""
        if not any(
            len({one.device.type for one in (copy, self._layouts[module].local(name), tensors[module][name])}) > 1
            for (module, name), copy in self._reserved.items()
        ):
            return
        try:
            self._buffers = Buffers()
        except OSError as error:
            lack = Unavailable(f"Nothing was written: {error}. Free host memory and try again.")
            raise Rejected(lack, Report()) from error

    def _stage(self, source: TensorSource, on_progress: OnProgress) -> None:
        """Read the bytes that a swap will put in place, so that a failed read fails before any write."""
        with torch.no_grad(), Copies(source.read, on_progress, self._buffers) as copies:
            for (module, name), buffer in self._reserved.items():
                if owns_pages(buffer) or buffer.device.type == "cuda":
                    copies(self._layouts[module].beside(name, source.tensors[module][name], buffer))
