"""Ranks that share layers agree on what was compiled: all run a graph from the same forward on, or none does."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import chain

import msgspec

from ..parallel.ranks import Ranks


class Decision(msgspec.Struct, frozen=True, array_like=True):
    """How a job has ended. ``component`` is refused for ``reason``; without one, a later call tries again."""

    admitted: bool = False
    reason: str | None = None
    component: str = ""


AGAIN = Decision()

Decisions = Mapping[str, Decision | None]
"""Decisions by the names of jobs; ``None`` for a job that has not ended."""

_DECISIONS = msgspec.msgpack.Decoder(dict[str, Decision | None])

Agree = Callable[[Decisions], Decisions]
"""Returns the jobs of all ranks with their common decisions. A collective."""


def agreement(axes: Sequence[Ranks]) -> Agree | None:
    """The agreement along all ``axes`` of the mesh; ``None`` if there is no other rank."""
    shared = [ranks for ranks in axes if ranks.size > 1]
    return (lambda own: _agreed(own, shared)) if shared else None


def _agreed(own: Decisions, axes: Sequence[Ranks]) -> Decisions:
    for ranks in axes:
        everywhere = [_DECISIONS.decode(decisions) for decisions in ranks.all_gather_bytes(msgspec.msgpack.encode(own))]
        names = dict.fromkeys(chain.from_iterable(everywhere))
        own = {name: _common([decisions.get(name, AGAIN) for decisions in everywhere]) for name in names}
    return own


def _common(decisions: Sequence[Decision | None]) -> Decision | None:
    """The decision that is furthest from admitting. A rank without the job has not met this kind of call."""
    if None in decisions:
        return None
    refused = (decision for decision in decisions if decision is not None and decision.reason is not None)
    return next(refused, AGAIN if AGAIN in decisions else decisions[0])
