"""A rank's part of an update: whatever is raised while it writes, every byte is as it was."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from safelight.formats.tensor_files import write_header
from safelight.protocol.errors import InvalidRequest, NotFound, Unavailable
from safelight.protocol.tensor_sources import Noise
from safelight.worker.parallel.plan import Shard
from safelight.worker.parallel.ranks import Ranks
from safelight.worker.weights.checkpoint.copies import Copies
from safelight.worker.weights.checkpoint.layout import Entry, Layout
from safelight.worker.weights.checkpoint.mapped_files import MappedFiles
from safelight.worker.weights.checkpoint.names import Names
from safelight.worker.weights.snapshot.digests import raw_bytes
from safelight.worker.weights.transport.sources import Rejected, TensorSource
from safelight.worker.weights.update import undo_log as undo
from safelight.worker.weights.update.noise import noise
from safelight.worker.weights.update.offload import Offloader
from safelight.worker.weights.update.page_swap import give_own_pages, owns_pages
from safelight.worker.weights.update.rank_update import RankUpdate
from safelight.worker.weights.update.undo_log import UndoBudgetExceeded, UndoLog

CPU = torch.device("cpu")
PLENTY = 1 << 30
SHAPES = {"large": (700, 1000), "wide": (3, 400_000), "row": (5,), "scalar": (), "empty": (0, 3)}
"""Two of more than a chunk."""


class Stop(Exception):
    pass


def model(*, settled: bool = False) -> nn.Module:
    torch.manual_seed(0)
    module = nn.Module()
    for name, shape in SHAPES.items():
        module.register_buffer(name, torch.randn(shape))
    module.register_buffer("low", torch.randn(300, 5000).bfloat16())
    if settled:
        give_own_pages([module])
        assert {name for name, tensor in module.state_dict().items() if owns_pages(tensor)} == {"large", "wide", "low"}
    return module


in_pages_or_not = pytest.mark.parametrize("settled", [False, True], ids=["copied", "exchanged"])


def state(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def other(module: nn.Module) -> dict[str, torch.Tensor]:
    """New tensors, of float32 all, and some not contiguous."""
    new = {name: torch.randn(tensor.shape) for name, tensor in module.state_dict().items()}
    new["large"] = torch.randn(1000, 700).t()
    return new


def begun(module: nn.Module, memory: UndoLog | None = None) -> RankUpdate:
    return RankUpdate({"transformer": Layout.whole(module)}, memory or UndoLog(CPU, PLENTY, None))


def opened(tensors: dict[str, torch.Tensor], then: Callable[[], object] = lambda: None) -> TensorSource:
    return TensorSource({"transformer": tensors}, then)


def same(one: dict[str, torch.Tensor], another: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], another[name]) for name in one)


@in_pages_or_not
def test_what_is_written_is_cast_and_what_is_rolled_back_is_bitwise_as_before(settled: bool) -> None:
    module = model(settled=settled)
    before, addresses = state(module), [tensor.data_ptr() for tensor in module.state_dict().values()]
    new = other(module)
    update = begun(module)
    update.prepare(opened(new))
    update.write()
    assert same(state(module), {name: new[name].to(before[name].dtype) for name in new})
    update.rollback()
    assert same(state(module), before)
    assert [tensor.data_ptr() for tensor in module.state_dict().values()] == addresses


@in_pages_or_not
@pytest.mark.parametrize("at", range(7))
def test_a_write_that_is_interrupted_after_any_tensor_is_undone(at: int, settled: bool) -> None:
    module = model(settled=settled)
    before, update, left = state(module), begun(module), itertools.count()

    def sign() -> None:
        if next(left) == at:
            raise Stop

    update.prepare(opened(other(module)))
    if at < len(before):
        with pytest.raises(Stop):
            update.write(sign)
        assert len(update.written["transformer"]) == at + 1
    else:
        update.write(sign)
    update.rollback()
    assert same(state(module), before)


def test_tied_scalars_are_compared_as_other_tensors_are() -> None:
    module = nn.Module()
    module.register_buffer("one", torch.tensor(1.0))
    module.register_buffer("other", module.one)
    begun(module).prepare(opened({"one": torch.tensor(2.0), "other": torch.tensor(2.0)}))
    with pytest.raises(Rejected, match="values are not the same"):
        begun(module).prepare(opened({"one": torch.tensor(2.0), "other": torch.tensor(3.0)}))


class _Breaks(torch.Tensor):
    """Raises when a part of it is copied that lies behind its middle."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.copy_ and args[1].storage_offset() > 350_000:
            raise Stop
        return super().__torch_function__(func, types, args, kwargs or {})


def test_a_write_that_is_interrupted_within_a_tensor_leaves_it_as_it_was() -> None:
    module = model()
    before, update = state(module), begun(module)
    new = {"large": torch.randn(700, 1000).as_subclass(_Breaks)}
    update.prepare(opened(new))
    with pytest.raises(Stop):
        update.write()
    assert same(state(module), before), "before it is rolled back already"
    update.rollback()
    assert same(state(module), before)


def from_file(module: nn.Module, folder: Path) -> tuple[dict[str, torch.Tensor], Path]:
    """New tensors of the module's own dtypes, and a file of them in which most lie off every alignment."""
    new = {name: torch.randn(tensor.shape).to(tensor.dtype) for name, tensor in module.state_dict().items()}
    file = folder / "new.safetensors"
    described = [("odd", "U8", (3,))] + [
        (name, "BF16" if tensor.dtype == torch.bfloat16 else "F32", tensor.shape) for name, tensor in new.items()
    ]
    file.write_bytes(b"".join([write_header(described), bytes(3), *(raw_bytes(tensor) for tensor in new.values())]))
    return new, file


@in_pages_or_not
def test_bytes_of_a_file_are_read_into_place_and_undone(settled: bool, tmp_path: Path) -> None:
    module = model(settled=settled)
    before = state(module)
    new, file = from_file(module, tmp_path)
    files, update = MappedFiles(), begun(module)
    tensors = {name: tensor for name, tensor in files.map(file).items() if name in new}
    update.prepare(TensorSource({"transformer": tensors}, files.close, files.read))
    update.write()
    assert same(state(module), new)
    update.rollback()
    assert same(state(module), before)


@pytest.mark.parametrize("reads", [0, 1, 2, 5])
def test_a_file_that_becomes_shorter_while_it_is_read_leaves_every_byte(reads: int, tmp_path: Path) -> None:
    module = model()
    before = state(module)
    _, file = from_file(module, tmp_path)
    files, update, done = MappedFiles(), begun(module), itertools.count()
    tensors = {name: tensor for name, tensor in files.map(file).items() if name in before}

    def read(into: memoryview, address: int) -> None:
        if next(done) == reads:
            os.truncate(file, 1)
        files.read(into, address)

    update.prepare(TensorSource({"transformer": tensors}, files.close, read))
    with pytest.raises(OSError, match="a file has become shorter"):
        update.write()
    update.rollback()
    assert same(state(module), before)


@in_pages_or_not
def test_several_parts_are_undone_to_what_was_before_the_first(settled: bool) -> None:
    module = model(settled=settled)
    before, update = state(module), begun(module)
    for _ in range(3):
        update.prepare(opened({name: tensor for name, tensor in other(module).items() if name in ("large", "row")}))
        update.write()
    update.prepare(opened(other(module)))
    update.release()
    update.rollback()
    assert same(state(module), before)


def tied() -> nn.Module:
    module = nn.Module()
    module.one = nn.Parameter(torch.randn(300, 400))
    module.other = nn.Parameter(module.one.data)
    return module


@in_pages_or_not
def test_two_names_of_the_same_memory_are_undone_to_what_was_there(settled: bool) -> None:
    module, new = tied(), torch.randn(300, 400)
    if settled:
        give_own_pages([module])
        assert owns_pages(module.one)
    assert module.one.data_ptr() == module.other.data_ptr()
    before, update = state(module), begun(module)
    update.prepare(opened({"one": new, "other": new.clone()}))
    update.write()
    assert torch.equal(module.one, new)
    update.rollback()
    assert same(state(module), before)


def test_two_names_of_the_same_memory_that_come_with_different_values_are_refused() -> None:
    with pytest.raises(Rejected, match=r"other: it is tied to transformer\.one, and its values are not the same"):
        begun(tied()).prepare(opened({"one": torch.zeros(300, 400), "other": torch.ones(300, 400)}))


def test_a_part_reports_its_own_tensors_and_the_whole_all_of_them() -> None:
    module = model()
    update = begun(module)
    for names in (("large", "row"), ("scalar",), ()):
        update.prepare(opened({name: tensor for name, tensor in other(module).items() if name in names}))
        update.write()
        assert sum(update.report(part=True).updated.values()) == len(names)
    assert update.report().updated == {"transformer": 3}


def test_an_error_of_any_kind_closes_the_source(monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[int] = []
    update = begun(model())
    monkeypatch.setattr(update, "_reserve", lambda tensors: (_ for _ in ()).throw(MemoryError))
    with pytest.raises(MemoryError):
        update.prepare(opened({"row": torch.zeros(5)}, lambda: closed.append(1)))
    assert closed == [1]


def test_what_is_rejected_closes_its_source_and_takes_no_room() -> None:
    module, memory, closed = model(), UndoLog(CPU, PLENTY, None), []
    update = begun(module, memory)
    with pytest.raises(Rejected) as rejected:
        update.prepare(opened({"nobody": torch.zeros(2)}, lambda: closed.append(1)))
    assert isinstance(rejected.value.error, InvalidRequest)
    assert closed == [1]
    memory.free()
    assert memory._blocks == []


def test_more_than_is_allowed_is_refused_and_nothing_is_written() -> None:
    module = model()
    before, closed = state(module), []
    update = begun(module, UndoLog(CPU, 2_000_000, None))
    with pytest.raises(Rejected, match=r"needs 11 MB on each rank, and 2 MB are allowed.*--undo-mb") as rejected:
        update.prepare(opened(other(module), lambda: closed.append(1)))
    assert isinstance(rejected.value.error, Unavailable)
    assert (closed, same(state(module), before)) == ([1], True)
    update.prepare(opened({"row": torch.zeros(5)}))
    update.write()
    update.rollback()
    assert same(state(module), before)


def test_what_is_not_allowed_in_memory_goes_to_files_that_leave_nothing(tmp_path: Path) -> None:
    module = model()
    before = state(module)
    memory = UndoLog(CPU, 2_000_000, tmp_path)
    update = begun(module, memory)
    update.prepare(opened(other(module)))
    assert [block.in_file for block in memory._blocks] == [True]
    update.write()
    update.rollback()
    assert same(state(module), before)
    assert memory._blocks == []
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_reported_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(undo.os, "posix_fallocate", full)
    update = begun(model(), UndoLog(CPU, 2_000_000, tmp_path))
    with pytest.raises(Rejected, match=f"no room in {tmp_path}: No space left on device"):
        update.prepare(opened(other(model())))


def test_the_second_update_uses_the_memory_of_the_first_and_free_gives_it_back() -> None:
    module, memory = model(), UndoLog(CPU, PLENTY, None)
    update, addresses = begun(module, memory), []
    for _ in range(3):
        update.prepare(opened(other(module)))
        update.write()
        addresses.append([block.memory.data_ptr() for block in memory._blocks])
        memory.free()  # which does nothing while there is something to undo
        update.commit()
    assert addresses[0] == addresses[1] == addresses[2] != []
    memory.free()
    assert memory._blocks == []


def test_memory_that_is_free_and_too_small_does_not_count() -> None:
    memory = UndoLog(CPU, 100 << 20, None)
    memory.reserve([torch.zeros(66 << 20, dtype=torch.uint8)])
    memory.clear()
    memory.reserve([torch.zeros(80 << 20, dtype=torch.uint8)])


def test_copies_do_not_overlap_and_are_aligned() -> None:
    memory = UndoLog(CPU, PLENTY, None)
    taken, _ = memory.reserve([torch.zeros(shape, dtype=torch.uint8) for shape in (1, 63, 64, 65, 1_000_000)])
    for number, tensor in enumerate(taken):
        tensor.fill_(number)
    assert [set(tensor.tolist()) for tensor in taken] == [{0}, {1}, {2}, {3}, {4}]
    assert {tensor.data_ptr() % 64 for tensor in taken} == {0}


def test_what_was_taken_and_not_used_is_there_again() -> None:
    memory = UndoLog(CPU, 64 << 20, None)
    for _ in range(3):
        _, give_back = memory.reserve([torch.zeros(60 << 20, dtype=torch.uint8)])
        give_back()
    memory.reserve([torch.zeros(60 << 20, dtype=torch.uint8)])
    with pytest.raises(UndoBudgetExceeded):
        memory.reserve([torch.zeros(5 << 20, dtype=torch.uint8)])


def test_a_file_that_becomes_shorter_is_found_before_anything_is_written(tmp_path: Path) -> None:
    module, memory = model(settled=True), UndoLog(CPU, PLENTY, None)
    before = state(module)
    _, file = from_file(module, tmp_path)
    files, update, closed = MappedFiles(), begun(module, memory), []
    tensors = {name: tensor for name, tensor in files.map(file).items() if name in before and tensor.nbytes > 1 << 18}
    os.truncate(file, 1)
    with pytest.raises(OSError, match="a file has become shorter"):
        update.prepare(TensorSource({"transformer": tensors}, lambda: closed.append(files.close()), files.read))
    assert (len(closed), update.written, memory._pages) == (1, {}, [])
    assert same(state(module), before)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_divided_tensor_in_pages_is_exchanged_whole(rank: int) -> None:
    module = nn.Module()
    module.register_buffer("packed", torch.randn(9, 50_000))
    give_own_pages([module])
    before, address = module.packed.clone(), module.packed.data_ptr()
    layout = Layout(module, [Entry("packed", "packed", (18, 50_000), Shard(0, (6, 12)))], Ranks(rank, 2))
    update, whole = RankUpdate({"transformer": layout}, UndoLog(CPU, PLENTY, None)), torch.randn(18, 50_000)
    update.prepare(opened({"packed": whole}))
    assert torch.equal(module.packed, before)
    update.write()
    first, second = (slice(0, 3), slice(6, 12)) if rank == 0 else (slice(3, 6), slice(12, 18))
    assert torch.equal(module.packed, torch.cat([whole[first], whole[second]]))
    update.rollback()
    assert torch.equal(module.packed, before)
    assert module.packed.data_ptr() == address


def test_a_begun_update_of_a_module_that_was_offloaded_meanwhile_is_undone() -> None:
    module = model(settled=True)
    before, update = state(module), begun(module)
    update.prepare(opened(other(module)))
    update.write()
    offloader = Offloader([module], CPU)
    offloader.offload(lambda: None)
    update.rollback()
    assert same(state(module), before)
    offloader.restore(lambda: None)
    assert same(state(module), before)


def test_pages_are_used_again_and_are_within_the_limit(tmp_path: Path) -> None:
    module, memory = model(settled=True), UndoLog(CPU, 70 << 20, None)
    update, addresses = begun(module, memory), []
    for _ in range(3):
        update.prepare(opened(other(module)))
        addresses.append([pages.data_ptr() for pages in memory._pages])
        update.write()
        update.commit()
    assert addresses[0] == addresses[1] == addresses[2]
    assert len(addresses[0]) == 3
    memory.free()
    assert memory._held() == 0
    before, small = state(module), begun(module, UndoLog(CPU, 6_000_000, tmp_path))
    small.prepare(opened(other(module)))
    assert len(small._undo_log._pages) < 3
    small.write()
    small.rollback()
    assert same(state(module), before)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_divided_tensor_of_several_blocks_is_exchanged_piece_by_piece(rank: int) -> None:
    module = nn.Module()
    module.register_buffer("packed", torch.randn(9, 500_000))
    before = module.packed.clone()
    entry = Entry("packed", "packed", (18, 500_000), Shard(0, (6, 12)))
    layout = Layout(module, [entry], Ranks(rank, 2))
    whole, kept = torch.randn(18, 500_000), torch.empty(9, 500_000)
    with Copies(None, lambda: None) as copies:
        copies.overwrite(layout.over("packed", whole, kept))
    first, second = (slice(0, 3), slice(6, 12)) if rank == 0 else (slice(3, 6), slice(12, 18))
    assert torch.equal(module.packed, torch.cat([whole[first], whole[second]]))
    assert torch.equal(kept, before)


def test_skipped_tensors_of_a_refused_update_are_not_reported_for_the_next() -> None:
    module = model()
    layout = Layout.whole(module)
    layout.names = Names(buffers=frozenset({"made"}))
    update = RankUpdate({"transformer": layout}, UndoLog(CPU, PLENTY, None))
    update.prepare(opened({**other(module), "made": torch.zeros(1)}))
    update.release()  # another rank could not do it
    update.prepare(opened(other(module)))
    update.write()
    assert update.report().left_out == []


def test_names_of_the_same_memory_are_whole_by_one_of_them() -> None:
    """A file may have a tied tensor under both names, as single files of T5 do, and the next only under one."""
    module = model()
    module.register_buffer("tied", module.get_buffer("large"))
    update = begun(module)
    new = other(module)
    del new["tied"]
    with pytest.raises(Rejected, match=r"1 tensors are missing \(row\)"):
        update.prepare(opened({name: tensor for name, tensor in new.items() if name != "row"}), complete=True)
    update.prepare(opened(new), complete=True)
    update.write()
    assert update.report().complete == ["transformer"]
    assert torch.equal(module.get_buffer("tied"), new["large"])


def test_a_reset_leaves_no_floating_tensor_as_it_was_but_those_that_are_kept() -> None:
    module = model()
    module.register_buffer("ids", torch.arange(4))
    before, layouts = state(module), {"transformer": Layout.whole(module)}
    source = TensorSource(noise(Noise(["transformer"], 7, ["wi", "row"]), layouts))
    update = RankUpdate(layouts, UndoLog(CPU, PLENTY, None))
    update.prepare(source)
    update.write()
    same_as_before = {name for name, tensor in state(module).items() if torch.equal(tensor, before[name])}
    assert same_as_before == {"wide", "row", "ids", "empty"}
    update.rollback()
    assert same(before, state(module))
    for error, asked in ((InvalidRequest, Noise(["transformer"], 7, [""])), (NotFound, Noise(["vae"], 7))):
        with pytest.raises(error):
            noise(asked, layouts)
