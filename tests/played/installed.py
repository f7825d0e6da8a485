"""Installs the played devices in this process, once."""

from __future__ import annotations

import types
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.library import Library
from torch.utils import _device

from . import streams
from .device_guard import install_device_guard
from .generators import install_generators
from .graphs import PlayedGraph
from .kernels import register_kernels
from .lagging import keep_until_done
from .nccl import install_nccl
from .record import RECORD, TOTAL_BYTES, Record
from .tags import on_device, on_host

_registrations: list[Library] = []


def install(devices: int = 4) -> Record:
    """Play ``devices`` CUDA devices from now on, to the end of the process."""
    if not _registrations:
        install_device_guard()
        _registrations.extend(register_kernels())
        _install_cuda(devices)
        install_generators()
        _install_storages()
        _install_pinned_memory()
        install_nccl()
    return RECORD


def _install_cuda(devices: int) -> None:
    functions: dict[str, Any] = {
        "is_available": lambda: True,
        "device_count": lambda: devices,
        "init": lambda: None,
        "_lazy_init": lambda: None,
        "is_initialized": lambda: True,
        "current_device": streams.current_device,
        "set_device": streams.set_device,
        "device": streams.Device,
        "Stream": streams.Stream,
        "Event": streams.Event,
        "stream": streams.use_stream,
        "set_stream": streams.set_stream,
        "current_stream": streams.current_stream,
        "default_stream": streams.default_stream,
        "CUDAGraph": PlayedGraph,
        "graph_pool_handle": lambda: (0, 0),
        "synchronize": streams.synchronize,
        "get_device_properties": _properties,
        "get_device_name": lambda device=None: "played",
        "get_device_capability": lambda device=None: (9, 0),
        "is_bf16_supported": lambda including_emulation=True: True,
        "manual_seed": lambda seed: None,
        "manual_seed_all": lambda seed: None,
        "get_rng_state": lambda device="cuda": torch.get_rng_state(),  # kernels draw from the CPU's generator
        "set_rng_state": lambda state, device="cuda": torch.set_rng_state(state),
        **_memory_functions(),
    }
    for name, function in functions.items():
        assert name in vars(torch.cuda), name
        setattr(torch.cuda, name, function)


def _memory_functions() -> dict[str, Callable[..., Any]]:
    def memory(device: Any = None) -> Any:
        return RECORD.memory(streams.index_of(device))

    def reset_peak(device: Any = None) -> None:
        memory(device).peak = memory(device).live

    return {
        "empty_cache": lambda: RECORD.operators.update(["empty_cache"]),
        "ipc_collect": lambda: None,
        "mem_get_info": lambda device=None: (memory(device).limit - memory(device).live, memory(device).limit),
        "memory_allocated": lambda device=None: memory(device).live,
        "memory_reserved": lambda device=None: memory(device).live,
        "max_memory_allocated": lambda device=None: memory(device).peak,
        "max_memory_reserved": lambda device=None: memory(device).peak,
        "reset_peak_memory_stats": reset_peak,
    }


def _properties(device: Any = None) -> Any:
    index = streams.index_of(device)
    return types.SimpleNamespace(
        name="played",
        uuid=f"00000000-0000-0000-0000-{index:012d}",
        total_memory=TOTAL_BYTES,
        major=9,
        minor=0,
        multi_processor_count=132,
        warp_size=32,
    )


def _install_storages() -> None:
    """``deepcopy`` of a tensor copies its storage, which torch does with the storage's own device."""
    plain: Callable[[torch.UntypedStorage], torch.UntypedStorage] = torch.UntypedStorage.clone

    def clone(storage: torch.UntypedStorage) -> torch.UntypedStorage:
        if storage.device.type != "cuda":
            return plain(storage)
        source = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
        return on_device(on_host(source).clone(), storage.device.index).untyped_storage()

    torch.UntypedStorage.clone = clone  # type: ignore[method-assign]


def _install_pinned_memory() -> None:
    """Pinned memory is ordinary memory that says that it is pinned."""
    _device._device_constructors()  # torch lists its functions once; ``torch.device`` as a context needs its own
    pinned: weakref.WeakValueDictionary[int, torch.UntypedStorage] = weakref.WeakValueDictionary()
    plain = torch.empty

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        RECORD.operators["pinned"] += 1
        storage = tensor.untyped_storage()
        RECORD.pinned_bytes += 1 << max(0, storage.nbytes() - 1).bit_length()
        pinned[storage.data_ptr()] = storage
        return tensor

    def empty(*args: Any, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
        made: torch.Tensor = plain(*args, **kwargs)
        return pin(made) if pin_memory else made

    def is_pinned(tensor: torch.Tensor, *_: Any) -> bool:
        return tensor.device.type == "cpu" and tensor.untyped_storage().data_ptr() in pinned

    def pin_memory(tensor: torch.Tensor, *_: Any) -> torch.Tensor:
        assert tensor.device.type == "cpu", "only memory of the host can be pinned"
        return tensor if is_pinned(tensor) else pin(tensor.clone())

    torch.empty = empty
    torch._C._host_emptyCache = lambda: RECORD.operators.update(["empty_host_cache"])  # type: ignore[assignment]
    torch.Tensor.record_stream = keep_until_done  # type: ignore[assignment,method-assign]
    torch.Tensor.is_pinned = is_pinned  # type: ignore[method-assign]
    torch.Tensor.pin_memory = pin_memory  # type: ignore[method-assign]
