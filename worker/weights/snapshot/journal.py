"""The journal: committed weights on disk, as whole modules that differ from the checkpoint, and their version.

``current.json`` names a folder beside it and is replaced atomically, so that a start after a crash reads exactly what
was committed. It has the digests of the files, so that damaged files are never served.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from ....protocol.errors import StartFailed
from ...parallel.ranks import Ranks
from ..checkpoint.layout import Layout
from ..checkpoint.mapped_files import map_file
from ..progress import OnProgress
from .snapshot import write_snapshot

_ENTRY = re.compile(r"version-[0-9a-f]{16}")


class _Current(msgspec.Struct, frozen=True):
    """``modules`` are the SHA-256 of the modules' files."""

    weight_version: str
    folder: str
    modules: dict[str, str]


class _Lookup(msgspec.Struct, frozen=True):
    """The bytes of ``current.json``; ``None`` where there is none."""

    found: bytes | None = None
    fault: str = ""


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
        on_progress: OnProgress,
    ) -> None:
        """Write an entry before its commit: ``modules``, and those that the journal already has.

        All ranks must call this together. Raises ``OSError`` on rank 0.
        """
        before = self._current(ranks)
        names = sorted({*modules, *(before.modules if before is not None else ())})
        folder = self._directory / f"version-{os.urandom(8).hex()}"
        try:
            files = write_snapshot(layouts, names, folder, ranks, on_progress, durable=True)
            current = _Current(version, folder.name, {module: file.sha256 for module, file in files.items()})
            if ranks.rank == 0:
                self._write_next(current)
        except OSError:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        self._written = current if ranks.rank == 0 else None  # the rank that wrote it commits or drops it

    def _write_next(self, current: _Current) -> None:
        """Write the next ``current.json``, so that a commit is only a rename, which needs no room on disk."""
        with self._next_file.open("wb") as stream:
            stream.write(msgspec.json.encode(current))
            stream.flush()
            os.fsync(stream.fileno())

    @property
    def _next_file(self) -> Path:
        return self._directory / "current.json.new"

    def drop(self) -> None:
        """Delete the entry that was written."""
        if self._written is not None:
            shutil.rmtree(self._directory / self._written.folder, ignore_errors=True)
            self._written = None

    def commit(self) -> None:
        """Make the written entry the one that the next start replays."""
        if self._written is None:
            return
        self._next_file.replace(self._directory / "current.json")
        _sync(self._directory)
        for folder in self._directory.iterdir():
            if _ENTRY.fullmatch(folder.name) and folder.name != self._written.folder:
                shutil.rmtree(folder, ignore_errors=True)
        self._written = None

    def _current(self, ranks: Ranks) -> _Current | None:
        """The current entry as rank 0 reads it, because another replica may commit between two ranks' reads.

        All ranks must call this together, and all raise the same: ``OSError`` or ``msgspec.DecodeError``.
        """
        file, lookup = self._directory / "current.json", _Lookup()
        try:
            if ranks.rank == 0 and file.exists():
                lookup = _Lookup(file.read_bytes())
        except OSError as error:
            lookup = _Lookup(fault=error.strerror or str(error))
        lookup = msgspec.msgpack.decode(ranks.all_gather_bytes(msgspec.msgpack.encode(lookup))[0], type=_Lookup)
        if lookup.fault:
            raise OSError(lookup.fault)
        return msgspec.json.decode(lookup.found, type=_Current) if lookup.found is not None else None

    def replay(self, layouts: Mapping[str, Layout], ranks: Ranks) -> str | None:
        """Write the last committed entry into the model, and return its version; ``None`` where there is no entry.

        All ranks must call this together.
        Raises ``StartFailed`` where the journal is of another model or cannot be read.
        """
        try:
            current = self._current(ranks)
            if current is None:
                return None
            files = {module: self._directory / current.folder / f"{module}.safetensors" for module in current.modules}
            for module, file in files.items():
                if _digest(file) != current.modules[module]:
                    raise ValueError(f"its {module} is damaged")
            for module, file in files.items():
                tensors, layout = map_file(file), layouts[module]
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


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sync(directory: Path) -> None:
    """Have a move in ``directory`` on the disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
