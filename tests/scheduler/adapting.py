"""A model of how workers change adapters; its adapters are words."""

from collections.abc import Sequence
from pathlib import Path

from msgspec.structs import replace

from safelight.protocol.adapters import (
    ALL,
    Active,
    AdapterChange,
    AdapterSource,
    AdapterState,
    Loaded,
    MergeAdapters,
    RestoreAdapters,
    SetAdapters,
    UnloadAdapter,
    UnmergeAdapters,
    WantedMode,
)
from safelight.protocol.errors import NotFound

MOST = 3
"""So many are kept; over it, the least recently used ones that are not active are evicted."""


def set_adapters(
    *nicknames: str, words: Sequence[str] = (), target: str = "transformer", mode: WantedMode = "merge"
) -> SetAdapters:
    """Have these active; the first are loaded, each with its word."""
    sources = [
        AdapterSource(nickname, f"/{word}", str(Path("/shared") / word), word)
        for nickname, word in zip(nicknames, words, strict=False)
    ]
    strengths = [1.0] * len(nicknames)
    return SetAdapters(nicknames=list(nicknames), strengths=strengths, target=target, mode=mode, sources=sources)


def words(state: AdapterState) -> dict[str, str]:
    """The loaded adapters' words, by nickname."""
    return {nickname: one.source.digest for nickname, one in state.loaded.items()}


def adapted(state: AdapterState, change: AdapterChange) -> AdapterState:
    """``state`` after the change. Raises ``NotFound`` if an adapter does not exist."""
    match change:
        case SetAdapters():
            return _set(state, change)
        case MergeAdapters(target=target):
            return _merged(state, target, merged=True)
        case UnmergeAdapters(target=target):
            return _merged(state, target, merged=False)
        case UnloadAdapter(nickname=nickname):
            return _without(state, nickname)
        case RestoreAdapters(state=state):
            return state


def _set(state: AdapterState, change: SetAdapters) -> AdapterState:
    loaded = state.loaded | {
        source.nickname: Loaded(source, ["transformer"], 1, 1.0, 1)
        for source in change.sources
        if source.nickname not in state.loaded or state.loaded[source.nickname].source.digest != source.digest
    }
    if missing := [nickname for nickname in change.nicknames if nickname not in loaded]:
        raise NotFound(f"There is no adapter {missing[0]!r}.", field="lora_nickname")
    active = dict(state.active)
    if change.mode != "request":
        merged = change.mode == "merge"
        for target in {change.target_of(nickname) for nickname in change.nicknames}:
            others = active.get(target, []) if change.keeps else []
            active[target] = [one for one in others if one.nickname not in change.nicknames] + [
                Active(nickname, strength, "merge" if merged else "dynamic", merged)
                for nickname, strength in zip(change.nicknames, change.strengths, strict=True)
                if change.target_of(nickname) == target
            ]
    state = AdapterState(loaded, active)
    used = {*change.nicknames, *(one.nickname for ones in active.values() for one in ones)}
    for nickname in (*change.recent, *loaded):
        if len(state.loaded) > MOST and nickname in state.loaded and nickname not in used:
            state = _without(state, nickname)
    return state


def _merged(state: AdapterState, target: str, *, merged: bool) -> AdapterState:
    active = {
        component: [replace(one, mode="merge" if merged else one.mode, merged=merged) for one in ones]
        if target in (ALL, component)
        else ones
        for component, ones in state.active.items()
    }
    return replace(state, active=active)


def _without(state: AdapterState, nickname: str) -> AdapterState:
    if nickname not in state.loaded:
        raise NotFound(f"There is no adapter {nickname!r}.", field="lora_nickname")
    loaded = {name: one for name, one in state.loaded.items() if name != nickname}
    active = {component: [one for one in ones if one.nickname != nickname] for component, ones in state.active.items()}
    return AdapterState(loaded, {component: ones for component, ones in active.items() if ones})
