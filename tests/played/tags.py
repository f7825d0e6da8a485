"""The same memory as a tensor of the CPU and as a tensor of a played CUDA device, by editing a DLPack capsule."""

from __future__ import annotations

import ctypes
import weakref

import torch

from .record import RECORD

CPU_KEY = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
_CPU, _CUDA = 1, 2  # DLPack's device types


class _DLTensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p), ("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32), ("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16),
        ("shape", ctypes.c_void_p), ("strides", ctypes.c_void_p), ("byte_offset", ctypes.c_uint64),
    ]  # fmt: skip


_capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_capsule_pointer.restype, _capsule_pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]


def on_host(tensor: torch.Tensor) -> torch.Tensor:
    """The memory of a played CUDA tensor as a CPU tensor; any other tensor as it is."""
    return _retagged(tensor, _CPU, 0) if tensor.device.type == "cuda" else tensor


def on_device(tensor: torch.Tensor, index: int = 0) -> torch.Tensor:
    """The memory of a CPU tensor as a tensor of ``cuda:index``, counted there for as long as it lives."""
    made = _retagged(tensor, _CUDA, index)
    storage = made.untyped_storage()
    size = storage.nbytes()
    RECORD.allocated(size, index)
    weakref.finalize(storage, RECORD.freed, size, index).atexit = False
    return made


def _retagged(tensor: torch.Tensor, device_type: int, index: int) -> torch.Tensor:
    size, stride, dtype = tensor.size(), tensor.stride(), tensor.dtype
    as_bytes = dtype.is_floating_point and tensor.itemsize == 1  # DLPack does not know fp8
    capsule = torch._C._to_dlpack(tensor.view(torch.uint8) if as_bytes else tensor)
    header = _DLTensor.from_address(_capsule_pointer(capsule, b"dltensor"))
    header.device_type, header.device_id = device_type, index
    made: torch.Tensor = torch._C._from_dlpack(capsule)
    if as_bytes:
        made = torch.ops.aten.view.dtype.redispatch(CPU_KEY, made, dtype) if device_type == _CPU else made.view(dtype)
    if made.stride() != stride:  # DLPack writes 1 for dimensions of size 1
        made = torch.ops.aten.as_strided.default.redispatch(CPU_KEY, made, size, stride, made.storage_offset())
    return made
