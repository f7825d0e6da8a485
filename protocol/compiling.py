"""Compiled components: their state and counts, as ``/server_info`` and ``/metrics`` report them."""

from __future__ import annotations

from typing import Literal

import msgspec

State = Literal["waiting", "compiled", "eager"]


class CompiledComponentStats(msgspec.Struct, frozen=True, kw_only=True):
    """``waiting``: nothing was compiled yet. ``eager``: the component runs eagerly for good, for ``reason``.

    ``graphs`` are counted by class of blocks. ``calls`` are those of blocks; for ``eager_calls`` among them there was
    no graph. ``kinds`` of calls have a graph that was admitted. For ``kinds_over_limit`` there can be none, because
    their class of blocks has as many graphs as it may.
    """

    state: State
    reason: str | None = None
    graphs: dict[str, int] = {}
    kinds: int = 0
    kinds_over_limit: int = 0
    compile_s: float = 0.0
    calls: int = 0
    eager_calls: int = 0
