"""Agreement between ranks: a payload for each rank must hold the same full tensors for all of them.

Each rank cuts its own part out of its own payload, so payloads that differ would leave a module that is torn between
two versions, whatever each rank by itself found right.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256

import msgspec
import torch

from ...protocol.reports import Invalid
from ...protocol.tensor_sources import CudaShared, Pickled, Source
from ..weights.progress import Sign
from ..weights.snapshot.digests import digest
from ..weights.transport.payload import Tensors

Given = dict[str, dict[str, str]]
"""One rank's tensors, by module and name: dtype and shape, and SHA-256 where values can differ between ranks."""

_SHOWN = 20


def is_for_each_rank(source: Source) -> bool:
    """Whether there is a payload for each rank, and not one for all."""
    match source:
        case Pickled(payloads=payloads):
            return len(payloads) > 1
        case CudaShared(tensors=lists):
            return len(lists) > 1
    return False


def differs_by_rank(source: Source) -> bool:
    """Whether ranks read different memory. Equal pickle streams name the same memory, however many there are."""
    if isinstance(source, Pickled):
        return len({bytes(payload) for payload in source.payloads}) > 1
    return is_for_each_rank(source)


def describe(tensors: Tensors, sign: Sign, *, hashed: bool) -> Given:
    """Every tensor as this rank was given it; ``hashed`` with its values."""
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        found: Given = {}
        for module, given in tensors.items():
            hashes = pool.map(lambda tensor: digest(tensor).sha256, given.values() if hashed else ())
            found[module] = {name: f"{tensor.dtype} {list(tensor.shape)}" for name, tensor in given.items()}
            for name, value in zip(given, hashes, strict=False):
                found[module][name] += f" {value}"
                sign()
        return found


def fingerprint(given: Given) -> str:
    """Equal for replicas that were given the same."""
    return sha256(msgspec.msgpack.encode(given, order="sorted")).hexdigest()


def differences(ranks: Sequence[Given]) -> list[Invalid]:
    """The first tensors in which a rank was given something other than rank 0, each with one such rank."""
    found: dict[str, Invalid] = {}
    for rank, given in enumerate(ranks):
        for module in {**ranks[0], **given}:
            here, there = ranks[0].get(module, {}), given.get(module, {})
            for name in {**here, **there}:
                if here.get(name) != there.get(name) and len(found) < _SHOWN:
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
