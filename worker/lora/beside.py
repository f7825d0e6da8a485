"""Adapters beside the weights: every layer's output with each row's own low-rank term.

Layers are watched from the load on, so that an adapter changes no module. What a forward is to add is said around it,
in :meth:`Beside.during`: the same adapters for all rows, or others for each. Then every loaded adapter's factors of a
layer lie in one stack, of ranks padded to one of a few sizes, and each row gathers its own: two products for all rows,
whatever they use.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from ..parallel.layers import RowParallelLinear
from ..parallel.ranks import Ranks
from .adapter import BESIDE, Adapter, Term

Uses = tuple[tuple[Adapter, float], ...]
"""Adapters with their strengths, that are used together."""

RANKS = (4, 8, 16, 32, 64, 128, 256)
"""The sizes that ranks are padded to in stacks; larger ones to multiples of the last."""

_REMEMBERED = 64


class CannotMix(Exception):
    """A layer's input is not in rows, so that rows cannot have different adapters in it."""


class Beside:
    """Adds terms to the layers that it watches, while a forward is :meth:`during`."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._now: _Alike | _Mixed | None = None
        self._alike: OrderedDict[tuple[str, Uses], _Alike] = OrderedDict()
        self._loaded: list[Adapter] = []
        self._stacks: dict[str, _Stacks] = {}

    def watch(self, component: str, module: nn.Module) -> None:
        for path, layer in module.named_modules():
            if type(layer) in BESIDE:
                layer.register_forward_hook(self._hook(path), prepend=True)  # before one that divides the output

    def set_loaded(self, adapters: Sequence[Adapter]) -> None:
        """These can be used from now on."""
        self._loaded = list(adapters)
        self._alike.clear()
        self._stacks.clear()

    @contextmanager
    def during(self, component: str, rows: Sequence[tuple[int, Uses]], *, listed: bool = False) -> Iterator[None]:
        """Of the forward that is made in this context, each so many rows use these. Raises ``CannotMix`` in it.

        ``listed`` says that a row is an element of a list, and not of a tensor's first dimension.
        """
        self._now = self._prepared(component, rows, listed=listed)
        try:
            yield
        finally:
            self._now = None

    def _prepared(self, component: str, rows: Sequence[tuple[int, Uses]], *, listed: bool) -> _Alike | _Mixed | None:
        touching = [(count, _touching(component, uses)) for count, uses in rows]
        first = touching[0][1]
        if all(uses == first for _, uses in touching):
            return self._of_all(component, first) if first else None
        return _Mixed(
            self._stack(component, {adapter for _, uses in touching for adapter, _ in uses}), touching, listed=listed
        )

    def _stack(self, component: str, used: set[Adapter]) -> _Stacks:
        """The factors of all that are loaded, and of ``used``: requests may still have what is not loaded any more."""
        found = self._stacks.get(component)
        if found is None or not used <= set(found.adapters):
            found = _Stacks(component, list(dict.fromkeys([*self._loaded, *used])), self._ranks)
            self._stacks[component] = found
        return found

    def _of_all(self, component: str, uses: Uses) -> _Alike:
        key = (component, uses)
        if key not in self._alike:
            self._alike[key] = _Alike(component, uses, self._ranks)
        self._alike.move_to_end(key)
        while len(self._alike) > _REMEMBERED:
            self._alike.popitem(last=False)
        return self._alike[key]

    def _hook(self, path: str) -> Callable[[nn.Module, Any, torch.Tensor], None]:
        def add(layer: nn.Module, args: Any, output: torch.Tensor) -> None:
            if self._now is not None:
                self._now.add(path, layer, args[0], output)

        return add


def _touching(component: str, uses: Uses) -> Uses:
    return tuple((adapter, strength) for adapter, strength in uses if component in adapter.terms and strength)


@dataclass(slots=True)
class _Factors:
    """Of one layer: ``down`` [rank, in, …], ``up`` [out, rank, …], ``scale`` [rank]; of a mixed one, stacks of them."""

    down: torch.Tensor
    up: torch.Tensor
    scale: torch.Tensor


@dataclass(slots=True)
class _Alike:
    """The same adapters for every row: their factors one behind the other, as one of a larger rank."""

    component: str
    uses: Uses
    ranks: Ranks
    _layers: dict[str, _Factors | None] = field(default_factory=dict)

    def add(self, path: str, layer: nn.Module, input: torch.Tensor, output: torch.Tensor) -> None:
        if path not in self._layers:
            self._layers[path] = self._joined(path, input.dtype)
        factors = self._layers[path]
        if factors is None:
            return
        if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            _add_convolved(layer, factors, input, output)
            return
        low = functional.linear(input, factors.down)
        if isinstance(layer, RowParallelLinear):
            low = self.ranks.sum(low)
        low = low.mul_(factors.scale)
        try:
            output.view(-1, output.shape[-1]).addmm_(low.view(-1, low.shape[-1]), factors.up.t())
        except RuntimeError:  # no view of these rows
            output.add_(functional.linear(low, factors.up))

    def _joined(self, path: str, dtype: torch.dtype) -> _Factors | None:
        terms = [
            (term, strength) for adapter, strength in self.uses if (term := adapter.terms[self.component].get(path))
        ]
        if not terms:
            return None
        scales = [torch.full((term.rank,), term.scale * strength) for term, strength in terms]
        where = terms[0][0].down.device
        return _Factors(
            torch.cat([term.down for term, _ in terms]).to(dtype),
            torch.cat([term.whole_up for term, _ in terms], dim=1).to(dtype),
            torch.cat(scales).to(where, dtype),
        )


class _Stacks:
    """The factors of every loaded adapter, layer by layer, the first of them zeros."""

    def __init__(self, component: str, adapters: list[Adapter], ranks: Ranks) -> None:
        self.ranks = ranks
        self.adapters = [adapter for adapter in adapters if component in adapter.terms]
        self._component = component
        self._layers: dict[tuple[str, torch.dtype], _Factors | None] = {}

    def place(self, adapter: Adapter) -> int:
        return 1 + self.adapters.index(adapter)

    def layer(self, path: str, dtype: torch.dtype) -> _Factors | None:
        key = (path, dtype)
        if key not in self._layers:
            terms = [adapter.terms[self._component].get(path) for adapter in self.adapters]
            self._layers[key] = _stacked(terms, dtype) if any(terms) else None
        return self._layers[key]


def _stacked(terms: Sequence[Term | None], dtype: torch.dtype) -> _Factors:
    there = [term for term in terms if term is not None]
    first, number = there[0], 1 + len(terms)
    rank = _padded(max(term.rank for term in there))
    down = first.down.new_zeros((number, rank, *first.down.shape[1:]), dtype=dtype)
    up = first.whole_up.new_zeros((number, first.whole_up.shape[0], rank), dtype=dtype)
    scale = first.down.new_zeros(number, dtype=dtype)
    for place, term in enumerate(terms, start=1):
        if term is not None:
            down[place, : term.rank] = term.down
            up[place, :, : term.rank] = term.whole_up.flatten(1)
            scale[place] = term.scale
    return _Factors(down, up, scale)


def _padded(rank: int) -> int:
    return next((size for size in RANKS if size >= rank), -(-rank // RANKS[-1]) * RANKS[-1])


class _Mixed:
    """Different adapters for different rows."""

    def __init__(self, stacks: _Stacks, rows: Sequence[tuple[int, Uses]], *, listed: bool) -> None:
        self._stacks = stacks
        self._listed = listed
        most = max(len(uses) for _, uses in rows)
        places, strengths = [], []
        for count, uses in rows:
            missing = most - len(uses)
            places += [[*(stacks.place(adapter) for adapter, _ in uses), *[0] * missing]] * count
            strengths += [[*(strength for _, strength in uses), *[0.0] * missing]] * count
        self._places = torch.tensor(places)
        self._strengths = torch.tensor(strengths)

    def add(self, path: str, layer: nn.Module, input: torch.Tensor, output: torch.Tensor) -> None:
        factors = self._stacks.layer(path, input.dtype)
        if factors is None:
            return
        rows = len(self._places)
        if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            raise CannotMix(f"{path} is a convolution")
        if input.shape[0] != rows and (self._listed or input.ndim < 2 or input.shape[0] % rows):
            raise CannotMix(f"{path} has an input of shape {tuple(input.shape)} for {rows} rows")
        places = self._places.to(input.device)
        low = torch.bmm(input.reshape(rows, -1, input.shape[-1]), factors.down[places].flatten(1, 2).mT)
        if isinstance(layer, RowParallelLinear):
            low = self._stacks.ranks.sum(low)
        scale = factors.scale[places] * self._strengths.to(input.device, input.dtype)
        low = low.mul_(scale.repeat_interleave(factors.down.shape[1], dim=1)[:, None])
        up = factors.up[places].transpose(1, 2).flatten(2)
        output.add_(torch.bmm(low, up.mT).view_as(output))


def _add_convolved(layer: nn.Module, factors: _Factors, input: torch.Tensor, output: torch.Tensor) -> None:
    """The first factor is a convolution like the layer's, and the second one of single positions."""
    assert isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    low = layer._conv_forward(input, factors.down, None)
    low = low.mul_(factors.scale.view(-1, *[1] * (low.ndim - 2)))
    output.add_(torch.einsum("or,br...->bo...", factors.up.flatten(1), low))
