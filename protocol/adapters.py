"""LoRA adapters, as server, scheduler and workers speak of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec

Mode = Literal["merge", "dynamic"]
"""In the weights, or computed beside them."""

SENT = "lora_merge"
"""With its component behind a colon the nickname of an adapter that came as tensors."""

ADAPTER_FILE = "adapter_model.safetensors"
"""As peft names it, and the server its own copy of an adapter."""

ADAPTER_CONFIG = "adapter_config.json"
"""What lies beside it, where there is more to say of the adapter."""

WantedMode = Literal["auto", "merge", "dynamic", "request"]
"""``request`` loads adapters for requests that name them, and changes nothing for others."""

ALL = "all"
"""The target that means every component which an adapter has layers for."""


class Use(msgspec.Struct, frozen=True):
    """An adapter of a request, by its nickname."""

    name: str
    scale: float = 1.0


class AdapterSource(msgspec.Struct, frozen=True):
    """An adapter to load. ``path`` is what its sender calls it, and ``folder`` holds the server's own copy of it.

    What it has for one denoiser is for the denoiser ``target``, if that is one. Two with the same ``digest`` are the
    same, also in ``alpha``, which stands for what the files say. Unless ``strict``, layers that the model does
    not have are left out.
    """

    nickname: str
    path: str | None
    folder: str
    digest: str
    alpha: float | None = None
    target: str = ALL
    strict: bool = True


class Loaded(msgspec.Struct, frozen=True):
    """An adapter that can be used. ``components`` are those that a request which names it has it in.

    ``nbytes`` is what its factors take in memory, all ranks of a replica together. ``left`` names what of its file has
    no place in the model and is left out.
    """

    source: AdapterSource
    components: list[str]
    rank: int
    alpha: float
    nbytes: int
    left: list[str] = []


class Active(msgspec.Struct, frozen=True):
    """An adapter of one component, for all requests. One of mode ``merge`` that is not ``merged`` has no effect."""

    nickname: str
    strength: float
    mode: Mode
    merged: bool


class AdapterState(msgspec.Struct, frozen=True):
    """What replicas have: adapters by nickname, and those that are active by component."""

    loaded: dict[str, Loaded] = {}
    active: dict[str, list[Active]] = {}


class Drawn(msgspec.Struct, frozen=True):
    """An adapter of ``component`` that had a part in what was drawn: merged, dynamic for all, or by request."""

    nickname: str
    component: str
    strength: float
    mode: Literal["merge", "dynamic", "request"]


def drawn(state: AdapterState, uses: Sequence[Use] | None) -> list[Drawn]:
    """The adapters that draw a request which names ``uses``; ``None`` where it names none and takes what is active."""
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
    """Have ``nicknames`` be the active adapters of ``target``, with these ``strengths``.

    ``targets``, where given, has one for each nickname instead of ``target``. ``sources`` are loaded first, in place of
    what was loaded under their names. With ``keeps`` others stay active.
    ``recent`` are all nicknames, the one that was not used for longest first: while there are too many, those go, but
    for such as are ``busy``.
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
    """Merge what is active, with other ``strengths``: one for each, or one for all."""

    target: str = ALL
    strengths: list[float] | None = None


class UnmergeAdapters(msgspec.Struct, tag=True, frozen=True):
    """Take what is merged out of the weights; it stays listed."""

    target: str = ALL


class UnloadAdapter(msgspec.Struct, tag=True, frozen=True):
    """Let go of an adapter, wherever it is active."""

    nickname: str


class RestoreAdapters(msgspec.Struct, tag=True, frozen=True):
    """Be as the others are: for a replica that comes later."""

    state: AdapterState


class KeepAdapters(msgspec.Struct, tag=True, frozen=True):
    """Change no adapter: what is drawn gets another version's name."""


AdapterChange = SetAdapters | MergeAdapters | UnmergeAdapters | UnloadAdapter | RestoreAdapters | KeepAdapters
