"""The adapters of this rank, and their changes, each of which is made everywhere or nowhere."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from msgspec.structs import replace
from torch import nn

from ...protocol.adapters import (
    ALL,
    Active,
    AdapterChange,
    AdapterState,
    Loaded,
    MergeAdapters,
    RestoreAdapters,
    SetAdapters,
    Source,
    UnloadAdapter,
    UnmergeAdapters,
    Use,
)
from ...protocol.errors import Conflict, InvalidRequest, NotFound
from ..parallel.ranks import Ranks
from ..sizes import DENOISERS
from ..weights.layout import Layout
from .adapter import Adapter, Term, placed
from .beside import Beside, Uses
from .files import AdapterFile, load_adapter, weight_shapes
from .merge import Sum, merge, rounded_away

MERGED = "merged_adapters"
"""What is merged anew when weights change, as replies name it."""

MOST_ROUNDED_AWAY = 0.1
"""Of an adapter's change, in the norm: from that on ``auto`` computes beside the weights."""

Wanted = Uses | None
"""A request's own adapters; ``None`` for those that are active for all."""


class RankAdapters:
    """Loads, applies and lets go of adapters; at most ``most`` of them with ``most_bytes`` on this rank."""

    def __init__(
        self, pipeline: DiffusionPipeline, layouts: Mapping[str, Layout], ranks: Ranks, *, most: int, most_bytes: int
    ) -> None:
        self.state = AdapterState()
        self.told: list[str] = []
        self.updated: dict[str, int] = {}
        """Of the last change, how many layers of each component have adapters for all requests."""
        self._pipeline = pipeline
        self._layouts = layouts
        self._ranks = ranks
        self._most = most
        self._most_bytes = most_bytes
        self._components: dict[str, nn.Module] = {
            name: pipeline.components[name] for name in layouts if name in DENOISERS or name.startswith("text_encoder")
        }
        self._adapters: dict[str, Adapter] = {}
        self._next: tuple[AdapterState, dict[str, Adapter]] | None = None
        self._folders: list[str] = []  # that came with the change in hand
        self._beside = Beside(ranks)
        for name, module in self._components.items():
            self._beside.watch(name, module)

    # --- in forwards

    def wanted(self, uses: Sequence[Use] | None) -> Wanted:
        """The adapters that a request names. Raises ``NotFound``."""
        if uses is None:
            return None
        for use in uses:
            if use.name not in self._adapters:
                raise self._unknown(use.name, "lora")
        return tuple((self._adapters[use.name], use.scale) for use in uses)

    def uses(self, component: str, wanted: Wanted) -> Uses:
        """What is computed beside the component's weights for a request."""
        root = component.split(".")[0]
        if wanted is None:
            active = self.state.active.get(root, ())
            return tuple((self._adapters[one.nickname], one.strength) for one in active if one.mode == "dynamic")
        return tuple((adapter, scale) for adapter, scale in wanted if root in adapter.components)

    def during(
        self, component: str, rows: Sequence[tuple[int, Uses]], *, listed: bool = False
    ) -> AbstractContextManager[None]:
        """Around a forward of ``component``, of which each so many rows have these."""
        return self._beside.during(component.split(".")[0], rows, listed=listed)

    # --- changes

    def prepare(self, change: AdapterChange) -> None:
        """Read, check and decide; nothing is changed. ``told`` says why, in sentences.

        Raises ``InvalidRequest``, ``NotFound`` or ``Conflict``.
        """
        self._folders = [source.folder for source in change.sources] if isinstance(change, SetAdapters) else []
        adapters, told = dict(self._adapters), self.told
        told.clear()
        match change:
            case SetAdapters():
                state = self._set(change, adapters, told)
            case MergeAdapters():
                state = self._merged(change)
            case UnmergeAdapters(target=target):
                state = self._unmerged(target)
            case UnloadAdapter(nickname=nickname):
                state = self._without(self.state, nickname, adapters)
            case RestoreAdapters(state=state):
                for loaded in state.loaded.values():
                    self._load(loaded.source, adapters)
        self._next = state, adapters

    def write(self) -> None:
        """Bring the weights into the next state. What it raises leaves them to :meth:`rollback`."""
        assert self._next is not None, "prepared before"
        self._merge_all(*self._next)

    def commit(self) -> bool:
        """Be in the next state from now on; says whether anything that is drawn can be another by it."""
        assert self._next is not None, "written before"
        before = self.state
        self.state, self._adapters = self._next
        self._next = None
        for nickname, loaded in self.state.loaded.items():
            self._adapters[nickname].components = frozenset(loaded.components)
        self._beside.set_loaded(list(self._adapters.values()))
        self.updated = {
            component: len({path for one in ones for path in self._adapters[one.nickname].terms[component]})
            for component, ones in self.state.active.items()
        }
        self._folders += [one.source.folder for one in before.loaded.values()]
        self._remove_folders()
        return before.active != self.state.active

    def rollback(self) -> None:
        """Put back every byte."""
        self._merge_all(self.state, self._adapters)
        self.release()

    def release(self) -> None:
        """Let go of what was prepared."""
        self._next = None
        self._remove_folders()

    def are_in(self, written: Mapping[str, Iterable[str]]) -> bool:
        """Whether any of these tensors has adapters merged into it."""
        return any(name in self._layouts[component].bases for component, names in written.items() for name in names)

    def rebuild(self, written: Mapping[str, Iterable[str]]) -> None:
        """After base weights have changed: what is merged into them is merged anew."""
        for component, names in written.items():
            layout = self._layouts[component]
            if merged := [name for name in names if name in layout.bases]:
                merge(layout, _merged_sum(component, self.state, self._adapters), merged)

    # --- what will be

    def _set(self, change: SetAdapters, adapters: dict[str, Adapter], told: list[str]) -> AdapterState:
        loaded = dict(self.state.loaded)
        for source in change.sources:
            known = loaded.get(source.nickname)
            if known is None or known.source.digest != source.digest:
                file = self._load(source, adapters)
                loaded[source.nickname] = Loaded(source, [], file.rank, file.alpha, file.nbytes)
        for nickname in change.nicknames:
            if nickname not in adapters:
                raise self._unknown(nickname, "lora_nickname")
        targets = {nickname: self._targets(adapters[nickname], change.target) for nickname in change.nicknames}
        for nickname, components in targets.items():
            loaded[nickname] = replace(loaded[nickname], components=components)
        active = {
            component: ones
            for component, ones in self.state.active.items()
            if change.mode == "request" or change.target not in (ALL, component)
        }
        state = AdapterState(loaded, active)
        if change.mode != "request":
            strengths = dict(zip(change.nicknames, change.strengths, strict=True))
            for component in sorted({name for components in targets.values() for name in components}):
                here = {
                    nickname: strengths[nickname] for nickname in change.nicknames if component in targets[nickname]
                }
                active[component] = self._activated(component, here, change.mode, adapters, told)
        return self._within_limits(state, change, adapters, told)

    def _load(self, source: Source, adapters: dict[str, Adapter]) -> AdapterFile:
        file = load_adapter(Path(source.folder), self._pipeline, weight_shapes(self._layouts), alpha=source.alpha)
        if source.rank is not None and source.rank != file.rank:
            raise InvalidRequest(f"The adapter has rank {file.rank}, and not {source.rank}.", field="lora_rank")
        others = [name for name in file.layers if name not in self._components]
        if others:
            raise InvalidRequest(
                f"The adapter {source.nickname!r} has layers of {', '.join(others)}.", field="lora_path"
            )
        adapters[source.nickname] = placed(file, source.nickname, self._components, self._layouts)
        return file

    def _targets(self, adapter: Adapter, target: str) -> list[str]:
        if target == ALL:
            return sorted(adapter.terms)
        if target not in self._components:
            known = ", ".join(self._components)
            raise NotFound(f"The model has no component {target!r} for adapters; it has {known}.", field="target")
        if target not in adapter.terms:
            raise InvalidRequest(
                f"The adapter {adapter.nickname!r} has no layers of {target}; it has {', '.join(adapter.terms)}.",
                field="target",
            )
        return [target]

    def _activated(
        self,
        component: str,
        strengths: Mapping[str, float],
        mode: str,
        adapters: Mapping[str, Adapter],
        told: list[str],
    ) -> list[Active]:
        only_merged = [
            layer
            for nickname in strengths
            for layer in adapters[nickname].cannot_be_beside(self._components, [component])
        ]
        if mode == "dynamic" and only_merged:
            raise InvalidRequest(
                f"{', '.join(only_merged[:3])} can only be merged into; use merge_mode = merge.", field="merge_mode"
            )
        if mode == "auto":
            mode, why = (
                ("merge", f"{only_merged[0]} can only be merged into")
                if only_merged
                else self._chosen(component, strengths, adapters)
            )
            told.append(f"{component}: {mode}, as {why}.")
        return [
            Active(nickname, strength, "merge" if mode == "merge" else "dynamic", merged=mode == "merge")
            for nickname, strength in strengths.items()
        ]

    def _chosen(
        self, component: str, strengths: Mapping[str, float], adapters: Mapping[str, Adapter]
    ) -> tuple[str, str]:
        """What ``auto`` chooses, and why."""
        layout = self._layouts[component]
        wanted = _sum(component, [(adapters[nickname], strength) for nickname, strength in strengths.items()])
        if any(
            not layout.dtype(name).is_floating_point or type(layout.live(name).data) is not torch.Tensor
            for name in wanted
        ):
            return "dynamic", "the weights are quantized"
        parts = self._ranks.gather(
            torch.tensor(rounded_away(layout, wanted), dtype=torch.float64, device=self._ranks.device)
        )
        lost, added = (float(value) for value in torch.stack(parts).sum(dim=0))
        share = (lost / added) ** 0.5 if added else 0.0
        mode = "dynamic" if share > MOST_ROUNDED_AWAY else "merge"
        return mode, f"a merge would round away {100 * share:.2g} % of the change"

    def _within_limits(
        self, state: AdapterState, change: SetAdapters, adapters: dict[str, Adapter], told: list[str]
    ) -> AdapterState:
        """Without those that were not used for longest, while there are too many, or too large ones."""
        order = [*(name for name in change.recent if name in state.loaded), *state.loaded]
        active = {one.nickname for ones in state.active.values() for one in ones}
        idle = [name for name in dict.fromkeys(order) if name not in active and name not in change.nicknames]
        while len(state.loaded) > self._most or sum(one.nbytes for one in state.loaded.values()) > self._most_bytes:
            if not idle:
                room = f"{self._most} adapters and {self._most_bytes // 1_000_000} MB of them"
                raise Conflict(f"There is room for {room}, and it is full of such as are in use; unload one.")
            name = idle.pop(0)
            state = self._without(state, name, adapters)
            told.append(f"{name} was unloaded to make room.")
        return state

    def _merged(self, change: MergeAdapters) -> AdapterState:
        numbers = change.strengths
        for component, ones in self.state.active.items():
            if change.target in (ALL, component) and numbers is not None and len(numbers) not in (1, len(ones)):
                raise InvalidRequest(
                    f"There are {len(ones)} adapters in {component}, and {len(numbers)} strengths.", field="strength"
                )
        if not any(ones for component, ones in self.state.active.items() if change.target in (ALL, component)):
            raise Conflict("No adapter is active there; set one first.")
        active = {
            component: [
                replace(
                    one,
                    mode="merge",
                    merged=True,
                    strength=one.strength if numbers is None else numbers[min(place, len(numbers) - 1)],
                )
                for place, one in enumerate(ones)
            ]
            if change.target in (ALL, component)
            else ones
            for component, ones in self.state.active.items()
        }
        return replace(self.state, active=active)

    def _unmerged(self, target: str) -> AdapterState:
        active = {
            component: [replace(one, merged=False) for one in ones] if target in (ALL, component) else ones
            for component, ones in self.state.active.items()
        }
        return replace(self.state, active=active)

    def _without(self, state: AdapterState, nickname: str, adapters: dict[str, Adapter]) -> AdapterState:
        if adapters.pop(nickname, None) is None:
            raise self._unknown(nickname, "lora_nickname")
        loaded = {name: one for name, one in state.loaded.items() if name != nickname}
        active = {
            component: [one for one in ones if one.nickname != nickname] for component, ones in state.active.items()
        }
        return AdapterState(loaded, {component: ones for component, ones in active.items() if ones})

    def _merge_all(self, state: AdapterState, adapters: Mapping[str, Adapter]) -> None:
        for component in self._components:
            wanted = _merged_sum(component, state, adapters)
            if wanted or self._layouts[component].bases:
                merge(self._layouts[component], wanted)

    def _unknown(self, nickname: str, field: str) -> NotFound:
        known = ", ".join(self._adapters) or "none"
        return NotFound(f"There is no adapter {nickname!r}; loaded: {known}.", field=field)

    def _remove_folders(self) -> None:
        """Of adapters that are not there any more, or never were."""
        kept = {one.source.folder for one in self.state.loaded.values()}
        for folder in set(self._folders) - kept:
            shutil.rmtree(folder, ignore_errors=True)
        self._folders = []


def _merged_sum(component: str, state: AdapterState, adapters: Mapping[str, Adapter]) -> Sum:
    merged = [(adapters[one.nickname], one.strength) for one in state.active.get(component, ()) if one.merged]
    return _sum(component, merged)


def _sum(component: str, adapters: Iterable[tuple[Adapter, float]]) -> Sum:
    """What they add to each tensor, in this order."""
    found: dict[str, list[tuple[Term, float]]] = {}
    for adapter, strength in adapters:
        for term in adapter.terms.get(component, {}).values():
            found.setdefault(term.weight, []).append((term, strength))
    return found
