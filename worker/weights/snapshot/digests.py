"""Digests of a model's weights: of whole tensors by checkpoint name, whatever part each rank holds."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import zip_longest
from typing import Self

import msgspec
import torch

from ....formats.digests import tensor_digest
from ....protocol.reports import TensorDigest
from ...parallel.ranks import Ranks
from ..checkpoint.layout import Layout
from ..progress import OnProgress


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """The tensor's bytes on the CPU, row by row; copied only where needed."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return memoryview(flat.numpy())  # type: ignore[arg-type]  # an array is a buffer


Details = dict[str, dict[str, TensorDigest]]
"""Digests of tensors by module and name."""


def module_digests(
    layouts: Mapping[str, Layout], ranks: Ranks, on_progress: OnProgress, *, detail: bool = False
) -> tuple[list[dict[str, str]], Details]:
    """Each rank's hex digest of each module: SHA-256 over names and bytes of its tensors, sorted by name.

    All ranks must call this together. Ranks differ where a tensor differs that each of them has whole. With ``detail``
    every tensor also has a digest of its own.
    """
    shares = _shares(layouts, _threads())
    with ThreadPoolExecutor(len(shares)) as pool, _Tensors() as tensors:
        hashers = [_Hasher(pool) for _ in shares]
        for turn in zip_longest(*(_tensors(layouts, modules) for modules in shares)):
            for hasher, item in zip(hashers, turn, strict=True):
                if item is not None:
                    module, name = item
                    whole = layouts[module].read(name)
                    host_bytes = raw_bytes(whole)  # once for both, as a GPU's tensor is copied to the host
                    hasher.add(module, name, host_bytes)
                    if detail:
                        tensors.add(module, name, whole, host_bytes)
                    on_progress()
        found = {module: hexadecimal for hasher in hashers for module, hexadecimal in hasher.done().items()}
        answers = ranks.all_gather_bytes(msgspec.msgpack.encode(dict(sorted(found.items()))))
        return [msgspec.msgpack.decode(one, type=dict[str, str]) for one in answers], tensors.done()


def tensor_digests(layout: Layout, names: Sequence[str], on_progress: OnProgress) -> dict[str, TensorDigest]:
    """The digests of the tensors ``names``, on every rank. All ranks must call this together."""
    with _Tensors() as tensors:
        for name in names:
            whole = layout.read(name)
            tensors.add("", name, whole, raw_bytes(whole))
            on_progress()
        return tensors.done().get("", {})


def _threads() -> int:
    """How many digests are computed at a time on each rank, the same number on all ranks."""
    return torch.get_num_threads()


class _Tensors:
    """Computes digests of tensors on all cores, with at most one tensor waiting for each core. A context."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(_threads())
        self._pending: deque[tuple[str, str, Future[TensorDigest]]] = deque()
        self._found: Details = {}

    def add(self, module: str, name: str, tensor: torch.Tensor, found: memoryview) -> None:
        dtype, shape = str(tensor.dtype), list(tensor.shape)
        self._pending.append((module, name, self._pool.submit(_digest, dtype, shape, found)))
        if len(self._pending) > _threads():  # bounds the whole tensors in memory
            self._collect()

    def done(self) -> Details:
        while self._pending:
            self._collect()
        return self._found

    def _collect(self) -> None:
        module, name, found = self._pending.popleft()
        self._found.setdefault(module, {})[name] = found.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()


def digest(tensor: torch.Tensor) -> TensorDigest:
    """The digest of one whole tensor."""
    return _digest(str(tensor.dtype), list(tensor.shape), raw_bytes(tensor))


def _digest(dtype: str, shape: list[int], found: memoryview) -> TensorDigest:
    return TensorDigest(tensor_digest(dtype, shape, found), dtype, shape)


class _Hasher:
    """Hashes module after module in a thread, at most one tensor behind."""

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self._pool = pool
        self._digests: dict[str, hashlib._Hash] = {}
        self._pending: Future[None] | None = None

    def add(self, module: str, name: str, found: memoryview) -> None:
        if self._pending is not None:
            self._pending.result()
        hasher = self._digests.setdefault(module, hashlib.sha256())

        def update() -> None:
            hasher.update(name.encode())
            hasher.update(found)

        self._pending = self._pool.submit(update)

    def done(self) -> dict[str, str]:
        if self._pending is not None:
            self._pending.result()
        return {module: hasher.hexdigest() for module, hasher in self._digests.items()}


def _shares(layouts: Mapping[str, Layout], number: int) -> list[list[str]]:
    """The modules in ``number`` groups of about as many bytes; the largest first, each to the smallest group."""
    shares: list[tuple[int, list[str]]] = [(0, []) for _ in range(max(1, min(number, len(layouts))))]
    for size, module in sorted(((_size(layout), name) for name, layout in layouts.items()), reverse=True):
        index = min(range(len(shares)), key=lambda index: shares[index][0])
        shares[index] = (shares[index][0] + size, [*shares[index][1], module])
    return [modules for _, modules in shares]


def _size(layout: Layout) -> int:
    return sum(torch.Size(entry.shape).numel() for entry in layout)


def _tensors(layouts: Mapping[str, Layout], modules: Sequence[str]) -> Iterator[tuple[str, str]]:
    return ((module, name) for module in modules for name in sorted(entry.name for entry in layouts[module]))
