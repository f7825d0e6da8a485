"""Offloaded weights come back as they were, whatever happens meanwhile."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from safelight.protocol.errors import Unavailable
from safelight.worker.weights.update import offload
from safelight.worker.weights.update.offload import Offloader

CPU = torch.device("cpu")


def nothing() -> None:
    pass


def model() -> nn.Module:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(64, 32), nn.Conv2d(3, 27, 3), nn.Linear(32, 8))
    module[1].weight.data = module[1].weight.data.to(memory_format=torch.channels_last)
    module[2].weight = nn.Parameter(module[0].weight.data[:8].t()[:8])  # with gaps
    module.register_buffer("scalar", torch.tensor(3.0))
    module.register_buffer("empty", torch.empty(0))
    return module


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_every_byte_every_stride_and_every_alignment_is_the_same_and_no_file_has_a_name(folder: Path) -> None:
    module = model()
    tensors = list(module.state_dict(keep_vars=True).values())
    before = [(tensor.clone(), tensor.data_ptr() % 64) for tensor in tensors]
    strides = [module[0].weight.stride(), module[1].weight.stride()]
    at_home = Offloader([module], CPU)
    at_home.offload(nothing)
    assert at_home.offloaded
    assert list(folder.iterdir()) == []
    assert all(torch.equal(tensor, value) for tensor, (value, _) in zip(tensors, before, strict=True))
    assert "(deleted)" in Path("/proc/self/maps").read_text()
    at_home.restore(nothing)
    assert not at_home.offloaded
    for tensor, (value, offset) in zip(tensors, before, strict=True):
        assert torch.equal(tensor, value)
        assert not tensor.numel() or tensor.data_ptr() % 64 == offset
    assert [module[0].weight.stride(), module[1].weight.stride()] == strides


def test_what_is_written_to_offloaded_weights_is_restored() -> None:
    module = model()
    offloader = Offloader([module], CPU)
    offloader.offload(nothing)
    with torch.no_grad():
        module[0].weight.fill_(2)
    offloader.restore(nothing)
    assert module[0].weight.eq(2).all()


def _failing(after: int, monkeypatch: pytest.MonkeyPatch, name: str, error: type[Exception]) -> None:
    """Has the function ``name`` of the module fail when it was called so often."""
    usual: Callable[..., torch.Tensor] = getattr(offload, name)
    calls = 0

    def fails(*args: object) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls > after:
            raise error
        return usual(*args)

    monkeypatch.setattr(offload, name, fails)


def test_a_full_disk_leaves_everything_at_home(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = model()
    before = [tensor.data_ptr() for tensor in module.parameters()]
    offloader = Offloader([module], CPU)
    with monkeypatch.context() as patched:
        _failing(2, patched, "in_file", BlockingIOError)
        with pytest.raises(Unavailable, match=f"Sleeping needs 1 MB of {folder}, and .* MB are missing"):
            offloader.offload(nothing)
    assert not offloader.offloaded
    assert [tensor.data_ptr() for tensor in module.parameters()] == before
    assert list(folder.iterdir()) == []


def test_a_wake_without_memory_moves_nothing_and_the_next_wakes(monkeypatch: pytest.MonkeyPatch) -> None:
    module = model()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    offloader = Offloader([module], CPU)
    offloader.offload(nothing)
    mapped = {tensor.data_ptr() for tensor in module.parameters()}
    with monkeypatch.context() as patched:
        _failing(2, patched, "aligned_like", MemoryError)
        with pytest.raises(Unavailable, match=r"Waking needs 1 MB of host memory, .* MB are missing"):
            offloader.restore(nothing)
    assert offloader.offloaded
    assert {tensor.data_ptr() for tensor in module.parameters()} == mapped
    offloader.restore(nothing)
    assert not offloader.offloaded
    assert not mapped & {tensor.data_ptr() for tensor in module.parameters()}
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def test_other_offloaded_memory_may_be_released_meanwhile() -> None:
    others = [torch.randn(40, 30), torch.randn(7)]
    before = [other.clone() for other in others]
    homes = {other.data_ptr() for other in others}
    offloader = Offloader([model()], CPU, lambda: others)
    offloader.offload(nothing)
    assert not homes & {other.data_ptr() for other in others}
    assert all(torch.equal(other, value) for other, value in zip(others, before, strict=True))
    del others[0]
    offloader.restore(nothing)
    assert not offloader.offloaded
    assert torch.equal(others[0], before[1])


def test_modules_go_and_come_one_by_one_and_what_else_there_is_with_the_last_and_the_first() -> None:
    one, two, others = model(), model(), [torch.randn(7)]
    before = {name: tensor.clone() for name, tensor in two.state_dict().items()}

    def homes() -> list[int]:
        return [module[0].weight.data_ptr() for module in (one, two)] + [others[0].data_ptr()]

    first = homes()
    offloader = Offloader([one, two], CPU, lambda: others)
    offloader.offload(nothing, [two])
    assert [now == then for now, then in zip(homes(), first, strict=True)] == [True, False, True]
    offloader.offload(nothing)
    assert not set(homes()) & {first[0], first[2]}
    away = homes()
    offloader.restore(nothing, [one])
    assert [now == then for now, then in zip(homes(), away, strict=True)] == [False, True, False]
    assert offloader.offloaded
    offloader.restore(nothing)
    assert not offloader.offloaded
    assert all(torch.equal(tensor, before[name]) for name, tensor in two.state_dict().items())
