"""LoRA adapters: state and operations, shared by server, scheduler and workers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec

Mode = Literal["merge", "dynamic"]
"""Merged into the weights, or applied in the forward."""

SENT = "lora_merge"
"""An adapter sent as tensors gets the nickname ``lora_merge:COMPONENT``."""

ADAPTER_FILE = "adapter_model.safetensors"
"""peft's name of the file, also for the server's own copy."""

ADAPTER_CONFIG = "adapter_config.json"
"""peft's name of the configuration beside it, which is optional."""

WantedMode = Literal["auto", "merge", "dynamic", "request"]
"""``request`` loads adapters for requests that name them, and changes nothing for others."""

ALL = "all"
"""The target for every component for which an adapter has layers."""


class Use(msgspec.Struct, frozen=True):
    """An adapter of a request, by its nickname."""

    name: str
    scale: float = 1.0


class AdapterSource(msgspec.Struct, frozen=True):
    """An adapter to load. ``path`` is the client's path, and ``folder`` has the server's own copy.

    If ``target`` is a denoiser, layers for a single denoiser are applied to it. Adapters with equal ``digest`` are
    equal, also in ``alpha``, which overrides the files' alpha. Unless ``strict``, layers that the model lacks are
    skipped.
    """

    nickname: str
    path: str | None
    folder: str
    digest: str
    alpha: float | None = None
    target: str = ALL
    strict: bool = True


class Loaded(msgspec.Struct, frozen=True):
    """A loaded adapter. ``components`` are those to which it applies for a request that names it.

    ``nbytes`` is the memory of its factors on all ranks of a replica together. ``left`` names layers of its file that
    the model lacks and that were skipped.
    """

    source: AdapterSource
    components: list[str]
    rank: int
    alpha: float
    nbytes: int
    left: list[str] = []


class Active(msgspec.Struct, frozen=True):
    """An adapter of one component, active for all requests; in mode ``merge`` it has no effect until ``merged``."""

    nickname: str
    strength: float
    mode: Mode
    merged: bool


class AdapterState(msgspec.Struct, frozen=True):
    """The adapters of the replicas by nickname, and the active ones by component."""

    loaded: dict[str, Loaded] = {}
    active: dict[str, list[Active]] = {}


class Drawn(msgspec.Struct, frozen=True):
    """An adapter of ``component`` that took part in an output: merged, dynamic for all requests, or by request."""

    nickname: str
    component: str
    strength: float
    mode: Literal["merge", "dynamic", "request"]


def drawn(state: AdapterState, uses: Sequence[Use] | None) -> list[Drawn]:
    """The adapters that take part in a request for ``uses``; ``None`` uses the active adapters."""
    active = [(component, one) for component, ones in state.active.items() for one in ones]
    found = [
        Drawn(one.nickname, component, one.strength, one.mode)
        for component, one in active
        if one.merged or (one.mode == "dynamic" and uses is None)
    ]
    for use in uses or ():
        loaded = state.loaded.get(use.name)
        for component in loaded.components if loaded is not None else ():
            found.append(Drawn(use.name, component, use.scale, "request"))
    return found


class SetAdapters(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """Make ``nicknames`` the active adapters of ``target``, with these ``strengths``.

    ``targets``, if given, has a target for each nickname and replaces ``target``. ``sources`` are loaded first and
    replace adapters of the same nicknames. With ``keeps`` other adapters stay active. ``recent`` lists nicknames in LRU
    order: over the limit, adapters are evicted from the front, except those in ``busy``.
    """

    nicknames: list[str]
    strengths: list[float]
    target: str = ALL
    targets: list[str] | None = None
    mode: WantedMode = "auto"
    sources: list[AdapterSource] = []
    recent: list[str] = []
    keeps: bool = False
    busy: list[str] = []

    def target_of(self, nickname: str) -> str:
        return self.target if self.targets is None else self.targets[self.nicknames.index(nickname)]


class MergeAdapters(msgspec.Struct, tag=True, frozen=True):
    """Merge the active adapters, with new ``strengths``: one for each, or one for all."""

    target: str = ALL
    strengths: list[float] | None = None


class UnmergeAdapters(msgspec.Struct, tag=True, frozen=True):
    """Unmerge the merged adapters; they stay listed."""

    target: str = ALL


class UnloadAdapter(msgspec.Struct, tag=True, frozen=True):
    """Unload an adapter, also from where it is active."""

    nickname: str


class RestoreAdapters(msgspec.Struct, tag=True, frozen=True):
    """Take over the adapters of the other replicas, on a replica that joins later."""

    state: AdapterState


class KeepAdapters(msgspec.Struct, tag=True, frozen=True):
    """Change only the weight version, no adapter."""


AdapterChange = SetAdapters | MergeAdapters | UnmergeAdapters | UnloadAdapter | RestoreAdapters | KeepAdapters
