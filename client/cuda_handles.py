"""Handles of tensors on a GPU, by which another process of this machine reads them without a copy."""

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
    """What ``shared.cuda_ipc`` has for ``tensor``, for one reader; torch counts it until it has let go.

    The fields are what ``torch.UntypedStorage._share_cuda_`` returns (torch/csrc/StorageSharing.cpp), which
    ``torch.multiprocessing`` sends too.
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
