"""The adapters of this rank, and their changes, each of which is made everywhere or nowhere."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import torch
from diffusers import DiffusionPipeline
from safetensors import SafetensorError
from torch import nn

from ...formats.digests import STORED_DTYPES
from ...protocol.adapters import (
    AdapterChange,
    AdapterSource,
    AdapterState,
    KeepAdapters,
    Loaded,
    MergeAdapters,
    Mode,
    RestoreAdapters,
    SetAdapters,
    UnloadAdapter,
    UnmergeAdapters,
    Use,
)
from ...protocol.errors import Conflict, InvalidRequest, Unavailable
from ...protocol.operations import Save
from ...protocol.reports import Report
from ..parallel.ranks import Ranks
from ..sizes import DENOISERS
from ..weights.checkpoint.layout import Layout
from . import planning
from .adapter import Adapter, Term, placed
from .change import Change
from .dynamic import Beside, Uses
from .files import AdapterFile, load_adapter, read_adapter
from .merge import Sum, merge, rounded_away
from .names import Shapes, weight_shapes
from .pairs import refused
from .parts import Part, Parts, has_whole_layers, joined, layer_of, of_module, read_parts, write_parts

MERGED = "merged_adapters"
"""What is merged anew when weights change, as replies name it."""

MOST_ROUNDED_AWAY = 0.1
"""Of an adapter's change, in the norm: from that on ``auto`` computes beside the weights."""


@dataclass(frozen=True, slots=True)
class Named:
    """An adapter of a request, as it was when the request came, and the components that it is for."""

    adapter: Adapter
    scale: float
    components: frozenset[str]


Wanted = tuple[Named, ...] | None
"""A request's own adapters; ``None`` for those that are active for all."""

Adapters = dict[str, Adapter]
"""By nickname."""


@dataclass(slots=True)
class _Next:
    """A change in hand: what will be, and sentences about it."""

    state: AdapterState
    adapters: Adapters
    told: list[str]


class RankAdapters:
    """Loads, applies and lets go of adapters; at most ``most`` of them, of ``most_bytes`` in all."""

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        layouts: Mapping[str, Layout],
        ranks: Ranks,
        device: torch.device,
        *,
        most: int,
        most_bytes: int,
    ) -> None:
        self.state = AdapterState()
        self.told: list[str] = []
        """Of the last change."""
        self.written = False
        """Whether the weights are of a state that is not committed, of which nothing may be computed."""
        self._pipeline = pipeline
        self._layouts = layouts
        self._ranks = ranks
        self._device = device
        self._most = most
        self._most_bytes = most_bytes
        self._components: dict[str, nn.Module] = {
            name: pipeline.components[name] for name in layouts if name in DENOISERS or name.startswith("text_encoder")
        }
        self._adapters: Adapters = {}
        self._next: _Next | None = None
        self._beside = Beside(ranks)
        for module in self._components.values():
            self._beside.watch(module)

    # --- in forwards

    def wanted(self, uses: Sequence[Use] | None) -> Wanted:
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
        return tuple(Named(adapter, scale, frozenset(components)) for adapter, scale, components in named)

    def uses(self, component: str, wanted: Wanted) -> Uses:
        """What is computed beside the component's weights for a request: nothing that is in them by now."""
        root = component.split(".")[0]
        active = self.state.active.get(root, ())
        if wanted is None:
            return tuple((self._adapters[one.nickname], one.strength) for one in active if one.mode == "dynamic")
        merged = [self._adapters[one.nickname] for one in active if one.merged]
        return tuple((one.adapter, one.scale) for one in wanted if root in one.components and one.adapter not in merged)

    def during(
        self, component: str, rows: Sequence[tuple[int, Uses]], *, listed: bool = False
    ) -> AbstractContextManager[None]:
        """Around a forward of ``component``, of which each so many rows have these."""
        return self._beside.during(component.split(".")[0], rows, listed=listed)

    # --- in memory

    def tensors(self) -> Iterator[torch.Tensor]:
        """What they hold on the device: factors, and on a CPU the bases of what is merged."""
        for adapter in self._adapters.values():
            yield from adapter.tensors()
        for layout in self._layouts.values():
            yield from (base for base in layout.bases.values() if base.device.type == self._device.type)

    def forget_stacks(self) -> None:
        """Let go of what forwards make of factors, and will make again."""
        self._beside.forget()

    # --- changes

    def prepare(self, change: AdapterChange) -> None:
        """Read, check and decide; nothing is changed. Raises ``InvalidRequest``, ``NotFound`` or ``Conflict``.

        All ranks must call this together.
        """
        self._next = None
        told, components = list[str](), sorted(self._components)
        adapters = dict(self._adapters)
        match change:
            case SetAdapters():
                state = self._set(change, adapters, told)
            case MergeAdapters():
                state = planning.merged(self.state, change, components)
            case UnmergeAdapters(target=target):
                state = planning.unmerged(self.state, target, components, told)
            case UnloadAdapter(nickname=nickname):
                state = planning.without(self.state, nickname)
            case KeepAdapters():
                state = self.state
            case RestoreAdapters(state=state):
                for loaded in state.loaded.values():
                    self._load(loaded.source, adapters)
        self._check(state, adapters)
        self._next = _Next(state, {name: adapters[name] for name in state.loaded}, told)

    def write(self) -> None:
        """Bring the weights into the next state. What it raises leaves them to :meth:`rollback`."""
        assert self._next is not None, "prepared before"
        self.written = True
        self._merge_all(self._next.state, self._next.adapters, unlike=self.state)

    def commit(self) -> bool:
        """Be in the next state from now on; says whether anything that is drawn can be another by it."""
        assert self._next is not None, "written before"
        before = planning.effect(self.state)
        self.state, self._adapters, self.told = self._next.state, self._next.adapters, self._next.told
        self._beside.forget()
        self._next, self.written = None, False
        return before != planning.effect(self.state)

    def rollback(self) -> None:
        """Put back every byte."""
        if self.written:
            self._merge_all(self.state, self._adapters)
        self.release()

    def release(self) -> None:
        """Let go of what was prepared."""
        self._next, self.written = None, False

    def keep(self, save: Save, tensors: Mapping[str, torch.Tensor]) -> Report:
        """Write an adapter that comes in parts, with one more. Raises ``InvalidRequest``, and ``Unavailable``."""
        unfit = [name for name, one in tensors.items() if one.is_complex() or str(one.dtype) not in STORED_DTYPES]
        if unfit:
            dtypes = ", ".join(sorted({str(tensors[name].dtype) for name in unfit}))
            raise refused(f"no adapter has tensors of {dtypes}", unfit, field="serialized_named_tensors")
        loaded = self.state.loaded.get(save.adapter.nickname) if save.update_id is None else None
        before = save.onto if loaded is None else loaded.source.folder
        part = Part(
            of_module(tensors, save.adapter.target),
            version=save.version,
            alpha=save.alpha,
            rank=save.rank,
            complete=save.complete,
            begun=save.update_id is not None,
        )
        parts, told = joined(Parts() if before is None else read_parts(Path(before)), part)
        if part.begun and parts.tensors:  # else the next step reads it
            read_adapter(parts.tensors, None, self._pipeline, self._shapes(), alphas=parts.notes.alphas)
        try:
            write_parts(parts, Path(save.adapter.folder))
        except (OSError, SafetensorError) as error:
            raise Unavailable(f"The adapter could not be kept in shared memory ({error}).") from error
        layers = {layer_of(name) for name in parts.tensors}
        return Report(updated={save.adapter.target: len(layers)}, waiting=sorted(parts.waiting), told=told)

    def layers_of(self, nicknames: Sequence[str]) -> dict[str, int]:
        """How many layers of each component these adapters change for all requests."""
        found: dict[str, set[str]] = {}
        for component, ones in self.state.active.items():
            for one in ones:
                if one.nickname in nicknames:
                    found.setdefault(component, set()).update(self._adapters[one.nickname].layers(component))
        return {component: len(layers) for component, layers in found.items()}

    def are_in(self, written: Mapping[str, Iterable[str]]) -> bool:
        """Whether any of these tensors has adapters merged into it."""
        return any(name in self._layouts[component].bases for component, names in written.items() for name in names)

    def rebuild(self, written: Mapping[str, Iterable[str]]) -> None:
        """After base weights have changed: what is merged into them is merged anew, in the same order on all ranks,
        which may speak with each other in it."""
        for component, names in sorted(written.items()):
            layout = self._layouts[component]
            if merged := sorted(name for name in names if name in layout.bases):
                merge(layout, _merged_sum(component, self.state, self._adapters), merged)

    # --- what will be

    def _check(self, state: AdapterState, adapters: Adapters) -> None:
        """Raises ``InvalidRequest`` for a layer that cannot be merged into, or computed beside, as it would be."""
        for component, ones in state.active.items():
            for one in ones:
                adapter = adapters[one.nickname]
                impossible = adapter.only_beside if one.mode == "merge" else adapter.only_merged
                if layer := next((layer for layer in impossible if layer.startswith(f"{component}.")), None):
                    way = "merged into" if one.mode == "merge" else "computed beside"
                    raise InvalidRequest(f"{one.nickname}: {layer} cannot be {way}.", field="merge_mode")

    def _set(self, change: SetAdapters, adapters: Adapters, told: list[str]) -> AdapterState:
        work = _Setting(change, adapters)
        try:
            self._look(work, told)
        except Exception as error:  # noqa: BLE001  # raised when the other ranks know of it
            work.error = error
        lost = self._together(work)
        assert work.state is not None, "there was no error"
        modes: dict[str, Mode] = {}
        for component, nicknames in work.here.items():
            modes[component] = "merge" if change.mode == "merge" else "dynamic"
            if change.mode == "auto":
                modes[component], why = _chosen([adapters[name] for name in nicknames], lost.get(component))
                told.append(f"{component}: {modes[component]}, as {why}.")
        state = planning.activated(work.state, change, work.targets, modes)
        return planning.within_limits(state, change, self._most, self._most_bytes, told)

    def _look(self, work: _Setting, told: list[str]) -> None:
        """Load what is to be loaded, and find out what the change is about; what a rank can do by itself."""
        change, adapters = work.change, work.adapters
        fresh: dict[str, Loaded] = {}
        for source in change.sources:
            known = self.state.loaded.get(source.nickname)
            if known is None or (known.source.digest, known.source.target) != (source.digest, source.target):
                file = self._load(source, adapters)
                fresh[source.nickname] = Loaded(source, [], file.rank, file.alpha, file.nbytes, file.left)
                if file.left:
                    told.append(
                        f"{source.nickname}: {len(file.left)} layers have no place in the model, and are left out."
                    )
        has = {nickname: adapter.components for nickname, adapter in adapters.items()}
        work.state = planning.with_loaded(self.state, fresh, change, has, told)
        work.targets = planning.targets_of(change, work.state, has, sorted(self._components))
        for component in sorted({name for components in work.targets.values() for name in components}):
            work.here[component] = [name for name in change.nicknames if component in work.targets[name]]
        named = [adapters[nickname] for nickname in change.nicknames]
        only_merged = [layer for adapter in named for layer in adapter.only_merged]
        only_beside = [layer for adapter in named for layer in adapter.only_beside]
        if only_merged and (only_beside or change.mode in ("dynamic", "request")):
            raise InvalidRequest(
                f"{', '.join(only_merged[:3])} can only be merged into; use merge_mode = merge.", field="merge_mode"
            )
        if only_beside and change.mode == "merge":
            raise InvalidRequest(
                f"{', '.join(only_beside[:3])} cannot be merged into, as the weights are quantized; use merge_mode = "
                "dynamic.",
                field="merge_mode",
            )
        if change.mode == "auto" and not only_beside:
            strengths = dict(zip(change.nicknames, change.strengths, strict=True))
            for component, nicknames in work.here.items():
                wanted = _sum(component, [(adapters[name], strengths[name]) for name in nicknames])
                only = any(adapters[name].only_merged for name in nicknames)  # nothing is to be chosen
                work.sums[component] = (0.0, 0.0) if only else rounded_away(self._layouts[component], wanted)

    def _together(self, work: _Setting) -> dict[str, float]:
        """What share of the change the ranks together would round away, by component.

        Raises the error of this rank, or that another has one.
        """
        said = self._ranks.exchange(msgspec.msgpack.encode(work.sums if work.error is None else None))
        if work.error is not None:
            raise work.error
        every = [msgspec.msgpack.decode(one, type=dict[str, tuple[float, float]] | None) for one in said]
        shares: dict[str, float] = {}
        for component in work.sums:
            lost = added = 0.0
            for sums in every:
                if sums is None:
                    raise Unavailable("Another rank could not use the adapter.")
                lost, added = lost + sums[component][0], added + sums[component][1]
            shares[component] = (lost / added) ** 0.5 if added else 0.0
        return shares

    def _load(self, source: AdapterSource, adapters: Adapters) -> AdapterFile:
        file = self._file(source)
        try:
            adapters[source.nickname] = placed(
                file, source.nickname, source.target, self._components, self._layouts, self._device
            )
        except torch.OutOfMemoryError as error:
            raise Unavailable("There is no memory for the adapter; unload another.") from error
        return file

    def _file(self, source: AdapterSource) -> AdapterFile:
        folder = Path(source.folder)
        if not has_whole_layers(folder):
            return AdapterFile({source.target: {}}, rank=0, alpha=0.0, nbytes=0)
        return load_adapter(folder, self._pipeline, self._shapes(), alpha=source.alpha, strict=source.strict)

    def _shapes(self) -> Shapes:
        return weight_shapes({name: self._layouts[name] for name in self._components})

    def _merge_all(self, state: AdapterState, adapters: Adapters, unlike: AdapterState | None = None) -> None:
        """Every component's weights as ``state`` has them; only those that it has otherwise than ``unlike``."""
        before = {} if unlike is None else planning.effect(unlike)
        for component, ones in {name: planning.effect(state).get(name, []) for name in self._components}.items():
            if unlike is not None and ones == before.get(component, []):
                continue
            wanted = _merged_sum(component, state, adapters)
            if wanted or self._layouts[component].bases:
                merge(self._layouts[component], wanted)


@dataclass(slots=True)
class _Setting:
    """What a rank has found out of a :class:`SetAdapters`: what was ``state``, and by component who is ``here``."""

    change: SetAdapters
    adapters: Adapters
    state: AdapterState | None = None
    targets: dict[str, list[str]] = field(default_factory=dict)
    here: dict[str, list[str]] = field(default_factory=dict)
    sums: dict[str, tuple[float, float]] = field(default_factory=dict)
    error: Exception | None = None


def _chosen(adapters: Sequence[Adapter], lost: float | None) -> tuple[Mode, str]:
    """What ``auto`` chooses for adapters of which a merge would round away such a share, and why."""
    if lost is None:
        return "dynamic", "the weights are quantized"
    if only := [layer for adapter in adapters for layer in adapter.only_merged]:
        return "merge", f"{only[0]} can only be merged into"
    return ("dynamic" if lost > MOST_ROUNDED_AWAY else "merge"), f"a merge would round away {100 * lost:.2g} % of it"


def _merged_sum(component: str, state: AdapterState, adapters: Adapters) -> Sum:
    merged = [(adapters[one.nickname], one.strength) for one in state.active.get(component, ()) if one.merged]
    return _sum(component, merged)


def _sum(component: str, adapters: Iterable[tuple[Adapter, float]]) -> Sum:
    """What they add to each tensor, in this order."""
    found: dict[str, list[tuple[Term | Change, float]]] = {}
    for adapter, strength in adapters:
        terms = adapter.terms.get(component, {}).values()
        for term in (*terms, *adapter.changes.get(component, ())):
            found.setdefault(term.weight, []).append((term, strength))
    return found
