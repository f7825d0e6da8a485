"""Dynamic LoRA: adapters that are computed beside the weights of a component, for each row of a forward its own.

While adapters are loaded, the component's layers are adapted ones. Before a forward, the adapters of its rows are given
slots in stacks of factors, and the rows' slots and strengths are written into tensors that keep their memory. So a
change of adapters changes numbers alone, and whatever was compiled or captured of the layers stays valid: only a layer,
a rank, or a number of adapters that was not there before takes other memory.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from .adapter import Adapter
from .bank import ActiveAdapters, FactorBank
from .layers import LayerLora, adaptable_layers, swap_in, swap_out
from .rows import ActiveRows, Rows

RANKS = (4, 8, 16, 32, 64, 128, 256)
"""The sizes that ranks are padded to; larger ones to multiples of the last.

There is a bank for each size, so that what an adapter computes does not depend on which others are there.
"""

AdapterRows = Sequence[tuple[int, ActiveAdapters]]
"""Each so many rows have these."""


class DynamicLora:
    """Of the component ``name``; ``device`` is where its adapters are."""

    def __init__(self, name: str, component: nn.Module, device: torch.device) -> None:
        self._name = name
        self._component = component
        self._device = device
        self._rows = ActiveRows()
        self._layers: dict[str, tuple[nn.Module, LayerLora]] = {}  # all that can be adapted, while they are
        self._banks: dict[int, FactorBank] = {}
        self._entered: tuple[AdapterRows, bool] = ((), False)

    def retain(self, loaded: Collection[Adapter]) -> None:
        """These adapters are loaded, and no others. Without any, the component is as its class makes it."""
        own = [adapter for adapter in loaded if adapter.factors.get(self._name)]
        if own:
            self._swap_in()
            for bank in self._banks.values():
                bank.retain(own)
        else:
            self._swap_out()

    def forget(self) -> None:
        """Give the stacks' memory back; what is used is written anew."""
        self._banks.clear()
        for _, lora in self._layers.values():
            lora.stacks.clear()

    @contextmanager
    def applied(self, rows: AdapterRows, *, listed: bool = False) -> Iterator[None]:
        """Around a forward of the component, whose rows have these adapters. Raises ``CannotMix`` in it.

        ``listed`` says that a row is an element of a list, and not of a tensor's first dimension.
        """
        touching = [(count, self._touching(active)) for count, active in rows]
        # a request may have begun before its adapter was unloaded
        for_now = not self._layers and any(active for _, active in touching)
        if for_now:
            self._swap_in()
        before, self._entered = self._entered, (touching, listed)
        try:
            self._activate(*self._entered)
            yield
        finally:
            self._entered = before
            self._activate(*before)
            if for_now:
                self._swap_out()

    def _touching(self, active: ActiveAdapters) -> ActiveAdapters:
        """Those with layers there, in an order of their own: the same adapters are the same, however they are named."""
        touching = ((adapter, strength) for adapter, strength in active if strength and adapter.factors.get(self._name))
        return tuple(sorted(touching, key=lambda one: one[0].number))

    @torch.inference_mode(mode=False)  # a request may use that mode, and the tensors must stay writable outside it
    def _activate(self, rows: AdapterRows, listed: bool) -> None:
        used = dict.fromkeys(adapter for _, active in rows for adapter, _ in active)
        ranks = {adapter: self._rank(adapter) for adapter in used}
        uniform, active_rows = all(active == rows[0][1] for _, active in rows), list[Rows]()
        for rank in sorted(set(ranks.values())):
            bank = self._bank(rank)
            bank.place([adapter for adapter in used if ranks[adapter] == rank])
            own = [
                tuple(one for one in active if ranks[one[0]] == rank) for count, active in rows for _ in range(count)
            ]
            active_rows.append(bank.uniform(own[0]) if uniform else bank.per_row(own, listed=listed))
        self._rows.now = tuple(active_rows)

    def _rank(self, adapter: Adapter) -> int:
        """That of the adapter's bank."""
        found = next((rank for rank, bank in self._banks.items() if adapter in bank), None)
        return _padded(max(one.rank for one in adapter.factors[self._name].values())) if found is None else found

    def _bank(self, rank: int) -> FactorBank:
        if rank not in self._banks:
            self._banks[rank] = FactorBank(self._name, self._layers, rank, self._device)
        return self._banks[rank]

    def _swap_in(self) -> None:
        if self._layers:
            return
        loras: dict[nn.Module, LayerLora] = {}  # a layer may have several names
        for path, layer in adaptable_layers(self._component):
            self._layers[path] = layer, loras.setdefault(layer, LayerLora(self._rows))
        for layer, lora in loras.items():
            swap_in(layer, lora)

    def _swap_out(self) -> None:
        for layer, _ in self._layers.values():
            swap_out(layer)
        self._layers.clear()
        self._banks.clear()


def _padded(rank: int) -> int:
    return next((size for size in RANKS if size >= rank), -(-rank // RANKS[-1]) * RANKS[-1])
