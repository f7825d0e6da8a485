"""The adapters of this rank, and changes of them, which all ranks make or none."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from diffusers import DiffusionPipeline
from torch import nn

from ...protocol.adapters import (
    AdapterChange,
    AdapterState,
    KeepAdapters,
    MergeAdapters,
    RestoreAdapters,
    SetAdapters,
    UnloadAdapter,
    UnmergeAdapters,
    Use,
)
from ...protocol.errors import Conflict, InvalidRequest
from ...protocol.operations import Save
from ...protocol.reports import Report
from ..parallel.ranks import Ranks
from ..pipelines.components import DENOISERS
from ..weights.checkpoint.layout import Layout
from . import planning
from .adapter import Adapter
from .bank import ActiveAdapters
from .dynamic import AdapterRows, DynamicLora
from .merge import Deltas, check_bases, deltas, merge
from .reader import AdapterReader
from .setting import Setting

MERGED = "merged_adapters"
"""The name in replies of the adapters that were merged again into changed weights."""


@dataclass(frozen=True, slots=True)
class BoundAdapter:
    """An adapter of a request, as it was when the request came, and the components that it is for."""

    adapter: Adapter
    scale: float
    components: frozenset[str]


RequestedAdapters = tuple[BoundAdapter, ...] | None
"""A request's own adapters; ``None`` for those that are active for all."""

Adapters = dict[str, Adapter]
"""Adapters by nickname."""


@dataclass(slots=True)
class _Next:
    """A prepared change: the next state, and ``notes`` for the reply."""

    state: AdapterState
    adapters: Adapters
    notes: list[str]


class RankAdapters:
    """Loads, applies and unloads adapters: at most ``max_adapters``, of at most ``max_bytes`` together.

    The weights without the adapters that are merged into them take at most ``max_merged_bytes`` more.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        layouts: Mapping[str, Layout],
        ranks: Ranks,
        device: torch.device,
        *,
        max_adapters: int,
        max_bytes: int,
        max_merged_bytes: float = math.inf,
    ) -> None:
        self.state = AdapterState()
        self.notes: list[str] = []
        """Notes of the last change, for its reply."""
        self.written = False
        """True while the weights are of a state that is not committed; no forward may run."""
        self._layouts = layouts
        self._ranks = ranks
        self._device = device
        self._max_adapters = max_adapters
        self._max_bytes = max_bytes
        self._max_merged_bytes = max_merged_bytes
        self._components: dict[str, nn.Module] = {
            name: pipeline.components[name] for name in layouts if name in DENOISERS or name.startswith("text_encoder")
        }
        self._reader = AdapterReader(pipeline, self._components, layouts, device)
        self._dynamic = {name: DynamicLora(name, module) for name, module in self._components.items()}
        self._adapters: Adapters = {}
        self._next: _Next | None = None
        self._bytes_left = max_bytes  # for the factors of rows with different adapters

    # --- in forwards

    def wanted(self, uses: Sequence[Use] | None) -> RequestedAdapters:
        """The adapters that a request names.

        Raises ``NotFound``, and ``Conflict`` for one that is merged: it is in everybody's weights already.
        """
        if uses is None:
            return None
        for use in uses:
            if use.name not in self._adapters:
                raise planning.unknown(use.name, self.state, "lora")
            if any(one.nickname == use.name and one.merged for ones in self.state.active.values() for one in ones):
                raise Conflict(
                    f"{use.name} is merged into the weights, for every request; set it with merge_mode = request or "
                    "dynamic to name it.",
                    field="lora",
                )
            if only := self._adapters[use.name].only_merged:
                raise InvalidRequest(f"{use.name} can only be merged, because of {only[0]}.", field="lora")
        named = ((self._adapters[use.name], use.scale, self.state.loaded[use.name].components) for use in uses)
        return tuple(BoundAdapter(adapter, scale, frozenset(components)) for adapter, scale, components in named)

    def uses(self, component: str, requested: RequestedAdapters) -> ActiveAdapters:
        """The adapters to apply dynamically for a request; those that are merged by now are left out."""
        root = component.split(".")[0]
        active = self.state.active.get(root, ())
        if requested is None:
            return tuple((self._adapters[one.nickname], one.strength) for one in active if one.mode == "dynamic")
        merged = [self._adapters[one.nickname] for one in active if one.merged]
        return tuple(
            (one.adapter, one.scale) for one in requested if root in one.components and one.adapter not in merged
        )

    def applied(self, component: str, rows: AdapterRows, *, listed: bool = False) -> AbstractContextManager[None]:
        """Around a forward of ``component``, whose rows have these adapters. Raises ``CannotMix`` in it."""
        dynamic = self._dynamic.get(component.split(".")[0])
        if dynamic is None:
            return nullcontext()
        others = sum(other.per_row_nbytes for other in self._dynamic.values() if other is not dynamic)
        return dynamic.applied(rows, listed=listed, max_bytes=self._bytes_left - others)

    def memory(self, component: str) -> Hashable:
        """The memory that the running forward of ``component`` reads factors from, and their shapes."""
        dynamic = self._dynamic.get(component.split(".")[0])
        return None if dynamic is None else dynamic.memory

    # --- in memory

    def tensors(self) -> Iterator[torch.Tensor]:
        """The tensors on the device: factors, and on a CPU the bases of merged tensors."""
        for adapter in self._adapters.values():
            yield from adapter.tensors()
        for layout in self._layouts.values():
            yield from (base for base in layout.bases.values() if base.device.type == self._device.type)

    def forget_gathered(self) -> None:
        """Free the memory of the factors that forwards gather, and will gather again."""
        for dynamic in self._dynamic.values():
            dynamic.forget()

    # --- changes

    def prepare(self, change: AdapterChange) -> None:
        """Read, check and decide, without changing anything. Raises ``InvalidRequest``, ``NotFound`` or ``Conflict``.

        All ranks must call this together.
        """
        self._next = None
        notes, components = list[str](), sorted(self._components)
        adapters = dict(self._adapters)
        match change:
            case SetAdapters():
                state = Setting(change, self.state, adapters, self._reader, notes).decide(self._ranks)
                limits = self._max_adapters, self._max_bytes
                state = planning.within_limits(state, change, *limits, lambda one: self._nbytes(one, adapters), notes)
            case MergeAdapters():
                state = planning.merged(self.state, change, components)
            case UnmergeAdapters(target=target):
                state = planning.unmerged(self.state, target, components, notes)
            case UnloadAdapter(nickname=nickname):
                state = planning.without(self.state, nickname)
            case KeepAdapters():
                state = self.state
            case RestoreAdapters(state=state):
                for loaded in state.loaded.values():
                    _, adapters[loaded.source.nickname] = self._reader.load(loaded.source)
        self._check(state, adapters)
        self._next = _Next(state, {name: adapters[name] for name in state.loaded}, notes)

    def write(self) -> None:
        """Bring the weights into the next state. If it raises, :meth:`rollback` restores them."""
        assert self._next is not None, "prepared before"
        self.written = True
        self._merge_all(self._next.state, self._next.adapters, unlike=self.state)

    def commit(self) -> set[str]:
        """Adopt the next state. Returns the components whose outputs may differ from now on."""
        assert self._next is not None, "written before"
        before = planning.effect(self.state)
        self.state, self._adapters, self.notes = self._next.state, self._next.adapters, self._next.notes
        for dynamic in self._dynamic.values():
            dynamic.retain(self._adapters.values())
        self._bytes_left = self._max_bytes - self._nbytes(self.state, self._adapters)
        if sum(dynamic.per_row_nbytes for dynamic in self._dynamic.values()) > self._bytes_left:
            self.forget_gathered()
        self._next, self.written = None, False
        after = planning.effect(self.state)
        return {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}

    def rollback(self) -> None:
        """Put back every byte."""
        if self.written:
            self._merge_all(self.state, self._adapters)
        self.release()

    def release(self) -> None:
        """Drop the prepared change."""
        self._next, self.written = None, False

    def keep(self, save: Save, tensors: Mapping[str, torch.Tensor]) -> Report:
        """Write an adapter that comes in parts, with one more part. Raises ``InvalidRequest`` and ``Unavailable``."""
        return self._reader.keep(save, tensors, self.state)

    def layers_of(self, nicknames: Sequence[str]) -> dict[str, int]:
        """How many layers of each component these adapters change for all requests."""
        found: dict[str, set[str]] = {}
        for component, ones in self.state.active.items():
            for one in ones:
                if one.nickname in nicknames:
                    found.setdefault(component, set()).update(self._adapters[one.nickname].layers(component))
        return {component: len(layers) for component, layers in found.items()}

    def are_in(self, written: Mapping[str, Iterable[str]]) -> bool:
        """True if adapters are merged into any of these tensors."""
        return any(name in self._layouts[component].bases for component, names in written.items() for name in names)

    def rebuild(self, written: Mapping[str, Iterable[str]]) -> None:
        """Merge the adapters again into changed base weights, in the same order on all ranks, because a merge may
        communicate."""
        for component, names in sorted(written.items()):
            layout = self._layouts[component]
            if merged := sorted(name for name in names if name in layout.bases):
                merge(layout, _merged(component, self.state, self._adapters), merged)

    # --- the next state

    def _nbytes(self, state: AdapterState, adapters: Adapters) -> int:
        """Bytes of the loaded factors, and of those that forwards gather for rows that have all dynamic adapters."""
        total = sum(loaded.nbytes for loaded in state.loaded.values())
        for component, dynamic in self._dynamic.items():
            merged = {one.nickname for one in state.active.get(component, ()) if one.mode == "merge"}
            names = (name for name in state.loaded if name not in merged and not adapters[name].only_merged)
            total += dynamic.uniform_nbytes([adapters[name] for name in names])
        return total

    def _check(self, state: AdapterState, adapters: Adapters) -> None:
        """Raises ``InvalidRequest`` for a layer that an adapter cannot change in the mode that it would have there."""
        for component, ones in state.active.items():
            for one in ones:
                adapter = adapters[one.nickname]
                impossible = adapter.only_dynamic if one.mode == "merge" else adapter.only_merged
                if layer := next((layer for layer in impossible if layer.startswith(f"{component}.")), None):
                    way = "be merged into" if one.mode == "merge" else "have dynamic adapters"
                    raise InvalidRequest(f"{one.nickname}: {layer} cannot {way}.", field="merge_mode")
        wanted = {name: _merged(name, state, adapters) for name in state.active if name in self._components}
        check_bases(self._layouts, wanted, self._max_merged_bytes)

    def _merge_all(self, state: AdapterState, adapters: Adapters, unlike: AdapterState | None = None) -> None:
        """Bring every component's weights into ``state``, except those for which ``unlike`` is the same."""
        before = {} if unlike is None else planning.effect(unlike)
        for component, ones in {name: planning.effect(state).get(name, []) for name in self._components}.items():
            if unlike is not None and ones == before.get(component, []):
                continue
            wanted = _merged(component, state, adapters)
            if wanted or self._layouts[component].bases:
                merge(self._layouts[component], wanted)


def _merged(component: str, state: AdapterState, adapters: Adapters) -> Deltas:
    merged = [(adapters[one.nickname], one.strength) for one in state.active.get(component, ()) if one.merged]
    return deltas(component, merged)
