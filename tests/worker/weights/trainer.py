"""A trainer, as a process of its own: it pickles payloads as trainers do, and keeps or forgets what it sent.

The modules that it names in its streams exist in that process alone. Commands and answers are lines of JSON.
"""

from __future__ import annotations

import base64
import io
import json
import subprocess
import sys
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from types import ModuleType
from typing import Any, Self

import psutil
import torch
import torch.multiprocessing
from safetensors.torch import load_file
from torch.multiprocessing import reductions

from safelight.tests.forked import Forked

BUCKETS, PATCH = "sglang.srt.weight_sync.tensor_bucket", "sglang.srt.utils.patch_torch"
UUID = "3b0a6f4c-5a0e-4d3a-9f0a-0d7a54f0c9e1"
DTYPES = (
    *(torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.uint64),
    *(torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128),
    *(torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz, torch.float8_e8m0fnu),
)


@dataclass
class FlattenedTensorMetadata:
    name: str
    shape: torch.Size
    dtype: torch.dtype
    start_idx: int
    end_idx: int
    numel: int


class FlattenedTensorBucket:
    def __init__(self, flattened_tensor: torch.Tensor, metadata: list[FlattenedTensorMetadata]) -> None:
        self.flattened_tensor, self.metadata = flattened_tensor, metadata


class OnCuda:
    """Is pickled like a tensor of float32 on a GPU, of 2×3, or of 0×3 without memory."""

    def __init__(self, device: int | str, rebuild: Callable[..., Any], rows: int = 2) -> None:
        self._rebuild = rebuild
        shape = (torch.Tensor, torch.Size((rows, 3)), (3, 1), 0, torch.storage.TypedStorage, torch.float32, device)
        memory = (b"\2c" + bytes(range(64)), 24, 512, False, b"/torch_7_8_9", 7, bytes(64), True)
        self._args = (*shape, *(memory if rows else (None, 0, 0, False, None, 0, None, None)))

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self._rebuild, self._args


def _rebuild_cuda_tensor_modified(*args: Any) -> None:
    raise AssertionError("a trainer receives nothing")


def pretend() -> None:
    """Register the modules whose names trainers send, with what is above."""
    for name, members in (
        (BUCKETS, (FlattenedTensorMetadata, FlattenedTensorBucket)),
        (PATCH, (_rebuild_cuda_tensor_modified,)),
    ):
        for end in range(len(name.split("."))):
            sys.modules.setdefault(".".join(name.split(".")[: end + 1]), ModuleType(name))
        sys.modules[name] = ModuleType(name)
        for member in members:
            member.__module__ = name
            setattr(sys.modules[name], member.__name__, member)


def of_dtype(dtype: torch.dtype) -> torch.Tensor:
    """[3, 4], every byte another; a bool's are zeros and ones."""
    if dtype == torch.bool:
        return torch.arange(12).view(3, 4) % 3 == 0
    return torch.arange(12 * dtype.itemsize, dtype=torch.uint8).view(dtype).view(3, 4)


def weights() -> list[tuple[str, torch.Tensor]]:
    shared = torch.arange(12.0)
    return [
        ("plain", torch.arange(6, dtype=torch.bfloat16).view(2, 3)),
        ("parameter", torch.nn.Parameter(torch.arange(4.0))),
        ("frozen", torch.nn.Parameter(torch.arange(4), requires_grad=False)),
        ("scalar", torch.tensor(2.5)),
        ("empty", torch.empty(0, 3)),
        ("one", shared[2:8].view(2, 3)),
        ("other", shared.view(3, 4).t()),
        ("strided", torch.arange(20).view(4, 5)[1::2, ::3]),
        ("nothing of it", shared[12:]),
    ]


def buffer(tensors: list[tuple[str, torch.Tensor]], in_bytes: bool) -> FlattenedTensorBucket:
    """Flattened as trainers do it: of one dtype as it is, of several as bytes."""
    found, flat, start = [], [], 0
    for name, tensor in tensors:
        part = tensor.detach().contiguous().flatten()
        part = part.view(torch.uint8) if in_bytes else part
        end = start + part.numel()
        found.append(FlattenedTensorMetadata(name, tensor.shape, tensor.dtype, start, end, part.numel()))
        flat.append(part)
        start = end
    return FlattenedTensorBucket(torch.cat(flat), found)


def floats() -> list[tuple[str, torch.Tensor]]:
    return [
        ("a", torch.arange(6.0).view(2, 3)),
        ("b", torch.tensor(7.0)),
        ("c", torch.empty(2, 0)),
        ("d", torch.ones(3)),
    ]


def mixed() -> list[tuple[str, torch.Tensor]]:
    """No part but the first is aligned to its dtype."""
    return [("a", torch.ones(1, dtype=torch.uint8)), ("b", torch.arange(6.0).view(2, 3)), *weights()[:3]]


def flattened(bucket: FlattenedTensorBucket, plain: bool = False) -> dict[str, Any]:
    """``plain``: metadata as dicts, with the dtype's name."""
    metadata = [{**vars(entry), "dtype": str(entry.dtype)} for entry in bucket.metadata]
    return {"flattened_tensor": bucket.flattened_tensor, "metadata": metadata if plain else bucket.metadata}


PAYLOADS: dict[str, Callable[[], Any]] = {
    "pairs": weights,
    "modules": lambda: {"transformer": weights(), "vae": floats()},
    "ordered": lambda: OrderedDict(transformer=weights()),
    "elements": lambda: {"transformer": flattened(buffer(floats(), False))},
    "bytes": lambda: {"transformer": flattened(buffer(mixed(), True))},
    "plain bytes": lambda: flattened(buffer(mixed(), True), plain=True),
    "plain elements": lambda: flattened(buffer(floats(), False), plain=True),
    "object": lambda: {"transformer": buffer(mixed(), True)},
    "no tensors": lambda: {"transformer": {"flattened_tensor": torch.empty(0), "metadata": []}},
    "no pairs": list,
    "dtypes": lambda: [(str(dtype), of_dtype(dtype)) for dtype in DTYPES],
    "twice": lambda: [("a", torch.ones(3)), ("a", torch.ones(3))],
    "one": lambda: [("a", torch.ones(3))],
    "meta": lambda: [("a", torch.ones(3, device="meta"))],
    "sparse": lambda: [("a", torch.eye(3).to_sparse())],
    "expanded": lambda: [("a", torch.ones(1).expand(3))],
    "float": lambda: [("a", torch.ones(3)), 1.5],
    "state dict": lambda: {"transformer": torch.nn.Linear(2, 2).state_dict()},
    "cuda": lambda: [("a", OnCuda(1, reductions.rebuild_cuda_tensor))],
    "cuda empty": lambda: [("a", OnCuda(1, reductions.rebuild_cuda_tensor, rows=0))],
    "cuda by uuid": lambda: [("a", OnCuda(UUID, _rebuild_cuda_tensor_modified))],
}


FORMS: dict[str, Callable[[list[tuple[str, torch.Tensor]]], Any]] = {
    "pairs": list,
    "modules": lambda tensors: {"transformer": tensors},
    "elements": lambda tensors: {"transformer": flattened(buffer(tensors, False))},
    "bytes": lambda tensors: {"transformer": flattened(buffer(tensors, True))},
    "plain bytes": lambda tensors: flattened(buffer(tensors, True), plain=True),
    "object": lambda tensors: {"transformer": buffer(tensors, True)},
}
"""How the tensors of a checkpoint are sent."""


class Trainer:
    """The process, seen from the test."""

    def __enter__(self) -> Self:
        self._process = Forked(
            "safelight.tests.worker.weights.trainer:main", stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    @property
    def pid(self) -> int:
        return self._process.pid

    def kill(self) -> None:
        with self._process:
            self._process.kill()

    def send(self, what: str, *, protocol: int = 4, strategy: str = "file_system", keep: bool = False) -> str:
        """A payload in base64; not kept, only the reader's reference holds its memory."""
        answer: str = self._ask(what=what, protocol=protocol, strategy=strategy, keep=keep)
        return answer

    def checkpoint(self, file: Path, form: str, *, by: float, keep: bool = False) -> str:
        """A payload of the tensors of a safetensors file, with ``by`` added to each."""
        command = {"what": form, "file": str(file), "by": by, "protocol": 4, "strategy": "file_system", "keep": keep}
        answer: str = self._ask(**command)
        return answer

    def stream(self, what: str, *, protocol: int = 4) -> bytes:
        """The payload's bytes."""
        return base64.b64decode(self.send(what, protocol=protocol, keep=True))

    def forget(self) -> None:
        self._ask(what=None)

    def segments(self) -> set[str]:
        """Its segments that exist in shared memory."""
        return {file.name for file in Path("/dev/shm").glob(f"torch_{self.pid}_*")}

    def quit(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        assert self._process.wait() == 0

    def kill_manager(self) -> None:
        """The manager of torch's shared memory, a child of each process that shares by file."""
        (manager,) = psutil.Process(self.pid).children()
        assert "torch_shm" in manager.name()
        manager.kill()
        while manager.is_running() and manager.status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.02)

    def _ask(self, **command: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


def _payload(what: str, file: str | None = None, by: float = 0.0, **_: Any) -> Any:
    if file is None:
        return PAYLOADS[what]()
    return FORMS[what]([(name, tensor + by) for name, tensor in load_file(file).items()])


def main() -> None:
    pretend()
    kept: list[Any] = []
    for line in sys.stdin:
        command = json.loads(line)
        if command["what"] is None:
            kept.clear()
            print("null", flush=True)
            continue
        torch.multiprocessing.set_sharing_strategy(command["strategy"])
        payload, stream = _payload(**command), io.BytesIO()
        ForkingPickler(stream, command["protocol"]).dump(payload)
        kept += [payload] if command["keep"] else []
        del payload
        print(json.dumps(base64.b64encode(stream.getvalue()).decode()), flush=True)
