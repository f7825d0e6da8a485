"""Opens GPU tensors of another process by CUDA IPC handles that came as plain data.

The handles are those of ``torch.UntypedStorage._share_cuda_``, and pass the same checks as those in a pickled payload.
The sender counts one reader for each handle.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ....protocol.tensor_sources import CudaTensor
from .allowlist import DTYPES, Known, NotAPayload
from .pickled import PickledCall
from .rebuild import cuda_tensor


def open_handles(handles: Sequence[CudaTensor]) -> dict[str, torch.Tensor]:
    """Views of the sender's memory, by tensor name. Raises :class:`NotAPayload`."""
    found: dict[str, torch.Tensor] = {}
    for handle in handles:
        if handle.name in found:
            raise NotAPayload(f"the tensor {handle.name!r} occurs twice")
        found[handle.name] = cuda_tensor(_call(handle))
    return found


def _call(handle: CudaTensor) -> PickledCall:
    """The call that a pickled payload would make for the same tensor."""
    origin = f"the handle of {handle.name}"
    dtype = DTYPES.get(f"torch.{handle.dtype.removeprefix('torch.')}")
    if dtype is None:
        raise NotAPayload(f"{origin} has the unknown dtype {handle.dtype!r}")
    size = PickledCall(Known.SIZE, (tuple(handle.shape),), origin)
    view = (Known.TENSOR, size, tuple(handle.stride), handle.offset, Known.TYPED_STORAGE, dtype)
    memory = (handle.device, handle.memory, handle.storage_bytes, handle.storage_offset, False)
    event = (handle.counters, handle.counter, handle.event, handle.event_sync)
    return PickledCall(Known.REBUILD_CUDA_TENSOR_BY_UUID, (*view, *memory, *event), origin)
