"""What was committed, on disk: every module that is not as its checkpoint has it, whole, with the version.

``current.json`` names a folder beside it and is replaced in one move, so that what can be read is always what was
committed, whenever the machine stops.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec

from ...protocol.errors import StartFailed
from ..parallel.ranks import Ranks
from .export import export
from .layout import Layout
from .sources import map_file


class _Current(msgspec.Struct, frozen=True):
    weight_version: str
    folder: str
    modules: list[str]


class Journal:
    """The journal in ``directory``."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._written: _Current | None = None

    def write(
        self,
        layouts: Mapping[str, Layout],
        modules: Sequence[str],
        version: str,
        ranks: Ranks,
        sign: Callable[[], object],
    ) -> None:
        """Write down what is to be committed: ``modules``, and those that the journal has already.

        All ranks must call this together. Raises ``OSError`` on rank 0.
        """
        before = self._current()
        modules = sorted({*modules, *(before.modules if before is not None else ())})
        folder = self._directory / f"version-{os.urandom(8).hex()}"
        try:
            export(layouts, modules, folder, ranks, sign, durable=True)
        except OSError:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        self._written = _Current(version, folder.name, modules)

    def drop(self) -> None:
        """What was written is not committed."""
        if self._written is not None:
            shutil.rmtree(self._directory / self._written.folder, ignore_errors=True)
            self._written = None

    def commit(self) -> None:
        """What was written is what a start begins with from now on."""
        if self._written is None:
            return
        beside = self._directory / "current.json.new"
        with beside.open("wb") as stream:
            stream.write(msgspec.json.encode(self._written))
            os.fsync(stream.fileno())
        beside.replace(self._directory / "current.json")
        for folder in self._directory.glob("version-*"):
            if folder.name != self._written.folder:
                shutil.rmtree(folder, ignore_errors=True)
        self._written = None

    def _current(self) -> _Current | None:
        file = self._directory / "current.json"
        return msgspec.json.decode(file.read_bytes(), type=_Current) if file.exists() else None

    def replay(self, layouts: Mapping[str, Layout]) -> str | None:
        """Write into the model what was committed last; returns its version, or ``None`` where there is none.

        Raises ``StartFailed`` for a journal that is of another model, or that cannot be read.
        """
        try:
            current = self._current()
            if current is None:
                return None
            for module in current.modules:
                tensors = map_file(self._directory / current.folder / f"{module}.safetensors")
                layout = layouts[module]
                if set(tensors) != {entry.name for entry in layout}:
                    raise ValueError(f"its {module} has other tensors")
                for name, whole in tensors.items():
                    layout.write(name, whole)
        except Exception as error:
            raise StartFailed(
                f"The journal {self._directory} cannot be replayed on this model ({error}); "
                "give another --weights-journal."
            ) from error
        return current.weight_version
