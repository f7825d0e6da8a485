"""Decides a :class:`SetAdapters`: which adapters are loaded, where they are active, and whether they are merged.

Each rank reads and measures its part; then the ranks exchange errors and measurements, and choose alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from ...protocol.adapters import AdapterState, Loaded, Mode, SetAdapters
from ...protocol.errors import InvalidRequest, Unavailable
from ..parallel.ranks import Ranks
from . import planning
from .adapter import Adapter
from .merge import deltas, rounded_away
from .reader import AdapterReader

MOST_ROUNDED_AWAY = 0.1
"""The share of an adapter's change, in the norm, from which ``auto`` chooses dynamic."""


@dataclass(slots=True)
class Setting:
    """``change`` on this rank, from the state ``before``; what it loads joins ``adapters``, by their nicknames.

    ``notes`` are sentences about it. By component, ``here`` are the nicknames, and ``sums`` are what a merge would lose
    and add.
    """

    change: SetAdapters
    before: AdapterState
    adapters: dict[str, Adapter]
    reader: AdapterReader
    notes: list[str]
    state: AdapterState = field(default_factory=AdapterState)
    targets: dict[str, list[str]] = field(default_factory=dict)
    here: dict[str, list[str]] = field(default_factory=dict)
    sums: dict[str, tuple[float, float]] = field(default_factory=dict)

    def decide(self, ranks: Ranks) -> AdapterState:
        """The next state. All ranks must call this together. Raises this rank's error, or ``Unavailable``."""
        failed: Exception | None = None
        try:
            self._look()
        except Exception as error:  # noqa: BLE001  # raised when the other ranks know of it
            failed = error
        lost = self._together(ranks, failed)
        modes: dict[str, Mode] = {}
        for component, nicknames in self.here.items():
            modes[component] = "merge" if self.change.mode == "merge" else "dynamic"
            if self.change.mode == "auto":
                modes[component], why = _chosen([self.adapters[name] for name in nicknames], lost.get(component))
                self.notes.append(f"{component}: {modes[component]}, as {why}.")
        return planning.activated(self.state, self.change, self.targets, modes)

    def _look(self) -> None:
        """Load the adapters that are new, and find the components that the change is for."""
        fresh = self._load()
        has = {nickname: adapter.components for nickname, adapter in self.adapters.items()}
        self.state = planning.with_loaded(self.before, fresh, self.change, has, self.notes)
        self.targets = planning.targets_of(self.change, self.state, has, sorted(self.reader.components))
        for component in sorted({name for components in self.targets.values() for name in components}):
            self.here[component] = [name for name in self.change.nicknames if component in self.targets[name]]
        self._check_mode()
        if self.change.mode == "auto" and not any(self.adapters[name].only_dynamic for name in self.change.nicknames):
            self._measure()

    def _load(self) -> dict[str, Loaded]:
        fresh: dict[str, Loaded] = {}
        for source in self.change.sources:
            known = self.before.loaded.get(source.nickname)
            if known is not None and (known.source.digest, known.source.target) == (source.digest, source.target):
                continue
            file, self.adapters[source.nickname] = self.reader.load(source)
            fresh[source.nickname] = Loaded(source, [], file.rank, file.alpha, file.nbytes, file.left)
            if file.left:
                self.notes.append(
                    f"{source.nickname}: {len(file.left)} layers have no place in the model, and are left out."
                )
        return fresh

    def _check_mode(self) -> None:
        named = [self.adapters[nickname] for nickname in self.change.nicknames]
        only_merged = [layer for adapter in named for layer in adapter.only_merged]
        only_dynamic = [layer for adapter in named for layer in adapter.only_dynamic]
        if only_merged and (only_dynamic or self.change.mode in ("dynamic", "request")):
            raise InvalidRequest(
                f"{', '.join(only_merged[:3])} can only be merged into; use merge_mode = merge.", field="merge_mode"
            )
        if only_dynamic and self.change.mode == "merge":
            raise InvalidRequest(
                f"{', '.join(only_dynamic[:3])} cannot be merged into, as the weights are quantized; use merge_mode = "
                "dynamic.",
                field="merge_mode",
            )

    def _measure(self) -> None:
        strengths = dict(zip(self.change.nicknames, self.change.strengths, strict=True))
        for component, nicknames in self.here.items():
            wanted = deltas(component, [(self.adapters[name], strengths[name]) for name in nicknames])
            only = any(self.adapters[name].only_merged for name in nicknames)  # there is no choice
            self.sums[component] = (0.0, 0.0) if only else rounded_away(self.reader.layouts[component], wanted)

    def _together(self, ranks: Ranks, failed: Exception | None) -> dict[str, float]:
        """The share of the change that a merge would round away on all ranks together, by component."""
        said = ranks.all_gather_bytes(msgspec.msgpack.encode(self.sums if failed is None else None))
        if failed is not None:
            raise failed
        every = [msgspec.msgpack.decode(one, type=dict[str, tuple[float, float]] | None) for one in said]
        shares: dict[str, float] = {}
        for component in self.sums:
            lost = added = 0.0
            for sums in every:
                if sums is None:
                    raise Unavailable("Another rank could not use the adapter.")
                lost, added = lost + sums[component][0], added + sums[component][1]
            shares[component] = (lost / added) ** 0.5 if added else 0.0
        return shares


def _chosen(adapters: Sequence[Adapter], lost: float | None) -> tuple[Mode, str]:
    """The choice of ``auto`` if a merge would round away the share ``lost``, and why."""
    if lost is None:
        return "dynamic", "the weights are quantized"
    if only := [layer for adapter in adapters for layer in adapter.only_merged]:
        return "merge", f"{only[0]} can only be merged into"
    return ("dynamic" if lost > MOST_ROUNDED_AWAY else "merge"), f"a merge would round away {100 * lost:.2g} % of it"
