"""Applies a change to the state of the adapters. Only names and sizes decide, so every rank finds the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from msgspec.structs import replace

from ...protocol.adapters import (
    ALL,
    Active,
    AdapterState,
    Loaded,
    MergeAdapters,
    Mode,
    SetAdapters,
)
from ...protocol.errors import Conflict, InvalidRequest, NotFound

Has = Mapping[str, Sequence[str]]
"""The components in which each adapter has layers, by nickname."""


def unknown(nickname: str, known: AdapterState, field: str) -> NotFound:
    return NotFound(f"There is no adapter {nickname!r}; loaded: {', '.join(known.loaded) or 'none'}.", field=field)


def with_loaded(
    state: AdapterState, fresh: Mapping[str, Loaded], change: SetAdapters, has: Has, notes: list[str]
) -> AdapterState:
    """``fresh`` ones in place of those of their nicknames. Where those are active, the fresh ones are."""
    active_names = {one.nickname for ones in state.active.values() for one in ones}
    if change.mode == "request" and (replaced := sorted(active_names & set(fresh))):
        raise Conflict(f"{replaced[0]} is active for all requests; unload it before its file is replaced for some.")
    active: dict[str, list[Active]] = {}
    for component, ones in state.active.items():
        kept = [one for one in ones if one.nickname not in fresh or component in has[one.nickname]]
        notes += [
            f"{one.nickname} is no longer active in {component}: its new file has no layers there."
            for one in ones
            if one not in kept
        ]
        if kept:
            active[component] = kept
    return AdapterState({**state.loaded, **fresh}, active)


def targets_of(change: SetAdapters, state: AdapterState, has: Has, components: Sequence[str]) -> dict[str, list[str]]:
    """The components that each of the change's adapters is for. Raises ``NotFound`` and ``InvalidRequest``."""
    found: dict[str, list[str]] = {}
    for nickname in change.nicknames:
        if nickname not in state.loaded:
            raise unknown(nickname, state, "lora_nickname")
        target = change.target_of(nickname)
        check_target(target, components)
        if target != ALL and target not in has[nickname]:
            raise InvalidRequest(
                f"The adapter {nickname!r} has no layers of {target}; it has {', '.join(has[nickname])}.",
                field="target",
            )
        found[nickname] = sorted(has[nickname]) if target == ALL else [target]
    return found


def check_target(target: str, components: Sequence[str]) -> None:
    if target not in (ALL, *components):
        known = ", ".join(components) or "none"
        raise NotFound(f"The model has no component {target!r} for adapters; it has {known}.", field="target")


def activated(
    state: AdapterState, change: SetAdapters, targets: Mapping[str, Sequence[str]], modes: Mapping[str, Mode]
) -> AdapterState:
    """The change's adapters are active in their targets, in each component's mode, in place of others or with them."""
    loaded = dict(state.loaded)
    for nickname, components in targets.items():
        before = [] if change.mode == "request" else loaded[nickname].components
        loaded[nickname] = replace(loaded[nickname], components=sorted({*before, *components}))
    if change.mode == "request":
        return AdapterState(loaded, state.active)
    strengths = dict(zip(change.nicknames, change.strengths, strict=True))
    named = {change.target_of(nickname) for nickname in change.nicknames}
    active: dict[str, list[Active]] = {}
    for component in sorted({*state.active, *modes}):
        is_target = not named.isdisjoint((ALL, component))
        kept = [
            one
            for one in state.active.get(component, ())
            if (change.keeps and one.nickname not in targets) or not is_target
        ]
        new = [
            Active(nickname, strengths[nickname], modes[component], merged=modes[component] == "merge")
            for nickname in change.nicknames
            if component in targets[nickname]
        ]
        if kept or new:
            active[component] = [*kept, *new]
    return AdapterState(loaded, active)


def within_limits(
    state: AdapterState,
    change: SetAdapters,
    max_adapters: int,
    max_bytes: int,
    nbytes: Callable[[AdapterState], int],
    notes: list[str],
) -> AdapterState:
    """Evict adapters in LRU order while there are too many, or their ``nbytes`` are too many. Raises ``Conflict``."""
    active = {one.nickname for ones in state.active.values() for one in ones}
    order = dict.fromkeys([*(name for name in change.recent if name in state.loaded), *state.loaded])
    idle = [name for name in order if name not in active | set(change.nicknames) | set(change.busy)]
    while len(state.loaded) > max_adapters or nbytes(state) > max_bytes:
        if not idle:
            raise Conflict(
                f"At most {max_adapters} adapters of {max_bytes / 1e6:.1f} MB in all may be loaded, and these would be "
                f"{len(state.loaded)} of {nbytes(state) / 1e6:.1f} MB, all in use; unload one, or start the server "
                "with a larger --max-loras or --max-lora-mb."
            )
        name = idle.pop(0)
        state = without(state, name)
        notes.append(f"{name} was unloaded to make room.")
    return state


def merged(state: AdapterState, change: MergeAdapters, components: Sequence[str]) -> AdapterState:
    """Merge the active adapters of the target, with the change's strengths if it has any."""
    check_target(change.target, components)
    there = {name: ones for name, ones in state.active.items() if change.target in (ALL, name)}
    if not there:
        raise Conflict("No adapter is active there; set one first.")
    numbers, active = change.strengths, dict(state.active)
    for component, ones in there.items():
        if numbers is not None and len(numbers) not in (1, len(ones)):
            raise InvalidRequest(
                f"There are {len(ones)} adapters in {component}, and {len(numbers)} strengths.", field="strength"
            )
        given = [one.strength for one in ones] if numbers is None else numbers * (len(ones) if len(numbers) == 1 else 1)
        active[component] = [
            replace(one, mode="merge", merged=True, strength=strength)
            for one, strength in zip(ones, given, strict=True)
        ]
    return replace(state, active=active)


def unmerged(state: AdapterState, target: str, components: Sequence[str], notes: list[str]) -> AdapterState:
    """Unmerge the adapters of the target; they stay listed."""
    check_target(target, components)
    there = [one for component, ones in state.active.items() if target in (ALL, component) for one in ones]
    if not any(one.merged for one in there):
        notes.append("Nothing was merged.")
    if beside := sorted({one.nickname for one in there if one.mode == "dynamic"}):
        notes.append(f"{', '.join(beside)} stays active beside the weights.")
    active = {
        component: [replace(one, merged=False) for one in ones] if target in (ALL, component) else ones
        for component, ones in state.active.items()
    }
    return replace(state, active=active)


def without(state: AdapterState, nickname: str) -> AdapterState:
    if nickname not in state.loaded:
        raise unknown(nickname, state, "lora_nickname")
    loaded = {name: one for name, one in state.loaded.items() if name != nickname}
    active = {component: [one for one in ones if one.nickname != nickname] for component, ones in state.active.items()}
    return AdapterState(loaded, {component: ones for component, ones in active.items() if ones})


def effect(state: AdapterState) -> dict[str, list[tuple[Active, str]]]:
    """Everything that affects outputs of requests that name no adapter: the active adapters and their digests."""
    return {
        component: [(one, state.loaded[one.nickname].source.digest) for one in ones]
        for component, ones in state.active.items()
    }
