"""The factors that the rows of a component's forwards have, of adapters of one rank: written when the rows change."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence

import torch
from torch import nn

from ..forward.adapters import CannotMix
from .adapter import Adapter
from .factors import LoraFactors
from .gathered import Entry, GatheredFactors
from .layers import LayerLora
from .rows import Convolution, Kind

ActiveAdapters = tuple[tuple[Adapter, float], ...]
"""Adapters with their strengths, that are active together."""


_Numbers = tuple[tuple[int, float], ...]
"""A row's adapters by their numbers, with strengths."""


class FactorBank:
    """Writes factors into the memory that the ``layers`` of ``component`` read, for rows of one ``kind``.

    ``layers`` are by path. Sizes are equal on all ranks of a replica.
    """

    def __init__(self, component: str, layers: Mapping[str, tuple[nn.Module, LayerLora]], kind: Kind) -> None:
        self.nbytes = 0
        self.capacity = 0
        """The most entries that it ever had room for."""
        self._component = component
        self._layers = layers
        self._kind = kind
        self._gathered: dict[str, GatheredFactors] = {}  # by the first of the layer's paths
        self._written: list[_Numbers] = []
        self._entries = 0
        self._place = object()  # another one once factors lie elsewhere

    @property
    def memory(self) -> Hashable:
        """Where the factors of the rows lie, and how many entries there are of each layer."""
        return self._place, self._entries

    def retain(self, adapters: Collection[Adapter]) -> None:
        """Free the memory of layers that none of ``adapters`` changes."""
        changed = {path for adapter in adapters for path in self._factors(adapter)}
        for path in self._gathered.keys() - changed:
            self._written, self._place = [], object()
            del self._gathered[path], self._layers[path][1].gathered[self._kind]
        self._count()

    def needed(self, rows: Sequence[ActiveAdapters]) -> int:
        """Bytes of the bank once it has room for these rows. Raises ``CannotMix``."""
        if _numbers(rows) == self._written:
            return self.nbytes
        self._add_layers(rows)
        entries = max(self.capacity, len(rows) * _width(rows))
        return entries * sum(gathered.entry_nbytes for gathered in self._gathered.values())

    @torch.no_grad()
    def write(self, rows: Sequence[ActiveAdapters]) -> None:
        """Have the layers read the factors of these rows, unless they do; the only one stands for all rows if alike."""
        wanted, width = _numbers(rows), _width(rows)
        if wanted == self._written:
            return
        self._written = []  # until everything is written
        self._add_layers(rows)
        number = len(rows) if self._kind[1] else None
        factors = {adapter: self._factors(adapter) for active in rows for adapter, _ in active}
        for path, gathered in self._gathered.items():
            entries = list[Entry]()
            for active in rows:
                entries += [(factors[adapter].get(path), strength) for adapter, strength in active]
                entries += [(None, 0.0)] * (width - len(active))
            gathered.write(entries, number)
        self._entries = len(rows) * width
        if self._entries > self.capacity:
            self.capacity, self._place = self._entries, object()
        self._written = wanted
        self._count()

    def _add_layers(self, rows: Sequence[ActiveAdapters]) -> None:
        """Add the layers that an adapter changes for the first time. Raises ``CannotMix``."""
        for adapter in dict.fromkeys(adapter for active in rows for adapter, _ in active):
            factors = self._factors(adapter)
            for path in factors.keys() - self._gathered.keys():
                layer, lora = self._layers[path]
                if self._kind[1] and isinstance(layer, Convolution):
                    raise CannotMix(f"{path} is a convolution")
                self._written, self._place = [], object()
                self._gathered[path] = GatheredFactors(path, layer, factors[path], self._kind[0])
                lora.gathered[self._kind] = self._gathered[path]

    def _factors(self, adapter: Adapter) -> dict[str, LoraFactors]:
        """Its factors by the first of each layer's paths, as adapters can name a layer by different ones."""
        found: dict[str, LoraFactors] = {}
        for path, factors in adapter.factors[self._component].items():
            if path in self._layers:
                paths = self._layers[path][1].paths
                assert paths[0] not in found, f"{', '.join(paths)} are one layer"
                found[paths[0]] = factors
        return found

    def _count(self) -> None:
        self.nbytes = sum(gathered.nbytes for gathered in self._gathered.values())


def _width(rows: Sequence[ActiveAdapters]) -> int:
    return max(len(active) for active in rows)


def _numbers(rows: Sequence[ActiveAdapters]) -> list[_Numbers]:
    return [tuple((adapter.number, strength) for adapter, strength in active) for active in rows]
