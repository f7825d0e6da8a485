"""The allowlist of names in a payload. The reader resolves each name to an entry here and never imports it."""

from __future__ import annotations

from enum import Enum

import torch

DTYPES = {
    str(dtype): dtype
    for dtype in (
        *(torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.uint64),
        *(torch.int8, torch.int16, torch.int32, torch.int64),
        *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128),
        *(torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz, torch.float8_e8m0fnu),
    )
}


class NotAPayload(Exception):
    """The bytes are not a payload of weights; the message says what is wrong, and where."""


class Known(Enum):
    """The globals that a stream may name, besides dtypes. They are markers: nothing is imported."""

    REBUILD_TENSOR = "torch.multiprocessing.reductions.rebuild_tensor"
    REBUILD_TYPED_STORAGE = "torch.multiprocessing.reductions.rebuild_typed_storage"
    REBUILD_STORAGE_FILENAME = "torch.multiprocessing.reductions.rebuild_storage_filename"
    REBUILD_STORAGE_EMPTY = "torch.multiprocessing.reductions.rebuild_storage_empty"
    REBUILD_CUDA_TENSOR = "torch.multiprocessing.reductions.rebuild_cuda_tensor"
    REBUILD_CUDA_TENSOR_BY_UUID = "sglang.srt.utils.patch_torch._rebuild_cuda_tensor_modified"
    TENSOR = "torch.Tensor"
    PARAMETER = "torch.nn.parameter.Parameter"
    SIZE = "torch.Size"
    TYPED_STORAGE = "torch.storage.TypedStorage"
    UNTYPED_STORAGE = "torch.storage.UntypedStorage"
    ORDERED_DICT = "collections.OrderedDict"
    ENCODE = "_codecs.encode"  # bytes, in protocol 2
    METADATA = "sglang.srt.weight_sync.tensor_bucket.FlattenedTensorMetadata"
    BUCKET = "sglang.srt.weight_sync.tensor_bucket.FlattenedTensorBucket"


KNOWN = {known.value: known for known in Known}

FIELDS = {
    Known.METADATA: frozenset(("name", "shape", "dtype", "start_idx", "end_idx", "numel")),
    Known.BUCKET: frozenset(("flattened_tensor", "metadata")),
}

REFUSED = {
    "torch.multiprocessing.reductions.rebuild_storage_fd": (
        "its tensors are shared by file descriptor, which an unrelated process cannot receive; call "
        'torch.multiprocessing.set_sharing_strategy("file_system") in the sender, or send safetensors '
        "(Content-Type: application/x-safetensors) or a file in shared memory"
    )
}
