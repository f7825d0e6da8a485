"""Agreement between ranks: payloads for each rank must hold the same full tensors.

Each rank cuts its own part out of its own payload, so payloads that differ would leave a module with parts of two
versions, although each rank by itself found nothing wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256

import msgspec
import torch

from ...protocol.reports import Invalid
from ...protocol.tensor_sources import CudaShared, Pickled, Source
from ..weights.checkpoint.names import Tensors
from ..weights.progress import OnProgress
from ..weights.snapshot.digests import digest

Manifest = dict[str, dict[str, str]]
"""The tensors that one rank received, by module and name: dtype, shape, and SHA-256 where values can differ."""

_MAX_LISTED = 20


def is_for_each_rank(source: Source) -> bool:
    """True if each rank has a payload of its own."""
    match source:
        case Pickled(payloads=payloads):
            return len(payloads) > 1
        case CudaShared(tensors=lists):
            return len(lists) > 1
    return False


def differs_by_rank(source: Source) -> bool:
    """True if ranks read different memory. Equal pickle streams name the same memory."""
    if isinstance(source, Pickled):
        return len({bytes(payload) for payload in source.payloads}) > 1
    return is_for_each_rank(source)


def describe(tensors: Tensors, on_progress: OnProgress, *, hashed: bool) -> Manifest:
    """Describe every tensor that this rank received, ``hashed`` with its values."""
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        found: Manifest = {}
        for module, given in tensors.items():
            hashes = pool.map(lambda tensor: digest(tensor).sha256, given.values() if hashed else ())
            found[module] = {name: f"{tensor.dtype} {list(tensor.shape)}" for name, tensor in given.items()}
            for name, value in zip(given, hashes, strict=False):
                found[module][name] += f" {value}"
                on_progress()
        return found


def fingerprint(manifest: Manifest) -> str:
    """Equal for replicas that received the same tensors."""
    return sha256(msgspec.msgpack.encode(manifest, order="sorted")).hexdigest()


def differences(ranks: Sequence[Manifest]) -> list[Invalid]:
    """The first tensors that a rank received otherwise than rank 0, each with one such rank."""
    found: dict[str, Invalid] = {}
    for rank, given in enumerate(ranks):
        for module in {**ranks[0], **given}:
            here, there = ranks[0].get(module, {}), given.get(module, {})
            for name in {**here, **there}:
                if here.get(name) != there.get(name) and len(found) < _MAX_LISTED:
                    reason = _difference(here.get(name), there.get(name), rank)
                    found.setdefault(f"{module}.{name}", Invalid(name, reason))
    return list(found.values())


def _difference(here: str | None, there: str | None, rank: int) -> str:
    if here is None or there is None:
        return f"only rank {rank if here is None else 0} was given it, not rank {0 if here is None else rank}"
    kinds = [one.rpartition("]")[0] + "]" for one in (here, there)]
    if kinds[0] != kinds[1]:
        return f"rank {rank} was given {kinds[1].removeprefix('torch.')}, rank 0 {kinds[0].removeprefix('torch.')}"
    return f"rank {rank} was given other values than rank 0"
