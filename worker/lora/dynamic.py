"""Dynamic LoRA: adapters that are applied beside the weights of a component, for each row of a forward its own.

While adapters are loaded, the component's layers are adapted ones. Before a forward, the factors that its rows have are
written into memory that the layers read, unless they are there already. So a change of adapters changes numbers alone,
and compiled or captured code of the layers stays valid: only a layer, a rank or a number of rows or adapters that was
not there before takes other memory.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from ..forward.adapters import CannotMix
from .adapter import Adapter
from .bank import ActiveAdapters, FactorBank
from .gathered import entry_nbytes
from .layers import LayerLora, adaptable_layers, swap_in, swap_out
from .rows import ActiveRows, Kind, PerRow, Uniform

RANKS = (4, 8, 16, 32, 64, 128, 256)
"""The sizes that ranks are padded to; larger ones to multiples of the last.

There is a bank for each size, so that what an adapter computes does not depend on which others are there.
"""

AdapterRows = Sequence[tuple[int, ActiveAdapters]]
"""Each so many rows have these."""


class DynamicLora:
    """Applies adapters to the component ``name``."""

    def __init__(self, name: str, component: nn.Module) -> None:
        self._name = name
        self._component = component
        self._rows = ActiveRows()
        self._layers: dict[str, tuple[nn.Module, LayerLora]] = {}  # all that can be adapted, while they are
        self._banks: dict[Kind, FactorBank] = {}
        self._entered: tuple[AdapterRows, bool] = ((), False)
        self._loaded: frozenset[Adapter] = frozenset()
        self._unloaded_used = False

    @property
    def per_row_nbytes(self) -> int:
        """Bytes of factors that are gathered for each row."""
        return sum(bank.nbytes for (_, per_row), bank in self._banks.items() if per_row)

    @property
    def memory(self) -> Hashable:
        """The memory that the layers read factors from, and their shapes; forwards with equal ones differ in values."""
        return tuple((rows.form, self._banks[rows.kind].memory) for rows in self._rows.now)

    def uniform_nbytes(self, adapters: Collection[Adapter]) -> int:
        """Bytes of the factors that are gathered if all rows have all of ``adapters``."""
        total = 0
        for rank, ones in self._by_rank(adapters).items():
            layers = {path: factors for adapter in ones for path, factors in adapter.factors[self._name].items()}
            modules = ((self._component.get_submodule(path), factors) for path, factors in layers.items())
            total += len(ones) * sum(entry_nbytes(module, factors, rank) for module, factors in modules)
        return total

    def retain(self, loaded: Collection[Adapter]) -> None:
        """These adapters are loaded, and no others. Without any, the component is as its class makes it."""
        self._loaded = frozenset(adapter for adapter in loaded if adapter.factors.get(self._name))
        if self._loaded:
            self._swap_in()
            self._trim()
        else:
            self._swap_out()

    def forget(self) -> None:
        """Free the memory of gathered factors; the next forward writes what it needs."""
        self._banks.clear()
        for _, lora in self._layers.values():
            lora.gathered.clear()

    @contextmanager
    def applied(self, rows: AdapterRows, *, listed: bool = False, max_bytes: int | None = None) -> Iterator[None]:
        """Around a forward of the component, whose rows have these adapters. Raises ``CannotMix``, also in it.

        ``listed`` says that a row is an element of a list, and not of a tensor's first dimension. Factors that are
        gathered for each row may have ``max_bytes``.
        """
        if not self._entered[0] and not any(active for _, active in rows):  # the layers have none, and keep none
            yield
            return
        touching = [(count, self._touching(active)) for count, active in rows]
        # a request may have begun before its adapter was unloaded
        for_now = not self._layers and any(active for _, active in touching)
        if for_now:
            self._swap_in()
        before, self._entered = self._entered, (touching, listed)
        try:
            self._activate(*self._entered, max_bytes)
            yield
        finally:
            self._entered = before
            self._activate(*before)
            if for_now:
                self._swap_out()
            elif self._unloaded_used and not before[0]:
                self._trim()

    def _touching(self, active: ActiveAdapters) -> ActiveAdapters:
        """The adapters with layers there, sorted: a request may name the same ones in any order."""
        touching = ((adapter, strength) for adapter, strength in active if strength and adapter.factors.get(self._name))
        return tuple(sorted(touching, key=lambda one: one[0].number))

    @torch.inference_mode(mode=False)  # a request may use that mode, and the tensors must stay writable outside it
    def _activate(self, rows: AdapterRows, listed: bool, max_bytes: int | None = None) -> None:
        per_row = any(active != rows[0][1] for _, active in rows)
        own = [active for count, active in rows for _ in range(count)] if per_row else [rows[0][1]] if rows else []
        used = frozenset(adapter for active in own for adapter, _ in active)
        self._unloaded_used |= not used <= self._loaded
        kinds = {
            (rank, per_row): [tuple(one for one in active if one[0] in ones) for active in own]
            for rank, ones in sorted(self._by_rank(used).items())
        }
        if per_row and max_bytes is not None:
            self._check_size(kinds, max_bytes)
        for kind, of_rank in kinds.items():
            self._bank(kind).write(of_rank)
        self._rows.now = tuple(PerRow(kind, len(own), listed) if per_row else Uniform(kind) for kind in kinds)

    def _check_size(self, kinds: Mapping[Kind, Sequence[ActiveAdapters]], max_bytes: int) -> None:
        needed = sum(self._bank(kind).needed(rows) for kind, rows in kinds.items())
        needed += sum(bank.nbytes for kind, bank in self._banks.items() if kind[1] and kind not in kinds)
        if needed > max_bytes:
            raise CannotMix(
                f"the factors of their rows need {needed / 1e6:.1f} MB, and the loaded adapters leave "
                f"{max(0, max_bytes) / 1e6:.1f} MB of --max-lora-mb"
            )

    def _by_rank(self, adapters: Iterable[Adapter]) -> dict[int, list[Adapter]]:
        """The adapters with layers in the component, by their padded rank."""
        found: dict[int, list[Adapter]] = {}
        for adapter in adapters:
            if adapter.factors.get(self._name):
                found.setdefault(padded(adapter.rank(self._name)), []).append(adapter)
        return found

    def _bank(self, kind: Kind) -> FactorBank:
        if kind not in self._banks:
            self._banks[kind] = FactorBank(self._name, self._layers, kind)
        return self._banks[kind]

    def _trim(self) -> None:
        """Free the memory that the loaded adapters cannot need."""
        self._unloaded_used = False
        by_rank = self._by_rank(self._loaded)
        for kind, bank in list(self._banks.items()):
            adapters = by_rank.get(kind[0], [])
            is_too_large = not kind[1] and bank.capacity > len(adapters)
            bank.retain([] if is_too_large else adapters)
            if is_too_large or not adapters:
                del self._banks[kind]

    def _swap_in(self) -> None:
        if self._layers:
            return
        loras: dict[nn.Module, LayerLora] = {}  # a layer may have several names
        for path, layer in adaptable_layers(self._component):
            lora = loras.setdefault(layer, LayerLora(self._rows))
            lora.paths.append(path)
            self._layers[path] = layer, lora
        for layer, lora in loras.items():
            swap_in(layer, lora)

    def _swap_out(self) -> None:
        for layer, _ in self._layers.values():
            swap_out(layer)
        self._layers.clear()
        self._banks.clear()
        self._unloaded_used = False


def padded(rank: int) -> int:
    return next((size for size in RANKS if size >= rank), -(-rank // RANKS[-1]) * RANKS[-1])
