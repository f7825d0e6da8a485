"""Ranks that share layers agree on what was compiled: all run a graph from the same forward on, or none does."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import chain

import msgspec

from ..parallel.ranks import Ranks


class Verdict(msgspec.Struct, frozen=True, array_like=True):
    """How a job has ended. ``component`` is refused for ``reason``; without one, a later call tries again."""

    admitted: bool = False
    reason: str | None = None
    component: str = ""


AGAIN = Verdict()

Verdicts = Mapping[str, Verdict | None]
"""Verdicts by the names of jobs; ``None`` for a job that has not ended."""

_VERDICTS = msgspec.msgpack.Decoder(dict[str, Verdict | None])

Agree = Callable[[Verdicts], Verdicts]
"""Returns the jobs of all ranks with their common verdicts. A collective."""


def agreement(axes: Sequence[Ranks]) -> Agree | None:
    """The agreement along all ``axes`` of the mesh; ``None`` if there is no other rank."""
    shared = [ranks for ranks in axes if ranks.size > 1]
    return (lambda own: _agreed(own, shared)) if shared else None


def _agreed(own: Verdicts, axes: Sequence[Ranks]) -> Verdicts:
    for ranks in axes:
        everywhere = [_VERDICTS.decode(verdicts) for verdicts in ranks.all_gather_bytes(msgspec.msgpack.encode(own))]
        names = dict.fromkeys(chain.from_iterable(everywhere))
        own = {name: _common([verdicts.get(name, AGAIN) for verdicts in everywhere]) for name in names}
    return own


def _common(verdicts: Sequence[Verdict | None]) -> Verdict | None:
    """The verdict that is furthest from admitting. A rank without the job has not met this kind of call."""
    if None in verdicts:
        return None
    refused = (verdict for verdict in verdicts if verdict is not None and verdict.reason is not None)
    return next(refused, AGAIN if AGAIN in verdicts else verdicts[0])
