"""Memory that is given back while nothing is generated, and caches that are emptied."""

from __future__ import annotations

from torch import nn

from ...protocol.operations import CACHES, Flush, Sleep, Wake
from ...protocol.reports import Report
from ..model.modules import modules
from ..weights.update.offload import Offloader
from .participant import OneStep, Prepared
from .resources import Resources


class OffloadedModules:
    """The model's modules, and what of them and of the adapters sleep moves.

    Of a model whose weights rest on the host at any time, these are the adapters, and what several modules share; they
    return when the last module wakes.
    """

    def __init__(self, resources: Resources) -> None:
        offload = resources.model.offload
        self._rest = offload is not None
        shared = [] if offload is None else offload.shared
        self._on_progress = resources.on_progress
        self._modules = modules(resources.model.pipeline)
        self._asleep: set[str] = set()
        moved = [] if self._rest else [*self._modules.values()]
        self._offloader = Offloader(moved, resources.model.device, lambda: (*shared, *resources.adapters.tensors()))

    def tagged(self, tags: list[str]) -> dict[str, nn.Module]:
        """The modules that ``tags`` name."""
        assert self._modules.keys() | {CACHES} >= set(tags), f"{tags} name a module that the model does not have"
        return {name: module for name, module in self._modules.items() if name in tags}

    def offload(self, tagged: dict[str, nn.Module]) -> None:
        """Raises ``Unavailable`` where there is no room; nothing has moved then."""
        self._offloader.offload(self._on_progress, None if self._rest else [*tagged.values()])
        self._asleep |= tagged.keys()

    def restore(self, tagged: dict[str, nn.Module]) -> None:
        """Raises ``Unavailable`` where there is no room; nothing has moved then."""
        if not self._rest:
            self._offloader.restore(self._on_progress, [*tagged.values()])
        elif self._asleep <= tagged.keys():
            self._offloader.restore(self._on_progress)
        self._asleep -= tagged.keys()


class CacheFlush(OneStep):
    def __init__(self, resources: Resources) -> None:
        self._resources = resources

    def prepare(self, operation: Flush, *, is_primary: bool) -> Prepared:
        self._resources.undo_log.free()
        return Prepared(Report(invalidated=self._resources.flush_caches()))


class Offload(OneStep):
    def __init__(self, resources: Resources, offloaded: OffloadedModules) -> None:
        self._resources = resources
        self._offloaded = offloaded

    def prepare(self, operation: Sleep, *, is_primary: bool) -> Prepared:
        if tagged := self._offloaded.tagged(operation.tags):
            self._resources.adapters.forget_gathered()
            self._resources.batcher.forget_graphs()
            self._offloaded.offload(tagged)
        if CACHES not in operation.tags:
            return Prepared()
        self._resources.undo_log.free()
        return Prepared(Report(invalidated=self._resources.flush_caches()))


class Restore(OneStep):
    def __init__(self, offloaded: OffloadedModules) -> None:
        self._offloaded = offloaded

    def prepare(self, operation: Wake, *, is_primary: bool) -> Prepared:
        if tagged := self._offloaded.tagged(operation.tags):
            self._offloaded.restore(tagged)
        return Prepared()
