"""Memory of a GPU: checked here, and opened by torch, which is played."""

from __future__ import annotations

import base64
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.multiprocessing import reductions

from safelight.protocol.tensor_sources import CudaTensor
from safelight.worker.weights.transport import shm_segment as segment
from safelight.worker.weights.transport.allowlist import NotAPayload
from safelight.worker.weights.transport.cuda_handles import open_handles

from .streams import decode
from .trainer import UUID, Trainer

ONE = ["transformer"]
HANDLE = b"\2c" + bytes(range(64))


@pytest.fixture
def opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Two GPUs (the trainer names the second), the segment with its counters, and the calls of torch."""
    (tmp_path / "torch_7_8_9").write_bytes(bytes(80_064))
    properties = [SimpleNamespace(uuid="other"), SimpleNamespace(uuid=UUID)]
    asked: list[tuple[Any, ...]] = []

    def rebuild(*args: Any) -> torch.Tensor:
        asked.append(args)
        return torch.zeros(args[1])

    monkeypatch.setattr(segment, "_FOLDER", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties[index])
    monkeypatch.setattr(reductions, "rebuild_cuda_tensor", rebuild)
    return asked


def altered(payload: str, old: bytes, new: bytes) -> str:
    """The same stream, which says ``new`` where it said ``old``."""
    stream = base64.b64decode(payload)
    assert stream.count(old) == 1
    return base64.b64encode(stream.replace(old, new)).decode()


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("what", ["cuda", "cuda by uuid"])
def test_memory_is_opened_by_torch_on_the_gpu_that_is_meant(
    what: str, protocol: int, trainer: Trainer, opened: list[Any]
) -> None:
    found = decode(trainer.send(what, protocol=protocol), ONE)
    assert list(found["transformer"]) == ["a"]
    shape = (torch.Tensor, (2, 3), (3, 1), 0)
    memory = (torch.storage.TypedStorage, torch.float32, 1, HANDLE, 24, 512)
    assert opened == [(*shape, *memory, False, b"/torch_7_8_9", 7, bytes(64), True)]


def test_memory_without_a_handle_is_empty(trainer: Trainer, opened: list[Any]) -> None:
    decode(trainer.send("cuda empty"), ONE)
    memory = (torch.storage.TypedStorage, torch.float32, 1, None, 0, 0)
    assert opened == [(torch.Tensor, (0, 3), (3, 1), 0, *memory, False, None, 0, None, None)]


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        (b"K\x18M\x00\x02", b"K\x17M\x00\x02", "reaches element 5 of a storage of 5"),
        (b"K\x03K\x01\x86", b"K\x04K\x01\x86", "reaches element 6 of a storage of 6"),
        (b"K\x18M\x00\x02", b"K\x18J\xff\xff\xff\xff", "an argument that is not an integer"),
        (b"K\x18M\x00\x02", b"NM\x00\x02", "an argument that is not an integer"),
        (b"TypedStorage", b"Untyped.....", "names 'torch.storage.Untyped.....'"),
        (b"/torch_7_8_9", b"/torch_7_8_8", "the segment /torch_7_8_8 cannot be opened"),
        (b"/torch_7_8_9", b"/../7_8_9.so", "a segment's name is not one of torch's"),
        (b"\2c\0\1", b"\2e\0\1", "allocate without expandable_segments in the sender"),
        (b"\2c\0\1", b"\2x\0\1", "does not have the handles that torch writes"),
        (b"CB\2c\0", b"CA\2c", "does not have the handles that torch writes"),
        (b"K\x07C\x40", b"M\x10\x27C\x40", "does not have the handles that torch writes"),
        (b"K\x07C\x40", b"NC\x40", "an argument that is not an integer"),
        (b"K\x07C\x40\0", b"K\x07C\x3f", "does not have the handles that torch writes"),
        (b"float32\x94\x93\x94K\x01", b"float32\x94\x93\x94K\x02", "needs the GPU 2; this process has 2"),
        (b"float32\x94\x93\x94K\x01", b"float32\x94\x93\x94N", "an argument that is not an integer"),
        (b"float32\x94\x93\x94K\x01", b"float32\x94\x93\x94\x88", "an argument that is not an integer"),
        (b"float32\x94\x93\x94K\x01", b"float32\x94\x93\x94\x8c\x01a", "an argument that is not an integer"),
    ],
)
def test_arguments_that_torch_does_not_give_are_refused(
    old: bytes, new: bytes, reason: str, trainer: Trainer, opened: list[Any]
) -> None:
    with pytest.raises(NotAPayload, match=reason):
        decode(_unframed(altered(trainer.send("cuda"), old, new)), ONE)
    assert opened == []


def _unframed(payload: str) -> str:
    """Without the opcode that says how long the stream is."""
    stream = base64.b64decode(payload)
    assert stream[2] == 0x95
    return base64.b64encode(stream[:2] + stream[11:]).decode()


def test_a_segment_of_another_size_holds_no_counters(trainer: Trainer, opened: list[Any], tmp_path: Path) -> None:
    (tmp_path / "torch_7_8_9").write_bytes(bytes(80_063))
    with pytest.raises(NotAPayload, match="the segment /torch_7_8_9 has 79999 bytes of data, not 80000"):
        decode(trainer.send("cuda"), ONE)
    assert opened == []


def test_a_gpu_that_this_process_lacks_is_named_with_those_that_it_has(trainer: Trainer, opened: list[Any]) -> None:
    with pytest.raises(NotAPayload, match=f"needs the GPU {UUID[:-1]}f; this process has other, {UUID}"):
        decode(altered(trainer.send("cuda by uuid"), UUID.encode(), UUID[:-1].encode() + b"f"), ONE)
    assert opened == []


def test_an_error_of_torch_is_a_refusal(trainer: Trainer, opened: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> torch.Tensor:
        raise RuntimeError("CUDA error: invalid handle\nand what torch adds to that")

    monkeypatch.setattr(reductions, "rebuild_cuda_tensor", fails)
    with pytest.raises(NotAPayload, match=r"rebuild_cuda_tensor, called at byte \d+, fails: .*invalid handle$"):
        decode(trainer.send("cuda"), ONE)


@pytest.mark.parametrize("what", ["cuda", "cuda by uuid", "cuda empty"])
def test_without_a_gpu_it_is_refused(
    what: str, trainer: Trainer, opened: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(NotAPayload, match="needs a GPU, and this process has none; send CPU tensors, or safetensors"):
        decode(trainer.send(what), ONE)
    assert opened == []


def handle(**changes: Any) -> CudaTensor:
    view = {"name": "a", "dtype": "float32", "shape": [2, 3], "stride": [3, 1], "offset": 0, "device": UUID}
    memory = {"memory": HANDLE, "storage_bytes": 24, "storage_offset": 512, "counters": b"/torch_7_8_9", "counter": 7}
    return CudaTensor(**(view | memory | {"event": bytes(64), "event_sync": True} | changes))


@pytest.mark.parametrize("dtype", ["float32", "torch.float32"])
def test_a_plain_handle_is_opened_as_a_pickled_one_is(dtype: str, trainer: Trainer, opened: list[Any]) -> None:
    decode(trainer.send("cuda by uuid"), ONE)
    assert list(open_handles([handle(dtype=dtype)])) == ["a"]
    assert opened[0] == opened[1]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": "object"}, "the handle of a has the unknown dtype 'object'"),
        ({"device": "another"}, "the handle of a needs the GPU another; this process has other"),
        ({"shape": [3, 3]}, "the handle of a reaches element 8 of a storage of 6"),
        ({"shape": [-1]}, "the handle of a has an invalid size or stride"),
        ({"offset": -1}, "the handle of a has an argument that is not an integer"),
        ({"stride": [3]}, "the handle of a has an invalid size or stride"),
        ({"storage_bytes": -1}, "the handle of a has an argument that is not an integer"),
        ({"counter": 10_000}, "the handle of a does not have the handles that torch writes"),
        ({"memory": b"\2e" + bytes(64)}, "the handle of a names an expandable segment"),
        ({"memory": b"short"}, "the handle of a does not have the handles that torch writes"),
        ({"counters": b"/../etc/passwd"}, "the handle of a fails: a segment's name is not one of torch's"),
    ],
)
def test_a_plain_handle_that_torch_would_not_give_is_not_opened(
    changes: dict[str, Any], reason: str, opened: list[Any]
) -> None:
    with pytest.raises(NotAPayload, match=reason):
        open_handles([handle(**changes)])
    assert opened == []


def test_a_plain_handle_twice(opened: list[Any]) -> None:
    with pytest.raises(NotAPayload, match="the tensor 'a' occurs twice"):
        open_handles([handle(), handle()])
