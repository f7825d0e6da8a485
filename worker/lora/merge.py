"""Adapters in the weights themselves: summed in fp32 and rounded once, and taken out without a trace.

A tensor that an adapter is merged into keeps what it was in its layout's ``bases``; from that every other sum is made,
and it is what comes back in the end. So nothing is ever subtracted, and whatever speaks of weights speaks of the base.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch

from ..weights.checkpoint.layout import Layout
from ..weights.update.page_swap import ALIGNMENT, aligned_like
from .adapter import Term
from .change import Change

Terms = Sequence[tuple[Term | Change, float]]
"""What is added to a tensor, with strengths."""

Sum = Mapping[str, Terms]
"""Of each tensor, by its name in the checkpoint."""


@torch.no_grad()
def merge(layout: Layout, wanted: Sum, names: Iterable[str] | None = None) -> None:
    """Have the module's tensors be their bases with ``wanted`` added; all, or only ``names``.

    When it raises, a call with what was wanted before puts back every byte.
    """
    for name in sorted({*layout.bases, *wanted}) if names is None else names:
        live, terms = layout.live(name), wanted.get(name, ())
        if terms and name not in layout.bases:
            layout.bases[name] = _copied(live)
        base = layout.bases.get(name)
        if base is None:
            continue
        live.copy_(_summed(base.to(live.device), terms) if terms else base)
        if not terms:
            del layout.bases[name]


@torch.no_grad()
def rounded_away(layout: Layout, wanted: Sum) -> tuple[float, float]:
    """The squares of what a merge would lose by rounding, and of what it would add, summed over this rank's part."""
    lost = added = 0.0
    for name, terms in wanted.items():
        base = layout.local(name).to(layout.live(name).device, torch.float32)
        merged = _summed(base, terms)
        change = merged - base
        lost += float((merged.to(layout.dtype(name)).float() - merged).square().sum(dtype=torch.float64))
        added += float(change.square().sum(dtype=torch.float64))
    return lost, added


def _copied(live: torch.Tensor) -> torch.Tensor:
    """On the host; on a CPU where the exchange of an update finds it."""
    if live.device.type != "cpu":
        return live.cpu()
    return aligned_like(live, live.data_ptr() % ALIGNMENT).copy_(live)


def _summed(base: torch.Tensor, terms: Terms) -> torch.Tensor:
    total = base.float()
    whole = total
    for term, strength in terms:
        total = total + term.added(whole, strength).to(total.device)
    return total
