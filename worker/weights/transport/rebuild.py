"""Rebuilds the tensors of a parsed payload (:mod:`.pickled`): views of memory that another process of this user shares.

The sender is not trusted. Handles must have exactly torch's form, their memory must belong to this user
and have the size in the stream (:mod:`.shm_segment`), and no view may reach beyond it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import torch
from torch.multiprocessing import reductions

from ....formats.tensor_files import is_shape
from .allowlist import Known, NotAPayload
from .pickled import MAX_DEPTH, Instance, PickledCall, parse
from .shm_segment import BadSegment, Segments, check_segment

_MANAGER = re.compile(rb"(/[^/\0]+)*/torch-shm-dir-[A-Za-z0-9]{6}/manager\.sock")
_COUNTERS = 10_000  # of 8 bytes each, in CUDA's segment of reference counts: CUDA_IPC_REF_COUNTER_FILE_SIZE
_LIMIT = 1 << 48  # for every size, stride, offset and number of elements

_UNFINISHED = object()


def unpickle(stream: bytes, segments: Segments) -> Any:
    """Read a ``ForkingPickler`` stream: ``None``, bool, int, str, ``torch.dtype``, tensors, and lists, tuples and
    dicts of them. Sizes are tuples; pieces of metadata and buckets are dicts of their attributes.

    Tensors are views of the sender's memory, without gradient; Parameters become tensors. ``segments`` maps
    the memory, and its release counts as the stream's one reader: if several ranks read one stream, exactly one of
    them releases it, after the others have read it. On a GPU every reader counts.

    Raises :class:`NotAPayload`.
    """
    return _Rebuilder(segments).value(parse(stream))


class _Rebuilder:
    """Replaces each call by its value. A call that the payload contains several times is evaluated once."""

    def __init__(self, segments: Segments) -> None:
        self._segments = segments
        self._made: dict[int, Any] = {}

    def value(self, node: Any, depth: int = 0) -> Any:
        if node is None or isinstance(node, bool | int | str | torch.dtype):
            return node
        if isinstance(node, Known):
            raise NotAPayload(f"{node.value} stands in place of a value")
        if isinstance(node, bytes):
            raise NotAPayload("the payload has bytes in place of a value")
        if id(node) not in self._made:
            if depth == MAX_DEPTH:
                raise NotAPayload(f"the payload is nested more than {MAX_DEPTH} deep")
            self._made[id(node)] = _UNFINISHED
            self._made[id(node)] = self._make(node, depth + 1)
        if self._made[id(node)] is _UNFINISHED:
            raise NotAPayload("the payload contains itself")
        return self._made[id(node)]

    def _make(self, node: Any, depth: int) -> Any:
        match node:
            case list() | tuple():
                return type(node)(self.value(part, depth) for part in node)
            case dict():
                return {key: self.value(part, depth) for key, part in node.items()}
            case Instance():
                if node.state is None:
                    raise NotAPayload(f"{node.cls.value} at byte {node.at} has no attributes")
                return {name: self.value(part, depth) for name, part in node.state.items()}
            case PickledCall(Known.SIZE, (tuple(size),)):
                if is_shape(size):
                    return size
            case PickledCall(Known.REBUILD_TENSOR):
                return self._tensor(node)
            case PickledCall(Known.REBUILD_CUDA_TENSOR | Known.REBUILD_CUDA_TENSOR_BY_UUID):
                return cuda_tensor(node)
        raise _wrong(node, "does not give a value that a payload can hold")

    def _tensor(self, call: PickledCall) -> torch.Tensor:
        match call.args:
            case (
                Known.TENSOR | Known.PARAMETER,
                PickledCall(Known.REBUILD_TYPED_STORAGE, (PickledCall() as shared, torch.dtype() as dtype)),
                (offset, PickledCall(Known.SIZE, (tuple(size),)), tuple(stride), bool()),
            ):
                if id(shared) not in self._made:
                    self._made[id(shared)] = self._storage(shared)
                storage = self._made[id(shared)]
                _check_view(call, size, stride, offset, storage.nbytes() // dtype.itemsize)
                if 0 in size:
                    return torch.empty(size, dtype=dtype)
                return torch.empty(0, dtype=dtype).set_(storage, offset, size, _regular(size, stride))
        raise _wrong(call, "does not have the arguments that torch writes")

    def _storage(self, call: PickledCall) -> torch.UntypedStorage:
        match call:
            case PickledCall(Known.REBUILD_STORAGE_EMPTY, (Known.UNTYPED_STORAGE,)):
                return torch.empty(0).untyped_storage()
            case PickledCall(
                Known.REBUILD_STORAGE_FILENAME, (Known.UNTYPED_STORAGE, bytes(manager), bytes(handle), nbytes)
            ) if _MANAGER.fullmatch(manager):
                _numbers(call, nbytes)
                storage: torch.UntypedStorage = _tried(call, self._segments.map, handle, nbytes)
                return storage
        raise _wrong(call, "does not have the arguments that torch writes")


def cuda_tensor(call: PickledCall) -> torch.Tensor:
    """The GPU tensor that a call of ``rebuild_cuda_tensor`` describes. Raises :class:`NotAPayload`."""
    match call.args:
        case (
            Known.TENSOR | Known.PARAMETER,
            PickledCall(Known.SIZE, (tuple(size),)),
            tuple(stride),
            offset,
            Known.TYPED_STORAGE,
            torch.dtype() as dtype,
            device,
            handle,
            nbytes,
            start,
            bool(),
            *event,
        ):
            _numbers(call, nbytes, start)
            _check_view(call, size, stride, offset, nbytes // dtype.itemsize)
            shape, index = (size, _regular(size, stride), offset), _cuda_device(call, device)
            _check_handles(call, nbytes, handle, *event)
            memory = (torch.storage.TypedStorage, dtype, index, handle, nbytes, start, False, *event)
            tensor: torch.Tensor = _tried(call, reductions.rebuild_cuda_tensor, torch.Tensor, *shape, *memory)
            return tensor
    raise _wrong(call, "does not have the arguments that torch writes")


def _check_handles(call: PickledCall, *handles: Any) -> None:
    """Check the size and handle of CUDA memory, its counter's segment and its event (CUDACachingAllocator.cpp)."""
    match handles:
        case 0, None, None, 0, None, None:
            return
        case _, bytes(memory), bytes(counters), index, bytes(event), bool():
            if memory[1:2] == b"e":
                raise _wrong(call, "names an expandable segment; allocate without expandable_segments in the sender")
            if memory[1:2] == b"c" and len(memory) == 66 and len(event) == 64:
                _tried(call, check_segment, counters, 8 * _COUNTERS)
                if _numbers(call, index)[0] < _COUNTERS:
                    return
    raise _wrong(call, "does not have the handles that torch writes")


def _cuda_device(call: PickledCall, device: object) -> int:
    """The index of ``device``: an index, or for some senders a UUID as in ``torch.cuda.get_device_properties``."""
    if not torch.cuda.is_available():
        raise _wrong(call, "needs a GPU, and this process has none; send CPU tensors, or safetensors")
    count = torch.cuda.device_count()
    if type(device) is str and call.function is Known.REBUILD_CUDA_TENSOR_BY_UUID:
        uuids = [str(torch.cuda.get_device_properties(index).uuid) for index in range(count)]
        if device not in uuids:
            raise _wrong(call, f"needs the GPU {device}; this process has {', '.join(uuids)}")
        return uuids.index(device)
    (index,) = _numbers(call, device)
    if index >= count:
        raise _wrong(call, f"needs the GPU {index}; this process has {count}")
    return index


def _check_view(call: PickledCall, size: Any, stride: Any, offset: Any, available: int) -> None:
    """Check that a view lies within a storage of ``available`` elements and has at most as many elements."""
    if not is_shape(size) or len(size) != len(stride):
        raise _wrong(call, "has an invalid size or stride")
    _numbers(call, *stride, offset)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if 0 not in size and last >= available:
        raise _wrong(call, f"reaches element {last} of a storage of {available}")
    if math.prod(size) > available:
        raise _wrong(call, f"makes {math.prod(size)} elements of the {available} in its storage; send it contiguous")


def _regular(size: tuple[int, ...], stride: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of the same view, with a contiguous tensor's strides in dimensions of one element.

    Any stride is legal in these dimensions, but torch refuses to view the bytes of some.
    """
    regular: list[int] = []
    running = 1
    for n, step in zip(reversed(size), reversed(stride), strict=True):
        regular.append(running if n == 1 else step)
        running = regular[-1] * n
    return tuple(reversed(regular))


def _numbers(call: PickledCall, *numbers: Any) -> tuple[int, ...]:
    for number in numbers:
        if type(number) is not int or not 0 <= number <= _LIMIT:
            raise _wrong(call, f"has an argument that is not an integer from 0 to {_LIMIT}")
    return numbers


def _tried(call: PickledCall, do: Callable[..., Any], *args: Any) -> Any:
    try:
        return do(*args)
    except (BadSegment, RuntimeError) as error:
        raise _wrong(call, f"fails: {str(error).partition(chr(10))[0]}") from error


def _wrong(call: PickledCall, reason: str) -> NotAPayload:
    return NotAPayload(f"{call.origin} {reason}")
