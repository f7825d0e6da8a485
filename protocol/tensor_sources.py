"""Sources of an update's tensors: files, streams, GPU handles, or a broadcast."""

from __future__ import annotations

from typing import Annotated

import msgspec

from .codec import Buffer

Int64 = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
"""Integers that a message can hold: JSON has no limit of its own."""


class Files(msgspec.Struct, tag=True, frozen=True):
    """safetensors files of each module; with ``delete`` they are gone when the update has ended.

    Those that stay on disk have ``stamps`` (``formats.tensor_files.stamp``), by path, and are read only as long as they
    are what they were; in an ``overlay`` a tensor of a later file stands for that of an earlier one.
    """

    modules: dict[str, list[str]]
    delete: bool = False
    stamps: dict[str, list[int]] = {}
    overlay: bool = False


class Pickled(msgspec.Struct, tag=True, frozen=True):
    """``ForkingPickler`` streams: one for all ranks, or one for each; with ``gpu_uuids`` each takes its own GPU's."""

    payloads: list[Buffer]
    targets: list[str]
    gpu_uuids: list[str] | None = None


class CudaTensor(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A tensor on the GPU whose UUID is ``device``, as torch shares it: a view of a storage, in elements, and handles.

    ``memory`` is the handle of the allocation in which the storage lies, ``storage_offset`` bytes from its begin;
    ``counters`` and ``counter`` locate the count of its readers, and ``event`` must be waited for.
    """

    name: str
    dtype: str
    shape: list[Int64]
    stride: list[Int64]
    offset: Int64
    device: str
    memory: bytes
    storage_bytes: Int64
    storage_offset: Int64
    counters: bytes
    counter: Int64
    event: bytes
    event_sync: bool


class CudaShared(msgspec.Struct, tag=True, frozen=True):
    """Handles of the tensors of ``module``: a list for each rank of each replica, as each may be opened once."""

    module: str
    tensors: list[list[CudaTensor]]


class Broadcast(msgspec.Struct, tag=True, frozen=True):
    """Tensors of ``module`` that the trainer sends over the process group ``group``, in this order."""

    group: str
    module: str
    names: list[str]
    dtypes: list[str]
    shapes: list[list[int]]


class Noise(msgspec.Struct, tag=True, frozen=True):
    """Random values, the same on all ranks, for the tensors of ``modules`` whose names contain none of ``kept``."""

    modules: list[str]
    seed: Int64
    kept: list[str] = []


Sent = Files | Pickled | CudaShared | Broadcast
Source = Sent | Noise
