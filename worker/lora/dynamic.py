"""Adapters beside the weights: every layer's output with each row's own low-rank term.

Layers are watched from the load on, so that an adapter changes no module. What a forward is to add is said around it,
in :meth:`Beside.during`: the same adapters for all rows, or others for each. Then the factors of those that are used
lie in one stack for each layer, of ranks padded to one of a few sizes, and each row gathers its own: two products for
all rows, whatever they use.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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

_REMEMBERED = 16
"""Combinations of adapters whose factors are kept side by side."""

_MOST_JOINED = 1 << 30
"""Bytes of factors side by side, of several combinations."""

_STACKED = 16
"""Adapters in a stack, unless a forward uses more."""

_ARRANGEMENTS = 4
"""Choices of rows that are kept: the same requests meet at every step."""

_MOST_GATHERED = 256 << 20
"""Bytes of factors, gathered for the rows of one choice, that are kept for the next step."""

_Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d


class CannotMix(Exception):
    """A layer's input is not in rows, so that rows cannot have different adapters in it."""


class Beside:
    """Adds terms to the layers that it watches, while a forward is :meth:`during`."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._now: _SameForAll | _RowByRow | None = None
        self._joined: OrderedDict[tuple[str, tuple[Adapter, ...]], _Joined] = OrderedDict()
        self._stacks: dict[str, _Stacks] = {}
        self._arranged: OrderedDict[tuple[str, bool, tuple[tuple[int, Uses], ...]], _RowByRow] = OrderedDict()

    def watch(self, module: nn.Module) -> None:
        """Watch every layer of a component that a term can be computed beside, under each of its names."""
        for path, layer in module.named_modules(remove_duplicate=False):
            if type(layer) in BESIDE:
                # before a hook that divides the output among ranks
                layer.register_forward_hook(self._hook(path), prepend=True, with_kwargs=True)

    def forget(self) -> None:
        """Let go of what was made of adapters' factors; what is used is made again."""
        self._joined.clear()
        self._stacks.clear()
        self._arranged.clear()

    @contextmanager
    def during(self, component: str, rows: Sequence[tuple[int, Uses]], *, listed: bool = False) -> Iterator[None]:
        """Of the forward that is made in this context, each so many rows use these. Raises ``CannotMix`` in it.

        ``listed`` says that a row is an element of a list, and not of a tensor's first dimension.
        """
        before, self._now = self._now, self._prepared(component, rows, listed=listed)
        try:
            yield
        finally:
            self._now = before

    def _prepared(
        self, component: str, rows: Sequence[tuple[int, Uses]], *, listed: bool
    ) -> _SameForAll | _RowByRow | None:
        touching = [(count, _touching(component, uses)) for count, uses in rows]
        first = touching[0][1]
        if any(uses != first for _, uses in touching):
            return self._row_by_row(component, tuple(touching), listed=listed)
        if not first:
            return None
        joined = self._side_by_side(component, tuple(adapter for adapter, _ in first))
        return _SameForAll(joined, [strength for _, strength in first], self._ranks)

    def _row_by_row(self, component: str, rows: tuple[tuple[int, Uses], ...], *, listed: bool) -> _RowByRow:
        key = (component, listed, rows)
        if key not in self._arranged:
            used = {adapter for _, uses in rows for adapter, _ in uses}
            self._arranged[key] = _RowByRow(self._stack(component, used), rows, self._ranks, listed=listed)
        self._arranged.move_to_end(key)
        while len(self._arranged) > _ARRANGEMENTS:
            self._arranged.popitem(last=False)
        return self._arranged[key]

    def _side_by_side(self, component: str, adapters: tuple[Adapter, ...]) -> _Joined:
        key = (component, adapters)
        if key not in self._joined:
            self._joined[key] = _Joined([adapter.terms[component] for adapter in adapters])
        self._joined.move_to_end(key)
        while len(self._joined) > _REMEMBERED or (
            len(self._joined) > 1 and sum(joined.nbytes for joined in self._joined.values()) > _MOST_JOINED
        ):
            self._joined.popitem(last=False)
        return self._joined[key]

    def _stack(self, component: str, used: set[Adapter]) -> _Stacks:
        """The factors of ``used``, and of some that were used before: all are padded to the largest rank of them."""
        found = self._stacks.get(component)
        if found is None or not used <= set(found.adapters):
            largest = max(_rank(component, adapter) for adapter in used)
            before = [] if found is None else found.adapters
            kept = [one for one in before if one not in used and _rank(component, one) <= largest]
            room = max(0, _STACKED - len(used))
            every = [*kept[max(0, len(kept) - room) :], *sorted(used, key=lambda adapter: adapter.number)]
            found = _Stacks(component, every)
            self._stacks[component] = found
        return found

    def _hook(self, path: str) -> Callable[[nn.Module, Any, Any, torch.Tensor], None]:
        def add(layer: nn.Module, args: Any, kwargs: Any, output: torch.Tensor) -> None:
            if self._now is not None:
                self._now.add(path, layer, args[0] if args else kwargs["input"], output)

        return add


def _touching(component: str, uses: Uses) -> Uses:
    """Those with layers there, in an order of their own: the same adapters are the same, however they were named."""
    touching = ((adapter, strength) for adapter, strength in uses if component in adapter.terms and strength)
    return tuple(sorted(touching, key=lambda use: use[0].number))


def _rank(component: str, adapter: Adapter) -> int:
    return _padded(max(term.rank for term in adapter.terms[component].values()))


class _Joined:
    """Several adapters' factors of each layer, one behind the other, as of one with a larger rank."""

    def __init__(self, terms: Sequence[Mapping[str, Term]]) -> None:
        self._terms = terms
        self._layers: dict[tuple[str, torch.dtype], tuple[torch.Tensor, torch.Tensor, tuple[int, ...]] | None] = {}

    @property
    def nbytes(self) -> int:
        return sum(made[0].nbytes + made[1].nbytes for made in self._layers.values() if made is not None)

    def layer(self, path: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, tuple[int, ...]] | None:
        """``down`` [ranks, in, …], ``up`` [out, ranks, …], and each adapter's rank, 0 for one without the layer."""
        key = (path, dtype)
        if key not in self._layers:
            found = [each.get(path) for each in self._terms]
            there = [term for term in found if term is not None]
            self._layers[key] = (
                (
                    torch.cat([term.down for term in there]).to(dtype),
                    torch.cat([term.whole_up for term in there], dim=1).to(dtype),
                    tuple(0 if term is None else term.rank for term in found),
                )
                if there
                else None
            )
        return self._layers[key]


class _SameForAll:
    """The same adapters for every row."""

    def __init__(self, joined: _Joined, strengths: list[float], ranks: Ranks) -> None:
        self._joined = joined
        self._strengths = strengths
        self._ranks = ranks

    def add(self, path: str, layer: nn.Module, input: torch.Tensor, output: torch.Tensor) -> None:
        if (found := self._joined.layer(path, input.dtype)) is None:
            return
        down, up, sizes = found
        if isinstance(layer, _Convolution):
            low = self._strengthened(layer._conv_forward(input, down, None), sizes, dim=1)
            output.add_(torch.einsum("or,br...->bo...", up.flatten(1), low))
            return
        low = functional.linear(input, down)
        if isinstance(layer, RowParallelLinear):
            low = self._ranks.sum(low)
        low = self._strengthened(low, sizes, dim=-1)
        if output.is_contiguous():
            output.view(-1, output.shape[-1]).addmm_(low.view(-1, low.shape[-1]), up.t())
        else:
            output.add_(functional.linear(low, up))

    def _strengthened(self, low: torch.Tensor, sizes: tuple[int, ...], dim: int) -> torch.Tensor:
        """Each adapter's part of ``low`` by its strength, in place."""
        for part, strength in zip(torch.split(low, list(sizes), dim), self._strengths, strict=True):
            if strength != 1 and part.numel():
                part.mul_(strength)
        return low


class _Stacks:
    """The factors of every adapter, layer by layer, the first of them zeros."""

    def __init__(self, component: str, adapters: list[Adapter]) -> None:
        self.adapters = adapters
        self._component = component
        self._places = {adapter: place for place, adapter in enumerate(adapters, start=1)}
        self._layers: dict[tuple[str, torch.dtype], tuple[torch.Tensor, torch.Tensor] | None] = {}

    @property
    def device(self) -> torch.device:
        return next(iter(self.adapters[0].terms[self._component].values())).down.device

    def place(self, adapter: Adapter) -> int:
        return self._places[adapter]

    def layer(self, path: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor] | None:
        """``down`` [places, rank, in] and ``up`` [places, out, rank]; ``None`` for a layer that no adapter has."""
        key = (path, dtype)
        if key not in self._layers:
            terms = [adapter.terms[self._component].get(path) for adapter in self.adapters]
            self._layers[key] = _stacked(terms, dtype) if any(terms) else None
        return self._layers[key]


def _stacked(terms: Sequence[Term | None], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    there = [term for term in terms if term is not None]
    first, number = there[0], 1 + len(terms)
    rank = _padded(max(term.rank for term in there))
    down = first.down.new_zeros((number, rank, *first.down.shape[1:]), dtype=dtype)
    up = first.whole_up.new_zeros((number, first.whole_up.shape[0], rank), dtype=dtype)
    for place, term in enumerate(terms, start=1):
        if term is not None:
            down[place, : term.rank] = term.down
            up[place, :, : term.rank] = term.whole_up.flatten(1)
    return down, up


def _padded(rank: int) -> int:
    return next((size for size in RANKS if size >= rank), -(-rank // RANKS[-1]) * RANKS[-1])


class _RowByRow:
    """Different adapters for different rows."""

    def __init__(self, stacks: _Stacks, rows: Sequence[tuple[int, Uses]], ranks: Ranks, *, listed: bool) -> None:
        self._stacks = stacks
        self._ranks = ranks
        self._listed = listed
        most = max(len(uses) for _, uses in rows)
        places, strengths = [], []
        for count, uses in rows:
            missing = most - len(uses)
            places += [[*(stacks.place(adapter) for adapter, _ in uses), *[0] * missing]] * count
            strengths += [[*(strength for _, strength in uses), *[0.0] * missing]] * count
        self._rows = len(places)
        self._places = torch.tensor(places, device=stacks.device)
        self._strengths = torch.tensor(strengths, device=stacks.device)[:, :, None, None]  # [rows, most, 1, 1]
        self._kept: dict[tuple[str, torch.dtype], tuple[torch.Tensor, torch.Tensor]] = {}
        self._bytes = 0

    def add(self, path: str, layer: nn.Module, input: torch.Tensor, output: torch.Tensor) -> None:
        if (found := self._stacks.layer(path, input.dtype)) is None:
            return
        self._check(path, layer, input)
        down, up = self._gathered(path, found)
        low = torch.bmm(input.reshape(self._rows, -1, input.shape[-1]), down)
        if isinstance(layer, RowParallelLinear):
            low = self._ranks.sum(low)
        if output.is_contiguous():
            output.view(self._rows, -1, output.shape[-1]).baddbmm_(low, up)
        else:
            output.add_(torch.bmm(low, up).view(output.shape))

    def _gathered(self, path: str, stacks: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Each row's factors, those of several adapters side by side: [rows, in, ranks] and [rows, ranks, out]."""
        key = (path, stacks[0].dtype)
        if key in self._kept:
            return self._kept[key]
        down, up = stacks
        gathered = (
            down[self._places].flatten(1, 2).mT,
            (up[self._places] * self._strengths).to(up.dtype).transpose(1, 2).flatten(2).mT,
        )
        size = sum(factor.nbytes for factor in gathered)
        if self._bytes + size <= _MOST_GATHERED:
            self._bytes += size
            self._kept[key] = gathered
        return gathered

    def _check(self, path: str, layer: nn.Module, input: torch.Tensor) -> None:
        """Raises ``CannotMix`` unless the input has the rows in their order, each as often as any other."""
        if isinstance(layer, _Convolution):
            raise CannotMix(f"{path} is a convolution")
        whole = input.ndim >= 3 and not self._listed and input.shape[0] % self._rows == 0
        if input.shape[0] != self._rows and not whole:
            raise CannotMix(f"{path} has an input of shape {tuple(input.shape)} for {self._rows} rows")
