"""The factors that the rows of a component's forwards have, of adapters of one rank: written when the rows change."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import nn

from ..forward.adapters import CannotMix
from .adapter import Adapter
from .gathered import Entry, GatheredFactors
from .layers import LayerLora
from .rows import Convolution, Kind

ActiveAdapters = tuple[tuple[Adapter, float], ...]
"""Adapters with their strengths, that are active together."""


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
        self._gathered: dict[str, GatheredFactors] = {}
        self._written: list[tuple[tuple[int, float], ...]] = []

    def retain(self, adapters: Collection[Adapter]) -> None:
        """Free the memory of layers that none of ``adapters`` changes."""
        changed = {path for adapter in adapters for path in adapter.factors[self._component]}
        for path in self._gathered.keys() - changed:
            del self._gathered[path], self._layers[path][1].gathered[self._kind]
        self._count()

    def needed(self, rows: Sequence[ActiveAdapters]) -> int:
        """Bytes of the bank once it has room for these rows. Raises ``CannotMix``."""
        self._add_layers(rows)
        entries = max(self.capacity, len(rows) * _width(rows))
        return entries * sum(gathered.entry_nbytes for gathered in self._gathered.values())

    @torch.no_grad()
    def write(self, rows: Sequence[ActiveAdapters]) -> None:
        """Have the layers read the factors of these rows, unless they do; the only one stands for all rows if alike."""
        added, width = self._add_layers(rows), _width(rows)
        wanted = [tuple((adapter.number, strength) for adapter, strength in active) for active in rows]
        if wanted == self._written and not added:
            return
        self._written = []  # until everything is written
        number = len(rows) if self._kind[1] else None
        for path, gathered in self._gathered.items():
            entries = list[Entry]()
            for active in rows:
                entries += [(adapter.factors[self._component].get(path), strength) for adapter, strength in active]
                entries += [(None, 0.0)] * (width - len(active))
            gathered.write(entries, number)
        self._written, self.capacity = wanted, max(self.capacity, len(rows) * width)
        self._count()

    def _add_layers(self, rows: Sequence[ActiveAdapters]) -> bool:
        """Add the layers that an adapter changes for the first time; returns true if there are any."""
        before = len(self._gathered)
        for adapter in dict.fromkeys(adapter for active in rows for adapter, _ in active):
            factors = adapter.factors[self._component]
            for path in factors.keys() & self._layers.keys() - self._gathered.keys():
                layer, lora = self._layers[path]
                if self._kind[1] and isinstance(layer, Convolution):
                    raise CannotMix(f"{path} is a convolution")
                self._gathered[path] = GatheredFactors(path, layer, factors[path], self._kind[0])
                lora.gathered[self._kind] = self._gathered[path]
        return len(self._gathered) > before

    def _count(self) -> None:
        self.nbytes = sum(gathered.nbytes for gathered in self._gathered.values())


def _width(rows: Sequence[ActiveAdapters]) -> int:
    return max(len(active) for active in rows)
