"""Changes of a rank's adapters: made wholly or not at all, and gone without a trace."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from safelight.protocol.adapters import (
    ALL,
    AdapterState,
    MergeAdapters,
    RestoreAdapters,
    SetAdapters,
    UnloadAdapter,
    UnmergeAdapters,
)
from safelight.protocol.errors import Conflict, InvalidRequest, NotFound
from safelight.worker.lora import merge as merging
from safelight.worker.lora.rank_adapters import RankAdapters
from safelight.worker.model.model import Model

from .agreement import Made, change, new_adapters, source, write_adapter

MADE = (Made("first", 4, 2.0, seed=1), Made("second", 8, 8.0, ("to_q",), seed=2))


@pytest.fixture
def model(tiny_model: Callable[[str], Model]) -> Model:
    return tiny_model("flux")


@pytest.fixture
def folders(model: Model, tmp_path: Path) -> dict[str, Path]:
    return {made.nickname: write_adapter(made, model.pipeline.transformer, tmp_path) for made in MADE}


def bytes_of(model: Model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.pipeline.transformer.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def setting(folders: dict[str, Path], *nicknames: str, mode: str = "merge", strength: float = 1.0) -> SetAdapters:
    return SetAdapters(
        nicknames=list(nicknames),
        strengths=[strength] * len(nicknames),
        mode=mode,  # type: ignore[arg-type]  # one of its words
        sources=[source(folders[name]) for name in nicknames],
    )


def test_a_merge_that_fails_midway_is_undone_bitwise(
    model: Model, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    adapters = new_adapters(model)
    change(adapters, setting(folders, "first"))
    before, bases = bytes_of(model), set(model.layouts["transformer"].bases)
    usual, calls = merging._summed, 0

    def fails(*arguments: object) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 9:
            raise MemoryError
        return usual(*arguments)  # type: ignore[arg-type]  # what it was called with

    adapters.prepare(setting(folders, "first", "second", strength=0.5))
    with monkeypatch.context() as patched:
        patched.setattr(merging, "_summed", fails)
        with pytest.raises(MemoryError):
            adapters.write()
    assert not same(bytes_of(model), before)
    adapters.rollback()
    assert same(bytes_of(model), before)
    assert set(model.layouts["transformer"].bases) == bases
    assert list(adapters.state.loaded) == ["first"]


def test_after_any_sequence_every_byte_is_the_base_s(model: Model, folders: dict[str, Path]) -> None:
    adapters, before = new_adapters(model), bytes_of(model)
    for wanted in (
        setting(folders, "first"),
        MergeAdapters(ALL, [0.3]),
        setting(folders, "second", "first", strength=-2.0),
        MergeAdapters("transformer", [0.1, 7.0]),
        UnmergeAdapters(),
        MergeAdapters(),
        setting(folders, "second", mode="dynamic"),
        setting(folders, "second"),
        UnloadAdapter("second"),
        UnloadAdapter("first"),
    ):
        change(adapters, wanted)
        told = {name: layout.local(name) for layout in [model.layouts["transformer"]] for name in before}
        assert same(told, before), wanted
    assert same(bytes_of(model), before)
    assert not model.layouts["transformer"].bases
    assert adapters.state == AdapterState()


def test_what_is_released_was_never_there(model: Model, folders: dict[str, Path]) -> None:
    adapters, before = new_adapters(model), bytes_of(model)
    adapters.prepare(setting(folders, "first"))
    adapters.release()
    assert adapters.state == AdapterState()
    assert same(bytes_of(model), before)
    with pytest.raises(NotFound):
        adapters.prepare(SetAdapters(nicknames=["first"], strengths=[1.0]))


def test_another_rank_can_be_brought_to_the_same_state(
    model: Model, folders: dict[str, Path], tiny_model: Callable[[str], Model]
) -> None:
    adapters = new_adapters(model)
    change(adapters, setting(folders, "first", "second", strength=0.4))
    change(adapters, setting(folders, "second", mode="dynamic"))
    change(adapters, MergeAdapters(ALL, [0.6]))
    late = tiny_model("flux")
    other = new_adapters(late)
    change(other, RestoreAdapters(adapters.state))
    assert other.state == adapters.state
    assert same(bytes_of(late), bytes_of(model))


def test_auto_merges_in_full_precision_and_not_where_rounding_takes_too_much(
    model: Model, folders: dict[str, Path]
) -> None:
    adapters = new_adapters(model)
    change(adapters, setting(folders, "first", mode="auto"))
    assert [one.mode for one in adapters.state.active["transformer"]] == ["merge"]
    assert "merge, as a merge would round away" in adapters.notes[0]
    change(adapters, UnloadAdapter("first"))
    model.pipeline.transformer.to(torch.bfloat16)
    faint = new_adapters(model)
    folder = write_adapter(
        Made("faint", 4, 4.0, seed=3), model.pipeline.transformer.float(), folders["first"].parent, 0.002
    )
    model.pipeline.transformer.to(torch.bfloat16)
    change(faint, SetAdapters(nicknames=["faint"], strengths=[1.0], sources=[source(folder)]))
    assert [one.mode for one in faint.state.active["transformer"]] == ["dynamic"]
    assert "dynamic, as a merge would round away" in faint.notes[0]


def test_a_merge_in_bfloat16_rounds_once(model: Model, folders: dict[str, Path]) -> None:
    model.pipeline.transformer.to(torch.bfloat16)
    adapters, before = new_adapters(model), bytes_of(model)
    change(adapters, setting(folders, "first", "second", strength=0.7))
    layout = model.layouts["transformer"]
    first, second = (adapters._adapters[name].factors["transformer"] for name in ("first", "second"))
    both = next(path for path in first if path in second)
    total = before[f"{both}.weight"].float()
    for term in (first[both], second[both]):
        total += (term.up @ term.down).mul_(0.7)
    assert torch.equal(layout.live(f"{both}.weight"), total.bfloat16())


@pytest.mark.parametrize(("most", "most_bytes", "room"), [(1, 1 << 40, True), (2, 1, False), (0, 1 << 40, False)])
def test_limits(most: int, most_bytes: int, room: bool, model: Model, folders: dict[str, Path]) -> None:
    adapters = new_adapters(model, most=most, most_bytes=most_bytes)
    if not room:
        with pytest.raises(Conflict, match="may be loaded"):
            adapters.prepare(setting(folders, "first", mode="request"))
        return
    change(adapters, setting(folders, "first", mode="request"))
    change(adapters, setting(folders, "second", mode="request"))
    assert list(adapters.state.loaded) == ["second"]
    assert adapters.notes == ["first was unloaded to make room."]


def test_a_merge_whose_unmerged_weights_exceed_their_limit_is_refused_before_anything_is_written(
    model: Model, folders: dict[str, Path]
) -> None:
    adapters = new_adapters(model)
    change(adapters, setting(folders, "first", mode="merge"))
    needed = sum(base.nbytes for base in model.layouts["transformer"].bases.values())
    change(adapters, UnloadAdapter("first"))
    assert needed > 0
    adapters._max_merged_bytes = needed - 1
    with pytest.raises(Conflict, match=r"Merging keeps \d+ MB of weights without the adapters .* --max-merged-mb"):
        adapters.prepare(setting(folders, "first", mode="merge"))
    assert not model.layouts["transformer"].bases
    change(adapters, setting(folders, "first", mode="dynamic"))
    change(adapters, UnloadAdapter("first"))
    adapters._max_merged_bytes = needed
    change(adapters, setting(folders, "first", mode="merge"))
    change(adapters, UnloadAdapter("first"))


def test_strengths_that_are_not_as_many_as_adapters(model: Model, folders: dict[str, Path]) -> None:
    adapters = new_adapters(model)
    with pytest.raises(Conflict, match="No adapter is active"):
        adapters.prepare(MergeAdapters())
    change(adapters, setting(folders, "first", "second"))
    with pytest.raises(InvalidRequest, match="2 adapters in transformer, and 3 strengths"):
        adapters.prepare(MergeAdapters(ALL, [1.0, 2.0, 3.0]))


def test_requests_keep_the_adapter_that_they_began_with(model: Model, folders: dict[str, Path]) -> None:
    from safelight.protocol.adapters import Use

    adapters: RankAdapters = new_adapters(model)
    change(adapters, setting(folders, "first", mode="request"))
    wanted = adapters.wanted([Use("first", 0.5)])
    change(adapters, UnloadAdapter("first"))
    ((adapter, strength),) = adapters.uses("transformer", wanted)
    assert (adapter.nickname, strength) == ("first", 0.5)
    with adapters.applied("transformer", [(1, ((adapter, strength),)), (1, ())]):
        pass
    with pytest.raises(NotFound, match="'first'"):
        adapters.wanted([Use("first")])
