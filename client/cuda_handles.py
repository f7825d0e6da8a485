"""CUDA IPC handles: another process of this machine reads a GPU's tensors without a copy."""

from __future__ import annotations

from base64 import b64encode
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def gpu_of(tensor: torch.Tensor) -> str:
    """The UUID of the GPU that ``tensor`` is on."""
    import torch

    return str(torch.cuda.get_device_properties(tensor.device).uuid)


def handle(name: str, tensor: torch.Tensor) -> dict[str, Any]:
    """The entry of ``tensor`` in ``shared.cuda_ipc``, for one reader; torch counts references until it is released.

    The fields are those of ``torch.UntypedStorage._share_cuda_`` (torch/csrc/StorageSharing.cpp), as
    ``torch.multiprocessing`` sends them.
    """
    storage = tensor.untyped_storage()
    _, memory, nbytes, start, counters, counter, event, event_sync = storage._share_cuda_()  # type: ignore[no-untyped-call]
    return {
        "name": name,
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "shape": list(tensor.shape),
        "stride": list(tensor.stride()),
        "offset": tensor.storage_offset(),
        "device": gpu_of(tensor),
        "memory": _text(memory),
        "storage_bytes": nbytes,
        "storage_offset": start,
        "counters": _text(counters),
        "counter": counter,
        "event": _text(event),
        "event_sync": event_sync,
    }


def _text(data: bytes) -> str:
    return b64encode(data).decode()
