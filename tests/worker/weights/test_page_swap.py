"""Tensors with pages of their own trade bytes, and nothing else sees it."""

from __future__ import annotations

import gc
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

from safelight.worker.weights.update import page_swap as module_of_pages
from safelight.worker.weights.update.page_swap import (
    MIN_BYTES,
    PagesLost,
    aligned_like,
    allocate_pages,
    can_swap,
    give_own_pages,
    owns_pages,
    swap_pages,
)

SIZES = [1, 4095, 4096, 4097, 3 << 20, (5 << 20) + 17]


def test_this_machine_exchanges_pages() -> None:
    assert can_swap()


@pytest.mark.parametrize("offset", [0, 16, 63])
@pytest.mark.parametrize("size", SIZES)
def test_bytes_change_places_and_addresses_do_not(size: int, offset: int) -> None:
    one, other = allocate_pages(size, offset), allocate_pages(size, offset)
    first, second = (torch.randint(0, 256, (size,), dtype=torch.uint8) for _ in range(2))
    one.copy_(first)
    other.copy_(second)
    addresses = one.data_ptr(), other.data_ptr()
    for _ in range(3):
        swap_pages(one, other)
        assert torch.equal(one, second)
        assert torch.equal(other, first)
        swap_pages(one, other)
        assert torch.equal(one, first)
    assert addresses == (one.data_ptr(), other.data_ptr())


def test_pages_that_were_never_touched_are_zero_on_the_other_side() -> None:
    one, other = allocate_pages(3 << 20, 0), allocate_pages(3 << 20, 0).fill_(7)
    swap_pages(one, other)
    assert (int(one.min()), int(other.max())) == (7, 0)


def test_pages_of_another_size_or_offset_are_refused() -> None:
    one = allocate_pages(8192, 0).fill_(1)
    for other in (allocate_pages(4096, 0), allocate_pages(8192, 64)):
        with pytest.raises(ValueError, match="different places"):
            swap_pages(one, other)
    assert one.eq(1).all()


def test_a_part_of_a_tensor_has_no_pages_of_its_own() -> None:
    tensor = allocate_pages(4 << 20, 0).view(torch.float32).view(1024, 1024)
    assert owns_pages(tensor)
    assert not owns_pages(tensor[:1023])
    assert not owns_pages(tensor[1:])
    assert not owns_pages(tensor[:, :512])
    assert owns_pages(tensor.t())


def test_memory_that_is_gone_is_not_known_any_more() -> None:
    tensor = allocate_pages(1 << 20, 0)
    address = tensor.data_ptr()
    assert f"{address:x}-" in Path("/proc/self/maps").read_text()
    del tensor
    gc.collect()
    assert address not in module_of_pages._known
    assert f"{address:x}-" not in Path("/proc/self/maps").read_text()


def test_memory_that_was_exchanged_is_given_back_where_it_is() -> None:
    kept = allocate_pages(1 << 20, 0).fill_(1)
    for value in range(2, 40):
        gone = allocate_pages(1 << 20, 0).fill_(value)
        swap_pages(kept, gone)
        del gone
        assert kept.eq(value).all()


@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_kernel_without_room_leaves_both_as_they_were(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = allocate_pages(1 << 20, 0).fill_(1), allocate_pages(1 << 20, 0).fill_(2)
    usual, calls = module_of_pages._move, 0

    def fails(*arguments: int) -> None:
        nonlocal calls
        calls += 1
        if calls == step:
            raise OSError(12, "Cannot allocate memory")
        usual(*arguments)

    monkeypatch.setattr(module_of_pages, "_move", fails)
    with pytest.raises(OSError, match="Cannot allocate"):
        swap_pages(one, other)
    assert one.eq(1).all()
    assert other.eq(2).all()


def test_pages_that_cannot_be_put_back_end_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = allocate_pages(1 << 20, 0), allocate_pages(1 << 20, 0)
    usual, calls = module_of_pages._move, 0

    def fails(*arguments: int) -> None:
        nonlocal calls
        calls += 1
        if calls > 1:
            raise OSError(12, "Cannot allocate memory")
        usual(*arguments)

    monkeypatch.setattr(module_of_pages, "_move", fails)
    with pytest.raises(PagesLost):
        swap_pages(one, other)


def test_other_threads_get_no_memory_in_between() -> None:
    """Threads that take and give back memory all the time never find a place that an exchange has for a moment."""
    one, other, stop = allocate_pages(3 << 20, 0).fill_(1), allocate_pages(3 << 20, 0).fill_(2), threading.Event()
    faults: list[int] = []

    def churn() -> None:
        while not stop.is_set():
            taken = torch.full((3 << 20,), 9, dtype=torch.uint8)
            if not taken.eq(9).all():
                faults.append(1)

    threads = [threading.Thread(target=churn) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for number in range(40):
            swap_pages(one, other)
            assert bool(one.eq(1 if number % 2 else 2).all())
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not faults


class _Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.large = nn.Linear(600, 500, bias=True)
        self.conv = nn.Conv2d(64, 128, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.tied = nn.Parameter(self.large.weight.data)
        self.register_buffer("buffer", torch.randn(MIN_BYTES // 4))
        self.register_buffer("off", torch.randn(MIN_BYTES)[3:])
        self.register_buffer("gaps", torch.randn(600, 1200)[:, ::2])


def test_a_settled_module_is_the_same_in_other_memory() -> None:
    torch.manual_seed(0)
    module = _Tied()
    tensors = list(module.state_dict(keep_vars=True).values())
    before = [(tensor.detach().clone(), tensor.stride(), tensor.data_ptr() % 64) for tensor in tensors]
    give_own_pages([module, module])
    assert [owns_pages(tensor) for tensor in tensors] == [
        name not in ("large.bias", "conv.bias", "gaps") for name in module.state_dict()
    ]
    assert module.tied.data_ptr() == module.large.weight.data_ptr(), "also when it is asked for again"
    for tensor, (value, stride, offset) in zip(tensors, before, strict=True):
        assert torch.equal(tensor, value)
        assert (tensor.stride(), tensor.data_ptr() % 64) == (stride, offset)


def test_a_kernel_that_exchanges_no_pages_leaves_a_module_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module_of_pages, "can_swap", lambda: False)
    module = _Tied()
    addresses = [tensor.data_ptr() for tensor in module.state_dict().values()]
    give_own_pages([module])
    assert [tensor.data_ptr() for tensor in module.state_dict().values()] == addresses
    assert not owns_pages(aligned_like(module.large.weight.data, 16))
