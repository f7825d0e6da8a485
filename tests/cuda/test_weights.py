"""Operations on weights and adapters leave the bytes, digests and pictures on a GPU that they leave on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from safelight.protocol.adapters import ALL, Mode, SetAdapters, UnmergeAdapters, Use
from safelight.protocol.operations import CACHES, Adapt, Digests, Operation, OperationStep, Sleep, Update, Wake
from safelight.protocol.tensor_sources import Files
from safelight.tests.played import Record
from safelight.tests.worker.lora.agreement import ADAPTERS, Made, source, write_adapter
from safelight.worker.model.modules import modules

from .device import KIND, device, on_devices, played_only
from .operations import Operations
from .replica import Replica

pytestmark = on_devices

CLOSE = 0.0 if KIND != "cuda" else 5e-3
"""The largest difference of a pixel in [0, 1] from the CPU's."""

KEPT: tuple[OperationStep, ...] = ("write", "commit")
PUT_BACK: tuple[OperationStep, ...] = ("write", "rollback")


class Sides:
    """The same model on the CPU and on a device; each operation is performed on both."""

    def __init__(self, path: Path, shared: Path) -> None:
        self.replicas = [Replica(path, place) for place in (torch.device("cpu"), device(1))]
        self._operations = [Operations(replica, shared) for replica in self.replicas]
        self.on_device = self._operations[1]
        self.modules = [*modules(self.replicas[0].model.pipeline)]

    def perform(self, operation: Operation, *further: OperationStep) -> None:
        """Asserts that the reports are equal."""
        ours, theirs = [operations.perform(operation, *further) for operations in self._operations]
        assert ours == theirs

    def digests(self) -> dict[str, str]:
        ours, theirs = [operations.perform(Digests()).digests for operations in self._operations]
        assert ours == theirs
        return theirs

    def draw(self, *uses: Use) -> torch.Tensor:
        """The device's picture, with adapters by request if any are named. Asserts that it is the CPU's."""
        changes = {"lora": [*uses]} if uses else {}
        (ours,), (theirs,) = [replica.draw(replica.request(0, **changes)) for replica in self.replicas]
        assert (ours - theirs).abs().max().item() <= CLOSE
        return theirs

    def close(self) -> None:
        for replica in self.replicas:
            replica.close()


@pytest.fixture
def sides(checkpoint: Callable[[str], Path], tmp_path: Path) -> Iterator[Sides]:
    found = Sides(checkpoint("flux"), tmp_path)
    yield found
    found.close()


def update(sides: Sides, folder: Path, dtype: torch.dtype) -> Update:
    """New tensors for the whole denoiser, in a file."""
    torch.manual_seed(1)
    state = sides.replicas[0].model.pipeline.transformer.state_dict()
    new = {name: (tensor + 0.02 * torch.randn(tensor.shape)).to(dtype) for name, tensor in state.items()}
    save_file(new, folder / f"{dtype}.safetensors")
    return Update(source=Files({"transformer": [str(folder / f"{dtype}.safetensors")]}))


def test_updates_rollbacks_and_sleep_leave_what_they_leave_on_a_cpu(sides: Sides, tmp_path: Path) -> None:
    first, second = update(sides, tmp_path, torch.float32), update(sides, tmp_path, torch.bfloat16)
    plain, untouched = sides.draw(), sides.digests()
    sides.perform(first, *PUT_BACK)
    assert sides.digests() == untouched
    assert torch.equal(sides.draw(), plain)
    sides.perform(first, *KEPT)
    changed, updated = sides.draw(), sides.digests()
    assert not torch.equal(changed, plain)
    sides.perform(Sleep([*sides.modules, CACHES]))
    assert sides.digests() == updated, "digests are those of the sleeping weights"
    sides.perform(second, *PUT_BACK)
    assert sides.digests() == updated
    sides.perform(second, *KEPT)
    asleep = sides.digests()
    assert asleep != updated
    sides.perform(Wake(sides.modules))
    assert sides.digests() == asleep
    assert not torch.equal(sides.draw(), changed)
    sides.perform(first, *KEPT)
    assert sides.digests() == updated
    assert torch.equal(sides.draw(), changed)


@played_only
def test_a_wake_without_memory_is_a_503_and_the_next_one_wakes_the_same_weights(sides: Sides, record: Record) -> None:
    plain, digests = sides.draw(), sides.digests()
    sides.perform(Sleep(sides.modules))
    record.memory(device(1)).limit = record.memory(device(1)).live + 700_000
    refused = sides.on_device.refused(Wake(sides.modules))
    assert refused.status == 503
    assert "MB are missing" in refused.message
    assert {one.device.type for one in sides.replicas[1].model.pipeline.transformer.parameters()} == {"cpu"}
    record.memory(device(1)).limit = 10**12
    sides.perform(Wake(sides.modules))
    assert sides.digests() == digests
    assert torch.equal(sides.draw(), plain)


@played_only
def test_no_operation_waits_for_a_copy_of_a_single_tensor(sides: Sides, tmp_path: Path, record: Record) -> None:
    written = update(sides, tmp_path, torch.float32)

    def waits(operation: Operation, *further: OperationStep) -> tuple[int, int]:
        record.clear()
        sides.on_device.perform(operation, *further)
        return record.operators["wait: copy H2D"], record.operators["wait: copy D2H"]

    assert waits(written, *PUT_BACK) == (0, 0)
    assert waits(written, *KEPT) == (0, 0)
    assert waits(Sleep(sides.modules)) == (0, 0)
    assert waits(Wake(sides.modules)) == (0, 0)


@pytest.mark.parametrize("mode", ["merge", "dynamic"])
def test_adapters_in_every_mode_draw_what_they_draw_on_a_cpu_also_after_sleep_and_a_rollback(
    mode: Mode, sides: Sides, tmp_path: Path
) -> None:
    plain, digests = sides.draw(), sides.digests()
    sources = [
        source(write_adapter(made, sides.replicas[0].model.pipeline.transformer, tmp_path)) for made in made_up()
    ]
    names = [one.nickname for one in sources]
    sides.perform(Adapt(SetAdapters(nicknames=names, strengths=[1.0, -0.5], mode=mode, sources=sources)), *KEPT)
    assert sides.digests() == digests, "they speak of the weights without adapters"
    adapted = sides.draw()
    assert not torch.equal(adapted, plain)
    sides.perform(update(sides, tmp_path, torch.bfloat16), *PUT_BACK)
    sides.perform(Sleep(sides.modules))
    sides.perform(Wake(sides.modules))
    assert sides.digests() == digests
    assert torch.equal(sides.draw(), adapted)
    sides.perform(Adapt(UnmergeAdapters(ALL)), *KEPT)


def test_adapters_of_requests_draw_what_they_draw_on_a_cpu(sides: Sides, tmp_path: Path) -> None:
    plain = sides.draw()
    sources = [
        source(write_adapter(made, sides.replicas[0].model.pipeline.transformer, tmp_path)) for made in made_up()
    ]
    names = [one.nickname for one in sources]
    sides.perform(Adapt(SetAdapters(nicknames=names, strengths=[1.0, 1.0], mode="request", sources=sources)), *KEPT)
    one, both = sides.draw(Use(names[0])), sides.draw(Use(names[0]), Use(names[1], 0.5))
    assert len({tuple(picture.flatten().tolist()) for picture in (plain, one, both)}) == 3


def made_up() -> tuple[Made, ...]:
    return ADAPTERS[:2]
