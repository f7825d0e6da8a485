"""Modules whose weights came from files that are still on disk, where a replica that lost them can read them again."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence

from ..protocol.tensor_sources import Broadcast, CudaShared, Files, Pickled, Source

Stamps = Mapping[str, list[int]]
"""Files in the order in which they were written, each with what it is known by."""

Origins = Mapping[str, Stamps | None]
"""Where the tensors of each module came from: files that stay on disk, or anything else."""


def modules_of(source: Source) -> list[str]:
    match source:
        case Files(modules=modules):
            return list(modules)
        case Pickled(targets=targets):
            return targets
        case Broadcast(module=module) | CudaShared(module=module):
            return [module]


def origins(source: Source) -> Origins:
    if not isinstance(source, Files) or not source.stamps:
        return dict.fromkeys(modules_of(source))
    return {module: {file: source.stamps[file] for file in files} for module, files in source.modules.items()}


def is_on_disk(source: Source) -> bool:
    """Whether it stays there; other files are in shared memory, and their sender's or ours to remove."""
    return isinstance(source, Files) and bool(source.stamps)


class OnDisk:
    """Knows of each changed module which files make it of the checkpoint, if files alone do."""

    def __init__(self) -> None:
        self._modules: dict[str, Stamps | None] = {}

    def updated(self, parts: Sequence[Origins], written: Iterable[str], complete: Container[str]) -> None:
        """An update of some ``parts`` was committed; of the modules in ``complete`` every tensor came."""
        for module in written:
            before = {} if module in complete else self._modules.get(module, {})
            self._modules[module] = _with(before, [part[module] for part in parts if module in part])

    def files(self, modules: Iterable[str]) -> Files | None:
        """What all of ``modules`` are to be read from; ``None`` where that is not possible."""
        found = {module: self._modules.get(module) for module in modules}
        known = {module: stamps for module, stamps in found.items() if stamps is not None}
        if len(known) < len(found):
            return None
        every = {file: stamp for stamps in known.values() for file, stamp in stamps.items()}
        return Files({module: list(stamps) for module, stamps in known.items()}, stamps=every, overlay=True)

    def forget(self) -> None:
        """Files are not there any more, or not what they were."""
        self._modules = dict.fromkeys(self._modules)


def _with(before: Stamps | None, parts: Sequence[Stamps | None]) -> Stamps | None:
    """The files of a module after these; one that was replaced meanwhile cannot be read as it was."""
    if before is None:
        return None
    stamps = dict(before)
    for part in parts:
        if part is None or any(stamps.pop(file, stamp) != stamp for file, stamp in part.items()):
            return None
        stamps |= part
    return stamps
