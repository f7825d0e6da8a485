"""The requests about weights and memory, as :mod:`.calls` has those about pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from ..protocol.operations import Barrier
from .calls import Call

UPDATE = "/update_weights_from_tensor"

Tag = str
"""``weights``, ``caches``, or a module's name."""

WEIGHT_VERSION = Call("GET", "/get_weight_version")
RESUME = Call("POST", "/continue_generation", {})
FLUSH_CACHE = Call("POST", "/flush_cache", {})


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorCall(Call):
    """An update whose body is a safetensors file of ``size`` bytes, made of ``chunks`` while it is sent."""

    chunks: Callable[[], Iterable[bytes]]
    size: int

    @property
    def headers(self) -> dict[str, str]:
        return {"content-type": "application/x-safetensors", "content-length": str(self.size)}

    @property
    def content(self) -> Iterable[bytes]:
        return self.chunks()


def update_by_file(path: Path, fields: Mapping[str, Any]) -> Call:
    """The tensors of the file ``path``, which lies in the server's shared-memory directory."""
    return Call("POST", UPDATE, {"shared": {"path": str(path)}, **fields}, again=_may_be_repeated(fields))


def update_by_handles(handles: Sequence[Sequence[Mapping[str, Any]]], fields: Mapping[str, Any]) -> Call:
    """The tensors that ``handles`` are of, a list for each rank of each replica; each may be opened once."""
    return Call("POST", UPDATE, {"shared": {"cuda_ipc": handles}, **fields}, again=False)


def update_by_body(chunks: Callable[[], Iterable[bytes]], size: int, fields: Mapping[str, Any]) -> Call:
    """The tensors of a body of ``size`` bytes."""
    query = {name: str(value).lower() if isinstance(value, bool) else value for name, value in fields.items()}
    again = _may_be_repeated(fields)
    return TensorCall("POST", f"{UPDATE}?{urlencode(query)}", again=again, chunks=chunks, size=size)


def update_from_disk(
    path: str | Path,
    *,
    target_modules: Sequence[str] | None,
    version: str | None,
    mode: Barrier,
    require_complete: bool | None,
) -> Call:
    modules = None if target_modules is None else list(target_modules)
    fields = {"model_path": str(path), "target_modules": modules, "weight_version": version, "mode": mode}
    return Call("POST", "/update_weights_from_disk", {**fields, "require_complete": require_complete})


def begin(version: str | None, modules: Sequence[str], mode: Barrier, timeout_s: float) -> Call:
    fields = {"weight_version": version, "target_modules": list(modules), "mode": mode, "timeout_s": timeout_s}
    return Call("POST", "/begin_weights_update", fields)


def commit(update_id: str, require_complete: bool) -> Call:
    fields = {"update_id": update_id, "require_complete": require_complete}
    return Call("POST", "/commit_weights_update", fields, again=False)


def abort(update_id: str) -> Call:
    return Call("POST", "/abort_weights_update", {"update_id": update_id}, again=False)


def check(module: str, digests: Mapping[str, str]) -> Call:
    fields = {"target_module": module, "expected_named_tensors_sha256": dict(digests)}
    return Call("POST", "/update_weights_from_tensor_checker", fields)


def checksum(modules: Sequence[str] | None, *, detail: bool) -> Call:
    names = None if modules is None else list(modules)
    return Call("POST", "/get_weights_checksum", {"module_names": names, "detail": detail})


def sleep(tags: Sequence[Tag] | None = None) -> Call:
    return Call("POST", "/release_memory_occupation", {"tags": None if tags is None else list(tags)})


def wake(tags: Sequence[Tag] | None = None) -> Call:
    return Call("POST", "/resume_memory_occupation", {"tags": None if tags is None else list(tags)})


def pause(mode: Barrier = "wait") -> Call:
    return Call("POST", "/pause_generation", {"mode": mode})


def _may_be_repeated(fields: Mapping[str, Any]) -> bool:
    """A part of a begun update may not: where one failed, there may be nothing left that it is part of."""
    return "update_id" not in fields
