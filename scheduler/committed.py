"""The committed state: which update wrote each module last, and the adapters on top. A commit makes the next value."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from ..protocol.adapters import AdapterChange, AdapterState, RestoreAdapters, SetAdapters
from ..protocol.tensor_sources import Files
from .writes import Stamps, Writes

Weights = Mapping[str, int]
"""The write that made each module's weights. A module without one is as a replica loads it."""

AS_LOADED, UNKNOWN = 0, -1


@dataclass(frozen=True, slots=True)
class Written:
    """The last write of a module, and the files that make it of the checkpoint, where files on disk alone do."""

    write: int
    files: Stamps | None


@dataclass(frozen=True, slots=True, kw_only=True)
class CommittedState:
    """``base_version`` is the version of the weights; ``version`` is another one once adapters were published.

    ``version`` is ``None`` until a replica has loaded. ``initial_adapters`` stand until adapters are committed.
    ``writes`` counts the versions that were made or tried, and ``updates`` the committed ones that wrote weights.
    """

    version: str | None = None
    base_version: str | None = None
    modules: Mapping[str, Written] = field(default_factory=dict)
    adapters: AdapterState = field(default_factory=AdapterState)
    initial_adapters: SetAdapters | None = None
    writes: int = 0
    updates: int = 0

    @property
    def weights(self) -> dict[str, int]:
        return {module: written.write for module, written in self.modules.items()}

    @property
    def next_version(self) -> str:
        """The name of the next version, unless its sender gives it one."""
        current = self.version or ""
        return str(int(current) + 1) if current.isdecimal() else str(self.writes + 1)

    @property
    def restoring_change(self) -> AdapterChange | None:
        """The change that gives the committed adapters to a replica that has just loaded, where it needs one.

        A version that adapters were published as needs it also after they were unloaded.
        """
        if self.adapters.loaded or self.version != self.base_version:
            return RestoreAdapters(self.adapters)
        return self.initial_adapters

    def based_on(self, version: str) -> CommittedState:
        """With other weights, and no adapters that were published on them."""
        return replace(self, version=version, base_version=version)

    def updated(self, version: str, writes: Writes) -> CommittedState:
        """After an update."""
        write, as_loaded = self.writes + 1, Written(AS_LOADED, {})
        modules = {
            module: Written(write, writes.files(module, self.modules.get(module, as_loaded).files))
            for module in writes.counts
        }
        return replace(
            self.based_on(version), modules={**self.modules, **modules}, writes=write, updates=self.updates + 1
        )

    def adapted(self, adapters: AdapterState, version: str) -> CommittedState:
        """After a change of the adapters, which may have been published as another version."""
        published = version != self.version
        return replace(self, adapters=adapters, initial_adapters=None, version=version, writes=self.writes + published)

    def tried(self, modules: Iterable[str]) -> CommittedState:
        """After a write of ``modules`` that may be in a journal, and was not committed."""
        as_loaded = {module: Written(AS_LOADED, {}) for module in modules}
        return replace(self, modules={**as_loaded, **self.modules}, writes=self.writes + 1)

    def taken_up(self, version: str, write: int, modules: Iterable[str]) -> CommittedState:
        """After a write was found in the journal."""
        found = {module: Written(write, None) for module in modules}
        return replace(self.based_on(version), modules={**self.modules, **found})

    def without_files(self) -> CommittedState:
        """After files on disk were found changed."""
        modules = {module: replace(written, files=None) for module, written in self.modules.items()}
        return replace(self, modules=modules)

    def files(self, modules: Iterable[str]) -> Files | None:
        """The files that make ``modules`` of the checkpoint's; ``None`` where files alone do not."""
        found = {module: self.modules[module].files for module in modules}
        known = {module: stamps for module, stamps in found.items() if stamps is not None}
        if len(known) < len(found):
            return None
        every = {file: stamp for stamps in known.values() for file, stamp in stamps.items()}
        return Files({module: list(stamps) for module, stamps in known.items()}, stamps=every, overlay=True)
