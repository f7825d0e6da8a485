"""What was committed, on disk: every module that is not as its checkpoint has it, whole, with the version.

``current.json`` names a folder beside it and is replaced in one move, so that what can be read is always what was
committed, whenever the machine stops. It has the digests of its files: what the disk has spoilt is never served.
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
from ..progress import Sign
from ..transport.sources import map_file
from .snapshot import export

_ENTRY = re.compile(r"version-[0-9a-f]{16}")


class _Current(msgspec.Struct, frozen=True):
    """``modules`` are the SHA-256 of the modules' files."""

    weight_version: str
    folder: str
    modules: dict[str, str]


class _Look(msgspec.Struct, frozen=True):
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
        sign: Sign,
    ) -> None:
        """Write down what is to be committed: ``modules``, and those that the journal has already.

        All ranks must call this together. Raises ``OSError`` on rank 0.
        """
        before = self._current(ranks)
        names = sorted({*modules, *(before.modules if before is not None else ())})
        folder = self._directory / f"version-{os.urandom(8).hex()}"
        try:
            files = export(layouts, names, folder, ranks, sign, durable=True)
            current = _Current(version, folder.name, {module: file.sha256 for module, file in files.items()})
            if ranks.rank == 0:
                self._put_beside(current)
        except OSError:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        self._written = current if ranks.rank == 0 else None  # who has written it commits it, or drops it

    def _put_beside(self, current: _Current) -> None:
        """So that a commit is no more than a move, for which a full disk has room."""
        with self._beside.open("wb") as stream:
            stream.write(msgspec.json.encode(current))
            stream.flush()
            os.fsync(stream.fileno())

    @property
    def _beside(self) -> Path:
        return self._directory / "current.json.new"

    def drop(self) -> None:
        """What was written is not committed."""
        if self._written is not None:
            shutil.rmtree(self._directory / self._written.folder, ignore_errors=True)
            self._written = None

    def commit(self) -> None:
        """What was written is what a start begins with from now on."""
        if self._written is None:
            return
        self._beside.replace(self._directory / "current.json")
        _sync(self._directory)
        for folder in self._directory.iterdir():
            if _ENTRY.fullmatch(folder.name) and folder.name != self._written.folder:
                shutil.rmtree(folder, ignore_errors=True)
        self._written = None

    def _current(self, ranks: Ranks) -> _Current | None:
        """What rank 0 finds: between two ranks' looks another replica may have committed.

        All ranks must call this together, and on all of them it raises the same: ``OSError``, ``msgspec.DecodeError``.
        """
        file, look = self._directory / "current.json", _Look()
        try:
            if ranks.rank == 0 and file.exists():
                look = _Look(file.read_bytes())
        except OSError as error:
            look = _Look(fault=error.strerror or str(error))
        look = msgspec.msgpack.decode(ranks.exchange(msgspec.msgpack.encode(look))[0], type=_Look)
        if look.fault:
            raise OSError(look.fault)
        return msgspec.json.decode(look.found, type=_Current) if look.found is not None else None

    def replay(self, layouts: Mapping[str, Layout], ranks: Ranks) -> str | None:
        """Write into the model what was committed last; returns its version, or ``None`` where there is none.

        All ranks must call this together.
        Raises ``StartFailed`` for a journal that is of another model, or that cannot be read.
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
