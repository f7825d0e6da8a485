"""Interprets a trainer's payload as full tensors, by module and checkpoint name."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeVar

import torch

from ....formats.tensor_files import is_shape
from ..checkpoint.names import Tensors
from .allowlist import DTYPES, FIELDS, Known, NotAPayload
from .rebuild import unpickle
from .shm_segment import Segments

Payload = TypeVar("Payload")


class InvalidTensor(NotAPayload):
    """The tensor ``name`` of ``module`` is invalid; ``reason`` says why."""

    def __init__(self, module: str, name: str, reason: str) -> None:
        super().__init__(f"the tensor {name!r} of {module} {reason}")
        self.module, self.name, self.reason = module, name, reason


def decode(stream: bytes, modules: Sequence[str], segments: Segments) -> Tensors:
    """Unpickle a stream and interpret it as the tensors of ``modules``."""
    return interpret(unpickle(stream, segments), modules)


def interpret(value: object, modules: Sequence[str]) -> Tensors:
    """The tensors of ``modules``. ``value`` must have exactly these modules, or be the tensors of the only one.

    A module's tensors are a list of pairs of name and tensor, or a bucket: ``flattened_tensor``, 1-d and contiguous,
    and ``metadata``, where each entry has ``name``, ``shape``, ``dtype`` (or its name), ``start_idx``, ``end_idx``
    and ``numel``. These three count bytes in a buffer of uint8, and elements in any other. Tensors are views of
    ``value``; only parts of a bucket with a misaligned or another floating dtype are copied.

    Raises :class:`NotAPayload`; :class:`InvalidTensor` if a tensor is at fault.
    """
    if isinstance(value, dict) and value.keys() != FIELDS[Known.BUCKET]:
        if value.keys() != set(modules):
            raise NotAPayload(f"the payload is for {_listed(value)}, and the request for {_listed(modules)}")
        return {module: _tensors(module, value[module]) for module in modules}
    if len(modules) != 1:
        raise NotAPayload(f"the payload names no modules, and the request {len(modules)}: {_listed(modules)}")
    return {modules[0]: _tensors(modules[0], value)}


def choose(
    payloads: Sequence[Payload], rank: int, world_size: int, gpu_uuids: Sequence[str] | None, own_uuid: str | None
) -> Payload:
    """The payload for ``rank`` of ``world_size``: by its GPU or its rank, or the only payload.

    ``gpu_uuids`` are the GPUs that the payloads come from, with or without NVML's prefix; ``own_uuid`` is this
    rank's GPU. Raises :class:`NotAPayload`.
    """
    if gpu_uuids is None:
        if len(payloads) not in {1, world_size}:
            raise NotAPayload(f"there are {len(payloads)} payloads for {world_size} ranks; send 1 or {world_size}")
        return payloads[rank if len(payloads) == world_size else 0]
    if len(gpu_uuids) != len(payloads):
        raise NotAPayload(f"there are {len(payloads)} payloads and {len(gpu_uuids)} GPU UUIDs")
    known = [_plain_uuid(uuid) for uuid in gpu_uuids]
    if own_uuid is None or _plain_uuid(own_uuid) not in known:
        raise NotAPayload(f"the payloads come from the GPUs {_listed(gpu_uuids)}, and rank {rank} has {own_uuid}")
    return payloads[known.index(_plain_uuid(own_uuid))]


def _tensors(module: str, part: object) -> dict[str, torch.Tensor]:
    match part:
        case list() | tuple():
            return _named(module, part)
        case {"flattened_tensor": buffer, "metadata": list(metadata), **rest} if not rest:
            return _flattened(module, buffer, metadata)
    raise NotAPayload(f"the tensors of {module} are neither a list of pairs nor a flattened bucket")


def _named(module: str, pairs: Sequence[Any]) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for index, pair in enumerate(pairs):
        match pair:
            case (str(name), torch.Tensor() as tensor):
                _add(found, module, name, tensor)
            case _:
                raise NotAPayload(f"entry {index} of {module} is not a pair of a name and a tensor")
    return found


def _flattened(module: str, buffer: object, metadata: list[Any]) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    if metadata and not (isinstance(buffer, torch.Tensor) and buffer.ndim == 1 and buffer.is_contiguous()):
        raise NotAPayload(f"the bucket of {module} has no 1-d contiguous tensor")
    for index, entry in enumerate(metadata):
        if not isinstance(entry, dict) or entry.keys() != FIELDS[Known.METADATA] or type(entry["name"]) is not str:
            raise NotAPayload(f"entry {index} of the metadata of {module} lacks the fields of a tensor")
        assert isinstance(buffer, torch.Tensor)
        try:
            tensor = _part(buffer, **{field: entry[field] for field in entry if field != "name"})
        except ValueError as error:
            raise InvalidTensor(module, entry["name"], str(error)) from error
        _add(found, module, entry["name"], tensor)
    return found


def _part(buffer: torch.Tensor, shape: Any, dtype: Any, start_idx: Any, end_idx: Any, numel: Any) -> torch.Tensor:
    """A tensor of a bucket. Raises ``ValueError`` if the numbers contradict one another or the buffer."""
    kind = DTYPES.get(f"torch.{dtype.removeprefix('torch.')}") if isinstance(dtype, str) else dtype
    if not isinstance(kind, torch.dtype):
        raise ValueError("has an invalid dtype")
    if not isinstance(shape, list | tuple) or not is_shape(shape):
        raise ValueError("has an invalid shape")
    if not all(type(index) is int and index >= 0 for index in (start_idx, end_idx, numel)):
        raise ValueError("has a start_idx, end_idx or numel that is not an integer from 0")
    in_bytes = buffer.dtype == torch.uint8
    needed = math.prod(shape) * (kind.itemsize if in_bytes else 1)
    unit = "bytes" if in_bytes else "elements"
    if not numel == needed == end_idx - start_idx:
        raise ValueError(f"needs {needed} {unit}, has numel {numel}, and goes from {start_idx} to {end_idx}")
    if end_idx > len(buffer):
        raise ValueError(f"goes to {end_idx} in a buffer of {len(buffer)} {unit}")
    part = buffer[start_idx:end_idx]
    if in_bytes:
        aligned = part.storage_offset() % kind.itemsize == 0
        part = (part if aligned else part.clone()).view(kind)
    elif kind != part.dtype:
        if not (kind.is_floating_point and part.dtype.is_floating_point):
            raise ValueError(f"is {kind} in a buffer of {part.dtype}")
        part = part.to(kind)
    return part.view(tuple(shape))


def _add(found: dict[str, torch.Tensor], module: str, name: str, tensor: torch.Tensor) -> None:
    if name in found:
        raise InvalidTensor(module, name, "occurs twice")
    found[name] = tensor


def _plain_uuid(uuid: str) -> str:
    return uuid.removeprefix("GPU-").removeprefix("MIG-").lower()


def _listed(names: Any) -> str:
    return ", ".join(map(str, names)) or "none"
