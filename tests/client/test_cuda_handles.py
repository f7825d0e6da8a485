"""Handles of a GPU's memory, made from what torch shares of it. There is no GPU here: that stands in for one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from safelight.client import cuda_handles, transports
from safelight.client.host_tensors import HostTensor, from_torch
from safelight.client.transports import CudaIpc, Server, SharedMemory
from safelight.protocol.errors import InvalidRequest
from safelight.server.body_validation import validate
from safelight.server.weight_bodies import FromTensor

UUID = "3b0a6f4c-5a0e-4d3a-9f0a-0d7a54f0c9e1"
SHARED = (0, b"\2c" + bytes(range(64)), 96, 512, b"/torch_7_8_9", 3, bytes(64), True)


@pytest.fixture(autouse=True)
def _gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.UntypedStorage, "_share_cuda_", lambda storage: SHARED)
    monkeypatch.setattr(cuda_handles, "gpu_of", lambda tensor: UUID)
    monkeypatch.setattr(transports, "gpu_of", lambda tensor: UUID)


def on_gpu() -> HostTensor:
    return HostTensor("w", "BF16", (4, 6), torch.arange(24).bfloat16().view(4, 6))


def server(*gpus: str) -> Server:
    return Server(Path("/nowhere"), frozenset(gpus), ranks=4)


def test_the_server_reads_what_is_sent_with_a_handle_for_each_rank() -> None:
    reported: list[int] = []
    encoded = CudaIpc(server(UUID), None).encode([on_gpu()], {"target_module": "transformer"}, reported.append)
    body = validate(json.loads(json.dumps(encoded.call.body)), FromTensor)
    assert body.shared is not None
    assert body.shared.cuda_ipc is not None
    assert [len(handles) for handles in body.shared.cuda_ipc] == [1, 1, 1, 1]
    assert body.shared.cuda_ipc[3][0].model_dump() == {
        "name": "w", "dtype": "bfloat16", "shape": [4, 6], "stride": [6, 1], "offset": 0, "device": UUID,
        "memory": SHARED[1], "storage_bytes": 96, "storage_offset": 512, "counters": SHARED[4], "counter": 3,
        "event": SHARED[6], "event_sync": True,
    }  # fmt: skip
    assert reported == [48]


def test_what_the_server_does_not_see_goes_otherwise_or_is_refused(tmp_path: Path) -> None:
    tensors: list[tuple[Any, ...]] = [("another",), (UUID,)]
    for gpus, tensor in zip(tensors, (on_gpu(), from_torch("w", torch.zeros(3))), strict=True):
        with pytest.raises(InvalidRequest, match="have no handle"):
            CudaIpc(server(*gpus), None).encode([tensor], {}, lambda sent: None)
        encoded = CudaIpc(server(*gpus), SharedMemory(tmp_path)).encode([tensor], {}, lambda sent: None)
        assert encoded.call.body is not None
        assert Path(encoded.call.body["shared"]["path"]).stat().st_size > tensor.nbytes
        encoded.release()


def test_bytes_are_copied_from_a_gpu_when_they_are_asked_for_and_not_before(monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[Any] = []
    usual: Any = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: copied.append(1) or usual(tensor))
    tensor = on_gpu()
    CudaIpc(server(UUID), None).encode([tensor], {}, lambda sent: None)
    assert copied == []
    assert (tensor.nbytes, len(tensor.data), copied) == (48, 48, [1])
