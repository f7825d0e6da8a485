"""An adapter on this rank: this rank's part of the factors of every layer that it changes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from ...protocol.adapters import ALL
from ...protocol.errors import InvalidRequest
from ..parallel.layers import GatheredColumnLinear
from ..pipelines.components import DENOISERS
from ..weights.checkpoint.layout import Layout
from .change import Change, change_of
from .factors import LoraFactors
from .files import AdapterFile, LowRank, WholeChange
from .layers import is_adaptable

_FIELD = "lora_path"
_numbers = itertools.count(1)


@dataclass(slots=True, eq=False)
class Adapter:
    """``factors`` by component and layer, and ``changes`` of whole weights by component.

    In ``only_merged`` layers it cannot be dynamic, in ``only_dynamic`` ones it cannot be merged. ``number`` is unique
    in this process.
    """

    nickname: str
    factors: dict[str, dict[str, LoraFactors]] = field(default_factory=dict)
    changes: dict[str, list[Change]] = field(default_factory=dict)
    only_merged: list[str] = field(default_factory=list)
    only_dynamic: list[str] = field(default_factory=list)
    number: int = field(default_factory=lambda: next(_numbers))
    _ranks: dict[str, int] = field(default_factory=dict)

    @property
    def components(self) -> list[str]:
        return list(dict.fromkeys([*self.factors, *self.changes]))

    def rank(self, component: str) -> int:
        """The largest rank of its factors in ``component``."""
        if component not in self._ranks:
            self._ranks[component] = max(one.rank for one in self.factors[component].values())
        return self._ranks[component]

    def layers(self, component: str) -> set[str]:
        return {*self.factors.get(component, ()), *(change.layer for change in self.changes.get(component, ()))}

    def tensors(self) -> Iterator[torch.Tensor]:
        """The tensors that it holds on the device."""
        for factors in self.factors.values():
            yield from itertools.chain.from_iterable(one.tensors() for one in factors.values())
        for changes in self.changes.values():
            yield from itertools.chain.from_iterable(change.tensors() for change in changes)


def placed(
    file: AdapterFile,
    nickname: str,
    target: str,
    components: Mapping[str, nn.Module],
    layouts: Mapping[str, Layout],
    device: torch.device,
) -> Adapter:
    """The adapter of ``file`` on this rank.

    If ``target`` is a denoiser, a file's layers of a single denoiser apply to it. Raises ``InvalidRequest`` for
    components and layers that adapters cannot change.
    """
    denoisers = [name for name in file.components if name in DENOISERS]
    moved = {denoisers[0]: target} if len(denoisers) == 1 and target in DENOISERS and target in components else {}
    adapter = Adapter(nickname)
    for component in file.components:
        own = moved.get(component, component)
        if own not in components:
            raise InvalidRequest(f"The adapter {nickname!r} has layers of {own}, which cannot have any.", field=_FIELD)
        if changes := [change for change in file.changes if change.component == component]:
            adapter.changes[own] = _changes(own, changes, layouts[own], device)
            adapter.only_merged += [f"{own}.{change.layer} ({change.kind})" for change in adapter.changes[own]]
        if (layers := file.layers.get(component)) is None:
            continue
        adapter.factors[own] = _terms(own, layers, components[own], layouts[own], device)
        for path, one in adapter.factors[own].items():
            if not is_adaptable(components[own].get_submodule(path)):
                adapter.only_merged.append(f"{own}.{path}")
            if one.weight in layouts[own].codecs:
                adapter.only_dynamic.append(f"{own}.{path}")
    if target != ALL and target in components and target not in adapter.components:
        raise InvalidRequest(
            f"The adapter {nickname!r} has no layers of {target}; it has {', '.join(adapter.components)}.",
            field="target",
        )
    return adapter


def _changes(component: str, changes: list[WholeChange], layout: Layout, device: torch.device) -> list[Change]:
    found: list[Change] = []
    shared = _shared(layout)
    for change in changes:
        name = layout.checkpoint_name(f"{change.layer}.{change.whole.parameter}")
        if name is None or name in shared:
            why = "it has none" if name is None else f"which shares its memory with {shared[name]}"
            raise InvalidRequest(
                f"The adapter cannot be used: it changes the {change.whole.parameter} of {component}.{change.layer}, "
                f"and {why}.",
                field=_FIELD,
            )
        if name in layout.codecs:
            raise InvalidRequest(
                f"{component}.{change.layer} cannot be merged into, as the weights are quantized, and a "
                f"{change.whole.kind} can only be merged.",
                field="merge_mode",
            )
        found.append(change_of(change, name, layout, device))
    return found


def _shared(layout: Layout) -> dict[str, str]:
    """The tensors that are in the memory of another, with the other's name."""
    names: dict[int, list[str]] = {}
    for entry in layout:
        if entry.name not in layout.codecs:
            names.setdefault(layout.live(entry.name).data_ptr(), []).append(entry.name)
    return {name: next(n for n in ones if n != name) for ones in names.values() if len(ones) > 1 for name in ones}


def _terms(
    component: str, layers: Mapping[str, LowRank], module: nn.Module, layout: Layout, device: torch.device
) -> dict[str, LoraFactors]:
    shared = _shared(layout)
    factors: dict[str, LoraFactors] = {}
    for path, pair in layers.items():
        name = layout.checkpoint_name(f"{path}.weight")
        if name is None or layout[name].shape[:2] != (pair.up.shape[0], pair.down.shape[1]):
            raise InvalidRequest(f"{component} has no such layer as {path}, or of another shape.", field=_FIELD)
        if name in shared:
            other = shared[name].rpartition(".")[0]
            raise InvalidRequest(
                f"The adapter cannot be used: {component}.{path} shares its weight with {component}.{other}, so that a "
                "change of one would change both.",
                field=_FIELD,
            )
        scaled = pair.scale * pair.up
        down, up = (factor.to(device) for factor in layout.factors(name, pair.down, scaled))
        whole = scaled.to(device) if isinstance(module.get_submodule(path), GatheredColumnLinear) else up
        factors[path] = LoraFactors(name, down, up, whole)
    return factors
