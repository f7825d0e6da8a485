"""The writes of an update, and the files on disk from which a replica can read them again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ..protocol.reports import Report
from ..protocol.tensor_sources import Broadcast, CudaShared, Files, Noise, Pickled, Source

Stamps = Mapping[str, list[int]]
"""Files in the order in which they were written, each with the stamp that it had then."""

Origins = Mapping[str, Stamps | None]
"""The files on disk that each module's tensors came from; ``None`` if they came from anything else."""


def modules_of(source: Source) -> list[str]:
    match source:
        case Files(modules=modules):
            return list(modules)
        case Noise(modules=modules):
            return modules
        case Pickled(targets=targets):
            return targets
        case Broadcast(module=module) | CudaShared(module=module):
            return [module]


def origins(source: Source) -> Origins:
    if not isinstance(source, Files) or not source.stamps:
        return dict.fromkeys(modules_of(source))
    return {module: {file: source.stamps[file] for file in files} for module, files in source.modules.items()}


@dataclass(slots=True)
class Writes:
    """``counts`` are the tensors that were written, by module; every tensor came of the modules in ``complete``.

    ``origins`` are those of each part of the update, in order.
    """

    counts: dict[str, int] = field(default_factory=dict)
    complete: set[str] = field(default_factory=set)
    origins: list[Origins] = field(default_factory=list)

    @property
    def partly(self) -> set[str]:
        """Modules with some tensors written, but not all."""
        return set(self.counts) - self.complete

    def add(self, source: Source, reports: Iterable[Report]) -> None:
        """Replicas have written a part."""
        self.origins.append(origins(source))
        for report in reports:
            self.complete.update(report.complete)
            for module, count in report.updated.items():
                self.counts[module] = max(self.counts.get(module, 0), count)

    def files(self, module: str, before: Stamps | None) -> Stamps | None:
        """The files on disk that make ``module``, which those ``before`` made; ``None`` where files alone do not."""
        parts = [part[module] for part in self.origins if module in part]
        return _overlaid({} if module in self.complete else before, parts)


def is_on_disk(source: Source) -> bool:
    """Return whether its files stay on disk. Files in shared memory are removed by their sender or by us."""
    return isinstance(source, Files) and bool(source.stamps)


def _overlaid(before: Stamps | None, parts: Sequence[Stamps | None]) -> Stamps | None:
    """``None`` once a part is not on disk, or has replaced a file before it."""
    if before is None:
        return None
    stamps = dict(before)
    for part in parts:
        if part is None or any(stamps.pop(file, stamp) != stamp for file, stamp in part.items()):
            return None
        stamps |= part
    return stamps
