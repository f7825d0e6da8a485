"""Lets a CPU build of torch speak of CUDA devices, with torch's own guard for devices that do nothing.

Every operator that may allocate asks ``c10::impl::device_guard_impl_registry[CUDA]``, which is empty in a CPU build.
``c10::impl::ensureCUDADeviceGuardSet()`` registers a ``NoOpDeviceGuardImpl`` there, but only in place of a guard that
counts no devices, as in a CUDA build on a machine without a GPU. So an object whose virtual functions all return 0
stands there for a moment.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

_CUDA, _META = 1, 14
_DEVICE_TYPES = 21
_VIRTUAL_FUNCTIONS = 64


def install_device_guard() -> None:
    c10 = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    registry = (ctypes.c_void_p * _DEVICE_TYPES).in_dll(c10, "_ZN3c104impl26device_guard_impl_registryE")
    assert registry[0], "the registry has the guard of CPUs"
    assert registry[_META], "the registry has the guard of the meta device"
    if registry[_CUDA]:
        return
    returns_zero = ctypes.CFUNCTYPE(ctypes.c_longlong, ctypes.c_void_p)(lambda _: 0)
    address = ctypes.cast(returns_zero, ctypes.c_void_p).value
    table = (ctypes.c_void_p * _VIRTUAL_FUNCTIONS)(*[address] * _VIRTUAL_FUNCTIONS)
    counts_none = ctypes.c_void_p(ctypes.addressof(table))
    registry[_CUDA] = ctypes.addressof(counts_none)
    try:
        c10._ZN3c104impl24ensureCUDADeviceGuardSetEv()
    finally:
        if registry[_CUDA] == ctypes.addressof(counts_none):
            registry[_CUDA] = None
    assert registry[_CUDA], "torch registered its own guard"
