"""The factors of a component's adapters of one rank: a stack for each layer, and a slot in all of them for each."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import nn

from .adapter import Adapter
from .layers import LayerLora
from .rows import PerRow, Uniform
from .stack import FactorStack

ActiveAdapters = tuple[tuple[Adapter, float], ...]
"""Adapters with their strengths, that are active together."""

FIRST_SLOTS = 4
"""Adapters that a bank has room for at first; it doubles when they are all taken."""

MAX_IDLE_SLOTS = 16
"""From so many on, an adapter that no row of the forward has gives its slot to another."""

FIRST_ROWS = 256
"""Numbers of adapters, of all rows of a forward, that there is room for at first; then there are twice as many."""


class FactorBank:
    """Stacks of one ``rank`` for the ``layers`` of ``component``, each by its path and with what it reads.

    An adapter comes by writes into a slot, and the rows of a forward by writes into the tensors of slots and strengths;
    all of them keep their memory as long as there is room.
    """

    def __init__(
        self, component: str, layers: Mapping[str, tuple[nn.Module, LayerLora]], rank: int, device: torch.device
    ) -> None:
        self._component = component
        self._layers = layers
        self._rank = rank
        self._capacity = FIRST_SLOTS
        self._stacks: dict[str, FactorStack] = {}
        self._slots: OrderedDict[Adapter, int] = OrderedDict()  # the one that was not used for longest first
        self._row_slots = torch.zeros(FIRST_ROWS, dtype=torch.long, device=device)
        self._row_strengths = torch.zeros(FIRST_ROWS, device=device)
        self._written: list[tuple[int, float]] = []

    def __contains__(self, adapter: Adapter) -> bool:
        return adapter in self._slots

    @property
    def nbytes(self) -> int:
        return sum(stack.nbytes for stack in self._stacks.values())

    def retain(self, adapters: Collection[Adapter]) -> None:
        """Free the slots of all others."""
        for adapter in self._slots.keys() - set(adapters):
            del self._slots[adapter]

    @torch.no_grad()
    def place(self, used: Collection[Adapter]) -> None:
        """Have each of ``used`` in a slot."""
        for adapter in used:
            if adapter in self._slots:
                self._slots.move_to_end(adapter)
        for adapter in used:
            if adapter not in self._slots:
                slot = self._free_slot(used)
                self._write(adapter, slot)
                self._slots[adapter] = slot

    def uniform(self, active: ActiveAdapters) -> Uniform:
        """Every row has these, which are placed."""
        slots, strengths = self._table([self._entries(active, len(active))])
        return Uniform(self._rank, slots[0], strengths[0])

    def per_row(self, rows: Sequence[ActiveAdapters], *, listed: bool) -> PerRow:
        """Each row has its own, which are placed."""
        width = max(len(active) for active in rows)
        slots, strengths = self._table([self._entries(active, width) for active in rows])
        return PerRow(self._rank, slots, strengths, listed)

    def _entries(self, active: ActiveAdapters, width: int) -> list[tuple[int, float]]:
        own = [(self._slots[adapter], strength) for adapter, strength in active]
        return own + [(0, 0.0)] * (width - len(own))

    def _table(self, rows: list[list[tuple[int, float]]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Slots and strengths [rows, adapters]."""
        entries = [entry for row in rows for entry in row]
        number = len(entries)
        if number > len(self._row_slots):
            self._row_slots = self._row_slots.new_zeros(2 * number)
            self._row_strengths = self._row_strengths.new_zeros(2 * number)
        if entries != self._written[:number]:
            self._row_slots[:number] = torch.tensor([slot for slot, _ in entries])
            self._row_strengths[:number] = torch.tensor([strength for _, strength in entries])
            self._written = entries
        return self._row_slots[:number].view(len(rows), -1), self._row_strengths[:number].view(len(rows), -1)

    def _free_slot(self, used: Collection[Adapter]) -> int:
        idle = [adapter for adapter in self._slots if adapter not in used]
        if len(self._slots) == self._capacity:
            if idle and self._capacity >= MAX_IDLE_SLOTS:
                return self._slots.pop(idle[0])
            self._capacity *= 2
        return min(set(range(1, self._capacity + 1)) - set(self._slots.values()))

    def _write(self, adapter: Adapter, slot: int) -> None:
        factors, slots = adapter.factors[self._component], 1 + self._capacity
        for path, one in factors.items():
            if path in self._layers and path not in self._stacks:
                layer, lora = self._layers[path]
                lora.stacks[self._rank] = self._stacks[path] = FactorStack(path, layer, one, self._rank, slots)
        for path, stack in self._stacks.items():
            stack.grow(slots)
            stack.write(slot, factors.get(path))
