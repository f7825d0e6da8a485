"""Offloaded weights draw the same bits, take no more of the device than they say, and are updated on the host."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from safelight.formats.model_names import resolve_model
from safelight.protocol.config import Config
from safelight.protocol.errors import StartFailed
from safelight.protocol.forward_options import OffloadKind
from safelight.protocol.operations import Sleep, Wake
from safelight.tests.played import Record
from safelight.tests.tiny import FAMILIES
from safelight.tests.worker.lora.agreement import change
from safelight.tests.worker.lora.whole_weights import ATTENTION, KINDS, is_merged, setting, write
from safelight.worker.crossing.changes import Changes
from safelight.worker.crossing.steps import DenoisingStep
from safelight.worker.graphs.setting import why_without_graphs
from safelight.worker.model.model import Model
from safelight.worker.model.modules import modules
from safelight.worker.offloading.block_stream import BlockStream
from safelight.worker.offloading.host_copy import HostCopy
from safelight.worker.offloading.offloading import Offloading, check_offload
from safelight.worker.offloading.overlay import OffloadedComponent
from safelight.worker.offloading.pinned_memory import PinnedMemory
from safelight.worker.requests.sample import SampleRun
from safelight.worker.weights.snapshot.digests import digest, tensor_digests
from safelight.worker.weights.transport.sources import TensorSource
from safelight.worker.weights.update.rank_update import RankUpdate
from safelight.worker.weights.update.undo_log import UndoLog

from .device import device, on_devices, played_only
from .operations import Operations
from .replica import Replica

pytestmark = on_devices

LEFT_OVER = 3_000_000
"""Bytes of embeddings that the prompt cache keeps, and of pictures."""


@pytest.fixture(autouse=True)
def _lagging(lagging: None) -> None: ...


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model, a FLUX of several blocks, in the place of the tiny one."""
    copied: Path = shutil.copytree(resolve_model("shapes"), tmp_path_factory.mktemp("embedded") / "flux")
    return copied


def offloaded(path: Path, kind: OffloadKind) -> tuple[Replica, Offloading]:
    replica = Replica(path, device(), offload=kind)
    offloading = Offloading(modules(replica.model.pipeline), device(), by_block=kind == "block")
    replica.model.offload = offloading
    replica.batcher.runner.stages.insert(-2, offloading)
    return replica, offloading


def live(record: Record) -> int:
    gc.collect()
    return record.memory().live


kinds = pytest.mark.parametrize("kind", ["component", "block"])


@kinds
def test_pictures_are_the_same_bits_and_the_device_holds_no_more_than_it_says(
    kind: OffloadKind, shapes: Path, record: Record
) -> None:
    plain = Replica(shapes, device())
    requests = [plain.request(index, deterministic=True) for index in range(2)]
    wanted = plain.draw(*requests)
    plain.close()
    del plain
    before = live(record)
    replica, offloading = offloaded(shapes, kind)
    assert live(record) - before < 1000
    assert all(map(torch.equal, replica.draw(*requests), wanted))
    sizes = replica.model.info().offloaded
    with offloading.present("transformer"):
        assert live(record) - before < sizes["transformer"].device_bytes + LEFT_OVER
    by_block = sizes["transformer"].streamed_blocks > 2
    assert (by_block, sizes["transformer"].device_bytes < sizes["transformer"].host_bytes) == (kind == "block",) * 2
    assert sizes.keys() == modules(replica.model.pipeline).keys()
    assert all(map(torch.equal, replica.draw(*requests), wanted))
    offloading.rest()
    assert live(record) - before < LEFT_OVER
    replica.close()


@kinds
def test_an_update_is_written_where_the_next_forward_reads(kind: OffloadKind, shapes: Path) -> None:
    replica, offloading = offloaded(shapes, kind)
    (asked,) = [replica.request(0, deterministic=True)]
    (before,) = replica.draw(asked)
    layout = replica.model.layouts["transformer"]
    offloading.rest()
    new = {entry.name: layout.read(entry.name) + 0.01 for entry in layout}
    digests = tensor_digests(layout, list(new), lambda: None)
    update = RankUpdate(replica.model.layouts, UndoLog(device(), 1 << 30, None))
    update.prepare(TensorSource({"transformer": new}))
    update.write()
    (changed,) = replica.draw(asked)
    assert not torch.equal(changed, before)
    offloading.rest()
    kept = tensor_digests(layout, list(new), lambda: None)
    assert kept == {name: digest(tensor) for name, tensor in new.items()}
    update.rollback()
    assert tensor_digests(layout, list(new), lambda: None) == digests
    assert torch.equal(replica.draw(asked)[0], before)
    replica.close()
    other = Replica(shapes, device())
    for name, tensor in new.items():
        other.model.layouts["transformer"].write(name, tensor)
    assert torch.equal(other.draw(asked)[0], changed)
    other.close()


@played_only
@kinds
def test_little_more_memory_is_page_locked_than_weights_need_and_the_log_says_how_much(
    kind: OffloadKind, shapes: Path, record: Record, caplog: pytest.LogCaptureFixture
) -> None:
    replica = Replica(shapes, device(), offload=kind)
    record.clear()
    with caplog.at_level("INFO"):
        offloading = Offloading(modules(replica.model.pipeline), device(), by_block=kind == "block")
    needed = sum(sizes.host_bytes for sizes in offloading.sizes.values())
    assert needed <= record.pinned_bytes <= 1.1 * needed
    assert f"takes {record.pinned_bytes / 1e6:.1f} MB of page-locked host memory" in caplog.text
    replica.close()


def devices(module: nn.Module) -> set[str]:
    return {parameter.device.type for parameter in module.parameters()}


def test_a_request_that_restores_the_device_s_copy_does_not_hide_an_update(checkpoint: Callable[[str], Path]) -> None:
    replica, offloading = offloaded(checkpoint("flux"), "component")
    transformer, layout = replica.model.pipeline.transformer, replica.model.layouts["transformer"]
    with offloading.present("transformer"):
        pass
    changes = Changes(modules(replica.model.pipeline).values())
    changes.show()
    with offloading.present("vae"):
        pass
    changes.hide()
    offloading.rest()
    assert devices(transformer) == {"cpu"}
    new = {entry.name: layout.read(entry.name) + 1 for entry in layout}
    for name, tensor in new.items():
        layout.write(name, tensor)
    with offloading.present("transformer"):
        assert devices(transformer) == {"cuda"}
        assert all(torch.equal(layout.live(name).cpu(), layout.part(name, tensor)) for name, tensor in new.items())
    replica.close()


def test_a_request_that_watches_all_leaves_one_component_on_the_device(checkpoint: Callable[[str], Path]) -> None:
    replica, offloading = offloaded(checkpoint("flux"), "component")
    transformer = replica.model.pipeline.transformer
    put_aside: list[set[str]] = []

    def on_step(sample: SampleRun, _: DenoisingStep) -> None:
        with sample.aside():
            pass
        put_aside.append(devices(transformer))

    with offloading.present("transformer"):
        pass
    run = SampleRun(replica.model, replica.request(0), 0, on_step, lambda _: None, watches_all=True)
    replica.batcher.start(run.coroutine)
    replica.settle()
    assert run.coroutine.error is None
    assert put_aside == [{"cpu"}] * 2
    assert devices(transformer) == {"cpu"}
    replica.close()


def test_dora_is_merged_into_weights_that_rest(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    replica, _ = offloaded(checkpoint("flux"), "component")
    module = FAMILIES["flux"].build().transformer
    module.load_state_dict(replica.model.pipeline.transformer.state_dict())
    expected = write(KINDS["DoRA"](ATTENTION), module, tmp_path / "x")
    change(replica.adapters, setting(tmp_path / "x"))
    is_merged(replica.model, "transformer", expected)
    replica.close()


@played_only
def test_sleep_takes_adapters_from_the_device_and_wake_brings_them_back(
    checkpoint: Callable[[str], Path], tmp_path: Path, record: Record
) -> None:
    replica, _ = offloaded(checkpoint("flux"), "component")
    before, names = live(record), [*modules(replica.model.pipeline)]
    write(KINDS["LoKr"](ATTENTION), FAMILIES["flux"].build().transformer, tmp_path / "x")
    change(replica.adapters, setting(tmp_path / "x"))
    operations = Operations(replica, tmp_path)
    assert live(record) > before
    record.clear()
    operations.perform(Sleep(names))
    assert live(record) == before
    assert record.operators["empty_cache"]
    operations.perform(Wake(names[1:]))
    assert live(record) == before, "a module still sleeps"
    operations.perform(Wake(names[:1]))
    assert {tensor.device.type for tensor in replica.adapters.tensors()} == {"cuda"}
    assert devices(replica.model.pipeline.transformer) == {"cpu"}
    replica.close()


@played_only
def test_sleep_takes_tensors_that_two_components_share_from_the_device_too(
    checkpoint: Callable[[str], Path], tmp_path: Path, record: Record
) -> None:
    replica = Replica(checkpoint("flux"), device(), offload="component")
    pipeline, tied = replica.model.pipeline, torch.randn(500_000)
    for component in (pipeline.transformer, pipeline.vae):
        component.register_buffer("tied", tied, persistent=False)
    before = live(record)
    replica.model.offload = Offloading(modules(pipeline), device(), by_block=False)
    kept, operations, names = tied.cpu().clone(), Operations(replica, tmp_path), [*modules(pipeline)]
    assert live(record) - before >= tied.nbytes
    for _ in range(2):
        operations.perform(Sleep(names))
        assert live(record) == before
        assert torch.equal(tied, kept)
        operations.perform(Wake(names))
        assert pipeline.transformer.tied is pipeline.vae.tied
        assert (tied.device.type, torch.equal(tied.cpu(), kept)) == ("cuda", True)
    replica.close()


class Block(nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((64, 64), value))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight + self.weight[0]


@played_only
def test_the_next_block_is_copied_before_the_last_one_is_asked_to_end_and_never_over_one_in_use(
    record: Record,
) -> None:
    blocks = [Block(float(index + 1) / 100) for index in range(5)]
    memory = PinnedMemory(5 * 64 * 64 * 4)
    copies = [HostCopy([block.weight], memory) for block in blocks]
    BlockStream(blocks, copies, device())
    order: list[str] = []
    before = live(record)
    for index, copy in enumerate(copies):
        begin = copy.copy_to
        copy.copy_to = lambda buffer, index=index, begin=begin: (order.append(f"copy {index}"), begin(buffer))[1]  # type: ignore[method-assign]
    for index, block in enumerate(blocks):
        block.register_forward_hook(lambda *_, index=index: order.append(f"run {index}"))
    x = torch.randn(2, 64)
    wanted, found = x, x.to(device())
    for block in [*blocks, *blocks, blocks[2], blocks[0]]:  # also out of their order
        found = block(found)
        wanted = wanted @ block.weight + block.weight[0]
        assert block.weight.device.type == "cpu"
    assert torch.equal(found.cpu(), wanted)
    assert order[:8] == ["copy 0", "copy 1", "run 0", "copy 2", "run 1", "copy 3", "run 2", "copy 4"]
    assert live(record) - before < 2 * 64 * 64 * 4 + 5000


def test_a_block_that_fails_leaves_its_weights_on_the_host() -> None:
    blocks = [Block(0.1), Block(0.2)]
    memory = PinnedMemory(2 * 64 * 64 * 4)
    BlockStream(blocks, [HostCopy([block.weight], memory) for block in blocks], device())
    with pytest.raises(RuntimeError):
        blocks[0](torch.zeros(2, 63, device=device()))
    assert [block.weight.device.type for block in blocks] == ["cpu", "cpu"]
    assert torch.equal(blocks[0](torch.zeros(2, 64, device=device())).cpu(), torch.full((2, 64), 0.1))


def test_a_tensor_of_two_components_stays_on_the_device() -> None:
    one, other = nn.Linear(4, 4), nn.Linear(4, 4)
    other.weight = one.weight
    offloading = Offloading({"one": one, "other": other}, device(), by_block=False)
    assert (one.weight.device.type, one.bias.device.type) == ("cuda", "cpu")
    rows = torch.ones(1, 4, device=device())
    for name, module in (("one", one), ("other", other), ("one", one)):
        with offloading.present(name):
            assert module(rows).device.type == "cuda"


def test_a_denoiser_without_blocks_is_refused_where_its_blocks_would_be_streamed() -> None:
    with pytest.raises(StartFailed, match="--offload block is impossible for unet: Linear has no repeated blocks"):
        Offloading({"vae": nn.Linear(4, 4), "unet": nn.Linear(4, 4)}, device(), by_block=True)


def test_pipelines_make_their_tensors_on_the_device(checkpoint: Callable[[str], Path]) -> None:
    replica, _ = offloaded(checkpoint("flux"), "component")
    model: Model = replica.model
    assert model.pipeline._execution_device == device()
    assert isinstance(model.pipeline.transformer, OffloadedComponent)
    replica.close()


def test_a_cpu_has_nothing_to_offload_to() -> None:
    with pytest.raises(StartFailed, match="--offload block moves weights between host memory and a GPU"):
        check_offload(Config(offload="block"), torch.device("cpu"))


def test_what_needs_weights_in_their_places_is_refused_beside_it() -> None:
    with pytest.raises(StartFailed, match="leave --offload or --compile out"):
        check_offload(Config(offload="component", compile="on"), device())
    with pytest.raises(StartFailed, match="impossible: --offload moves the weights"):
        why_without_graphs(Config(offload="component", piecewise_cuda_graph="on"), device())
    assert why_without_graphs(Config(offload="block"), device()) == "--offload moves the weights"
