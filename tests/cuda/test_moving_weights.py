"""Weights that move between host memory and a GPU: updates and sleep keep every byte, and wait for no single tensor."""

from __future__ import annotations

import errno
import itertools
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from safelight.formats.tensor_files import write_header
from safelight.protocol.errors import Unavailable
from safelight.tests.played import Record
from safelight.worker.parallel.ranks import ALONE
from safelight.worker.weights.checkpoint import pinned_copy
from safelight.worker.weights.checkpoint.layout import Layout
from safelight.worker.weights.checkpoint.mapped_files import MappedFiles
from safelight.worker.weights.snapshot.digests import module_digests, raw_bytes
from safelight.worker.weights.transport.sources import Rejected, TensorSource
from safelight.worker.weights.update import staging_buffers
from safelight.worker.weights.update.offload import Offloader
from safelight.worker.weights.update.rank_update import RankUpdate
from safelight.worker.weights.update.undo_log import UndoBudgetExceeded, UndoLog

from .device import device, on_devices, played_only

pytestmark = on_devices

PLENTY = 1 << 30
SHAPES = {"large": (300, 500), "wide": (3, 90_000), "row": (5,), "scalar": (), "empty": (0, 3), "kernel": (16, 8, 9, 9)}
HALF = 1 << 18
MEGABYTE = 1 << 20

Tensors = dict[str, torch.Tensor]


class Stop(Exception):
    pass


@pytest.fixture(autouse=True)
def small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Halves that the tensors above fill several times."""
    monkeypatch.setattr(pinned_copy, "HALF", HALF)
    monkeypatch.setattr(pinned_copy, "_MAX_PIECE", HALF // 2)
    monkeypatch.setattr(staging_buffers, "_SCRATCH", HALF)


@pytest.fixture(autouse=True)
def _lagging(lagging: None) -> None: ...


def model() -> nn.Module:
    torch.manual_seed(0)
    module = nn.Module()
    for name, shape in SHAPES.items():
        module.register_buffer(name, torch.randn(shape))
    module.kernel = module.kernel.to(memory_format=torch.channels_last)
    module.register_buffer("low", torch.randn(100, 3000).bfloat16())
    return module.to(device())


def state(module: nn.Module) -> Tensors:
    return {name: tensor.cpu().clone() for name, tensor in module.state_dict().items()}


def other(module: nn.Module) -> Tensors:
    """New tensors in host memory, of float32 all, and one not contiguous."""
    new = {name: torch.randn(tensor.shape) for name, tensor in module.state_dict().items()}
    return new | {"large": torch.randn(500, 300).t()}


def same(one: Tensors, another: Tensors) -> bool:
    return all(torch.equal(one[name].cpu(), another[name].cpu()) for name in one)


def log(*, staged: bool, **options: int) -> UndoLog:
    return UndoLog(device(), options.get("limit", PLENTY), None, on_gpu=staged)


def begun(module: nn.Module, memory: UndoLog) -> RankUpdate:
    return RankUpdate({"transformer": Layout.whole(module)}, memory)


def opened(tensors: Tensors) -> TensorSource:
    return TensorSource({"transformer": tensors})


staged_or_not = pytest.mark.parametrize("staged", [True, False], ids=["staged", "through the host"])


@staged_or_not
def test_an_update_writes_the_values_that_a_cpu_writes_and_a_rollback_the_old_bytes(staged: bool) -> None:
    module = model()
    before, new, update = state(module), other(module), begun(module, log(staged=staged))
    addresses = [tensor.data_ptr() for tensor in module.state_dict().values()]
    update.prepare(opened(new))
    assert same(before, state(module))
    update.write()
    assert same({name: tensor.to(before[name].dtype) for name, tensor in new.items()}, state(module))
    update.rollback()
    assert same(before, state(module))
    assert [tensor.data_ptr() for tensor in module.state_dict().values()] == addresses


@staged_or_not
@pytest.mark.parametrize("on_gpu", [True, False], ids=["from a GPU", "from the host"])
def test_a_commit_leaves_the_new_bytes_and_no_memory(staged: bool, on_gpu: bool, record: Record) -> None:
    module, memory = model(), log(staged=staged)
    new = {name: torch.randn(tensor.shape).to(tensor.dtype) for name, tensor in module.state_dict().items()}
    live = torch.cuda.memory_allocated(device())
    for _ in range(2):
        update = begun(module, memory)
        update.prepare(opened({name: tensor.to(device()) for name, tensor in new.items()} if on_gpu else dict(new)))
        update.write()
        update.commit()
        assert same(new, state(module))
        assert torch.cuda.memory_allocated(device()) == live


@staged_or_not
@pytest.mark.parametrize("at", [0, 3, 6])
def test_a_write_that_is_interrupted_after_any_tensor_is_undone(at: int, staged: bool) -> None:
    module = model()
    before, update, left = state(module), begun(module, log(staged=staged)), itertools.count()

    def stop() -> None:
        if next(left) == at:
            raise Stop

    update.prepare(opened(other(module)))
    with pytest.raises(Stop):
        update.write(stop)
    update.rollback()
    assert same(before, state(module))


def no_page_locked_memory(size: int) -> torch.Tensor:
    raise OSError(errno.ENOMEM, f"page-locked memory cannot be had: {size} bytes")


@staged_or_not
def test_an_update_without_page_locked_memory_is_refused_before_a_byte_is_written(
    staged: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = model()
    before, live = state(module), torch.cuda.memory_allocated(device())
    update = begun(module, UndoLog(device(), 0, tmp_path, on_gpu=staged))
    monkeypatch.setattr(pinned_copy, "pinned", no_page_locked_memory)
    with pytest.raises(Rejected, match=r"Nothing was written: .*page-locked memory cannot be had") as refused:
        update.prepare(opened(other(module)))
    assert isinstance(refused.value.error, Unavailable)
    update.rollback()
    assert same(before, state(module))
    assert torch.cuda.memory_allocated(device()) == live


@staged_or_not
def test_a_write_takes_no_page_locked_memory_that_prepare_did_not_take(
    staged: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = model()
    new, update = other(module), begun(module, UndoLog(device(), 0, tmp_path, on_gpu=staged))
    update.prepare(opened(new))
    monkeypatch.setattr(pinned_copy, "pinned", no_page_locked_memory)
    update.write()
    assert same({name: new[name].to(tensor.dtype) for name, tensor in state(module).items()}, state(module))


@pytest.mark.parametrize("at", [0, 1, 3, 7])
def test_a_copy_through_the_host_that_fails_leaves_every_byte(
    at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It fails at its first byte, while old bytes go down, or while new bytes go up."""
    module, done = model(), itertools.count()
    before, update = state(module), begun(module, UndoLog(device(), 0, tmp_path, on_gpu=False))
    plain = pinned_copy._Halves.buffer_for

    def stop(halves: pinned_copy._Halves, piece: torch.Tensor) -> torch.Tensor:
        if next(done) == at:
            raise Stop
        return plain(halves, piece)

    update.prepare(opened(other(module)))
    monkeypatch.setattr(pinned_copy._Halves, "buffer_for", stop)
    with pytest.raises(Stop):
        update.write()
    update.rollback()
    assert same(before, state(module))


def from_file(module: nn.Module, folder: Path) -> tuple[Tensors, MappedFiles, Path]:
    """New tensors of the module's own dtypes, mapped from a file."""
    file, files = folder / "new.safetensors", MappedFiles()
    new = {name: torch.randn(tensor.shape).to(tensor.dtype) for name, tensor in module.state_dict().items()}
    described = [
        (name, "BF16" if tensor.dtype is torch.bfloat16 else "F32", tensor.shape) for name, tensor in new.items()
    ]
    file.write_bytes(b"".join([write_header(described), *(raw_bytes(tensor) for tensor in new.values())]))
    return new, files, file


@staged_or_not
def test_files_are_read_into_place(staged: bool, tmp_path: Path) -> None:
    module = model()
    new, files, file = from_file(module, tmp_path)
    update = begun(module, log(staged=staged))
    update.prepare(TensorSource({"transformer": files.map(file)}, files.close, files.read))
    update.write()
    assert same(new, state(module))


@pytest.mark.parametrize("reads", [0, 1, 3])
def test_a_file_that_becomes_shorter_halfway_through_a_write_leaves_every_byte(reads: int, tmp_path: Path) -> None:
    module = model()
    before, update, done = state(module), begun(module, log(staged=False)), itertools.count()
    _, files, file = from_file(module, tmp_path)

    def read(into: memoryview, address: int) -> None:
        if next(done) == reads:
            os.truncate(file, 1)
        files.read(into, address)

    update.prepare(TensorSource({"transformer": files.map(file)}, files.close, read))
    with pytest.raises(OSError, match="a file has become shorter"):
        update.write()
    update.rollback()
    assert same(before, state(module))


def test_a_file_that_becomes_shorter_is_found_while_it_is_staged(tmp_path: Path) -> None:
    module = model()
    before, live = state(module), torch.cuda.memory_allocated(device())
    update = begun(module, log(staged=True))
    _, files, file = from_file(module, tmp_path)
    tensors = files.map(file)
    os.truncate(file, 1)
    with pytest.raises(OSError, match="a file has become shorter"):
        update.prepare(TensorSource({"transformer": tensors}, files.close, files.read))
    assert same(before, state(module))
    update.rollback()
    assert torch.cuda.memory_allocated(device()) == live


def waits(record: Record, work: Callable[[], object]) -> Counter[str]:
    record.clear()
    work()
    return Counter(name.removeprefix("wait: ") for name in record.operators.elements() if name.startswith("wait: "))


@played_only
def test_a_staged_update_waits_for_buffers_and_not_for_tensors(record: Record) -> None:
    module = model()
    update = begun(module, log(staged=True))
    nbytes = sum(tensor.nbytes for tensor in module.state_dict().values())
    found = waits(record, lambda: update.prepare(opened(other(module))))
    assert set(found) == {"event.synchronize"}
    assert found.total() <= 2 * nbytes / HALF + 4
    assert not waits(record, update.write), "both the old and the new bytes are on the GPU"
    assert not record.operators["copy H2D without waiting"]


@played_only
def test_an_update_through_the_host_waits_for_buffers_and_not_for_tensors(record: Record) -> None:
    module = model()
    update = begun(module, log(staged=False))
    nbytes = sum(tensor.nbytes for tensor in module.state_dict().values())
    update.prepare(opened(other(module)))
    found = waits(record, update.write)
    assert set(found) == {"event.synchronize"}
    assert found.total() <= 4 * nbytes / HALF + 8


@played_only
def test_an_update_that_has_room_on_the_gpu_for_some_tensors_stages_those(record: Record) -> None:
    module, memory = model(), log(staged=True)
    before, update = state(module), begun(module, memory)
    record.memory(device()).limit = torch.cuda.memory_allocated(device()) + 3 * MEGABYTE
    update.prepare(opened(other(module)))
    places = Counter(buffer.device.type for buffer in update._reserved.values())
    assert places["cuda"] > 0
    assert places["cpu"] > 0
    update.write()
    update.rollback()
    assert same(before, state(module))


@played_only
def test_the_parts_of_an_update_take_half_of_the_free_memory_together(record: Record) -> None:
    memory = log(staged=True)
    live, parts, free = torch.cuda.memory_allocated(device()), list[torch.Tensor](), 100 * MEGABYTE
    like = torch.empty(10 * MEGABYTE, dtype=torch.uint8, device=device())
    record.memory(device()).limit = torch.cuda.memory_allocated(device()) + free
    for _ in range(6):
        parts += memory.reserve([like])[0]
    assert [part.device.type for part in parts] == 4 * ["cuda"] + 2 * ["cpu"], "four parts, and what swaps need"
    del like, parts
    memory.clear()
    assert torch.cuda.memory_allocated(device()) == live


def test_a_part_that_is_given_back_leaves_its_memory_to_the_next_one_and_to_forwards() -> None:
    memory, live = log(staged=True), torch.cuda.memory_allocated(device())
    like = torch.empty(MEGABYTE, dtype=torch.uint8, device=device())
    first, give_first_back = memory.reserve([like])
    second, give_second_back = memory.reserve([like])
    taken = memory.gpu.taken
    del second
    give_second_back()
    assert memory.gpu.taken == taken - MEGABYTE
    memory.gpu.swap(like, first[0])
    del first
    give_first_back()
    assert memory.gpu.taken == 0
    del like
    assert torch.cuda.memory_allocated(device()) == live


@played_only
def test_the_undo_log_asks_for_powers_of_two_and_counts_what_is_taken(
    record: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's allocator of page-locked memory takes the next power of two of what it is asked for, and keeps it."""
    memory = log(staged=False, limit=300 * MEGABYTE)
    memory.reserve([torch.empty(size * MEGABYTE, dtype=torch.uint8, device=device()) for size in (40, 100, 30)])
    taken = [block.memory.nbytes for block in memory._blocks]
    assert all(size & (size - 1) == 0 for size in taken)
    assert sum(taken) <= 300 * MEGABYTE
    with pytest.raises(UndoBudgetExceeded):  # 130 MB would fit, and 256 be taken
        memory.reserve([torch.empty(130 * MEGABYTE, dtype=torch.uint8, device=device())])
    memory.clear()
    record.clear()
    memory.free()
    assert record.operators["empty_host_cache"] == 1


def offloader(module: nn.Module) -> Offloader:
    return Offloader([module], device())


def test_sleep_frees_the_gpu_and_wake_restores_every_byte_and_stride(record: Record) -> None:
    module = model()
    before, stride, live = state(module), module.kernel.stride(), torch.cuda.memory_allocated(device())
    moved = offloader(module)
    moved.offload(lambda: None)
    assert {tensor.device.type for tensor in module.state_dict().values() if tensor.numel()} == {"cpu"}
    assert torch.cuda.memory_allocated(device()) <= live - sum(t.nbytes for t in before.values()) // 2
    assert same(before, state(module))
    moved.restore(lambda: None)
    assert {tensor.device for tensor in module.state_dict().values()} == {device()}
    assert same(before, state(module))
    assert (module.kernel.stride(), torch.cuda.memory_allocated(device())) == (stride, live)


@played_only
def test_sleep_and_wake_wait_for_buffers_and_not_for_tensors(record: Record) -> None:
    module = model()
    moved, nbytes = offloader(module), sum(tensor.nbytes for tensor in module.state_dict().values())
    for work in (moved.offload, moved.restore):
        found = waits(record, lambda work=work: work(lambda: None))  # type: ignore[misc]
        assert set(found) == {"event.synchronize"}
        assert found.total() <= 2 * nbytes / HALF + 4


@played_only
def test_a_wake_without_memory_says_how_much_is_missing_and_moves_nothing(record: Record) -> None:
    module = model()
    before, moved = state(module), offloader(module)
    needed = sum(tensor.nbytes for tensor in module.state_dict().values())
    moved.offload(lambda: None)
    live = torch.cuda.memory_allocated(device())
    record.memory(device()).limit = live + 1_000_000
    with pytest.raises(
        Unavailable, match=f"needs {-(-needed // 10**6)} MB of cuda:0, and 1 MB are free: .* are missing"
    ):
        moved.restore(lambda: None)
    assert torch.cuda.memory_allocated(device()) == live
    assert {tensor.device.type for tensor in module.state_dict().values() if tensor.numel()} == {"cpu"}
    assert same(before, state(module))
    record.memory(device()).limit = live + needed
    moved.restore(lambda: None)
    assert same(before, state(module))
    assert {tensor.device.type for tensor in module.state_dict().values()} == {"cuda"}


def test_a_sleep_without_host_memory_says_how_much_is_missing_and_moves_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = model()
    before = state(module)
    monkeypatch.setattr("safelight.worker.weights.update.offload.free_bytes", lambda _: 1_000_000)
    with pytest.raises(
        Unavailable, match=r"Sleeping needs \d+ MB of host memory, and 1 MB are free: \d+ MB are missing"
    ):
        offloader(module).offload(lambda: None)
    assert {tensor.device.type for tensor in module.state_dict().values()} == {"cuda"}
    assert same(before, state(module))


def test_sleep_and_wake_without_page_locked_memory_say_what_is_missing_and_move_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = model()
    before, moved, live = state(module), offloader(module), torch.cuda.memory_allocated(device())
    for work, what, place in ((moved.offload, "Sleeping", "cuda"), (moved.restore, "Waking", "cpu")):
        with monkeypatch.context() as short:
            short.setattr(pinned_copy, "pinned", no_page_locked_memory)
            with pytest.raises(Unavailable, match=f"{what} needs 135 MB of page-locked host memory to copy through"):
                work(lambda: None)
        assert {tensor.device.type for tensor in module.state_dict().values() if tensor.numel()} == {place}
        assert same(before, state(module))
        work(lambda: None)
    assert same(before, state(module))
    assert torch.cuda.memory_allocated(device()) == live


@played_only
def test_digests_with_detail_copy_each_tensor_to_the_host_once(record: Record) -> None:
    module = model()
    layouts, plain = {"transformer": Layout.whole(module)}, {"transformer": Layout.whole(model().cpu())}
    record.clear()
    found = module_digests(layouts, ALONE, lambda: None, detail=True)
    assert record.operators["wait: copy D2H"] == len(module.state_dict())
    assert found == module_digests(plain, ALONE, lambda: None, detail=True)
