"""Merges adapters into the weights: summed in fp32 and rounded once, and removed without a trace.

The base of a tensor that adapters are merged into is kept in its layout's ``bases``. Every sum starts from it, and it
is restored in the end, so nothing is ever subtracted. All other code that speaks of weights means the base.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch

from ...protocol.errors import Conflict
from ..weights.checkpoint.layout import Layout
from ..weights.update.page_swap import ALIGNMENT, aligned_like
from .adapter import Adapter
from .change import Change
from .factors import LoraFactors

Delta = Sequence[tuple[LoraFactors | Change, float]]
"""The changes of a tensor, with strengths."""

Deltas = Mapping[str, Delta]
"""The changes of each tensor, by its name in the checkpoint."""


def deltas(component: str, adapters: Iterable[tuple[Adapter, float]]) -> Deltas:
    """The changes of each tensor of ``component``, in the order of the adapters."""
    found: dict[str, list[tuple[LoraFactors | Change, float]]] = {}
    for adapter, strength in adapters:
        factors = adapter.factors.get(component, {}).values()
        for one in (*factors, *adapter.changes.get(component, ())):
            found.setdefault(one.weight, []).append((one, strength))
    return found


@torch.no_grad()
def merge(layout: Layout, wanted: Deltas, names: Iterable[str] | None = None) -> None:
    """Have the module's tensors be their bases with ``wanted`` added; all, or only ``names``.

    When it raises, a call with what was wanted before puts back every byte.
    """
    for name in sorted({*layout.bases, *wanted}) if names is None else names:
        live, delta = layout.live(name), wanted.get(name, ())
        if delta and name not in layout.bases:
            layout.bases[name] = _copied(live)
        base = layout.bases.get(name)
        if base is None:
            continue
        live.copy_(_summed(base.to(live.device), delta) if delta else base)
        if not delta:
            del layout.bases[name]


def check_bases(layouts: Mapping[str, Layout], wanted: Mapping[str, Deltas], limit: float) -> None:
    """Raises ``Conflict`` where the bases of merges, by component, need more than ``limit`` bytes of this rank."""
    needed = sum(layouts[component].live(name).nbytes for component, deltas in wanted.items() for name in deltas)
    if needed > limit:
        raise Conflict(
            f"Merging keeps {-(-needed // 1_000_000)} MB of weights without the adapters on each rank, and "
            f"{limit // 1_000_000:.0f} MB are allowed. Apply the adapters dynamically (merge_mode = dynamic), or start "
            "the server with a larger --max-merged-mb.",
            field="merge_mode",
        )


@torch.no_grad()
def rounded_away(layout: Layout, wanted: Deltas) -> tuple[float, float]:
    """The squares of a merge's loss by rounding, and of the change that it would add, summed over this rank's part."""
    lost = added = 0.0
    for name, delta in wanted.items():
        base = layout.local(name).to(layout.live(name).device, torch.float32)
        merged = _summed(base, delta)
        change = merged - base
        lost += float((merged.to(layout.dtype(name)).float() - merged).square().sum(dtype=torch.float64))
        added += float(change.square().sum(dtype=torch.float64))
    return lost, added


def _copied(live: torch.Tensor) -> torch.Tensor:
    """On the host; on a CPU where the exchange of an update finds it."""
    if live.device.type != "cpu":
        return live.cpu()
    return aligned_like(live, live.data_ptr() % ALIGNMENT).copy_(live)


def _summed(base: torch.Tensor, delta: Delta) -> torch.Tensor:
    total = base.float()
    whole = total
    for one, strength in delta:
        total = total + one.added(whole, strength).to(total.device)
    return total
